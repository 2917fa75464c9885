"""Who scored what and when, from the receipts of a run: sums over them, and speed over time, per worker.

A partition is taken to occupy its worker from the end of its wait for the teacher until its receipt: loading, scoring
and writing. Its tokens are spread evenly over loading and scoring, because the next partition is scored while this one
is written. Times are those of the workers' clocks.

Dimension letters: P partitions, W workers, E edges of time bins.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dask_logits.errors import CacheError
from dask_logits.records import Array, Statistics
from dask_logits.run.records import FailedAttempt, Receipt
from dask_logits.run.state import PartitionState, RunState
from dask_logits.run.timings import add_seconds

# Stages between the wait for the teacher and the receipt.
_BUSY_STAGES = ("load", "score", "write")
# What is kept of each partition with a time.
_COLUMNS = ("index", "worker", "begin", "scored", "end", "tokens")
# A pause is longer than this, and than this share of the time in which a worker was busy.
_PAUSE_SECONDS = 60.0
_PAUSE_SHARE = 0.05
_SHOWN_PROBLEMS = 20
_SHOWN_ATTEMPTS = 400


@dataclass(kw_only=True)
class Worker:
    """A process that committed partitions, on a host, with its GPUs."""

    host: str
    process: int
    gpus: tuple[str, ...]
    partitions: int = 0
    tokens: int = 0
    score_seconds: float = 0.0
    splits: int = 0
    peak_rss_bytes: int = 0

    @property
    def name(self) -> str:
        """Name for display."""
        return f"{self.host}, process {self.process}"


@dataclass(kw_only=True)
class History:
    """Sums over the partitions of a run, and what its receipts say, collected one at a time, some 50 bytes each.

    Attributes
    ----------
    committed, rows
        Partitions that are done, and their dataset rows.
    lacking
        Partitions in the cache without a valid receipt. They are not in the sums over receipts.
    statistics, seconds, flops, splits, n_retried, failed_attempts
        Sums over valid receipts.
    damaged
        Errors of receipts that were skipped.
    problems
        Partition → why its receipt is invalid, for the first 20.
    n_problems
        Number of invalid receipts.
    workers
        The workers, in order of their first partition that was added.
    retried
        Committed partitions and their failed attempts, for the first 400 attempts.
    """

    committed: int = 0
    rows: int = 0
    lacking: int = 0
    statistics: Statistics = field(default_factory=Statistics)
    seconds: dict[str, float] = field(default_factory=dict)
    flops: float = 0.0
    splits: int = 0
    n_retried: int = 0
    failed_attempts: Counter[str] = field(default_factory=Counter)
    damaged: list[CacheError] = field(default_factory=list)
    problems: dict[int, str] = field(default_factory=dict)
    n_problems: int = 0
    workers: list[Worker] = field(default_factory=list)
    retried: list[tuple[int, FailedAttempt]] = field(default_factory=list)
    _numbers: dict[tuple[str, int], int] = field(default_factory=dict)
    # The columns of each partition, one partition after the other.
    _values: array[float] = field(default_factory=lambda: array("d"))

    @classmethod
    def of(cls, state: RunState) -> History:
        """Add up all partitions of a run."""
        history = cls()
        for each in state.partitions():
            history.add(each)
        return history

    def add(self, each: PartitionState) -> None:
        """Add a partition.

        Raises
        ------
        CacheError
            If its receipt cannot be read.
        """
        if each.error is not None:
            if each.is_unreadable:
                raise each.error
            self.damaged.append(each.error)
        if each.problem is not None:
            self.n_problems += 1
            if len(self.problems) < _SHOWN_PROBLEMS:
                self.problems[each.partition.index] = each.problem
        if each.is_done:
            self.committed += 1
            self.rows += each.partition.n_rows
        if each.receipt is None:
            self.lacking += each.is_cached
        else:
            self._add(each.receipt)

    def _add(self, receipt: Receipt) -> None:
        self.statistics += receipt.statistics
        self.seconds = add_seconds(self.seconds, receipt.seconds)
        self.flops += receipt.flops
        self.splits += len(receipt.splits)
        self.n_retried += bool(receipt.failed_attempts)
        self.failed_attempts.update(attempt.kind for attempt in receipt.failed_attempts)
        place = (receipt.host or "unknown host", receipt.process or 0)
        number = self._numbers.setdefault(place, len(self.workers))
        if number == len(self.workers):
            self.workers.append(Worker(host=place[0], process=place[1], gpus=receipt.gpus))
        worker = self.workers[number]
        worker.partitions += 1
        worker.tokens += receipt.statistics.tokens
        worker.score_seconds += receipt.seconds.get("score", 0.0)
        worker.splits += len(receipt.splits)
        worker.peak_rss_bytes = max(worker.peak_rss_bytes, receipt.peak_rss_bytes or 0)
        room = _SHOWN_ATTEMPTS - len(self.retried)
        self.retried += [(receipt.partition, attempt) for attempt in receipt.failed_attempts[:room]]
        if receipt.finished is not None:
            end = receipt.finished
            begin = end - sum(receipt.seconds.get(stage, 0.0) for stage in _BUSY_STAGES)
            scored = end - receipt.seconds.get("write", 0.0)
            self._values.extend((receipt.partition, number, begin, scored, end, receipt.statistics.tokens))

    def column(self, name: str) -> Array:
        """Return ``index``, ``worker``, ``tokens``, or ``begin``, ``scored``, ``end`` in Unix time: [P] float64."""
        return np.frombuffer(self._values, np.float64).reshape(-1, len(_COLUMNS))[:, _COLUMNS.index(name)]

    def __len__(self) -> int:
        return len(self._values) // len(_COLUMNS)


@dataclass(frozen=True, kw_only=True)
class Clock:
    """The time in which a run was at work: its pauses are left out.

    Parameters
    ----------
    begin, end
        First and last moment, Unix time in seconds.
    pauses
        (begin, end) of each pause, in order.
    """

    begin: float
    end: float
    pauses: tuple[tuple[float, float], ...] = ()

    @classmethod
    def of(cls, history: History) -> Clock | None:
        """Find the pauses of a run. None if no partition has a time.

        A pause is a time longer than a minute, and than 5 % of the remaining time, in which no worker was busy.
        """
        if not len(history):
            return None
        order = np.argsort(history.column("begin"), kind="stable")
        begins, ends = history.column("begin")[order], np.maximum.accumulate(history.column("end")[order])
        gaps = begins[1:] - ends[:-1]
        busy = ends[-1] - begins[0] - gaps[gaps > 0].sum()
        at = np.flatnonzero(gaps > max(_PAUSE_SECONDS, _PAUSE_SHARE * busy))
        pauses = tuple((float(ends[i]), float(begins[i + 1])) for i in at)
        return cls(begin=float(begins[0]), end=float(ends[-1]), pauses=pauses)

    @property
    def seconds(self) -> float:
        """Length without pauses, at least a millisecond."""
        return max(1e-3, self.end - self.begin - sum(end - begin for begin, end in self.pauses))

    def shown(self, times: Array | Sequence[float] | float) -> Array:
        """Return the seconds at work before each time.

        >>> Clock(begin=100.0, end=200.0, pauses=((110.0, 190.0),)).shown([100.0, 110.0, 150.0, 195.0]).tolist()
        [0.0, 10.0, 10.0, 15.0]
        """
        real = [self.begin, *(time for pause in self.pauses for time in pause), self.end]
        spans = np.diff(real)
        # Every second one is a pause.
        spans[1::2] = 0.0
        return np.asarray(np.interp(np.asarray(times, np.float64), real, np.concatenate([[0.0], np.cumsum(spans)])))

    def share(self, time: float) -> float:
        """Return the share of the time at work that lies before a time."""
        return float(self.shown(time)) / self.seconds


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Speed in bins of equal length.

    Parameters
    ----------
    tokens_per_second
        [B, W] of each worker.
    busy
        [B, W] share of the bin in which the worker was busy, at most 1.
    """

    tokens_per_second: Array
    busy: Array


def rates(history: History, clock: Clock, n_bins: int = 120) -> Rates:
    """Return the speed of each worker over time, in time proportional to partitions × bins."""
    begin, scored, end = (clock.shown(history.column(name)) for name in ("begin", "scored", "end"))
    scoring, busy = np.maximum(scored - begin, 1e-6), np.maximum(end - begin, 1e-6)
    worker, tokens = history.column("worker").astype(np.int64), history.column("tokens")
    edges = np.linspace(0.0, clock.seconds, n_bins + 1)
    before_EW = np.empty((2, n_bins + 1, len(history.workers)))
    for i, edge in enumerate(edges):
        for sums, long, weights in zip(before_EW, (scoring, busy), (tokens, busy), strict=True):
            done = np.clip((edge - begin) / long, 0.0, 1.0)
            sums[i] = np.bincount(worker, done * weights, len(history.workers))
    made, shares = np.diff(before_EW, axis=1) / np.diff(edges)[:, None]
    return Rates(tokens_per_second=made, busy=np.minimum(shares, 1.0))
