"""Active drivers of a run, from the status records and locks in its folder, or from announcements at a scheduler.

A record alone is not sufficient, because a killed driver leaves one that says "running". Its lock shows that it ended.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dask_logits.errors import CacheError
from dask_logits.files.lock import is_abandoned
from dask_logits.run.folder import WORKING_STATES, RunFolder
from dask_logits.run.records import DriverStatus

logger = logging.getLogger(__name__)

# A driver that has not updated its record for this long is not counted as running.
_ALIVE_SECONDS = 120.0

State = Literal[
    "starting", "calibrating", "running", "consolidating", "stopped", "failed", "scored", "complete", "damaged"
]


@dataclass(frozen=True, kw_only=True)
class Drivers:
    """The status records of a run's drivers, and which of these drivers are active."""

    records: tuple[DriverStatus, ...] = ()
    alive: tuple[DriverStatus, ...] = ()

    @classmethod
    def of(cls, run: RunFolder, level: int = logging.WARNING) -> Drivers:
        """Read the records of a run. Damaged ones are logged at `level`."""
        found = run.driver_statuses(level)
        alive = [
            record
            for name, record in found.items()
            if record.state in WORKING_STATES
            and time.time() - record.at < _ALIVE_SECONDS
            and not is_abandoned(run.path / name.replace("status", ".driver").replace(".json", ".lock"))
        ]
        return cls(records=tuple(found.values()), alive=tuple(alive))

    def state(self) -> State:
        """Return the most advanced state of the active drivers."""
        return WORKING_STATES[max(WORKING_STATES.index(record.state) for record in self.alive)]

    @property
    def since(self) -> float | None:
        """Start time of the first active driver."""
        return min((record.since for record in self.alive if record.since), default=None)

    @property
    def step(self) -> str | None:
        """Step of a calibration."""
        return next((record.step for record in self.alive if record.step), None)

    @property
    def reason(self) -> str | None:
        """Reason for which an inactive driver failed."""
        return next((record.reason for record in self.records if record.state == "failed"), None)

    @property
    def tokens_per_second(self) -> float:
        """Total rate of all active drivers, in wall-clock time."""
        return float(sum(record.tokens_per_second for record in self.alive))

    @property
    def seconds_left(self) -> float | None:
        """Time until the last active driver finishes. None if unknown."""
        left = [record.seconds_left for record in self.alive if record.seconds_left is not None]
        return max(left) if left and len(left) == len(self.alive) else None

    @property
    def running(self) -> frozenset[int]:
        """Partitions that active drivers have given to workers."""
        return frozenset(index for record in self.alive for index in record.running)

    @property
    def left_out(self) -> dict[str, str]:
        """Worker → reason why it gets no work."""
        return {worker: why for record in self.records for worker, why in (record.left_out or {}).items()}

    @property
    def dashboard(self) -> str | None:
        """Dashboard address of an active driver."""
        return next((record.dashboard for record in self.alive if record.dashboard), None)


def announcements(events: Sequence[tuple[float, object]]) -> dict[str, DriverStatus]:
    """Return run folder → last announcement of its driver, the latest first. Malformed announcements are skipped.

    Parameters
    ----------
    events
        Time and content of what was announced at a scheduler, the oldest first.
    """
    found: dict[str, DriverStatus] = {}
    for _, event in reversed(events):
        run = event.get("run") if isinstance(event, dict) else None
        if not isinstance(event, dict) or not isinstance(run, str) or run in found:
            continue
        try:
            found[run] = DriverStatus.parse(Path(run), event)
        except CacheError as error:
            logger.debug("ignored: %s", error)
    return found
