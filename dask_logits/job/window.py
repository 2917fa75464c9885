"""The driver's loop: delayed partitions in a bounded window, drained one by one.

Chosen: two partitions in flight for each worker (one for a worker with one thread), each submitted on its own: while
one is scored, the other is read or written. A list of ``delayed`` is quadratic (10,000 take half a minute to reach the
scheduler, dask#11737), and futures that are held make Dask compute finished work again when a worker dies. Completions
are read from a queue with a timeout: a bare ``as_completed`` waits for ever when the workers are gone.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import dask
from distributed import Client, Future, KilledWorker, get_worker
from distributed.client import FutureCancelledError
from distributed.threadpoolexecutor import ThreadPoolExecutor

from dask_logits.capture.task import PartitionTask, Stages, process_partition
from dask_logits.config import JobConfig
from dask_logits.errors import CacheError, CapacityError, ClusterError, DaskLogitsError, PartitionsFailedError
from dask_logits.job.failures import Failure, Kind
from dask_logits.store.durable import Json, no_room

logger = logging.getLogger(__name__)

_TOPIC = "dask_logits.tokens."
_CALL_SECONDS = 20
# A worker with two threads scores one partition at a time, there is one teacher, and reads or writes another meanwhile.
_PARTITIONS_EACH = 2
# Dask's, whose threads do not keep a process from ending.
_SCORER = ThreadPoolExecutor(1, thread_name_prefix="dask_logits-scorer")
# What the threads of a worker take turns at.
STAGES = Stages(text=threading.Lock(), teacher=threading.Lock(), scorer=_SCORER)
_POLL_SECONDS = 0.5
_STREAM_POLL_SECONDS = 0.05
_FIRST_BACKOFF_SECONDS = 2.0
_RESTART_SECONDS = 60
# Frames of a traceback that are kept as evidence.
_FRAMES = 6


def run_on_worker(task: PartitionTask) -> Json:
    """Run a partition inside a Dask worker and report its progress as events."""
    worker = get_worker()
    return process_partition(
        task,
        lambda tokens: worker.log_event(_TOPIC + task.run_id, {"tokens": tokens, "partition": task.partition.index}),
        STAGES,
    )


def classify(error: BaseException) -> Kind:
    """Say what kind of failure an exception from a worker is.

    >>> classify(ConnectionResetError("peer")), classify(ValueError("row"))
    ('transient', 'data')
    """
    if isinstance(error, KilledWorker):
        return "worker-death"
    transient = isinstance(error, OSError) and (isinstance(error, CacheError) or not isinstance(error, DaskLogitsError))
    return "transient" if transient else "data"


def run_partitions(
    client: Client,
    tasks: Iterator[PartitionTask | None],
    job: JobConfig,
    *,
    run_id: str,
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
        If a worker has no room to write: nor would the others.
    PartitionsFailedError
        If the first ``max_failures`` partitions all fail: the error is systematic.
    """
    window = _Window(client, tasks, job, on_failure)
    events: queue.SimpleQueue[Json] = queue.SimpleQueue()
    topic = _TOPIC + run_id
    client.subscribe_topic(topic, lambda event: events.put(event[1]))
    try:
        while window.fill():
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
    finally:
        window.release()
        if client.status == "running":
            client.unsubscribe_topic(topic)
    return window.failed


@dataclass
class _Running:
    """A partition at the scheduler, and when it gave the last sign of life."""

    task: PartitionTask
    future: Future
    alive: float = field(default_factory=time.monotonic)


@dataclass
class _Window:
    client: Client
    tasks: Iterator[PartitionTask | None]
    job: JobConfig
    on_failure: Callable[[Failure], None]
    failed: dict[int, str] = field(default_factory=dict)
    last_progress: float = field(default_factory=time.monotonic)
    _succeeded: bool = False
    _exhausted: bool = False
    _starved: bool = False
    _running: dict[str, _Running] = field(default_factory=dict)
    _attempts: dict[int, int] = field(default_factory=dict)
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
        while len(self._running) < self._room():
            due = next((entry for entry in self._later if entry[0] <= now), None)
            if due is not None:
                self._later.remove(due)
            task = due[1] if due is not None else self._draw()
            if task is None:
                break
            self._submit(task)
        if self._suspects and self._exhausted and not self._running and not self._later:
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
            if future.status == "finished":
                receipt = _result_of(self.client, future, self.job.stall_seconds)
                self._succeeded = True
                self._hung_in_a_row = 0
                self._attempts.pop(task.partition.index)
                return receipt
            self._failed(task, _exception_of(future), future)
        finally:
            # At once: what nobody holds is not computed again when its worker dies.
            future.release()
        return False

    def note_life(self, index: int) -> None:
        """Note that a partition is being scored."""
        self.last_progress = time.monotonic()
        for running in self._running.values():
            if running.task.partition.index == index:
                running.alive = self.last_progress

    def check_stall(self) -> None:
        """Raise ClusterError if the scheduler is lost, or nothing moves and no worker can be blamed."""
        idle = time.monotonic() - self.last_progress
        if self.client.status != "running":
            raise _scheduler_lost()
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
                        task=task,
                    )
                )
            else:
                self._alone.add(index)
                self._suspects.append(task)

    def _stalled(self, idle: float) -> ClusterError:
        workers = self._workers()
        where = ", ".join(sorted(running.task.partition.name for running in self._running.values()))
        return ClusterError(
            f"distillation.job.stall_seconds: expected progress within {self.job.stall_seconds:g} s, got none for "
            f"{idle:.0f} s with {len(workers)} workers and partitions {where or 'none'} in flight; look at the "
            "workers' logs and at what the dataset is read from, then run the same command again"
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
        future = self.client.compute(delayed, optimize_graph=False)
        self._running[future.key] = _Running(task, future)
        future.add_done_callback(self._done.put)

    def _failed(self, task: PartitionTask, error: BaseException, future: Future) -> None:
        index = task.partition.index
        kind = classify(error)
        if (full := no_room(error)) is not None:
            # No further partition could be written either.
            raise CapacityError(
                f"distillation.teacher.cache_dir: expected room to write partition {task.partition.name}, got "
                f"{full!r}; everything committed before is good: make room and run the same command again"
            )
        if kind == "transient" and self._attempts[index] <= self.job.retries:
            wait = _FIRST_BACKOFF_SECONDS * 2 ** (self._attempts[index] - 1)
            logger.warning("partition %s: %s; again in %.0f s", task.partition.name, error, wait)
            self._later.append((time.monotonic() + wait, task))
            return
        if kind == "worker-death" and self._shared and index not in self._alone:
            logger.warning(
                "partition %s: its worker died, with another partition on it; again on its own", task.partition.name
            )
            self._alone.add(index)
            self._suspects.append(task)
            return
        reason, row = str(error) or repr(error), getattr(error, "row", None)
        if isinstance(error, KilledWorker):
            reason = f"its worker died {error.allowed_failures + 1} times"
            evidence = f"last worker {error.last_worker.address}; its log, or the kernel's, says what ended it"
        else:
            frames = traceback.format_tb(future.traceback(_CALL_SECONDS))[-_FRAMES:]
            evidence = "".join([*frames, *traceback.format_exception_only(error)])
        self._give_up_partition(
            Failure(
                index=index,
                kind=kind,
                reason=reason,
                attempts=self._attempts[index],
                evidence=evidence,
                rows=() if row is None else (int(row),),
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
        found = call_scheduler(self.client, lambda: scheduler.identity(n_workers=-1), _CALL_SECONDS)
        workers: dict[str, Any] = found["workers"]
        return workers

    def _room(self) -> int:
        threads = [min(_PARTITIONS_EACH, int(worker["nthreads"])) for worker in self._workers().values()]
        self._shared = self._shared or max(threads, default=1) > 1
        return max(1, sum(threads))


def holders(client: Client) -> dict[str, str]:
    """Return key → address of the worker that it was sent to, of all tasks that are with one."""
    scheduler = client.scheduler
    found = call_scheduler(client, lambda: scheduler.processing(workers=None), _CALL_SECONDS)
    return {key: worker for worker, keys in found.items() for key in keys}


def restart_worker(client: Client, address: str) -> None:
    """Have a worker's nanny end it and start another; without a nanny it is closed.

    Raises
    ------
    ClusterError
        If the scheduler is lost.
    """
    scheduler = client.scheduler
    found = call_scheduler(
        client,
        lambda: scheduler.restart_workers(
            workers=[address],
            timeout=_RESTART_SECONDS,
            wait_for_workers=False,
            on_error="return",
            stimulus_id=f"dask_logits-hung-{uuid.uuid4().hex[:8]}",
        ),
        2 * _RESTART_SECONDS,
    )
    logger.warning("worker %s: %s", address, found.get(address, "gone"))


def call_scheduler(client: Client, function: Callable[[], Awaitable[Any]], seconds: float) -> Any:
    """Call the scheduler, and stop waiting when the client has lost it: distributed goes on connecting for minutes.

    Raises
    ------
    ClusterError
        If the scheduler is lost, or does not answer in ``seconds``.
    """

    async def call() -> Any:
        async with asyncio.timeout(seconds):
            task = asyncio.ensure_future(function())
            try:
                while not task.done():
                    await asyncio.wait([task], timeout=_POLL_SECONDS)
                    if client.status != "running" and not task.done():
                        raise _scheduler_lost()
                return task.result()
            finally:
                task.cancel()

    try:
        return client.sync(call)
    except (OSError, FutureCancelledError) as error:
        raise _scheduler_lost() from error


def _result_of(client: Client, future: Future, seconds: float) -> Json:
    """Fetch a result; where its worker has just died, another computes it first."""
    receipt: Json = call_scheduler(client, lambda: client.gather([future], asynchronous=True), seconds)[0]
    return receipt


def _exception_of(future: Future) -> BaseException:
    error: BaseException | None = future.exception() if future.status == "error" else None
    if error is None or isinstance(error, FutureCancelledError):
        raise _scheduler_lost()
    return error


def _scheduler_lost() -> ClusterError:
    return ClusterError(
        "distillation.cluster: expected a running scheduler, got none: it cancelled our work or its connection was "
        "lost; everything committed is kept, run the same command again"
    )


def _in_scorer(function: Callable[[Any], Json], argument: Any) -> Json:
    found: Json = _SCORER.submit(function, argument).result()
    return found


def run_one(client: Client, function: Callable[[Any], Json], argument: Any, job: JobConfig) -> Json:
    """Run one function on one worker and wait for it, but not for ever.

    Raises
    ------
    ClusterError
        If the scheduler is lost, the worker dies again and again, or nothing came in ``stall_seconds``.
    """
    name = f"{function.__name__}-{uuid.uuid4().hex[:8]}"
    future = client.compute(dask.delayed(_in_scorer, pure=False)(function, argument, dask_key_name=name))
    started = time.monotonic()
    while not future.done():
        time.sleep(_POLL_SECONDS / 5)
        if client.status != "running":
            raise _scheduler_lost()
        if time.monotonic() - started > job.stall_seconds:
            raise ClusterError(
                f"distillation.job.stall_seconds: expected the {function.__name__} task to end within "
                f"{job.stall_seconds:g} s, got nothing; look at the workers' logs, then run the same command again"
            )
    if future.status == "finished":
        return _result_of(client, future, job.stall_seconds)
    error = _exception_of(future)
    if isinstance(error, KilledWorker):
        raise ClusterError(
            f"distillation.cluster: expected a result of the {function.__name__} task, got a worker that died "
            f"{error.allowed_failures + 1} times; it may be out of memory: lower batch_tokens, or use fewer workers"
        ) from error
    raise error
