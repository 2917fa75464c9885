"""The driver's loop: delayed partitions in a bounded window, drained one by one.

Chosen: two partitions in flight for each worker (one for a worker with one thread), each submitted on its own: while
one is scored, the other is read or written. A list of ``delayed`` is quadratic (10,000 take half a minute to reach the
scheduler, dask#11737), and futures that are held make Dask compute finished work again when a worker dies. Completions
are read from a queue with a timeout: a bare ``as_completed`` waits for ever when the workers are gone.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import dask
from distributed import Client, Future, KilledWorker, get_worker

from dask_logits.config import JobConfig
from dask_logits.errors import (
    CacheError,
    CapacityError,
    ClusterError,
    DaskLogitsError,
    PartitionsFailedError,
    TeacherError,
)
from dask_logits.files.atomic import Json, no_room, only_readable
from dask_logits.job.roster import Roster, retry_after
from dask_logits.job.scheduler import (
    CALL_SECONDS,
    SCORER,
    SchedulerLostError,
    call_scheduler,
    erred_on,
    exception_of,
    holders,
    restart_worker,
    result_of,
    scheduler_lost,
    wait_for_scheduler,
)
from dask_logits.run.failures import Failure, Kind
from dask_logits.worker.task import PartitionTask, Stages, process_partition

logger = logging.getLogger(__name__)

_TOPIC = "dask_logits.tokens."
# A worker with two threads scores one partition at a time, there is one teacher, and reads or writes another meanwhile.
_PARTITIONS_EACH = 2
# What the threads of a worker take turns at.
STAGES = Stages(text=threading.Lock(), teacher=threading.Lock(), scorer=SCORER)
_POLL_SECONDS = 0.5
_STREAM_POLL_SECONDS = 0.05
# Frames of a traceback that are kept as evidence.
_FRAMES = 6


def run_on_worker(task: PartitionTask) -> Json:
    """Run a partition inside a Dask worker and report its progress as events; return its receipt and the worker."""
    worker = get_worker()
    receipt = process_partition(
        task,
        lambda tokens: worker.log_event(_TOPIC + task.run_id, {"tokens": tokens, "partition": task.partition.index}),
        STAGES,
    )
    return {"receipt": receipt, "worker": worker.address}


def classify(error: BaseException) -> Kind:
    """Say what kind of failure an exception from a worker is.

    >>> classify(ConnectionResetError("peer")), classify(ValueError("row")), classify(ImportError("torch"))
    ('transient', 'data', 'worker')
    """
    if isinstance(error, KilledWorker):
        return "worker-death"
    # A teacher that cannot be loaded or run, as opposed to logits that are not finite in a row.
    teacher = isinstance(error, TeacherError) and error.row is None
    if teacher or isinstance(error, ImportError | ClusterError | CapacityError):
        return "worker"
    transient = isinstance(error, OSError) and (isinstance(error, CacheError) or not isinstance(error, DaskLogitsError))
    return "transient" if transient else "data"


def run_partitions(
    client: Client,
    tasks: Iterator[PartitionTask | None],
    job: JobConfig,
    *,
    run_id: str,
    roster: Roster | None = None,
    on_receipt: Callable[[Json], None],
    on_failure: Callable[[Failure], None] = lambda failure: None,
    on_tokens: Callable[[int], None] = lambda tokens: None,
    on_turn: Callable[[], bool] = lambda: False,
) -> dict[int, str]:
    """Run tasks on the cluster until none is left.

    Parameters
    ----------
    client
        A connected client.
    tasks
        Partitions to do, drawn only as there is room; None where none is ready yet.
    job
        Retries, bounds and patience.
    run_id
        Of the run, whose workers' events are listened to.
    roster
        Workers that get no work; those that fail what others complete are added.
    on_receipt
        Called in this thread with every receipt.
    on_failure
        Called in this thread with every partition that failed for good.
    on_tokens
        Called in this thread with tokens scored in partitions that are still running.
    on_turn
        Called in this thread several times a second; returns whether there was progress that is not seen here.

    Returns
    -------
    dict
        Partition index → reason, of those that failed for good.

    Raises
    ------
    ClusterError
        If the scheduler is lost, or nothing moves for ``stall_seconds`` and it is not one partition's fault.
    CapacityError
        If a worker has no room to write, or no worker may write.
    PartitionsFailedError
        If the first ``max_failures`` partitions all fail: the error is systematic.
    """
    window = _Window(client, tasks, job, on_failure, roster=Roster() if roster is None else roster)
    events: queue.SimpleQueue[Json] = queue.SimpleQueue()
    topic = _TOPIC + run_id
    client.subscribe_topic(topic, lambda event: events.put(event[1]))
    try:
        while True:
            try:
                if not window.fill():
                    break
                done = window.next_done(_POLL_SECONDS)
                while not events.empty():
                    event = events.get()
                    on_tokens(event["tokens"])
                    window.note_life(event["partition"])
                if on_turn():
                    window.last_progress = time.monotonic()
                if done is None:
                    window.check_stall()
                elif isinstance(done, dict):
                    on_receipt(done)
                window.check_hung()
            except SchedulerLostError:
                wait_for_scheduler(client, job.stall_seconds, on_turn)
                # A client that has connected again is another one to the scheduler.
                client.subscribe_topic(topic, lambda event: events.put(event[1]))
                window.note_reconnection()
    finally:
        window.release()
        if client.status == "running":
            client.unsubscribe_topic(topic)
    return window.failed


@dataclass
class _Running:
    """A partition at the scheduler, when it gave the last sign of life, and which workers may take it (None: any)."""

    task: PartitionTask
    future: Future
    workers: frozenset[str] | None = None
    started: float = field(default_factory=time.monotonic)
    alive: float = field(default_factory=time.monotonic)


@dataclass
class _Window:
    client: Client
    tasks: Iterator[PartitionTask | None]
    job: JobConfig
    on_failure: Callable[[Failure], None]
    roster: Roster = field(default_factory=Roster)
    failed: dict[int, str] = field(default_factory=dict)
    last_progress: float = field(default_factory=time.monotonic)
    _succeeded: bool = False
    _exhausted: bool = False
    _starved: bool = False
    _running: dict[str, _Running] = field(default_factory=dict)
    _attempts: dict[int, int] = field(default_factory=dict)
    # Workers that a partition was given to and that are gone, or a client that the scheduler forgot.
    _losses: dict[int, int] = field(default_factory=dict)
    _present: dict[str, Any] = field(default_factory=dict)
    _later: list[tuple[float, PartitionTask]] = field(default_factory=list)
    # Partitions whose workers died or hung while they had company: each is tried once more, last and on its own.
    _suspects: list[PartitionTask] = field(default_factory=list)
    _alone: set[int] = field(default_factory=set)
    _shared: bool = False
    # Workers that were restarted since anything moved.
    _hung_in_a_row: int = 0
    _done: queue.SimpleQueue[Future] = field(default_factory=queue.SimpleQueue)
    _token: str = field(default_factory=lambda: uuid.uuid4().hex[:8])

    def fill(self) -> bool:
        """Submit while there is room; return whether anything is left to wait for."""
        now = time.monotonic()
        self._starved = False
        self._present = self._workers()
        self._take_back_orphans()
        while len(self._running) < self._room(now):
            due = next((entry for entry in self._later if entry[0] <= now), None)
            if due is not None:
                self._later.remove(due)
            task = due[1] if due is not None else self._draw()
            if task is None:
                break
            self._submit(task)
        waits = self._suspects and self._exhausted and not self._running and not self._later
        if waits and self._room(now):
            self._submit(self._suspects.pop(0))
        return bool(self._running or self._later or self._suspects or not self._exhausted)

    def next_done(self, seconds: float) -> Json | bool | None:
        """Wait for a completion: its receipt, False if it failed, None if none came in time."""
        try:
            # A worker that waits for a stream is given its rows soon after they come.
            future = self._done.get(timeout=_STREAM_POLL_SECONDS if self._starved else seconds)
        except queue.Empty:
            return None
        running = self._running.pop(future.key, None)
        if running is None:
            # Given up as hung, and over in the end.
            future.release()
            return None
        self.last_progress = time.monotonic()
        task = running.task
        try:
            if future.status == "lost":
                # Its worker died between finishing and telling; if it committed, the next attempt finds the receipt.
                self._later.append((self.last_progress, task))
                return False
            if future.status == "cancelled":
                self._note_loss(task)
                return False
            if future.status == "finished":
                return self._finished(task, result_of(self.client, future, self.job.stall_seconds))
            self._failed(running, exception_of(future), future)
        except SchedulerLostError:
            # If it committed, the next attempt finds the receipt.
            self._later.append((self.last_progress, task))
            raise
        finally:
            # At once: what nobody holds is not computed again when its worker dies.
            future.release()
        return False

    def _finished(self, task: PartitionTask, outcome: Json) -> Json:
        index = task.partition.index
        self._succeeded = True
        self._hung_in_a_row = 0
        self._attempts.pop(index)
        self._losses.pop(index, None)
        self.roster.note_success(outcome["worker"], index, time.monotonic())
        receipt: Json = outcome["receipt"]
        return receipt

    def note_reconnection(self) -> None:
        """Note that the scheduler answers again: nobody could give a sign of life meanwhile."""
        self.last_progress = now = time.monotonic()
        self._losses.clear()
        for running in self._running.values():
            running.alive = now

    def _take_back_orphans(self) -> None:
        """Take back partitions whose workers are all gone: the scheduler would keep them for those."""
        for key, running in list(self._running.items()):
            if running.workers is not None and not running.workers & self._present.keys():
                del self._running[key]
                running.future.release()
                self._note_loss(running.task)

    def _note_loss(self, task: PartitionTask) -> None:
        """Submit a partition again whose worker is gone, or that the scheduler forgot; not without end."""
        index = task.partition.index
        self._losses[index] = losses = self._losses.get(index, 0) + 1
        if losses <= self.job.retries + 1:
            self._later.append((time.monotonic(), task))
            return
        reason = f"its worker died or its submission was cancelled {losses} times"
        self._give_up_partition(
            Failure(index=index, kind="worker-death", reason=reason, attempts=self._attempts[index], task=task)
        )

    def note_life(self, index: int) -> None:
        """Note that a partition is being scored."""
        self.last_progress = time.monotonic()
        for running in self._running.values():
            if running.task.partition.index == index:
                running.alive = self.last_progress

    def check_stall(self) -> None:
        """Raise ClusterError if the scheduler is lost, or nothing moves and no worker can be blamed."""
        if self.client.status != "running":
            raise scheduler_lost()
        now = time.monotonic()
        if self._later and not self._running and min(due for due, _ in self._later) > now:
            # Nothing is expected to move before the next try; one that is due and finds no worker is a stall.
            self.last_progress = now
        idle = now - self.last_progress
        if idle > self.job.stall_seconds and (not self._running or not self._held()):
            raise self._stalled(idle)

    def check_hung(self) -> None:
        """Restart a worker whose partition gives no sign of life; its partitions are tried again on their own."""
        now = time.monotonic()
        if all(now - running.alive <= self.job.stall_seconds for running in self._running.values()):
            return
        held = self._held()
        for key, running in self._running.items():
            if key not in held:
                # It waits at the scheduler.
                running.alive = now
        silent = {key for key, running in self._running.items() if now - running.alive > self.job.stall_seconds}
        workers = {held[key] for key in silent}
        again = {held[key] for key in silent if self._running[key].task.partition.index in self._alone}
        self._hung_in_a_row += len(workers - again)
        if self._hung_in_a_row > 1 and now - self.last_progress > self.job.stall_seconds:
            # Several hang alike: it is what they read, write or compute with.
            raise self._stalled(now - self.last_progress)
        for worker in workers:
            self._give_up([key for key in self._running if held.get(key) == worker], worker)
            self.last_progress = now

    def _give_up(self, keys: list[str], worker: str) -> None:
        """Take partitions from a worker that hangs, and restart it."""
        seconds = self.job.stall_seconds
        tasks = []
        for key in keys:
            running = self._running.pop(key)
            running.future.release()
            tasks.append(running.task)
        names = ", ".join(task.partition.name for task in tasks)
        logger.warning("no sign of life from %s for %.0f s; restarting %s", names, seconds, worker)
        restart_worker(self.client, worker)
        for task in tasks:
            index = task.partition.index
            if index in self._alone:
                reason = f"no sign of life for {seconds:g} s (distillation.job.stall_seconds), on its own, too"
                self._give_up_partition(
                    Failure(
                        index=index,
                        kind="hang",
                        reason=reason,
                        attempts=self._attempts[index],
                        evidence=f"worker {worker}",
                        workers=(self.roster.name(worker),),
                        task=task,
                    )
                )
            else:
                self._alone.add(index)
                self._suspects.append(task)

    def _stalled(self, idle: float) -> ClusterError:
        workers = self._workers()
        where = ", ".join(sorted(running.task.partition.name for running in self._running.values()))
        left_out = f"\nThese workers get no work:\n{self.roster.listed()}" if self.roster.left_out else ""
        return ClusterError(
            f"distillation.job.stall_seconds: expected progress within {self.job.stall_seconds:g} s, got none for "
            f"{idle:.0f} s with {len(workers)} workers and partitions {where or 'none'} in flight; look at the "
            f"workers' logs and at what the dataset is read from, then run the same command again{left_out}"
        )

    def _held(self) -> dict[str, str]:
        """Return key → worker, of those that are with one."""
        return {key: worker for key, worker in holders(self.client).items() if key in self._running}

    def release(self) -> None:
        """Take back what has not finished: what nobody wants, the scheduler forgets."""
        for running in self._running.values():
            running.future.release()

    def _draw(self) -> PartitionTask | None:
        """Return the next partition; None if there is none, or a stream has not come so far."""
        if self._exhausted:
            return None
        try:
            task = next(self.tasks)
        except StopIteration:
            self._exhausted = True
            return None
        self._starved = task is None
        return task

    def _submit(self, task: PartitionTask) -> None:
        index = task.partition.index
        self._attempts[index] = attempt = self._attempts.get(index, 0) + 1
        name = f"score-partition-{task.partition.name}-{attempt}-{self._token}"
        delayed = dask.delayed(run_on_worker, pure=False)(task, dask_key_name=name)
        chosen = self.roster.choose(self._present, index, time.monotonic())
        # Named only where they must be: the scheduler does not queue what is meant for certain workers.
        workers = None if chosen == self._present.keys() else frozenset(chosen)
        future = self.client.compute(delayed, optimize_graph=False, workers=workers and sorted(workers))
        self._running[future.key] = _Running(task, future, workers)
        future.add_done_callback(self._done.put)

    def _failed(self, running: _Running, error: BaseException, future: Future) -> None:
        task, index, kind = running.task, running.task.partition.index, classify(error)
        if kind == "worker-death":
            self._died(task, error)
            return
        worker = erred_on(self.client, future)
        if worker is None:
            # The scheduler has forgotten where.
            self._note_loss(task)
            return
        if self._is_left_out(task, worker, error):
            return
        before = set(self.roster.left_out)
        retired = self.roster.note_failure(worker, index, started=running.started, now=time.monotonic())
        if retired is not None and worker not in before:
            logger.error("worker %s gets no more work: %s; see its log", self.roster.name(worker), retired)
        tried = self.roster.tried(index)
        wait = retry_after(kind, tried, self.roster.usable(self._present), self.job.retries)
        if wait is not None:
            logger.warning(
                "partition %s failed on %s: %s; again%s",
                task.partition.name,
                self.roster.name(worker),
                str(error) or repr(error),
                f" in {wait:.0f} s" if wait else " on another worker",
            )
            self._later.append((time.monotonic() + wait, task))
            return
        self.roster.note_bad(index)
        row = getattr(error, "row", None)
        frames = traceback.format_tb(future.traceback(CALL_SECONDS))[-_FRAMES:]
        self._give_up_partition(
            Failure(
                index=index,
                kind=kind,
                reason=str(error) or repr(error),
                attempts=self._attempts[index],
                evidence="".join([*frames, *traceback.format_exception_only(error)]),
                workers=tuple(dict.fromkeys(map(self.roster.name, tried))),
                rows=() if row is None else (int(row),),
                task=task,
            )
        )

    def _is_left_out(self, task: PartitionTask, worker: str, error: BaseException) -> bool:
        """Leave out a worker that cannot score for this run; its partition is tried elsewhere."""
        full = no_room(error)
        if full is None and not isinstance(error, ClusterError):
            return False
        where = self.roster.name(worker)
        cure = "everything committed before is good: make room and run the same command again"
        alike = {worker}
        if full is not None:
            if not only_readable(error):
                # No further partition could be written either.
                raise CapacityError(
                    f"distillation.teacher.cache_dir: expected room to write partition {task.partition.name}, got "
                    f"{full!r} from worker {where}; {cure}"
                )
            alike = {other for other in self._present if self.roster.host(other) == self.roster.host(worker)} | {worker}
        said = str(error) if full is None else f"it cannot write to the run folder ({full}); mount it with write access"
        self.roster.leave_out(dict.fromkeys(alike, said))
        logger.error("worker %s gets no more work: %s", where, said)
        if not self.roster.usable(self._present):
            refused = CapacityError if full is not None else ClusterError
            raise refused(f"distillation.cluster: expected a worker that can score, got none:\n{self.roster.listed()}")
        self._later.append((time.monotonic(), task))
        return True

    def _died(self, task: PartitionTask, error: BaseException) -> None:
        assert isinstance(error, KilledWorker)
        index = task.partition.index
        if self._shared and index not in self._alone:
            logger.warning(
                "partition %s: its worker died, with another partition on it; again on its own", task.partition.name
            )
            self._alone.add(index)
            self._suspects.append(task)
            return
        worker = error.last_worker.address
        self._give_up_partition(
            Failure(
                index=index,
                kind="worker-death",
                reason=f"its worker died {error.allowed_failures + 1} times",
                attempts=self._attempts[index],
                evidence=f"last worker {worker}; its log, or the kernel's, says what ended it",
                workers=(self.roster.name(worker),),
                task=task,
            )
        )

    def _give_up_partition(self, failure: Failure) -> None:
        logger.error("partition %06d failed (%s): %s", failure.index, failure.kind, failure.reason)
        self.failed[failure.index] = failure.reason
        self.on_failure(failure)
        if not self._succeeded and len(self.failed) >= self.job.max_failures:
            raise PartitionsFailedError(
                f"the first {len(self.failed)} partitions all failed, so the job was stopped; the first because: "
                f"{next(iter(self.failed.values()))}",
                self.failed,
            )

    def _workers(self) -> dict[str, Any]:
        # Client.scheduler_info() lists five workers only, or waits for ever when the scheduler is gone.
        scheduler = self.client.scheduler
        found = call_scheduler(self.client, lambda: scheduler.identity(n_workers=-1), CALL_SECONDS)
        workers: dict[str, Any] = found["workers"]
        return workers

    def _room(self, now: float) -> int:
        """Return how many partitions may be in flight: of workers that may be given one."""
        threads = {address: min(_PARTITIONS_EACH, int(worker["nthreads"])) for address, worker in self._present.items()}
        self._shared = self._shared or max(threads.values(), default=1) > 1
        if self._present and not self.roster.usable(self._present):
            return 0
        # Without any worker one partition waits at the scheduler, where an adaptive cluster sees it.
        return max(1, sum(threads[address] for address in self.roster.choose(self._present, None, now)))
