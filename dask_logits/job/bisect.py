"""Find the rows that make a partition fail, by scoring halves of it without storing the results."""

from __future__ import annotations

import logging
from collections.abc import Callable

from dask_logits.run.failures import Failure
from dask_logits.worker.task import PartitionTask

logger = logging.getLogger(__name__)

# A failure with more rows than this is not caused by one row.
_MOST_ROWS = 8


def bisect(failure: Failure, passes: Callable[[PartitionTask, int, int], bool]) -> Failure:
    """Find the rows that make a partition fail.

    Parameters
    ----------
    failure
        The failed partition.
    passes
        Whether some rows of it pass (:meth:`dask_logits.job.executor.Executor.passes`).

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
    if not passes(task, 0, 0):
        logger.error("partition %s: its files or the teacher make it fail, and not a row", task.partition.name)
        return failure
    rows: list[int] = []
    waiting = [(0, task.partition.n_rows)]
    while waiting and len(rows) < _MOST_ROWS:
        first, n_rows = waiting.pop()
        if passes(task, first, n_rows):
            continue
        if n_rows == 1:
            rows.append(task.partition.first_row + first)
            logger.error("partition %s: dataset row %d makes it fail", task.partition.name, rows[-1])
        else:
            half = n_rows // 2
            waiting += [(first + half, n_rows - half), (first, half)]
    return failure.model_copy(update={"rows": tuple(rows)})
