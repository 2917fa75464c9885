"""Delayed partitions in a bounded window, completed one by one.

A partition is in flight for each thread of a worker, at most three, and each is submitted separately: while one is
scored, the others are read or written. A list of ``delayed`` is quadratic (10,000 take half a minute to reach the
scheduler, dask#11737), and held futures make Dask recompute finished work when a worker dies. Completions are read from
a queue with a timeout, because a bare ``as_completed`` waits forever when the workers are gone.
"""

from __future__ import annotations

import logging
import queue
import time
import uuid
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import dask
from distributed import Client, Future, KilledWorker

from dask_logits.config.groups import JobConfig
from dask_logits.errors import CapacityError, ClusterError, is_poisoned
from dask_logits.files.atomic import no_room, only_readable
from dask_logits.job.executor import Committed, Event, Failed, Progress, failure_of, no_room_for, stalled, take_due
from dask_logits.job.newcomers import Newcomers
from dask_logits.job.remote import run_on_worker
from dask_logits.job.retry_policy import classify, decide
from dask_logits.job.roster import Roster
from dask_logits.job.scheduler import (
    CALL_SECONDS,
    SchedulerLostError,
    erred_on,
    exception_of,
    holders,
    present_workers,
    restart_worker,
    result_of,
    scheduler_lost,
)
from dask_logits.run.failures import Failure, Kind
from dask_logits.run.records import Receipt
from dask_logits.run.timings import plural
from dask_logits.worker.task import PartitionTask

logger = logging.getLogger(__name__)

# A worker scores one partition, because there is one teacher, and reads or writes the others meanwhile.
_MOST_PARTITIONS_EACH = 3
_STREAM_POLL_SECONDS = 0.05
# Time for which a partition waits that found no place on the workers where it has not failed.
_PLACE_SECONDS = 0.5
# Number of workers that left during one partition after which lifetimes are probably too short.
_MANY_DEPARTURES = 3


@dataclass
class _Running:
    """A submitted partition, with the time of its last sign of life and its allowed workers (None: any)."""

    task: PartitionTask
    future: Future
    workers: frozenset[str] | None = None
    started: float = field(default_factory=time.monotonic)
    alive: float = field(default_factory=time.monotonic)


@dataclass
class Window:
    """Partitions in flight.

    Parameters
    ----------
    client
        A connected client.
    tasks
        Partitions to compute. None: none is ready yet.
    job
        Retries and timeouts.
    roster
        Workers that get no work. Workers that fail partitions which others complete are added.
    newcomers
        Compares workers that join later. None: none are expected.
    """

    client: Client
    tasks: Iterator[PartitionTask | None]
    job: JobConfig
    roster: Roster = field(default_factory=Roster)
    newcomers: Newcomers | None = None
    last_progress: float = field(default_factory=time.monotonic)
    _events: list[Event] = field(default_factory=list)
    _exhausted: bool = False
    _starved: bool = False
    _running: dict[str, _Running] = field(default_factory=dict)
    _attempts: dict[int, int] = field(default_factory=dict)
    # Number of times a partition's workers disappeared, or the scheduler forgot the client.
    _losses: dict[int, int] = field(default_factory=dict)
    _present: dict[str, Any] = field(default_factory=dict)
    # Workers that left on purpose, and how many of them left during a partition.
    _departed: set[str] = field(default_factory=set)
    _departures: Counter[int] = field(default_factory=Counter)
    _later: list[tuple[float, PartitionTask]] = field(default_factory=list)
    # Partitions whose workers died or hung while running another one. Each is retried once, last and alone.
    _suspects: list[PartitionTask] = field(default_factory=list)
    _alone: set[int] = field(default_factory=set)
    _shared: bool = False
    # Workers that were restarted because of their device. They come back with another address.
    _restarted: set[str] = field(default_factory=set)
    # Workers restarted since the last progress.
    _hung_in_a_row: int = 0
    _done: queue.SimpleQueue[Future] = field(default_factory=queue.SimpleQueue)
    _token: str = field(default_factory=lambda: uuid.uuid4().hex[:8])

    def fill(self) -> bool:
        """Submit tasks while there is capacity. Return whether anything is left to wait for."""
        now = time.monotonic()
        self._starved = False
        before = self._present
        self._look()
        if self.newcomers is not None:
            self.newcomers.look(self._present, now)
        # A worker that left may be missing shortly before its departure is reported.
        self._take_back_orphans(before.keys() | self._present.keys())
        room, places = self._room(now), self._places()
        while len(self._running) < room:
            task = take_due(self._later, now) or self._draw()
            if task is None or not self._submit(task, places):
                break
        waits = self._suspects and self._exhausted and not self._running and not self._later
        if waits and room:
            self._submit(self._suspects.pop(0))
        return bool(self._running or self._later or self._suspects or not self._exhausted)

    def _look(self) -> None:
        """Look which workers are present."""
        self._present = present_workers(self.client)
        self.roster.note_nannies(self._present)

    def events(self) -> list[Event]:
        """Return what has happened since the last call."""
        events, self._events = self._events, []
        return events

    def wait(self, seconds: float) -> bool:
        """Wait for a completion. Return whether there was one in time."""
        try:
            # A worker waiting for a stream gets its rows soon after they arrive.
            future = self._done.get(timeout=_STREAM_POLL_SECONDS if self._starved else seconds)
        except queue.Empty:
            return False
        running = self._running.pop(future.key, None)
        if running is None:
            # Given up as hung, but finished later.
            future.release()
            return False
        self.last_progress = time.monotonic()
        task = running.task
        try:
            if future.status == "lost":
                # Its worker died before it reported the result. If it committed, the next attempt finds the receipt.
                self._later.append((self.last_progress, task.after("lost", "its worker died")))
            elif future.status == "cancelled":
                self._note_loss(task)
            elif future.status == "finished":
                self._finished(task, result_of(self.client, future, self.job.stall_seconds))
            else:
                self._failed(running, exception_of(future), future)
        except SchedulerLostError:
            # If it committed, the next attempt finds the receipt.
            self._later.append((self.last_progress, task))
            raise
        finally:
            # Immediately: released work is not recomputed when its worker dies.
            future.release()
        return True

    def _finished(self, task: PartitionTask, outcome: tuple[Receipt, str]) -> None:
        index = task.partition.index
        self._hung_in_a_row = 0
        self._attempts.pop(index)
        self._losses.pop(index, None)
        self._departures.pop(index, None)
        receipt, worker = outcome
        self.roster.note_success(worker, index, time.monotonic())
        self._events.append(Committed(receipt))

    def note_reconnection(self) -> None:
        """Record that the scheduler answers again. Signs of life could not arrive in the meantime."""
        self.last_progress = now = time.monotonic()
        self._losses.clear()
        for running in self._running.values():
            running.alive = now

    def note_departure(self, worker: str, keys: Collection[str]) -> None:
        """Record that a worker left on purpose. The scheduler assigns its partitions to another one, without blame."""
        self._departed.add(worker)
        tasks = [self._running[key].task for key in keys if key in self._running]
        if not tasks:
            return
        self._departures.update(task.partition.index for task in tasks)
        most = max(self._departures[task.partition.index] for task in tasks)
        names = ", ".join(sorted(task.partition.name for task in tasks))
        name = self.roster.name(worker)
        if most < _MANY_DEPARTURES:
            logger.info("worker %s left on purpose; another one scores partition %s", name, names)
        else:
            logger.warning(
                "worker %s left on purpose, as %d others did during partition %s; start workers with a longer "
                "--lifetime: loading the teacher and scoring a partition must fit into it",
                name,
                most - 1,
                names,
            )

    def _take_back_orphans(self, present: Collection[str]) -> None:
        """Take back partitions whose allowed workers are all gone, because the scheduler would keep them waiting."""
        for key, running in list(self._running.items()):
            if running.workers is not None and running.workers.isdisjoint(present):
                del self._running[key]
                running.future.release()
                if running.workers <= self._departed:
                    self._later.append((time.monotonic(), running.task))
                else:
                    self._note_loss(running.task)

    def _note_loss(self, task: PartitionTask) -> None:
        """Resubmit a partition after its worker was lost or the scheduler forgot it, a limited number of times."""
        index = task.partition.index
        self._losses[index] = losses = self._losses.get(index, 0) + 1
        if decide("lost", self.job.retries, losses=losses) is not None:
            again = task.after("lost", "its worker died or its submission was cancelled")
            self._later.append((time.monotonic(), again))
            return
        if (
            decide("worker-death", self.job.retries, had_company=self._shared, was_alone=index in self._alone)
            is not None
        ):
            self._alone.add(index)
            self._suspects.append(task.after("lost", "its worker died, maybe with another partition on it"))
            return
        self._lose(task, "worker-death", f"its worker died or its submission was cancelled {losses} times")

    def note_tokens(self, index: int, tokens: int) -> None:
        """Record that a partition is being scored."""
        # Tokens of a running partition come before its receipt.
        self._events.insert(0, Progress(index, tokens))
        self.last_progress = time.monotonic()
        for running in self._running.values():
            if running.task.partition.index == index:
                running.alive = self.last_progress

    def check_stall(self) -> None:
        """Raise ClusterError if the scheduler is lost, or there is no progress and no worker is to blame."""
        if self.client.status != "running":
            raise scheduler_lost()
        now = time.monotonic()
        if self._later and not self._running and min(due for due, _ in self._later) > now:
            # No progress is expected before the next retry. A due retry that finds no worker is a stall.
            self.last_progress = now
        idle = now - self.last_progress
        if idle > self.job.stall_seconds and (not self._running or not self._held()):
            raise self._stalled(idle)

    def check_hung(self) -> None:
        """Restart a worker whose partition gives no sign of life. Its partitions are retried alone."""
        now = time.monotonic()
        if all(now - running.alive <= self.job.stall_seconds for running in self._running.values()):
            return
        held = self._held()
        for key, running in self._running.items():
            if key not in held:
                # It is queued at the scheduler.
                running.alive = now
        silent = {key for key, running in self._running.items() if now - running.alive > self.job.stall_seconds}
        # A partition may wait for another one of its worker, which is scored or whose teacher is loaded.
        workers = {held[key] for key in silent} - {held[key] for key in self._running.keys() - silent if key in held}
        silent = {key for key in silent if held[key] in workers}
        again = {held[key] for key in silent if self._running[key].task.partition.index in self._alone}
        self._hung_in_a_row += len(workers - again)
        if self._hung_in_a_row > 1 and now - self.last_progress > self.job.stall_seconds:
            # Several workers hang in the same way, so the cause is their shared input, output or computation.
            raise self._stalled(now - self.last_progress)
        for worker in workers:
            self._give_up([key for key in self._running if held.get(key) == worker], worker)
            self.last_progress = now

    def _give_up(self, keys: list[str], worker: str) -> None:
        """Take partitions from a hung worker, and restart it."""
        seconds = self.job.stall_seconds
        tasks = []
        for key in keys:
            running = self._running.pop(key)
            running.future.release()
            tasks.append(running.task)
        names = ", ".join(task.partition.name for task in tasks)
        logger.warning("no sign of life from %s for %.0f s; restarting %s", names, seconds, worker)
        for task in tasks:
            index = task.partition.index
            if decide("hang", self.job.retries, was_alone=index in self._alone) is None:
                reason = f"no sign of life for {seconds:g} s (distillation.job.stall_seconds), on its own, too"
                self._lose(task, "hang", reason, (self.roster.name(worker),), f"worker {worker}")
            else:
                self._alone.add(index)
                reason = f"no sign of life for {seconds:g} s, from it or another partition of its worker"
                self._suspects.append(task.after("hang", reason, self.roster.name(worker)))
        # Last, because it may find the scheduler lost.
        restart_worker(self.client, worker)

    def _stalled(self, idle: float) -> ClusterError:
        flying = ", ".join(sorted(running.task.partition.name for running in self._running.values()))
        left_out = f"\nThese workers get no work:\n{self.roster.listed()}" if self.roster.left_out else ""
        where = f"{plural(len(present_workers(self.client)), 'worker')} and partitions {flying or 'none'} in flight"
        return stalled(self.job.stall_seconds, idle, where, left_out)

    def _held(self) -> dict[str, str]:
        """Return key → worker for partitions assigned to one."""
        return {key: worker for key, worker in holders(self.client).items() if key in self._running}

    def release(self) -> None:
        """Release unfinished futures, so that the scheduler forgets them."""
        if self.newcomers is not None:
            self.newcomers.cancel()
        for running in self._running.values():
            running.future.release()

    def _draw(self) -> PartitionTask | None:
        """Return the next partition, or None if there is none or the stream has not reached it."""
        if self._exhausted:
            return None
        try:
            task = next(self.tasks)
        except StopIteration:
            self._exhausted = True
            return None
        self._starved = task is None
        return task

    def _submit(self, task: PartitionTask, places: dict[str, int] | None = None) -> bool:
        """Submit a partition, and take its place. Return False if there is none for it, so that it waits."""
        index = task.partition.index
        chosen = self.roster.choose(self._present, index, time.monotonic())
        if places is not None and chosen:
            worker = max(sorted(chosen), key=lambda each: places[each])
            if places[worker] < 1:
                self._later.append((time.monotonic() + _PLACE_SECONDS, task))
                return False
            places[worker] -= 1
            chosen = {worker}
        self._attempts[index] = attempt = self._attempts.get(index, 0) + 1
        name = f"score-partition-{task.partition.name}-{attempt}-{self._token}"
        delayed = dask.delayed(run_on_worker, pure=False)(task, dask_key_name=name)
        # Restricted only if necessary, because the scheduler does not queue tasks restricted to workers.
        workers = None if chosen == self._present.keys() else frozenset(chosen)
        future = self.client.compute(delayed, optimize_graph=False, workers=workers and sorted(workers))
        self._running[future.key] = _Running(task, future, workers)
        future.add_done_callback(self._done.put)
        return True

    def _failed(self, running: _Running, error: BaseException, future: Future) -> None:
        task, index = running.task, running.task.partition.index
        if isinstance(error, KilledWorker):
            self._died(task, error)
            return
        kind = classify(error)
        worker = erred_on(self.client, future)
        if worker is None:
            # The scheduler has forgotten the worker.
            self._note_loss(task)
            return
        if worker not in self._present:
            # It has just come, and got a partition that waited for a worker.
            self._look()
        if self._is_left_out(task, worker, error):
            return
        if kind == "device":
            self._device_failed(task, worker, error, future)
            return
        before = set(self.roster.left_out)
        retired = self.roster.note_failure(worker, index, started=running.started, now=time.monotonic())
        if retired is not None and worker not in before:
            logger.error("worker %s gets no more work: %s; see its log", self.roster.name(worker), retired)
        tried = self.roster.tried(index)
        seconds = decide(kind, self.job.retries, tried=tried, usable=self.roster.usable(self._present))
        if seconds is not None:
            logger.warning(
                "partition %s failed on %s: %s; again%s",
                task.partition.name,
                self.roster.name(worker),
                str(error) or repr(error),
                f" in {seconds:.0f} s" if seconds else " on another worker",
            )
            following = task.after(kind, str(error) or repr(error), self.roster.name(worker))
            self._later.append((time.monotonic() + seconds, following))
            return
        self.roster.note_bad(index)
        self._give_up_partition(
            failure_of(
                task,
                error,
                future.traceback(CALL_SECONDS),
                kind=kind,
                attempts=self._attempts[index],
                workers=tuple(dict.fromkeys(map(self.roster.name, tried))),
            )
        )

    def _device_failed(self, task: PartitionTask, worker: str, error: BaseException, future: Future) -> None:
        """Restart or retire a worker whose device failed. Its partition is retried, without blame."""
        index, name, said = task.partition.index, self.roster.name(worker), str(error) or repr(error)
        if worker in self._restarted or worker in self.roster.left_out:
            # It failed together with another partition, for the same reason.
            self._later.append((time.monotonic(), task.after("device", said, name)))
            return
        on_good_devices, retired = self.roster.note_device_failure(worker, index)
        if retired is None and is_poisoned(error):
            # First, because `wait` takes the partition back if the scheduler is lost.
            self._restart(worker)
        seconds = decide("device", self.job.retries, on_good_devices=on_good_devices)
        if seconds is not None:
            logger.warning("partition %s: the device of %s failed: %s; again", task.partition.name, name, said)
            self._later.append((time.monotonic() + seconds, task.after("device", said, name)))
        else:
            tried = tuple(dict.fromkeys(map(self.roster.name, self.roster.tried(index))))
            self.roster.note_bad(index)
            trace, attempts = future.traceback(CALL_SECONDS), self._attempts[index]
            self._give_up_partition(failure_of(task, error, trace, kind="device", attempts=attempts, workers=tried))
        if retired is not None:
            self._leave_out({worker: f"{retired}, the last time with: {said}"}, ClusterError)

    def _restart(self, worker: str) -> None:
        """Restart a worker, and take its other partitions back without blame."""
        held = self._held()
        for key in [key for key in self._running if held.get(key) == worker]:
            running = self._running.pop(key)
            running.future.release()
            self._later.append((time.monotonic(), running.task))
        restart_worker(self.client, worker)
        self._restarted.add(worker)

    def _leave_out(self, reasons: dict[str, str], refused: type[ClusterError | CapacityError]) -> None:
        """Give workers no more work. Raise if none is left."""
        self.roster.leave_out(reasons)
        for worker, reason in reasons.items():
            logger.error("worker %s gets no more work: %s", self.roster.name(worker), reason)
        if not self.roster.usable(self._present) and not self._comes_back():
            raise refused(f"distillation.cluster: expected a worker that can score, got none:\n{self.roster.listed()}")

    def _comes_back(self) -> bool:
        """Whether a worker that was restarted may return and get work."""
        retired = {self.roster.nannies.get(worker) for worker in self.roster.left_out}
        return bool({self.roster.nannies.get(worker) for worker in self._restarted} - retired - {None})

    def _is_left_out(self, task: PartitionTask, worker: str, error: BaseException) -> bool:
        """Exclude a worker that cannot score for this run. Its partition is retried elsewhere."""
        full = no_room(error)
        if full is None and not isinstance(error, ClusterError):
            return False
        where = self.roster.name(worker)
        alike = {worker}
        if full is not None:
            if not only_readable(error):
                # No further partition could be written either.
                raise no_room_for(task, full, f"worker {where}")
            alike = {other for other in self._present if self.roster.host(other) == self.roster.host(worker)} | {worker}
        said = str(error) if full is None else f"it cannot write to the run folder ({full}); mount it with write access"
        self._leave_out(dict.fromkeys(alike, said), CapacityError if full is not None else ClusterError)
        self._later.append((time.monotonic(), task.after("device", said, where)))
        return True

    def _died(self, task: PartitionTask, error: KilledWorker) -> None:
        index, name = task.partition.index, self.roster.name(error.last_worker.address)
        was_alone = index in self._alone
        if decide("worker-death", self.job.retries, had_company=self._shared, was_alone=was_alone) is not None:
            logger.warning(
                "partition %s: its worker died, with another partition on it; again on its own", task.partition.name
            )
            self._alone.add(index)
            self._suspects.append(task.after("worker-death", "its worker died, with another partition on it", name))
            return
        evidence = f"last worker {error.last_worker.address}; its log, or the kernel's, says what ended it"
        self._lose(task, "worker-death", f"its worker died {error.allowed_failures + 1} times", (name,), evidence)

    def _lose(
        self, task: PartitionTask, kind: Kind, reason: str, workers: tuple[str, ...] = (), evidence: str = ""
    ) -> None:
        """Give up a partition whose last attempt ended without an error of its own."""
        index, attempts = task.partition.index, self._attempts[task.partition.index]
        failed = Failure(
            index=index, kind=kind, reason=reason, attempts=attempts, evidence=evidence, workers=workers, task=task
        )
        self._give_up_partition(failed)

    def _give_up_partition(self, failure: Failure) -> None:
        logger.error("partition %06d failed (%s): %s", failure.index, failure.kind, failure.reason)
        self._events.append(Failed(failure))

    def _threads(self) -> dict[str, int]:
        """Return how many partitions each worker can have at one time."""
        return {address: min(_MOST_PARTITIONS_EACH, int(each["nthreads"])) for address, each in self._present.items()}

    def _room(self, now: float) -> int:
        """Return how many partitions may be in flight, counting the workers that may get one."""
        threads = self._threads()
        self._shared = self._shared or max(threads.values(), default=1) > 1
        if self._present and not self.roster.usable(self._present):
            return 0
        chosen = self.roster.choose(self._present, None, now)
        # Without workers, one partition waits at the scheduler, where an adaptive cluster sees it.
        return max(1, sum(self.roster.most(address, threads[address]) for address in chosen))

    def _places(self) -> dict[str, int] | None:
        """Return how many more partitions each worker may get. None: as many as it has threads, which Dask sees to."""
        threads = self._threads()
        most = {address: self.roster.most(address, threads[address]) for address in threads}
        if all(most[address] == threads[address] for address in self.roster.usable(threads)):
            return None
        held = self._held() if self._running else {}
        # A partition may be on its way to its only worker.
        sole = {
            key: min(each.workers) for key, each in self._running.items() if each.workers and len(each.workers) == 1
        }
        load = Counter((held | sole).values())
        return {address: most[address] - load[address] for address in most}
