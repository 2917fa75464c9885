"""Committed state of a run: the rows of its cache, then partitions with valid receipts.

It is computed from files only, without a running process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

from dask_logits.cache.find import CacheFiles
from dask_logits.errors import CacheError
from dask_logits.files.atomic import is_there, names_in, unreadable
from dask_logits.records import Statistics
from dask_logits.run.folder import RunFolder, Share
from dask_logits.run.plan import Partition
from dask_logits.run.plan_log import PlanLog
from dask_logits.run.records import Manifest, Receipt

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


def open_run_cache(run: RunFolder, manifest: Manifest | None = None) -> CacheFiles | None:
    """Open a run's cache. None if it is missing, belongs to another run, or holds one static worker's share only.

    Parameters
    ----------
    run
        The run folder.
    manifest
        Its manifest. None: read from its file.

    Raises
    ------
    CacheError
        If it exists but cannot be read. Only the user may decide to recompute it.
    """
    manifest = manifest or run.manifest()
    path = next((path for path in (run.cache_path, run.index_path) if is_there(path)), None)
    if manifest is None or path is None:
        return None
    cache = CacheFiles.open(path)
    readers = cache.readers
    if any(reader.header.run_id != manifest.run_id for reader in readers):
        return None
    # A numbered file is partial, too, but the index names all of them.
    numbered = [reader.header.shard for reader in readers] == list(range(len(readers))) and path == run.index_path
    partial = any(reader.attributes.get("partial") for reader in readers)
    return None if partial and not numbered else cache


def cache_state(run: RunFolder) -> list[int]:
    """Return values that change when another cache is written."""
    paths = (run.cache_path, run.index_path)
    return [path.stat().st_ino if is_there(path) else 0 for path in paths]


def read_consistently(run: RunFolder, read: Callable[[], _T]) -> _T:
    """Read a run. Do it again if the job wrote its cache in the meantime, because it then deleted its partitions."""
    before = cache_state(run)
    found = read()
    return found if cache_state(run) == before else read()


@dataclass(frozen=True, kw_only=True)
class PartitionState:
    """The state of one planned partition.

    Parameters
    ----------
    partition
        The partition.
    is_cached
        Whether the cache contains it. Its receipt is then not needed.
    receipt
        Its receipt. None if there is none, or if it is invalid: of another run or plan, without its targets, damaged.
    problem
        Why the receipt on disk is invalid. None if there is none, or if it is valid.
    error
        The error of reading the receipt.
    """

    partition: Partition
    is_cached: bool
    receipt: Receipt | None = None
    problem: str | None = None
    error: CacheError | None = None

    @property
    def is_done(self) -> bool:
        """Whether its targets exist, in the cache or in a committed partition."""
        return self.is_cached or self.receipt is not None

    @property
    def is_unreadable(self) -> bool:
        """Whether its receipt cannot be read now but may be intact."""
        return self.error is not None and unreadable(self.error)


class Listing:
    """Names in a run folder at one moment.

    Parameters
    ----------
    run
        The run folder.

    Attributes
    ----------
    receipts : set of int
        Partitions that have a receipt.

    Raises
    ------
    CacheError
        If a folder cannot be listed.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.receipts = run.receipt_indices()

    @cached_property
    def attempts(self) -> set[str]:
        """Folders of targets. Listed when they are first asked for: a complete run needs none."""
        return set(names_in(self.run.partitions_path))


@dataclass(frozen=True, kw_only=True)
class RunState:
    """One reading of a run folder. Everything that asks whether a partition is done asks this.

    Parameters
    ----------
    run, manifest, log
        The run, its manifest and its plan.
    cache
        Its cache, or None.
    cache_error
        Why the cache cannot be read. Its contents are then unknown.
    """

    run: RunFolder
    manifest: Manifest
    log: PlanLog
    cache: CacheFiles | None
    cache_error: CacheError | None

    @classmethod
    def find(cls, run: RunFolder, log: PlanLog | None = None) -> RunState | None:
        """Read a run folder, or return None if it has no manifest.

        Raises
        ------
        CacheError
            If the manifest or the plan is damaged or cannot be read.
        """
        manifest = run.manifest()
        if manifest is None:
            return None
        cache = error = None
        try:
            cache = open_run_cache(run, manifest)
        except CacheError as caught:
            error = caught
        return cls(run=run, manifest=manifest, log=log or PlanLog(run), cache=cache, cache_error=error)

    @property
    def n_cached(self) -> int:
        """Number of rows in the cache, from 0.

        Raises
        ------
        CacheError
            If the cache cannot be read.
        """
        if self.cache_error is not None:
            raise self.cache_error
        return 0 if self.cache is None else self.cache.n_rows

    @property
    def is_complete(self) -> bool:
        """Whether the plan has ended and the cache holds all of it.

        Raises
        ------
        CacheError
            If that depends on a cache that cannot be read.
        """
        if self.log.end is None or self.log.n_unread:
            return False
        return self.n_cached == self.log.n_rows and self.cache is not None

    def partitions(
        self, listing: Listing | None = None, *, wanted: Callable[[int], bool] = lambda index: True
    ) -> Iterator[PartitionState]:
        """Yield the state of the planned partitions in order. Each receipt is read once.

        Parameters
        ----------
        listing
            Names in the folder. None: they are listed now.
        wanted
            Whether to look at the partition with this index.

        Raises
        ------
        CacheError
            If the receipts cannot be listed, or the file system cannot tell whether targets exist.
        """
        listing = listing or Listing(self.run)
        cached_rows = 0 if self.cache is None else self.cache.n_rows
        for partition in self.log.partitions(wanted):
            # A partition without rows could not be read and is never in the cache.
            is_cached = 0 < partition.n_rows <= cached_rows - partition.first_row
            if partition.index in listing.receipts:
                yield self._with_receipt(partition, is_cached, listing)
            else:
                yield PartitionState(partition=partition, is_cached=is_cached)

    def done_of(self, indices: Collection[int]) -> set[int]:
        """Return those of some partitions that are done. Only their receipts are read.

        Raises
        ------
        CacheError
            If a receipt that decides it cannot be read now.
        """
        done = set()
        for each in self.partitions(wanted=lambda index: index in indices):
            if each.is_done:
                done.add(each.partition.index)
            elif each.error is not None and each.is_unreadable:
                raise each.error
        return done

    def _with_receipt(self, partition: Partition, is_cached: bool, listing: Listing) -> PartitionState:
        try:
            receipt = self.run.receipt(partition.index)
        except CacheError as error:
            return PartitionState(partition=partition, is_cached=is_cached, problem=error.message, error=error)
        if receipt is None:
            return PartitionState(partition=partition, is_cached=is_cached)
        rows = (receipt.first_row, receipt.n_rows)
        is_ours = receipt.run_id == self.manifest.run_id and rows == (partition.first_row, partition.n_rows)
        if is_ours and (is_cached or self.cache_error is not None or self._has_targets(receipt, listing)):
            return PartitionState(partition=partition, is_cached=is_cached, receipt=receipt)
        problem = "its arrays are gone, or another run's"
        return PartitionState(partition=partition, is_cached=is_cached, problem=problem)

    def _has_targets(self, receipt: Receipt, listing: Listing) -> bool:
        if receipt.attempt in listing.attempts:
            return True
        # The folder may be a link to an unmounted file system, or a network file system's listing may be old.
        folder = self.run.partitions_path
        return is_there(folder) and is_there(folder / receipt.attempt)

    def committed(self) -> Iterator[Receipt]:
        """Yield the valid receipts in order.

        Raises
        ------
        CacheError
            If a receipt cannot be read, or if one is damaged and the cache does not contain its partition.
        """
        for each in self.partitions():
            if each.error is not None and (each.is_unreadable or not each.is_cached):
                raise each.error
            if each.receipt is not None:
                yield each.receipt


@dataclass(kw_only=True)
class Done:
    """Done partitions of one driver's share, with their rows and the sums in their receipts."""

    indices: set[int] = field(default_factory=set)
    rows: int = 0
    statistics: Statistics = field(default_factory=Statistics)

    def add(self, each: PartitionState) -> None:
        """Add a done partition."""
        self.indices.add(each.partition.index)
        self.rows += each.partition.n_rows
        if each.receipt is not None:
            self.statistics += each.receipt.statistics


def discard_stale(state: RunState, share: Share) -> Done:
    """Delete the invalid receipts of a share, so that their partitions are recomputed, and return what is done.

    Each receipt of the share is read once. Those of partitions that the cache contains are kept.

    Raises
    ------
    CacheError
        If the cache or a receipt of the share cannot be read.
    """
    if state.cache_error is not None:
        raise state.cache_error

    def read() -> tuple[Done, list[PartitionState]]:
        done, stale = Done(), []
        now = replace(state, cache=open_run_cache(state.run, state.manifest))
        for each in now.partitions(wanted=share.owns):
            if each.error is not None and each.is_unreadable:
                raise each.error
            if each.is_done:
                done.add(each)
            elif each.problem is not None:
                stale.append(each)
        return done, stale

    done, stale = read_consistently(state.run, read)
    for each in stale:
        logger.warning("partition %s is recomputed: %s", each.partition.name, each.problem)
        state.run.receipt_path(each.partition.index).unlink(missing_ok=True)
    return done
