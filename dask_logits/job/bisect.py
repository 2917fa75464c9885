"""Find the rows that make a partition fail, by scoring halves of it without storing the results."""

from __future__ import annotations

import contextlib
import dataclasses
import logging

from dask_logits.job.executor import Executor, Failed, has_run
from dask_logits.run.failures import Failure
from dask_logits.worker.task import PartitionTask

logger = logging.getLogger(__name__)

# A failure with more rows than this is not caused by one row.
_MOST_ROWS = 8
# Kinds of failures that rows can cause.
_OF_ROWS = ("data", "worker-death", "hang")


def bisect(failure: Failure, executor: Executor) -> Failure:
    """Find the rows that make a partition fail.

    Parameters
    ----------
    failure
        The failed partition.
    executor
        Scores some rows of it at a time. It has no other work.

    Returns
    -------
    Failure
        With at most 8 rows. With none if each row passes on its own, or if the partition fails without any row, too.

    Raises
    ------
    ClusterError
        If scoring ends with an error that no row can cause.
    """
    task = failure.task
    assert isinstance(task, PartitionTask)
    if not _passes(executor, task, 0, 0):
        logger.error("partition %s: its files or the teacher make it fail, and not a row", task.partition.name)
        return failure
    rows: list[int] = []
    waiting = [(0, task.partition.n_rows)]
    while waiting and len(rows) < _MOST_ROWS:
        first, n_rows = waiting.pop()
        if _passes(executor, task, first, n_rows):
            continue
        if n_rows == 1:
            rows.append(task.partition.first_row + first)
            logger.error("partition %s: dataset row %d makes it fail", task.partition.name, rows[-1])
        else:
            half = n_rows // 2
            waiting += [(first + half, n_rows - half), (first, half)]
    return failure.model_copy(update={"rows": tuple(rows)})


def _passes(executor: Executor, task: PartitionTask, first: int, n_rows: int) -> bool:
    trial = dataclasses.replace(task, trial=(first, n_rows))
    with contextlib.closing(executor.run(iter([trial]), task.run_id)) as events:
        failures = [event.failure for event in events if isinstance(event, Failed)]
    for failure in failures:
        if failure.kind not in _OF_ROWS:
            raise has_run(
                f"partition {task.partition.name}: expected some of its rows to pass or fail, got {failure.reason}, "
                "which no row can cause; fix the cause, then run the same command again"
            )
    return not failures
