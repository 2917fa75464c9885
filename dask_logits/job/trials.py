"""Score some rows of a partition on one worker, without storing the results."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Iterator
from typing import Any

import dask
from distributed import Client

from dask_logits.errors import ClusterError
from dask_logits.job.executor import not_of_rows
from dask_logits.job.remote import try_on_worker
from dask_logits.job.retry_policy import classify
from dask_logits.job.roster import Roster
from dask_logits.job.scheduler import (
    CALL_SECONDS,
    exception_of,
    holders,
    present_workers,
    restart_worker,
    run_on_scheduler,
    scheduler_lost,
)
from dask_logits.worker.task import PartitionTask

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_LOOK_SECONDS = 1.0


def passes(client: Client, task: PartitionTask, first: int, n_rows: int, seconds: float, roster: Roster) -> bool:
    """Score rows on a worker. Return whether they pass.

    Parameters
    ----------
    client
        A connected client with no other work.
    task
        The partition.
    first, n_rows
        The rows, counted from the partition's first.
    seconds
        Limit of an attempt. A worker that takes longer is restarted, and the rows have failed. Time without a worker,
        or on one that left, does not count.
    roster
        Workers that get no work.

    Raises
    ------
    ClusterError
        If the scheduler is lost, no worker accepts an attempt, or it ends with an error that no row can cause.
    """
    while (found := _tried(client, task, first, n_rows, seconds, roster)) is None:
        logger.info("partition %s: a try was lost; again", task.partition.name)
    return found


def _tried(client: Client, task: PartitionTask, first: int, n_rows: int, seconds: float, roster: Roster) -> bool | None:
    """Whether rows pass. None if unknown, because a worker was lost before it reported the result."""
    if client.status != "running":
        raise scheduler_lost()
    name = f"try-rows-{task.partition.name}-{uuid.uuid4().hex[:8]}"
    delayed = dask.delayed(try_on_worker, pure=False)(task, first, n_rows, dask_key_name=name)
    future = client.compute(delayed, optimize_graph=False, workers=_allowed(client, roster))
    holder, since = None, time.monotonic()
    looked = since
    try:
        while not future.done():
            if client.status != "running":
                raise scheduler_lost()
            now = time.monotonic()
            if now - looked > _LOOK_SECONDS or now - since > seconds:
                looked = now
                if (current := holders(client).get(name)) != holder:
                    holder, since = current, now
            if now - since > seconds:
                if holder is None:
                    raise ClusterError(
                        f"distillation.cluster: expected a worker within {seconds:g} s "
                        "(distillation.job.stall_seconds), got none; look at the workers' logs"
                    )
                future.release()
                restart_worker(client, holder)
                return False
            time.sleep(_POLL_SECONDS)
        if future.status == "error":
            error = exception_of(future)
            # The death of a worker (KilledWorker) counts as "data".
            if classify(error) != "data":
                raise not_of_rows(task, error) from error
            logger.info("%d rows from %d on fail: %r", n_rows, task.partition.first_row + first, error)
        return {"finished": True, "error": False}.get(str(future.status))
    finally:
        future.release()


def _allowed(client: Client, roster: Roster) -> list[str] | None:
    """Return the workers that may get work. None: all."""
    if not roster.left_out:
        return None
    return sorted(roster.usable(present_workers(client))) or None


@contextlib.contextmanager
def two_deaths_are_enough(client: Client) -> Iterator[None]:
    """Fail a task when a second worker dies during it. The first may have died of an earlier task."""

    def allow(failures: int, dask_scheduler: Any = None) -> int:
        before: int = dask_scheduler.allowed_failures
        dask_scheduler.allowed_failures = failures
        return before

    before: int = run_on_scheduler(client, allow, 1)
    try:
        yield
    finally:
        # A lost scheduler has nothing to restore.
        with contextlib.suppress(ClusterError):
            run_on_scheduler(client, allow, before)
