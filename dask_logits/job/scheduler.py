"""Scheduler and worker calls with timeouts.

distributed keeps connecting to a lost scheduler for minutes, and waits forever for a result that is no longer being
computed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from distributed import Client, Future
from distributed.client import FutureCancelledError
from distributed.comm import get_address_host_port

from dask_logits.errors import CacheError, ClusterError
from dask_logits.files.atomic import read_json

logger = logging.getLogger(__name__)

CALL_SECONDS = 20
_RESTART_SECONDS = 60
_POLL_SECONDS = 0.5
_FILE_POLL_SECONDS = 0.2
_PROBE_SECONDS = 5.0


class SchedulerLostError(ClusterError):
    """The client is currently not connected to its scheduler."""


def address_in(file: Path, seconds: float, where: str) -> str:
    """Return the address in the file of a scheduler, waiting for it if necessary.

    ``Client(scheduler_file=…)`` of distributed 2026.7.1 waits forever for a missing file.

    Parameters
    ----------
    file
        The file.
    seconds
        Maximum waiting time.
    where
        What named the file, for the message.

    Raises
    ------
    ClusterError
        If there is no address in time.
    """
    deadline = time.monotonic() + seconds
    if not file.exists():
        logger.info("waiting for %s, at most %g s", file, seconds)
    while True:
        got = "none"
        # The scheduler first opens its file and then writes it.
        try:
            address = (read_json(file) or {}).get("address")
        except CacheError as error:
            address, got = None, error.message
        if isinstance(address, str):
            return address
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{where}: expected a scheduler's address in {str(file)!r} within {seconds:g} s, got {got}; start "
                "`dask scheduler --scheduler-file` with it, on a file system that all machines see"
            )
        time.sleep(_FILE_POLL_SECONDS)


def call_scheduler(client: Client, function: Callable[[], Awaitable[Any]], seconds: float = CALL_SECONDS) -> Any:
    """Call the scheduler, and stop waiting when the client has lost it. distributed keeps connecting for minutes.

    Raises
    ------
    SchedulerLostError
        If the scheduler is lost, or does not answer within ``seconds``.
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


def run_on_scheduler(client: Client, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in the scheduler's process.

    It must be defined inside another one, to be pickled by value: the scheduler may not have this package
    (distributed 2026.7.1).
    """
    return call_scheduler(client, lambda: client.run_on_scheduler(function, *arguments, asynchronous=True))


def present_workers(client: Client) -> dict[str, Any]:
    """Return address → facts of all workers.

    ``Client.scheduler_info()`` lists only five, or waits forever when the scheduler is gone.
    """
    scheduler = client.scheduler
    workers: dict[str, Any] = call_scheduler(client, lambda: scheduler.identity(n_workers=-1))["workers"]
    return workers


def holders(client: Client) -> dict[str, str]:
    """Return key → worker address for all tasks assigned to a worker."""
    scheduler = client.scheduler
    found = call_scheduler(client, lambda: scheduler.processing(workers=None))
    return {key: worker for worker, keys in found.items() for key in keys}


def restart_worker(client: Client, address: str) -> None:
    """Restart a worker through its nanny. A worker without a nanny is closed.

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


def result_of(client: Client, future: Future, seconds: float) -> Any:
    """Fetch a result. If its worker has just died, another worker computes it first.

    Raises
    ------
    ClusterError
        If the scheduler is lost, or the call took more than ``seconds``.
    """
    return call_scheduler(client, lambda: client.gather([future], asynchronous=True), seconds)[0]


def exception_of(future: Future) -> BaseException:
    """Return the exception of a failed future.

    Raises
    ------
    ClusterError
        If there is none, because the scheduler is lost.
    """
    error: BaseException | None = future.exception() if future.status == "error" else None
    if error is None or isinstance(error, FutureCancelledError):
        raise scheduler_lost()
    return error


def erred_on(client: Client, future: Future) -> str | None:
    """Return the worker on which a task raised its exception, or None if the scheduler does not know.

    Raises
    ------
    SchedulerLostError
        If the scheduler is lost.
    """

    def look_up(key: str, dask_scheduler: Any) -> str | None:
        state = dask_scheduler.tasks.get(key)
        return next(iter((state and state.erred_on) or ()), None)

    found: str | None = run_on_scheduler(client, look_up, future.key)
    return found


def wait_for_scheduler(client: Client, seconds: float) -> Iterator[None]:
    """Wait until the scheduler answers again, and yield about once a second meanwhile.

    If the scheduler's machine refuses connections, the scheduler has ended, which is detected within 20 s. A machine
    that does not answer may be cut off temporarily, so waiting continues.

    Parameters
    ----------
    client
        The client. It reconnects by itself.
    seconds
        Maximum waiting time.

    Raises
    ------
    ClusterError
        If it does not answer in time.
    """
    address = str(client.scheduler.address if client.scheduler is not None else client)
    logger.warning(
        "no connection to the scheduler at %s; waiting for it up to distillation.job.stall_seconds=%g s",
        address,
        seconds,
    )
    started = heard = time.monotonic()
    while (now := time.monotonic()) - started <= seconds:
        yield
        if client.status not in ("running", "connecting"):
            raise scheduler_lost()
        if client.status == "running":
            with contextlib.suppress(SchedulerLostError):
                call_scheduler(client, lambda: client.scheduler.identity(n_workers=0))
                logger.warning("the scheduler at %s answers again after %.0f s", address, time.monotonic() - started)
                return
        if not _refuses(address):
            heard = time.monotonic()
        if now - heard > CALL_SECONDS:
            raise scheduler_lost()
        time.sleep(_POLL_SECONDS)
    raise ClusterError(
        f"distillation.job.stall_seconds: expected the scheduler at {address} to answer within {seconds:g} s, got no "
        "answer; check the network between this machine and the scheduler. Everything committed is kept: run the same "
        "command again"
    )


def _refuses(address: str) -> bool:
    """Whether the scheduler's machine answers but refuses connections to its port."""
    try:
        host, port = get_address_host_port(address, strict=True)
        with socket.create_connection((host, port), timeout=_PROBE_SECONDS):
            return False
    except ConnectionRefusedError:
        return True
    except (OSError, ValueError):
        return False


def scheduler_lost() -> SchedulerLostError:
    """Return the error for a lost scheduler."""
    return SchedulerLostError(
        "distillation.cluster: expected a running scheduler, got none: it cancelled our work or its connection was "
        "lost; everything committed is kept, run the same command again"
    )
