"""Partitions in flight: submitted to the workers of a cluster, and not ended.

Each is submitted separately as ``delayed``. A list of them is quadratic (10,000 take half a minute to reach the
scheduler, dask#11737), and held futures make Dask recompute finished work when a worker dies. Ends are read from a
queue with a timeout, because a bare ``as_completed`` waits forever when the workers are gone.
"""

from __future__ import annotations

import queue
import time
import uuid
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import dask
from distributed import Client, Future

from dask_logits.job.remote import run_on_worker
from dask_logits.job.scheduler import holders
from dask_logits.worker.task import PartitionTask


@dataclass
class Submitted:
    """A partition in flight, with the time of its last sign of life and its allowed workers (None: any)."""

    task: PartitionTask
    future: Future
    workers: frozenset[str] | None = None
    started: float = field(default_factory=time.monotonic)
    alive: float = field(default_factory=time.monotonic)


@dataclass
class Flight:
    """The partitions in flight of one job.

    Parameters
    ----------
    client
        A connected client.
    """

    client: Client
    _submitted: dict[str, Submitted] = field(default_factory=dict)
    _ended: queue.SimpleQueue[Future] = field(default_factory=queue.SimpleQueue)
    _token: str = field(default_factory=lambda: uuid.uuid4().hex[:8])

    def __len__(self) -> int:
        """Number of partitions in flight."""
        return len(self._submitted)

    def submit(self, task: PartitionTask, attempt: int, workers: frozenset[str] | None) -> None:
        """Submit a partition to some workers (None: to any).

        The scheduler does not queue tasks restricted to workers.
        """
        name = f"score-partition-{task.partition.name}-{attempt}-{self._token}"
        delayed = dask.delayed(run_on_worker, pure=False)(task, dask_key_name=name)
        future = self.client.compute(delayed, optimize_graph=False, workers=workers and sorted(workers))
        self._submitted[future.key] = Submitted(task, future, workers)
        future.add_done_callback(self._ended.put)

    def next_ended(self, seconds: float) -> Submitted | None:
        """Wait for a partition to end, and take it. Its future is the caller's to release. None: none did in time."""
        try:
            future = self._ended.get(timeout=seconds)
        except queue.Empty:
            return None
        ended = self._submitted.pop(future.key, None)
        if ended is None:
            # Given up as hung, but finished later.
            future.release()
        return ended

    def take_back(self, keys: Iterable[str]) -> list[PartitionTask]:
        """Have the scheduler forget some partitions. Return their tasks."""
        tasks = []
        for key in keys:
            taken = self._submitted.pop(key)
            taken.future.release()
            tasks.append(taken.task)
        return tasks

    def take_orphans(self, present: Collection[str]) -> list[Submitted]:
        """Take back partitions whose allowed workers are all gone, because the scheduler would keep them waiting."""
        orphans = {
            key: each
            for key, each in self._submitted.items()
            if each.workers is not None and each.workers.isdisjoint(present)
        }
        self.take_back(orphans)
        return list(orphans.values())

    def assigned(self) -> dict[str, str]:
        """Return key → worker for partitions that the scheduler has assigned to one."""
        return {key: worker for key, worker in holders(self.client).items() if key in self._submitted}

    def load(self) -> Counter[str]:
        """Return worker → number of its partitions."""
        if not self._submitted:
            return Counter()
        # A partition may be on its way to its only worker.
        sole = {
            key: min(each.workers) for key, each in self._submitted.items() if each.workers and len(each.workers) == 1
        }
        return Counter((self.assigned() | sole).values())

    def note_life(self, index: int | None = None) -> None:
        """Record a sign of life of a partition (None: of all)."""
        now = time.monotonic()
        for each in self._submitted.values():
            if index is None or each.task.partition.index == index:
                each.alive = now

    def hung(self, seconds: float) -> dict[str, list[str]]:
        """Return worker → keys of its partitions, for workers of which no partition gave a sign of life."""
        now = time.monotonic()
        if all(now - each.alive <= seconds for each in self._submitted.values()):
            return {}
        assigned = self.assigned()
        hung: dict[str, list[str]] = {}
        alive = set()
        for key, each in self._submitted.items():
            if key not in assigned:
                # It is queued at the scheduler.
                each.alive = now
            elif now - each.alive > seconds:
                hung.setdefault(assigned[key], []).append(key)
            else:
                # A partition may wait for another one of its worker, which is scored or whose teacher is loaded.
                alive.add(assigned[key])
        return {worker: keys for worker, keys in hung.items() if worker not in alive}

    def tasks(self, keys: Iterable[str] | None = None) -> list[PartitionTask]:
        """Return the tasks of those keys that are in flight (None: of all)."""
        chosen = self._submitted.keys() if keys is None else keys
        return [self._submitted[key].task for key in chosen if key in self._submitted]

    def release(self) -> None:
        """Release all futures, so that the scheduler forgets them."""
        for each in self._submitted.values():
            each.future.release()


def names(tasks: Iterable[PartitionTask]) -> str:
    """Return the names of partitions, for a message."""
    return ", ".join(sorted(task.partition.name for task in tasks))
