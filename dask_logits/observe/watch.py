"""Follow a run from its files until it ends: for a terminal, and for a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dask_logits.files.atomic import expanded
from dask_logits.observe.live import LiveRun
from dask_logits.observe.status import Status
from dask_logits.run.folder import WORKING_STATES
from dask_logits.run.timings import duration, plural

# A reading may take at most this share of the time, however many receipts there are.
_READING_SHARE = 0.2
# State in which a run ended → exit status of a command that waited for it.
EXIT_STATUS: Final = {"complete": 0, "scored": 0, "failed": 1, "damaged": 1, "stopped": 130}


def follow(path: Path | str, seconds: float = 2.0) -> Iterator[Status]:
    """Yield the state of a run repeatedly. The last one is that of a run at which no driver is at work.

    Parameters
    ----------
    path
        The run folder.
    seconds
        Time between two readings, longer if a reading takes more than a fifth of it.

    Raises
    ------
    RunConflictError, CacheError
        As by :func:`dask_logits.read_status`.
    """
    live = LiveRun(expanded(path))
    while True:
        began = time.monotonic()
        status = live.read().status
        yield status
        if status.state not in WORKING_STATES:
            return
        time.sleep(max(seconds, (time.monotonic() - began) / _READING_SHARE))


def progress_line(status: Status) -> str:
    """Format a state as one line of a log."""
    step = f": {status.step}" if status.step else ""
    parts = [f"{status.state}{step}"]
    if status.partitions:
        parts += [
            f"{status.committed:,} of {plural(status.partitions, 'partition')}",
            plural(status.statistics.tokens, "token"),
        ]
    if status.running_tokens_per_second:
        parts.append(f"{status.running_tokens_per_second:,.0f} tokens/s")
    if status.seconds_left is not None:
        parts.append(f"{duration(status.seconds_left)} left")
    if status.failed:
        parts.append(f"{len(status.failed):,} failed")
    return " · ".join(parts)
