"""Committed state of a run: the rows of its cache, then partitions with valid receipts.

It is computed from files only, without a running process.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dask_logits.cache.find import find_caches
from dask_logits.cache.reader import CacheReader
from dask_logits.errors import CacheError
from dask_logits.files.atomic import Json, is_there, unreadable
from dask_logits.records import total_digest
from dask_logits.run.folder import RunFolder, Share
from dask_logits.run.plan import Partition
from dask_logits.run.plan_log import PlanLog

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunCache:
    """A run's cache: one file, or numbered ones with an index.

    Parameters
    ----------
    path
        The file or index that a user opens.
    readers
        Readers of the files.
    """

    path: Path
    readers: tuple[CacheReader, ...]

    @property
    def n_rows(self) -> int:
        """Number of dataset rows, from 0."""
        return int(self.readers[0].attributes["n_rows"])

    @property
    def n_tokens(self) -> int:
        """Tokens of all files."""
        return sum(reader.n_tokens for reader in self.readers)

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        return sum(reader.path.stat().st_size for reader in self.readers)

    @property
    def content_digest(self) -> str:
        """Content digest of all files."""
        return total_digest(reader.attributes["content_digest"] for reader in self.readers)


def open_run_cache(run: RunFolder) -> RunCache | None:
    """Open a run's cache. None if it is missing, belongs to another run, or holds one static worker's share only.

    Raises
    ------
    CacheError
        If it exists but cannot be read. Only the user may decide to recompute it.
    """
    manifest = run.manifest()
    path = next((path for path in (run.cache_path, run.index_path) if is_there(path)), None)
    if manifest is None or path is None:
        return None
    readers = tuple(CacheReader(file) for file in find_caches(path))
    said = [reader.attributes for reader in readers]
    if any(one.get("run_id") != manifest["run_id"] for one in said):
        return None
    # A numbered file is partial, too, but the index names all of them.
    numbered = [one.get("shard") for one in said] == list(range(len(said))) and path == run.index_path
    partial = any(one.get("partial") for one in said)
    return None if partial and not numbered else RunCache(path=path, readers=readers)


def cache_state(run: RunFolder) -> list[int]:
    """Return values that change when another cache is written."""
    paths = (run.cache_path, run.index_path)
    return [path.stat().st_ino if is_there(path) else 0 for path in paths]


def is_complete(run: RunFolder, log: PlanLog) -> bool:
    """Whether the cache holds the whole plan, and the plan has ended."""
    if log.end is None or log.n_unread:
        return False
    cache = open_run_cache(run)
    return cache is not None and cache.n_rows == log.n_rows


def committed(run: RunFolder, log: PlanLog, *, forget: Share | None = None) -> Iterator[Json]:
    """Yield the receipts of all partitions whose targets exist, in order.

    Arrays may have been deleted externally, and a worker of a replaced run may have committed late.

    Parameters
    ----------
    run, log
        The run and its plan.
    forget
        Delete invalid receipts of this share, so that their partitions are recomputed, unless a cache contains them.

    Raises
    ------
    CacheError
        If a receipt cannot be read, or if it is damaged, no cache holds its partition, and `forget` is None.
    """
    manifest = run.manifest()
    if manifest is None:
        return
    cached_rows = cached_rows_of(run)
    for partition in log.partitions():
        cached = covers(cached_rows, partition)
        wrong = "its arrays are gone, or another run's"
        try:
            receipt = run.receipt(partition.index)
        except CacheError as error:
            if unreadable(error) or (forget is None and not cached):
                raise
            receipt, wrong = {}, error.message
        if receipt is None:
            continue
        if receipt and counts(run, manifest, receipt, cached_rows) and fits(receipt, partition):
            yield receipt
        elif forget is not None and forget.owns(partition.index) and not cached:
            # A cache written in the meantime may have replaced the partitions.
            cached_rows = cached_rows_of(run)
            if not covers(cached_rows, partition):
                logger.warning("partition %s is computed again: %s", partition.name, wrong)
                run.receipt_path(partition.index).unlink(missing_ok=True)
            elif receipt and counts(run, manifest, receipt, cached_rows) and fits(receipt, partition):
                yield receipt


def cached_rows_of(run: RunFolder) -> int:
    """Return the number of rows in the run's cache, from 0."""
    cache = open_run_cache(run)
    return 0 if cache is None else cache.n_rows


def covers(cached_rows: int, partition: Partition) -> bool:
    """Whether a cache of rows [0, n) contains this partition. Partitions without rows are never contained."""
    return 0 < partition.n_rows <= cached_rows - partition.first_row


def fits(receipt: Json, partition: Partition) -> bool:
    """Whether a receipt has the planned rows of its partition."""
    return (receipt["first_row"], receipt["n_rows"]) == (partition.first_row, partition.n_rows)


def counts(run: RunFolder, manifest: Json, receipt: Json, cached_rows: int) -> bool:
    """Whether a receipt belongs to this run and its targets exist, in the cache or in a partition."""
    cached = receipt["first_row"] + receipt["n_rows"] <= cached_rows
    ours = bool(receipt["run_id"] == manifest["run_id"])
    # The folder may be a link to an unmounted file system.
    return ours and (cached or (is_there(run.partitions_path) and is_there(run.partitions_path / receipt["attempt"])))
