"""Calls to the scheduler and to one worker that come back, whatever happened to either.

distributed goes on connecting for minutes to a scheduler that is gone, and waits for ever for a result that nobody
computes any more.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import dask
from distributed import Client, Future, KilledWorker, get_worker
from distributed.client import FutureCancelledError
from distributed.threadpoolexecutor import ThreadPoolExecutor

from dask_logits.config import JobConfig
from dask_logits.errors import ClusterError, DaskLogitsError
from dask_logits.store.durable import Json, no_room

logger = logging.getLogger(__name__)

CALL_SECONDS = 20
_RESTART_SECONDS = 60
_POLL_SECONDS = 0.5
_STEPS_TOPIC = "dask_logits.steps."
# The thread of a worker that computes. Dask's, whose threads do not keep a process from ending.
SCORER = ThreadPoolExecutor(1, thread_name_prefix="dask_logits-scorer")


def call_scheduler(client: Client, function: Callable[[], Awaitable[Any]], seconds: float) -> Any:
    """Call the scheduler, and stop waiting when the client has lost it: distributed goes on connecting for minutes.

    Raises
    ------
    ClusterError
        If the scheduler is lost, or does not answer in ``seconds``.
    """

    async def call() -> Any:
        if client.status != "running":
            raise scheduler_lost()
        async with asyncio.timeout(seconds):
            task = asyncio.ensure_future(function())
            try:
                while not task.done():
                    await asyncio.wait([task], timeout=_POLL_SECONDS)
                    if client.status != "running" and not task.done():
                        raise scheduler_lost()
                return task.result()
            finally:
                task.cancel()

    try:
        return client.sync(call)
    except (OSError, FutureCancelledError) as error:
        raise scheduler_lost() from error


def holders(client: Client) -> dict[str, str]:
    """Return key → address of the worker that it was sent to, of all tasks that are with one."""
    scheduler = client.scheduler
    found = call_scheduler(client, lambda: scheduler.processing(workers=None), CALL_SECONDS)
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


def forget_submissions(client: Client) -> None:
    """Have the scheduler drop what it keeps of every task that was ever submitted (distributed 2026.7.1).

    That is an entry in the metadata of a span, without a bound, and one in dask's cache of 100,000 names.

    Raises
    ------
    ClusterError
        If the scheduler is lost, or does not answer.
    """

    # Inside, so that it is sent whole: the scheduler may not have this package.
    def drop(dask_scheduler: Any) -> None:
        from dask.utils import key_split

        key_split.cache_clear()
        spans = getattr(dask_scheduler.extensions.get("spans"), "spans_search_by_name", {})
        for span in spans.get(("default",), ()):
            if span.metadata:
                del span.metadata["collections"][1:]

    call_scheduler(client, lambda: client.run_on_scheduler(drop, asynchronous=True), CALL_SECONDS)


def run_one(
    client: Client,
    function: Callable[[Any, Callable[[str], None]], Json],
    argument: Any,
    job: JobConfig,
    *,
    on_step: Callable[[str], None] = lambda step: None,
    on_turn: Callable[[], None] = lambda: None,
) -> Json:
    """Run one function on one worker and wait for it, but not for ever.

    Parameters
    ----------
    client
        A connected client.
    function
        Takes the argument and a function that it calls with a description of each of its steps.
    argument
        Its argument.
    job
        How long to wait.
    on_step
        Called in this thread with each step.
    on_turn
        Called in this thread several times a second.

    Raises
    ------
    ClusterError
        If the scheduler is lost, the worker dies again and again, or nothing came in ``stall_seconds``.
    """
    name = f"{function.__name__}-{uuid.uuid4().hex[:8]}"
    steps: queue.SimpleQueue[str] = queue.SimpleQueue()
    client.subscribe_topic(_STEPS_TOPIC + name, lambda event: steps.put(event[1]))
    future = client.compute(dask.delayed(_in_scorer, pure=False)(function, argument, name, dask_key_name=name))
    started = time.monotonic()
    while not future.done():
        time.sleep(_POLL_SECONDS / 5)
        while not steps.empty():
            on_step(steps.get())
        on_turn()
        if client.status != "running":
            raise scheduler_lost()
        if time.monotonic() - started > job.stall_seconds:
            raise ClusterError(
                f"distillation.job.stall_seconds: expected the {function.__name__} task to end within "
                f"{job.stall_seconds:g} s, got nothing; look at the workers' logs, then run the same command again "
                "and allow more if the teacher is that slow"
            )
    if future.status == "finished":
        return result_of(client, future, job.stall_seconds)
    error = exception_of(future)
    if isinstance(error, KilledWorker):
        raise ClusterError(
            f"distillation.cluster: expected a result of the {function.__name__} task, got a worker that died "
            f"{error.allowed_failures + 1} times; it may be out of memory: lower batch_tokens, or use fewer workers"
        ) from error
    if isinstance(error, OSError) and not isinstance(error, DaskLogitsError) and no_room(error) is None:
        raise ClusterError(
            f"distillation.cluster: expected a result of the {function.__name__} task, got {error} from its worker; "
            "see that workers can read teacher and data, then run the same command again"
        ) from error
    raise error


def _in_scorer(function: Callable[[Any, Callable[[str], None]], Json], argument: Any, name: str) -> Json:
    worker = get_worker()
    found: Json = SCORER.submit(function, argument, lambda step: worker.log_event(_STEPS_TOPIC + name, step)).result()
    return found


def result_of(client: Client, future: Future, seconds: float) -> Json:
    """Fetch a result; where its worker has just died, another computes it first.

    Raises
    ------
    ClusterError
        If the scheduler is lost, or it took more than ``seconds``.
    """
    receipt: Json = call_scheduler(client, lambda: client.gather([future], asynchronous=True), seconds)[0]
    return receipt


def exception_of(future: Future) -> BaseException:
    """Return what a future failed with.

    Raises
    ------
    ClusterError
        If nothing did: the scheduler is lost.
    """
    error: BaseException | None = future.exception() if future.status == "error" else None
    if error is None or isinstance(error, FutureCancelledError):
        raise scheduler_lost()
    return error


def scheduler_lost() -> ClusterError:
    """Return the error of a scheduler that is gone."""
    return ClusterError(
        "distillation.cluster: expected a running scheduler, got none: it cancelled our work or its connection was "
        "lost; everything committed is kept, run the same command again"
    )
