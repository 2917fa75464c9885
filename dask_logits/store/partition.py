"""One partition as one Zarr group: written whole by one worker, read back in blocks.

Chosen: a group per *attempt*, so that two writers never share an array and nothing is ever resized (parallel appends
and writes smaller than a shard lose data without an error); one shard per array, so that a partition is a dozen
files; core codecs only (zstd with its own checksum), so that any Zarr reader opens it. A missing chunk reads as zeros
in Zarr, so readers compare digests with the receipt's.

This is one of the two homes of ``zarr``-written data; the other, :mod:`dask_logits.store.consolidate`, only reads.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dask_logits.errors import CacheError
from dask_logits.records import BLOCK_ARRAYS, DOCUMENT_ARRAYS, TOKEN_ARRAYS, Array, ContentDigest, Records
from dask_logits.store.durable import sync_tree

FORMAT = "dask_logits.partition"
VERSION = 1
BLOCK_TOKENS = 16_384


def write_partition(path: Path, records: Records) -> None:
    """Write a partition into a new group and make it durable.

    Parameters
    ----------
    path
        Folder of this attempt; must not exist.
    records
        The partition.
    """
    import zarr
    from zarr.codecs import ZstdCodec

    group = zarr.create_group(str(path), zarr_format=3)
    group.attrs.update({"format": FORMAT, "version": VERSION})
    for name, array in records.arrays():
        rows = max(1, min(len(array), BLOCK_TOKENS))
        chunk = (rows, *array.shape[1:])
        shard = (-(-len(array) // rows) * rows, *array.shape[1:]) if len(array) > rows else None
        stored = group.create_array(
            name,
            shape=array.shape,
            dtype=array.dtype,
            chunks=chunk,
            shards=shard,
            compressors=[ZstdCodec(level=1, checksum=True)],
        )
        if len(array):
            stored[:] = array
    sync_tree(path)


class PartitionReader:
    """Reads one committed partition block by block, in constant memory.

    Parameters
    ----------
    path
        Folder of the committed attempt.

    Raises
    ------
    CacheError
        If it is missing or not a partition of this version.
    """

    def __init__(self, path: Path) -> None:
        import zarr
        from zarr.errors import GroupNotFoundError

        self.path = path
        try:
            self._group: Any = zarr.open_group(str(path), mode="r")
        except (GroupNotFoundError, FileNotFoundError, ValueError) as error:
            raise CacheError(f"{path}: expected a partition, got nothing; run the job again", str(path)) from error
        found = (self._group.attrs.get("format"), self._group.attrs.get("version"))
        if found != (FORMAT, VERSION):
            raise CacheError(f"{path}: expected {FORMAT} version {VERSION}, got {found}", str(path))
        packed = [name for name in BLOCK_ARRAYS if name in self._group]
        self.names = (*TOKEN_ARRAYS, *DOCUMENT_ARRAYS, *packed)

    def blocks(self, name: str) -> Iterator[Array]:
        """Yield one array in blocks of at most 16,384 entries."""
        try:
            array = self._group[name]
            for first in range(0, array.shape[0], BLOCK_TOKENS):
                yield np.asarray(array[first : first + BLOCK_TOKENS])
        except (KeyError, ValueError, RuntimeError, OSError) as error:
            raise CacheError(
                f"{self.path}: expected to read {name}, got {error}; delete its receipt and run the job again",
                str(self.path),
            ) from error

    def records(self) -> Records:
        """Read the whole partition."""
        columns = {}
        for name in self.names:
            blocks = list(self.blocks(name))
            columns[name] = np.concatenate(blocks) if blocks else np.asarray(self._group[name][:])
        return Records(**columns)

    def check(self, digests: Mapping[str, str]) -> None:
        """Compare every array with the digests of its receipt.

        Raises
        ------
        CacheError
            At the first array that differs.
        """
        for name, expected in digests.items():
            digest = ContentDigest()
            digest.update(name, np.asarray(self._group[name][:0]))
            for block in self.blocks(name):
                digest.update(name, block)
            compare_digest(self.path, name, digest.array_digests()[name], expected)


def compare_digest(path: Path, name: str, found: str, expected: str) -> None:
    """Refuse an array whose bytes are not the ones that were committed."""
    if found != expected:
        raise CacheError(
            f"{path}: expected {name} with SHA-256 {expected[:16]}…, got {found[:16]}…: the data are damaged; "
            "delete the partition's receipt and run the job again",
            str(path),
        )


def remove_partition(path: Path) -> None:
    """Delete one attempt's folder; missing is fine."""
    shutil.rmtree(path, ignore_errors=True)
