"""A run that is read again and again: each receipt and each entry of the plan is read once.

``read_status`` reads every receipt on every call. A page that refreshes keeps the sums over committed partitions, and
adds those that are new. Receipts and targets are listed at every reading. If one of them is gone, or if the cache is
another one, all receipts are read again. What it keeps is also dropped when a driver starts, or when the run or the end
of its plan is replaced.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from dask_logits.errors import CacheError
from dask_logits.observe.history import History
from dask_logits.observe.status import Reading, reading_of
from dask_logits.records import Array
from dask_logits.run.drivers import Drivers
from dask_logits.run.folder import RunFolder
from dask_logits.run.plan import PlanEnd, Segment
from dask_logits.run.plan_log import PlanLog
from dask_logits.run.records import Receipt
from dask_logits.run.state import Listing, PartitionState, RunState, cache_state, read_consistently

# States of a partition. Where one square of a map stands for several partitions, the last of their states is drawn.
STATES = ("committed", "waiting", "running", "failed")
_COMMITTED, _WAITING, _RUNNING, _FAILED = range(len(STATES))


@dataclass(frozen=True, kw_only=True)
class Snapshot(Reading):
    """A run at one moment.

    Parameters
    ----------
    at
        Time of the reading, Unix time in seconds.
    states_P
        [P] uint8 index into ``STATES`` of each planned partition.
    """

    at: float
    states_P: Array

    def counts(self) -> dict[str, int]:
        """Return state → number of partitions."""
        found = Counter(self.states_P.tolist())
        return {name: found[i] for i, name in enumerate(STATES)}


class _Log(PlanLog):
    """A plan that notices whether its end is still the one that was read. A driver drops entries from the end."""

    def __init__(self, run: RunFolder) -> None:
        # Identity of the file of the last entry.
        self._last: tuple[int, int] | None = None
        super().__init__(run)

    def is_current(self) -> bool:
        return not self._entries or _identity(self.run.plan_path(len(self._entries) - 1)) == self._last

    def _entry(self, ordinal: int) -> Segment | PlanEnd | None:
        identity = _identity(self.run.plan_path(ordinal))
        entry = super()._entry(ordinal)
        if entry is not None:
            self._last = identity
        return entry


@dataclass(kw_only=True)
class _Kept:
    """Done partitions of an earlier reading, so that the next one looks at the others only.

    They remain done as long as their receipts and targets exist and the cache is the same.

    Attributes
    ----------
    cache
        State of the cache (:func:`~dask_logits.run.state.cache_state`).
    indices
        The partitions.
    attempts
        Folders of the targets that are not in the cache.
    history
        Their sums.
    """

    cache: list[int] | None = None
    indices: set[int] = field(default_factory=set)
    attempts: set[str] = field(default_factory=set)
    history: History = field(default_factory=History)

    def add(self, each: PartitionState, receipt: Receipt) -> None:
        self.history.add(each)
        self.indices.add(each.partition.index)
        if not each.is_cached:
            self.attempts.add(receipt.attempt)

    def holds(self, listing: Listing, cache: list[int]) -> bool:
        """Whether all of them are still done."""
        is_same = self.cache == cache and self.indices <= listing.receipts
        return is_same and (not self.attempts or self.attempts <= listing.attempts)


class LiveRun:
    """Reads a run folder repeatedly, for one thread at a time. Nothing is written.

    Parameters
    ----------
    path
        The run folder. It need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._run = RunFolder(path)
        self._stamp: object = None
        self._log: _Log | None = None
        self._kept = _Kept()
        self._lock = threading.Lock()

    def read(self) -> Snapshot:
        """Read what has changed.

        Raises
        ------
        RunConflictError
            If the folder contains no run.
        CacheError
            If its files cannot be read, or are those of a newer version.
        """
        with self._lock:
            return self._read()

    def _read(self) -> Snapshot:
        # A damaged record is reported once.
        drivers = Drivers.of(self._run, logging.WARNING if self._stamp is None else logging.DEBUG)
        stamp = (_identity(self._run.manifest_path), sorted(record.since or 0.0 for record in drivers.records))
        if self._stamp != stamp:
            self._stamp = stamp
            self._start_over()
        self._log = self._plan()

        def read() -> tuple[Reading, list[PartitionState]]:
            others: list[PartitionState] = []
            count = partial(self._count, cache_state(self._run), others)
            return reading_of(self._run, count, log=self._log, level=logging.DEBUG), others

        found, others = read_consistently(self._run, read)
        states_P = np.full(found.status.partitions, _WAITING, np.uint8)
        done = [*self._kept.indices, *(each.partition.index for each in others if each.is_done)]
        states_P[done] = _COMMITTED
        for indices, state in ((drivers.running, _RUNNING), (found.failures, _FAILED)):
            for index in indices:
                if index < len(states_P) and states_P[index] != _COMMITTED:
                    states_P[index] = state
        return Snapshot(
            status=found.status, history=found.history, failures=found.failures, at=time.time(), states_P=states_P
        )

    def _start_over(self) -> None:
        self._log, self._kept = None, _Kept()

    def _plan(self) -> _Log:
        """Read the plan on. If its end was replaced, which a driver does some time after its start, start over."""
        if self._log is not None:
            with contextlib.suppress(CacheError):
                if self._log.is_current():
                    self._log.read_on()
                    return self._log
            self._start_over()
        return _Log(self._run)

    def _count(self, cache: list[int], others: list[PartitionState], state: RunState) -> History:
        """Add up a run. Partitions without a valid receipt are put into `others`, to be looked at again."""
        listing = Listing(self._run)
        if not self._kept.holds(listing, cache):
            self._kept = _Kept(cache=cache)
        kept = self._kept
        for each in state.partitions(listing, wanted=lambda index: index not in kept.indices):
            if each.receipt is not None and state.cache_error is None:
                kept.add(each, each.receipt)
            else:
                others.append(each)
        history = copy.deepcopy(kept.history)
        for each in others:
            history.add(each)
        return history


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
