"""Who scored what and when, from the receipts of a run: speed over time, per worker.

A partition is taken to occupy its worker from the end of its wait for the teacher until its receipt: loading, scoring
and writing. Its tokens are spread evenly over loading and scoring, because the next partition is scored while this one
is written. Times are those of the workers' clocks.

Dimension letters: P partitions, W workers, E edges of time bins.
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from dask_logits.records import Array
from dask_logits.run.records import FailedAttempt, Receipt
from dask_logits.run.state import PartitionState

# Stages between the wait for the teacher and the receipt.
_BUSY_STAGES = ("load", "score", "write")
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
    """What the receipts of a run say, collected one at a time, some 40 bytes each.

    Attributes
    ----------
    workers
        The workers, in order of their first partition that was added.
    problems
        Partition → why its receipt is invalid, for the first 20.
    n_problems
        Number of invalid receipts.
    retried
        Committed partitions and their failed attempts, for the first 400 attempts.
    """

    workers: list[Worker] = field(default_factory=list)
    problems: dict[int, str] = field(default_factory=dict)
    n_problems: int = 0
    retried: list[tuple[int, FailedAttempt]] = field(default_factory=list)
    _numbers: dict[tuple[str, int], int] = field(default_factory=dict)
    _columns: dict[str, array[float]] = field(
        default_factory=lambda: {name: array("d") for name in ("index", "worker", "begin", "scored", "end", "tokens")}
    )

    def noted(self, states: Iterable[PartitionState]) -> Iterator[PartitionState]:
        """Yield partitions after adding each."""
        for state in states:
            self.add(state)
            yield state

    def copy(self) -> History:
        """Return a copy, to which partitions can be added without changing this history."""
        return copy.deepcopy(self)

    def add(self, state: PartitionState) -> None:
        """Add a partition."""
        if state.problem is not None:
            self.n_problems += 1
            if len(self.problems) < _SHOWN_PROBLEMS:
                self.problems[state.partition.index] = state.problem
        if state.receipt is not None:
            self._add(state.receipt)

    def _add(self, receipt: Receipt) -> None:
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
        if receipt.finished is None:
            return
        end = receipt.finished
        begin = end - sum(receipt.seconds.get(stage, 0.0) for stage in _BUSY_STAGES)
        scored = end - receipt.seconds.get("write", 0.0)
        values = (receipt.partition, number, begin, scored, end, receipt.statistics.tokens)
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)

    def column(self, name: str) -> Array:
        """Return ``index``, ``worker``, ``tokens``, or ``begin``, ``scored``, ``end`` in Unix time: [P] float64."""
        return np.frombuffer(self._columns[name], np.float64)

    def __len__(self) -> int:
        return len(self._columns["index"])


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
