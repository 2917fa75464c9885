"""Score some rows of a partition on one worker, without storing the results."""

from __future__ import annotations

import logging
import time
import uuid
from typing import Any

import dask
from distributed import Client

from dask_logits.errors import ClusterError
from dask_logits.job.executor import not_of_rows
from dask_logits.job.remote import try_on_worker
from dask_logits.job.retry_policy import classify
from dask_logits.job.roster import Roster
from dask_logits.job.scheduler import (
    exception_of,
    present_workers,
    restart_worker,
    run_on_scheduler,
    scheduler_lost,
)
from dask_logits.run.timings import plural
from dask_logits.worker.task import PartitionTask

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_LOOK_SECONDS = 0.2
# Dead workers after which rows have failed. The first may have died of an earlier task.
_MOST_DEATHS = 2


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
        or on one that left, does not count. The rows have also failed when a second worker dies.
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
                current, n_deaths = _look(client, name)
                if n_deaths >= _MOST_DEATHS:
                    return False
                if current != holder:
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
            logger.info("%s failed, from row %d on: %s", plural(n_rows, "row"), task.partition.first_row + first, error)
        return {"finished": True, "error": False}.get(str(future.status))
    finally:
        future.release()


def _look(client: Client, key: str) -> tuple[str | None, int]:
    """Return the worker that has an attempt, and how many workers died during it.

    The scheduler's own limit of deaths is not lowered, because it holds for other jobs, too.
    """

    # Defined inside, so that it is pickled by value: the scheduler may not have this package. (distributed 2026.7.1)
    def look_up(key: str, dask_scheduler: Any) -> tuple[str | None, int]:
        state = dask_scheduler.tasks.get(key)
        if state is None:
            return None, 0
        return state.processing_on.address if state.processing_on else None, state.suspicious

    found: tuple[str | None, int] = run_on_scheduler(client, look_up, key)
    return found


def _allowed(client: Client, roster: Roster) -> list[str] | None:
    """Return the workers that may get work. None: all."""
    if not roster.left_out:
        return None
    return sorted(roster.usable(present_workers(client))) or None
