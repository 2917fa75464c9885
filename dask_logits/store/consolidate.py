"""Committed partitions → one cache: a single writer, constant memory, all or nothing.

Every array is compared with the digests of its receipt while it is copied. The file is written aside, its completeness
flag last, flushed, read back against its checksums, and only then renamed over an older one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dask_logits.errors import CacheError
from dask_logits.records import DOCUMENT_ARRAYS, TOKEN_ARRAYS, ContentDigest
from dask_logits.store.cache import CacheReader, CacheWriter
from dask_logits.store.durable import sync
from dask_logits.store.partition import PartitionReader, compare_digest


def consolidate(
    cache_path: Path,
    partitions_path: Path,
    receipts: Sequence[Mapping[str, Any]],
    *,
    n_rows: int,
    top_k: int,
    vocab_size: int,
    attributes: Mapping[str, Any],
    on_partition: Callable[[int], None] = lambda done: None,
) -> str:
    """Write the cache from all partitions of a run.

    Parameters
    ----------
    cache_path
        Where the cache goes.
    partitions_path
        Folder of the attempts the receipts name.
    receipts
        Of every partition, in order.
    n_rows, top_k, vocab_size
        Of the run.
    attributes
        Further attributes of the file.
    on_partition
        Called with the number of partitions done.

    Returns
    -------
    str
        The content digest.

    Raises
    ------
    CacheError
        If a partition is missing or damaged, or rows are not consecutive. An older cache stays as it was.
    """
    _check_rows(cache_path, receipts, n_rows)
    for stale in cache_path.parent.glob(f".{cache_path.name}.*.tmp"):
        stale.unlink()
    aside = cache_path.with_name(f".{cache_path.name}.{os.getpid()}.tmp")
    sizes = {
        "n_tokens": sum(receipt["statistics"]["tokens"] for receipt in receipts),
        "n_documents": sum(receipt["statistics"]["documents"] for receipt in receipts),
    }
    with CacheWriter(aside, **sizes, top_k=top_k, vocab_size=vocab_size) as writer:
        start = 0
        for done, receipt in enumerate(receipts, 1):
            start = _copy(writer, PartitionReader(partitions_path / receipt["attempt"]), receipt, start)
            on_partition(done)
        content_digest = writer.finish(attributes)
        CacheReader(aside).verify_checksums()
    aside.replace(cache_path)
    sync(cache_path.parent)
    return content_digest


def _copy(writer: CacheWriter, partition: PartitionReader, receipt: Mapping[str, Any], start: int) -> int:
    """Copy one partition; return the first token of the next."""
    for name in (*TOKEN_ARRAYS, *DOCUMENT_ARRAYS):
        digest = ContentDigest()
        for block in partition.blocks(name):
            digest.update(name, block)
            writer.append(name, block)
            if name == "document_length":
                ends = start + np.cumsum(block, dtype=np.uint64)
                writer.append("document_start", (ends - block).astype(np.uint64))
                start = int(ends[-1])
        expected = receipt["digests"][name]
        if digest.array_digests():
            compare_digest(partition.path, name, digest.array_digests()[name], expected)
        elif receipt["statistics"]["tokens"]:
            raise CacheError(f"{partition.path}: expected {name}, got no entries", str(partition.path))
    return start


def _check_rows(cache_path: Path, receipts: Sequence[Mapping[str, Any]], n_rows: int) -> None:
    row = 0
    for receipt in receipts:
        if receipt["first_row"] != row:
            raise CacheError(
                f"{cache_path}: expected a partition from row {row}, got one from row {receipt['first_row']}",
                str(cache_path),
            )
        row += receipt["n_rows"]
    if row != n_rows:
        raise CacheError(f"{cache_path}: expected {n_rows} rows of partitions, got {row}", str(cache_path))
