"""Partitions completed one by one in the workers of a cluster, in a bounded window.

A partition is in flight for each thread of a worker, at most three: while one is scored, the others are read or
written.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from distributed import Client, KilledWorker

from dask_logits.config.groups import JobConfig
from dask_logits.errors import CapacityError, ClusterError, is_poisoned
from dask_logits.files.atomic import no_room, only_readable
from dask_logits.job.attempts import Attempts, said
from dask_logits.job.executor import Committed, Event, Failed, Progress, no_room_for, stalled
from dask_logits.job.flight import Flight, Submitted, names
from dask_logits.job.newcomers import Newcomers
from dask_logits.job.retry_policy import classify
from dask_logits.job.roster import Roster
from dask_logits.job.scheduler import (
    CALL_SECONDS,
    SchedulerLostError,
    erred_on,
    exception_of,
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
class Window:
    """Give partitions to workers, and decide what follows when one ends.

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
    flight: Flight = field(init=False)
    attempts: Attempts = field(init=False)
    _events: list[Event] = field(default_factory=list)
    _exhausted: bool = False
    _starved: bool = False
    _present: dict[str, Any] = field(default_factory=dict)
    # Workers that left on purpose.
    _departed: set[str] = field(default_factory=set)
    # Workers that were restarted because of their device, with the time. Only one with a fixed port keeps its address.
    _restarted: dict[str, float] = field(default_factory=dict)
    # Workers restarted since the last progress.
    _hung_in_a_row: int = 0

    def __post_init__(self) -> None:
        """Begin with nothing in flight."""
        self.flight = Flight(self.client)
        self.attempts = Attempts(self.job.retries)

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
        room, places = self._capacity(now)
        while len(self.flight) < room:
            task = self.attempts.take_due(now) or self._draw()
            if task is None or not self._submit(task, places):
                break
        if self._exhausted and not self.flight and room and (suspect := self.attempts.take_suspect()) is not None:
            self._submit(suspect)
        return bool(self.flight or self.attempts.are_left() or not self._exhausted)

    def events(self) -> list[Event]:
        """Return what has happened since the last call."""
        events, self._events = self._events, []
        return events

    def wait(self, seconds: float) -> bool:
        """Wait for a completion. Return whether there was one in time."""
        # A worker waiting for a stream gets its rows soon after they arrive.
        ended = self.flight.next_ended(_STREAM_POLL_SECONDS if self._starved else seconds)
        if ended is None:
            return False
        self.last_progress = time.monotonic()
        task, future = ended.task, ended.future
        try:
            if future.status == "lost":
                # Its worker died before it reported the result. If it committed, the next attempt finds the receipt.
                self.attempts.again(task.after("lost", "its worker died"))
            elif future.status == "cancelled":
                self._lost(task)
            elif future.status == "finished":
                self._finished(task, result_of(self.client, future, self.job.stall_seconds))
            else:
                self._failed(ended, exception_of(future))
        except SchedulerLostError:
            # If it committed, the next attempt finds the receipt.
            self.attempts.again(task)
            raise
        finally:
            # Immediately: released work is not recomputed when its worker dies.
            future.release()
        return True

    def note_reconnection(self) -> None:
        """Record that the scheduler answers again. Signs of life could not arrive in the meantime."""
        self.last_progress = time.monotonic()
        self.attempts.forget_losses()
        self.flight.note_life()

    def note_departure(self, worker: str, keys: Collection[str]) -> None:
        """Record that a worker left on purpose. The scheduler assigns its partitions to another one, without blame."""
        self._departed.add(worker)
        tasks = self.flight.tasks(keys)
        if not tasks:
            return
        for task in tasks:
            self.attempts.past(task).departures += 1
        most = max(self.attempts.past(task).departures for task in tasks)
        name = self.roster.name(worker)
        if most < _MANY_DEPARTURES:
            logger.info("worker %s left on purpose; another one scores partition %s", name, names(tasks))
        else:
            logger.warning(
                "worker %s left on purpose, as %d others did during partition %s; start workers with a longer "
                "--lifetime: loading the teacher and scoring a partition must fit into it",
                name,
                most - 1,
                names(tasks),
            )

    def note_tokens(self, index: int, tokens: int) -> None:
        """Record that a partition is being scored."""
        # Tokens of a running partition come before its receipt.
        self._events.insert(0, Progress(index, tokens))
        self.last_progress = time.monotonic()
        self.flight.note_life(index)

    def check_stall(self) -> None:
        """Raise ClusterError if the scheduler is lost, or there is no progress and no worker is to blame."""
        if self.client.status != "running":
            raise scheduler_lost()
        now = time.monotonic()
        soonest = self.attempts.soonest()
        if not self.flight and soonest is not None and soonest > now:
            # No progress is expected before the next retry. A due retry that finds no worker is a stall.
            self.last_progress = now
        idle = now - self.last_progress
        if idle > self.job.stall_seconds and (not self.flight or not self.flight.assigned()):
            raise self._stalled(idle)

    def check_hung(self) -> None:
        """Restart a worker whose partitions give no sign of life. They are retried alone."""
        hung = self.flight.hung(self.job.stall_seconds)
        were_alone = {
            worker
            for worker, keys in hung.items()
            if any(self.attempts.past(task).is_alone for task in self.flight.tasks(keys))
        }
        self._hung_in_a_row += len(hung.keys() - were_alone)
        idle = time.monotonic() - self.last_progress
        if hung and self._hung_in_a_row > 1 and idle > self.job.stall_seconds:
            # Several workers hang in the same way, so the cause is their shared input, output or computation.
            raise self._stalled(idle)
        for worker, keys in hung.items():
            self._take_from_hung(keys, worker)
            self.last_progress = time.monotonic()

    def release(self) -> None:
        """Release unfinished futures, so that the scheduler forgets them."""
        if self.newcomers is not None:
            self.newcomers.cancel()
        self.flight.release()

    def _look(self) -> None:
        """Look which workers are present."""
        self._present = present_workers(self.client)
        self.roster.note_nannies(self._present)

    def _capacity(self, now: float) -> tuple[int, dict[str, int] | None]:
        """Return how many partitions may be in flight, and how many more each worker may get.

        None: as many as it has threads, which Dask sees to.
        """
        threads = {
            address: min(_MOST_PARTITIONS_EACH, int(each["nthreads"])) for address, each in self._present.items()
        }
        self.attempts.have_company |= max(threads.values(), default=1) > 1
        most = {address: self.roster.most(address, count) for address, count in threads.items()}
        usable = self.roster.usable(threads)
        chosen = self.roster.choose(threads, None, now)
        # Without workers, one partition waits at the scheduler, where an adaptive cluster sees it.
        room = 0 if threads and not usable else max(1, sum(most[address] for address in chosen))
        if all(most[address] == threads[address] for address in usable):
            return room, None
        load = self.flight.load()
        return room, {address: most[address] - load[address] for address in most}

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
        chosen = self.roster.choose(self._present, task.partition.index, time.monotonic())
        if places is not None and chosen:
            worker = max(sorted(chosen), key=lambda each: places[each])
            if places[worker] < 1:
                self.attempts.again(task, _PLACE_SECONDS)
                return False
            places[worker] -= 1
            chosen = {worker}
        # Restricted only if necessary.
        workers = None if chosen == self._present.keys() else frozenset(chosen)
        self.flight.submit(task, self.attempts.begin(task), workers)
        return True

    def _take_back_orphans(self, present: Collection[str]) -> None:
        """Take back partitions whose allowed workers are all gone."""
        for orphan in self.flight.take_orphans(present):
            if orphan.workers is not None and orphan.workers <= self._departed:
                self.attempts.again(orphan.task)
            else:
                self._lost(orphan.task)

    def _finished(self, task: PartitionTask, outcome: tuple[Receipt | None, str]) -> None:
        index = task.partition.index
        self._hung_in_a_row = 0
        self.attempts.note_success(task)
        receipt, worker = outcome
        self.roster.note_success(worker, index, time.monotonic())
        if receipt is not None:
            self._events.append(Committed(receipt))

    def _failed(self, ended: Submitted, error: BaseException) -> None:
        """Decide what follows an error: for the partition, and for the worker that raised it."""
        task, index = ended.task, ended.task.partition.index
        if isinstance(error, KilledWorker):
            self._died(task, error)
            return
        kind = classify(error)
        worker = erred_on(self.client, ended.future)
        if worker is None:
            # The scheduler has forgotten the worker.
            self._lost(task)
            return
        if worker not in self._present:
            # It has just come, and got a partition that waited for a worker.
            self._look()
        if self._is_left_out(task, worker, error):
            return
        if kind == "device":
            self._device_failed(ended, worker, error)
            return
        before, name = set(self.roster.left_out), self.roster.name(worker)
        retired = self.roster.note_failure(worker, index, started=ended.started, now=time.monotonic())
        if retired is not None and worker not in before:
            logger.error("worker %s gets no more work: %s; see its log", name, retired)
        tried, usable = self.roster.tried(index), self.roster.usable(self._present)
        seconds = self.attempts.retry(task, kind, said(error), name, tried=tried, usable=usable)
        if seconds is None:
            self._give_up_on_error(ended, error, kind)
            return
        where = f" in {seconds:.0f} s" if seconds else " on another worker"
        logger.warning("partition %s failed on %s: %s; again%s", task.partition.name, name, said(error), where)

    def _device_failed(self, ended: Submitted, worker: str, error: BaseException) -> None:
        """Restart or retire a worker whose device failed. Its partition is retried, without blame."""
        task, name = ended.task, self.roster.name(worker)
        if ended.started < self._restarted.get(worker, -math.inf) or worker in self.roster.left_out:
            # It failed together with another partition, for the same reason.
            self.attempts.again(task.after("device", said(error), name))
            return
        on_good_devices, retired = self.roster.note_device_failure(worker, task.partition.index)
        if retired is None and is_poisoned(error):
            # First, because `wait` takes the partition back if the scheduler is lost.
            self._restart(worker)
        if self.attempts.retry(task, "device", said(error), name, on_good_devices=on_good_devices) is not None:
            logger.warning("partition %s: the device of %s failed: %s; again", task.partition.name, name, said(error))
        else:
            self._give_up_on_error(ended, error, "device")
        if retired is not None:
            self._leave_out({worker: f"{retired}, the last time with: {said(error)}"}, ClusterError)

    def _restart(self, worker: str) -> None:
        """Restart a worker, and take its other partitions back without blame."""
        assigned = self.flight.assigned()
        for task in self.flight.take_back(key for key, each in assigned.items() if each == worker):
            self.attempts.again(task)
        restart_worker(self.client, worker)
        self._restarted[worker] = time.monotonic()

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
        reason = (
            str(error) if full is None else f"it cannot write to the run folder ({full}); mount it with write access"
        )
        self._leave_out(dict.fromkeys(alike, reason), CapacityError if full is not None else ClusterError)
        self.attempts.again(task.after("device", reason, where))
        return True

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

    def _take_from_hung(self, keys: list[str], worker: str) -> None:
        """Take partitions from a hung worker, and restart it."""
        seconds, name = self.job.stall_seconds, self.roster.name(worker)
        tasks = self.flight.take_back(keys)
        logger.warning("no sign of life from %s for %.0f s; restarting %s", names(tasks), seconds, worker)
        for task in tasks:
            reason = f"no sign of life for {seconds:g} s"
            together = f"{reason}, from it or another partition of its worker"
            if self.attempts.retry(task, "hang", together, name) is None:
                alone = f"{reason} (distillation.job.stall_seconds), on its own, too"
                self._give_up(self.attempts.ended(task, "hang", alone, [name], f"worker {worker}"))
        # Last, because it may find the scheduler lost.
        restart_worker(self.client, worker)

    def _lost(self, task: PartitionTask) -> None:
        """Try a partition again after its worker or its submission disappeared, a limited number of times."""
        reason = "its worker died or its submission was cancelled"
        if self.attempts.retry(task, "lost", reason) is None:
            self._give_up(
                self.attempts.ended(task, "worker-death", f"{reason} {self.attempts.past(task).losses} times")
            )

    def _died(self, task: PartitionTask, error: KilledWorker) -> None:
        name = self.roster.name(error.last_worker.address)
        reason = "its worker died, with another partition on it"
        if self.attempts.retry(task, "worker-death", reason, name) is not None:
            logger.warning("partition %s: %s; again on its own", task.partition.name, reason)
            return
        reason = f"its worker died {error.allowed_failures + 1} times"
        evidence = f"last worker {error.last_worker.address}; its log, or the kernel's, says what ended it"
        self._give_up(self.attempts.ended(task, "worker-death", reason, [name], evidence))

    def _give_up_on_error(self, ended: Submitted, error: BaseException, kind: Kind) -> None:
        index = ended.task.partition.index
        tried = list(map(self.roster.name, self.roster.tried(index)))
        self.roster.note_bad(index)
        self._give_up(self.attempts.failed(ended.task, error, ended.future.traceback(CALL_SECONDS), kind, tried))

    def _give_up(self, failure: Failure) -> None:
        self._events.append(Failed(failure))

    def _stalled(self, idle: float) -> ClusterError:
        left_out = f"\nThese workers get no work:\n{self.roster.listed()}" if self.roster.left_out else ""
        workers = plural(len(present_workers(self.client)), "worker")
        where = f"{workers} and partitions {names(self.flight.tasks()) or 'none'} in flight"
        return stalled(self.job.stall_seconds, idle, where, left_out)
