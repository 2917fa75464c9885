"""The failure ledger: a small file per quarantined partition, deleted when the partition is committed.

The files inform the user and ``dask-logits retry``. ``RunState`` alone determines which partitions remain.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import Literal

from pydantic import Field

from dask_logits.files.atomic import read_json, replace_json
from dask_logits.run.folder import RunFolder
from dask_logits.run.records import FailureEntry

# Failures that a message names.
_NAMED = 20
# In order: a persistent I/O error, an unusable row or teacher, workers that died, a worker that stopped responding,
# rows that could not be read when the plan was made, arrays that changed on disk after the commit, a device or
# worker that cannot score.
Kind = Literal["transient", "data", "worker-death", "hang", "unreadable", "damaged", "device"]


class Failure(FailureEntry):
    """A partition that failed permanently, before it is written to the ledger."""

    index: int
    kind: Kind
    rows: tuple[int, ...] = ()
    # The task that was tried. None if it did not start.
    task: object = Field(default=None, exclude=True)


def note_failure(run: RunFolder, failure: Failure) -> None:
    """Write a failure to the ledger, replacing an older entry of the same partition."""
    path = run.failure_path(failure.index)
    path.parent.mkdir(exist_ok=True)
    replace_json(path, {**failure.model_dump(mode="json"), "at": time.time()}, durable=True)


def listed(run: RunFolder, reasons: Mapping[int, str]) -> str:
    """Format the first few failures for an error message, one on a line, and count the others."""
    lines = [f"  partition {index:06d}: {reason}" for index, reason in sorted(reasons.items())[:_NAMED]]
    more = len(reasons) - len(lines)
    return "\n".join([*lines, *([f"  and {more:,} more, which `dask-logits status {run.path}` lists"] if more else [])])


def read_failures(run: RunFolder, done_of: Callable[[Collection[int]], Collection[int]]) -> dict[int, FailureEntry]:
    """Return partition → entry for all partitions in the ledger that are not done.

    Parameters
    ----------
    run
        The run folder.
    done_of
        Returns those of some partitions that are done, such as ``RunState.done_of``.
    """
    indices = run.failure_indices()
    done = done_of(indices) if indices else ()
    values = {index: read_json(run.failure_path(index)) for index in sorted(indices) if index not in done}
    return {i: FailureEntry.parse(run.failure_path(i), each) for i, each in values.items() if each is not None}
