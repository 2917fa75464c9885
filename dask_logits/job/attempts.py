"""The attempts at partitions: which are made again, when, and which partitions are given up. No input or output.

The rules are those of ``retry_policy.py``. This module remembers what they need to know.
"""

from __future__ import annotations

import time
import traceback
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from types import TracebackType

from dask_logits.job.retry_policy import Event, Past, decide
from dask_logits.run.failures import Failure, Kind
from dask_logits.worker.task import PartitionTask

# Number of traceback frames kept as evidence.
_FRAMES = 6


@dataclass
class Attempts:
    """Partitions that are tried again, and what is known of all that are not committed.

    Parameters
    ----------
    retries
        The setting ``distillation.job.retries``.
    have_company
        Whether a worker may have more than one partition.
    """

    retries: int
    have_company: bool = False
    _past: defaultdict[int, Past] = field(default_factory=lambda: defaultdict(Past))
    _later: list[tuple[float, PartitionTask]] = field(default_factory=list)
    # Partitions whose workers died or hung while running another one. Each is retried once, last and alone.
    _suspects: list[PartitionTask] = field(default_factory=list)

    def past(self, task: PartitionTask) -> Past:
        """Return what has happened to a partition."""
        return self._past[task.partition.index]

    def begin(self, task: PartitionTask) -> int:
        """Record an attempt. Return its number, from 1."""
        past = self.past(task)
        past.attempts += 1
        past.is_alone |= task.trial is not None
        return past.attempts

    def note_success(self, task: PartitionTask) -> None:
        """Record that a partition was completed."""
        self._past.pop(task.partition.index, None)

    def are_left(self) -> bool:
        """Whether any partition is to be tried again."""
        return bool(self._later or self._suspects)

    def soonest(self) -> float | None:
        """Return the time of the next retry, suspects excluded. None: there is none."""
        return min((due for due, _ in self._later), default=None)

    def take_due(self, now: float) -> PartitionTask | None:
        """Take the first partition whose time has come."""
        due = next((entry for entry in self._later if entry[0] <= now), None)
        if due is None:
            return None
        self._later.remove(due)
        return due[1]

    def take_suspect(self) -> PartitionTask | None:
        """Take a partition that is tried alone, when no other one is left to retry."""
        return self._suspects.pop(0) if self._suspects and not self._later else None

    def again(self, task: PartitionTask, seconds: float = 0.0) -> None:
        """Try a partition again after a number of seconds."""
        self._later.append((time.monotonic() + seconds, task))

    def retry(
        self,
        task: PartitionTask,
        event: Event,
        reason: str,
        worker: str | None = None,
        *,
        tried: Collection[str] = (),
        usable: Collection[str] = (),
        on_good_devices: int = 0,
    ) -> float | None:
        """Try a partition again after an attempt that did not end well, unless it has failed permanently.

        Parameters
        ----------
        task
            The partition.
        event, reason, worker
            What happened, in words, and the name of the worker.
        tried, usable, on_good_devices
            As in :func:`~dask_logits.job.retry_policy.decide`.

        Returns
        -------
        float or None
            Seconds to wait before. None: it has failed permanently.
        """
        past = self.past(task)
        past.losses += event == "lost"
        # One attempt at some rows tells enough, and a second one if its worker was lost.
        is_trial = task.trial is not None
        retry = decide(
            event,
            0 if is_trial else self.retries,
            past,
            tried=tried,
            usable=() if is_trial and event == "data" else usable,
            had_company=self.have_company,
            on_good_devices=on_good_devices,
        )
        if retry is None:
            return None
        following = task.after(event, reason, worker)
        if retry.is_alone:
            past.is_alone = True
            self._suspects.append(following)
        else:
            self.again(following, retry.seconds)
        return retry.seconds

    def forget_losses(self) -> None:
        """Count no earlier loss, because the connection to the scheduler was the cause."""
        for past in self._past.values():
            past.losses = 0

    def failed(
        self,
        task: PartitionTask,
        error: BaseException,
        trace: TracebackType | None,
        kind: Kind,
        workers: Collection[str],
    ) -> Failure:
        """Return the record of a partition whose last attempt ended with an error, as :meth:`ended` does."""
        row = getattr(error, "row", None)
        evidence = "".join([*traceback.format_tb(trace)[-_FRAMES:], *traceback.format_exception_only(error)])
        failure = self.ended(task, kind, said(error), workers, evidence)
        return failure if row is None else failure.model_copy(update={"rows": (int(row),)})

    def ended(
        self, task: PartitionTask, kind: Kind, reason: str, workers: Collection[str] = (), evidence: str = ""
    ) -> Failure:
        """Return the record of a partition that has failed permanently.

        Parameters
        ----------
        task
            The partition.
        kind, reason, evidence
            How its last attempt ended.
        workers
            Names of the workers on which it failed, with repetitions.
        """
        return Failure(
            index=task.partition.index,
            kind=kind,
            reason=reason,
            attempts=self.past(task).attempts,
            evidence=evidence,
            workers=tuple(dict.fromkeys(workers)),
            task=task,
        )


def said(error: BaseException) -> str:
    """Return what an error says.

    >>> said(ValueError("too long")), said(MemoryError())
    ('too long', 'MemoryError()')
    """
    return str(error) or repr(error)
