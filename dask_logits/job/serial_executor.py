"""Run tasks in this process, without a cluster: a static worker, a notebook, or a debugger."""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any

from distributed.threadpoolexecutor import ThreadPoolExecutor

from dask_logits.config.groups import ClusterConfig, GenerationConfig, JobConfig
from dask_logits.errors import ClusterError, DaskLogitsError
from dask_logits.files.atomic import no_room
from dask_logits.job.attempts import Attempts, said
from dask_logits.job.executor import (
    Committed,
    Event,
    Failed,
    Progress,
    Waiting,
    no_room_for,
    stalled,
    too_slow,
    unreadable_there,
)
from dask_logits.job.remote import SCORER, STAGES
from dask_logits.job.retry_policy import classify
from dask_logits.job.roster import Roster
from dask_logits.job.workers import local_device, own_device, partitions_each, threads_each
from dask_logits.run.records import Receipt
from dask_logits.teacher.checkpoint import TeacherSpec
from dask_logits.worker.environment import environment
from dask_logits.worker.task import PartitionTask, process_partition, try_rows

logger = logging.getLogger(__name__)

_HERE = "this process"
_POLL_SECONDS = 0.2
_STREAM_POLL_SECONDS = 0.05
# Time for a batch to end after an interruption.
_STOP_SECONDS = 8.0


class _StoppedError(Exception):
    """Ends a partition at its next batch, because nobody waits for it."""


class SerialExecutor:
    """One worker, in threads of this process (:class:`~dask_logits.job.executor.Executor`).

    Parameters
    ----------
    device
        ``cpu`` or ``cuda``.
    torch_threads
        CPU threads for scoring.
    job
        Retries and timeouts.
    """

    n_workers = 1
    dashboard = None

    def __init__(self, *, device: str, torch_threads: int, job: JobConfig) -> None:
        self.device = device
        self.torch_threads = torch_threads
        self.environments = {_HERE: environment(device)}
        self.roster = Roster(hosts={_HERE: socket.gethostname()})
        self._job = job
        self._n_partitions = partitions_each(device)
        self._pool = ThreadPoolExecutor(self._n_partitions, thread_name_prefix="dask_logits-partition")
        self._stop = threading.Event()

    def run(
        self, tasks: Iterator[PartitionTask | None], run_id: str, is_reading: Callable[[], bool] = lambda: False
    ) -> Generator[Event, None, None]:
        """Run tasks until none is left."""
        seconds = self._job.stall_seconds
        news: queue.SimpleQueue[Progress | Future[Receipt | None]] = queue.SimpleQueue()
        attempts = Attempts(self._job.retries)
        running: dict[Future[Receipt | None], PartitionTask] = {}
        is_exhausted, alive = False, time.monotonic()
        while True:
            is_starved = False
            while len(running) < self._n_partitions:
                task = attempts.take_due(time.monotonic())
                if task is None and not is_exhausted:
                    try:
                        task = next(tasks)
                        is_starved = task is None
                    except StopIteration:
                        is_exhausted = True
                if task is None:
                    break
                attempts.begin(task)
                work = process_partition if task.trial is None else try_rows
                future = self._pool.submit(work, task, self._reporter(task, news.put), STAGES)
                running[future] = task
                future.add_done_callback(news.put)
            if is_exhausted and not running and not attempts.are_left():
                return
            try:
                found = news.get(timeout=_STREAM_POLL_SECONDS if is_starved else _POLL_SECONDS)
            except queue.Empty:
                found = None
            now = time.monotonic()
            if found is not None or is_reading() or (attempts.are_left() and not running):
                alive = now
            if now - alive > seconds:
                flying = ", ".join(sorted(task.partition.name for task in running.values())) or "none"
                raise stalled(seconds, now - alive, f"partitions {flying} in this process")
            if isinstance(found, Future):
                task = running.pop(found)
                if (error := found.exception()) is None:
                    attempts.note_success(task)
                    receipt = found.result()
                    yield Waiting() if receipt is None else Committed(receipt)
                else:
                    yield self._failed(task, error, attempts)
            else:
                yield found or Waiting()

    def _reporter(self, task: PartitionTask, put: Callable[[Progress], None]) -> Callable[[int], None]:
        def on_tokens(tokens: int) -> None:
            if self._stop.is_set():
                raise _StoppedError
            put(Progress(task.partition.index, tokens))

        return on_tokens

    def _failed(self, task: PartitionTask, error: BaseException, attempts: Attempts) -> Event:
        """Retry a partition after an error, or declare it failed."""
        where = self.roster.name(_HERE)
        if (cause := no_room(error)) is not None:
            raise no_room_for(task, cause, where) from error
        if isinstance(error, ClusterError):
            raise error
        kind = classify(error)
        if kind == "device":
            raise ClusterError(
                f"distillation.cluster: expected a device that can score, got {said(error)} from {where}; see "
                "that it works, then run the same command again"
            ) from error
        tried = [_HERE] * attempts.past(task).attempts
        seconds = attempts.retry(task, kind, said(error), where, tried=tried, usable=[_HERE])
        if seconds is None:
            return Failed(attempts.failed(task, error, error.__traceback__, kind, [where]))
        logger.warning("partition %s failed: %s; again in %.0f s", task.partition.name, said(error), seconds)
        return Waiting()

    def call(
        self,
        function: Callable[[Any, Callable[[str], None]], Any],
        argument: Any,
        *,
        on_step: Callable[[str], None] = lambda step: None,
        on_turn: Callable[[], None] = lambda: None,
    ) -> Any:
        """Run one function in the computing thread and wait for it."""
        name = function.__name__
        steps: queue.SimpleQueue[str] = queue.SimpleQueue()
        alive = time.monotonic()

        def step(text: str) -> None:
            if self._stop.is_set():
                raise _StoppedError
            steps.put(text)

        future = SCORER.submit(function, argument, step)
        try:
            while not future.done():
                if time.monotonic() - alive > self._job.stall_seconds:
                    raise too_slow(name, self._job.stall_seconds)
                with contextlib.suppress(queue.Empty):
                    on_step(steps.get(timeout=_POLL_SECONDS))
                    alive = time.monotonic()
                on_turn()
            while not steps.empty():
                on_step(steps.get())
            return future.result()
        except OSError as error:
            if isinstance(error, DaskLogitsError) or no_room(error) is not None:
                raise
            raise unreadable_there(name, error, self.roster.name(_HERE)) from error

    def preload(self, teacher: TeacherSpec, vocab_size: int) -> AbstractContextManager[object]:
        """Do nothing: there is no other worker."""
        return contextlib.nullcontext()

    def close(self) -> None:
        """Stop at the next batch, and wait a moment for it."""
        self._stop.set()
        self._pool.shutdown(timeout=_STOP_SECONDS)

    def announce(self, topic: str, message: dict[str, Any]) -> None:
        """Do nothing: there are no monitors but those that read the run folder."""


@contextlib.contextmanager
def open_process(generation: GenerationConfig, config: ClusterConfig, job: JobConfig) -> Iterator[SerialExecutor]:
    """Prepare this process for scoring. On GPUs, it sees only its own.

    Raises
    ------
    ClusterError
        If no GPU is visible but one is requested, or this process uses other GPUs already.
    """
    device = local_device(generation, config)
    with own_device(generation, device):
        executor = SerialExecutor(device=device, torch_threads=threads_each(generation, 1), job=job)
        with contextlib.closing(executor):
            yield executor
