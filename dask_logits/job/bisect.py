"""Find the rows that make a partition fail, by scoring halves of it without storing the results."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Iterator
from typing import Any

import dask
from distributed import Client

from dask_logits.config import JobConfig
from dask_logits.errors import ClusterError
from dask_logits.job.dispatch import STAGES
from dask_logits.job.roster import Roster
from dask_logits.job.scheduler import CALL_SECONDS, call_scheduler, holders, restart_worker, scheduler_lost
from dask_logits.run.failures import Failure
from dask_logits.worker.task import PartitionTask, try_rows

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
# A failure with more rows than this is not caused by one row.
_MOST_ROWS = 8


def bisect(client: Client, failure: Failure, job: JobConfig, roster: Roster | None = None) -> Failure:
    """Find the rows that make a partition fail.

    Parameters
    ----------
    client
        A connected client with no other work.
    failure
        The failed partition.
    job
        Settings. ``stall_seconds`` limits each attempt.
    roster
        Workers that get no work. None: all get work.

    Returns
    -------
    Failure
        With at most 8 rows, or with none if each row passes on its own.

    Raises
    ------
    ClusterError
        If the scheduler is lost, or no worker accepts an attempt.
    """
    task = failure.task
    assert isinstance(task, PartitionTask)
    rows: list[int] = []
    waiting = [(0, task.partition.n_rows)]
    with _two_deaths_are_enough(client):
        while waiting and len(rows) < _MOST_ROWS:
            first, n_rows = waiting.pop()
            if _passes(client, task, first, n_rows, job.stall_seconds, roster):
                continue
            if n_rows == 1:
                rows.append(task.partition.first_row + first)
                logger.error("partition %s: dataset row %d makes it fail", task.partition.name, rows[-1])
            else:
                half = n_rows // 2
                waiting += [(first + half, n_rows - half), (first, half)]
    return failure.found_in(tuple(rows))


def _try_on_worker(task: PartitionTask, first: int, n_rows: int) -> None:
    try_rows(task, first, n_rows, STAGES)


def _passes(
    client: Client, task: PartitionTask, first: int, n_rows: int, seconds: float, roster: Roster | None = None
) -> bool:
    while (found := _tried(client, task, first, n_rows, seconds, roster)) is None:
        logger.info("partition %s: a try was lost; again", task.partition.name)
    return found


def _tried(
    client: Client, task: PartitionTask, first: int, n_rows: int, seconds: float, roster: Roster | None
) -> bool | None:
    """Whether rows pass. None if unknown, because a worker was lost before it reported the result."""
    if client.status != "running":
        raise scheduler_lost()
    name = f"try-rows-{task.partition.name}-{uuid.uuid4().hex[:8]}"
    delayed = dask.delayed(_try_on_worker, pure=False)(task, first, n_rows, dask_key_name=name)
    future = client.compute(delayed, optimize_graph=False, workers=_allowed(client, roster))
    started = time.monotonic()
    try:
        while not future.done():
            if client.status != "running":
                raise scheduler_lost()
            if time.monotonic() - started > seconds:
                holder = holders(client).get(name)
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
            end = task.partition.first_row + first + n_rows - 1
            logger.info("rows %d to %d fail: %r", task.partition.first_row + first, end, future.exception(CALL_SECONDS))
        return {"finished": True, "error": False}.get(str(future.status))
    finally:
        future.release()


def _allowed(client: Client, roster: Roster | None) -> list[str] | None:
    """Return the workers that may get work. None: all."""
    if roster is None or not roster.left_out:
        return None
    scheduler = client.scheduler
    present = call_scheduler(client, lambda: scheduler.identity(n_workers=-1), CALL_SECONDS)["workers"]
    return sorted(roster.usable(present)) or None


@contextlib.contextmanager
def _two_deaths_are_enough(client: Client) -> Iterator[None]:
    """Fail a task when a second worker dies during it. The first may have died of an earlier task."""

    def allow(failures: int, dask_scheduler: Any = None) -> int:
        before: int = dask_scheduler.allowed_failures
        dask_scheduler.allowed_failures = failures
        return before

    def set_allowed(failures: int) -> int:
        before: int = call_scheduler(
            client, lambda: client.run_on_scheduler(allow, failures, asynchronous=True), CALL_SECONDS
        )
        return before

    before = set_allowed(1)
    try:
        yield
    finally:
        # A lost scheduler has nothing to restore.
        with contextlib.suppress(ClusterError):
            set_allowed(before)
