"""What a run folder holds of its plan: the cache as far as it goes, then partitions whose receipts count.

Files only; nothing has to be alive.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from dask_logits.job.manifest import RunFolder, Share
from dask_logits.job.planlog import PlanLog
from dask_logits.store.cache import CacheReader
from dask_logits.store.durable import Json

logger = logging.getLogger(__name__)


def open_run_cache(run: RunFolder) -> CacheReader | None:
    """Open a run's cache; None if there is none, it is another run's, or it holds one static worker's share only.

    Raises
    ------
    CacheError
        If it is there and cannot be read: nobody but the user may decide to compute it again.
    """
    manifest = run.manifest()
    if manifest is None or not run.cache_path.exists():
        return None
    cache = CacheReader(run.cache_path)
    whole = cache.attributes.get("run_id") == manifest["run_id"] and not cache.attributes.get("partial")
    return cache if whole else None


def is_complete(run: RunFolder, log: PlanLog) -> bool:
    """Whether the cache holds the whole plan, and the plan has ended."""
    if log.end is None:
        return False
    cache = open_run_cache(run)
    return cache is not None and int(cache.attributes["n_rows"]) == log.n_rows


def committed(run: RunFolder, log: PlanLog, *, forget: Share | None = None) -> Iterator[Json]:
    """Yield the receipts of all partitions whose targets are there, in order.

    Arrays may have been deleted from outside, and a worker of a run that was replaced may have committed late.

    Parameters
    ----------
    run, log
        The run and its plan.
    forget
        Delete the other receipts of this share, so that their partitions are computed again.
    """
    manifest = run.manifest()
    if manifest is None:
        return
    cache = open_run_cache(run)
    cached_rows = 0 if cache is None else int(cache.attributes["n_rows"])
    for partition in log.partitions():
        receipt = run.receipt(partition.index)
        if receipt is None:
            continue
        cached = receipt["first_row"] + receipt["n_rows"] <= cached_rows
        place = (receipt["first_row"], receipt["n_rows"]) == (partition.first_row, partition.n_rows)
        ours = receipt["run_id"] == manifest["run_id"] and place
        if ours and (cached or (run.partitions_path / receipt["attempt"]).exists()):
            yield receipt
        elif forget is not None and forget.owns(partition.index):
            logger.warning("partition %s: arrays gone, or another run's; computing it again", partition.name)
            run.receipt_path(partition.index).unlink(missing_ok=True)
