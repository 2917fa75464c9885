"""Names, version and checksums shared by the writer and reader of a cache. ``docs/FORMAT.md`` specifies them."""

from __future__ import annotations

import zlib
from typing import Any, Literal

import numpy as np
from pydantic import Field

from dask_logits.fields import Count, Digest, Record
from dask_logits.records import BLOCK_ARRAYS, DOCUMENT_ARRAYS, Array, Statistics

FORMAT = "dask_logits"
FORMAT_VERSION = "1.0"
CRC_BLOCK_BYTES = 1 << 20
# Every array begins at a multiple of it, so that programs can map values of any dtype where they lie.
ALIGNMENT_BYTES = 8
DOCUMENTS = (*DOCUMENT_ARRAYS, "document_start")
BLOCKS = (*BLOCK_ARRAYS, "block_start")
# HDF5's registered number of the zstd filter (https://github.com/HDFGroup/hdf5_plugins).
ZSTD_FILTER = 32_015
# Of each chunk of a chunked array: name → dtype.
INDEX = {"offset": "<u8", "size": "<u4", "crc32": "<u4"}


class Header(Record):
    """Attributes of a cache that a reader checks. ``docs/FORMAT.md`` describes them."""

    n_tokens: Count
    n_entries: Count
    n_documents: Count
    n_targets: Count | None = None
    n_target_entries: Count | None = None
    top_k: Count
    draws: Count | None = None
    vocab_size: Count
    crc32_block_bytes: Count = Field(default=CRC_BLOCK_BYTES, gt=0)
    content_digest: Digest
    n_blocks: Count | None = None
    n_rows: Count | None = None
    total_workers: Count | None = None
    tokenizer_ids: Count | None = None
    shard: Count | None = None
    fingerprint: str | None = None
    run_id: str | None = None
    source_precision: Literal[8, 10, 12] | None = None
    plan_digest: str | None = None
    plan_end: str | None = None
    tokenizer_map_digest: str | None = None
    what: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    statistics: Statistics | None = None


class CompactHeader(Header):
    """Attributes of a cache in the compact profile that a reader checks."""

    precision: Literal[8, 10, 12]
    chunk_tokens: Count


class BlockCrc:
    """CRC-32 of every block of a stream of arrays.

    Parameters
    ----------
    block_bytes
        Bytes of a block.
    """

    def __init__(self, block_bytes: int = CRC_BLOCK_BYTES) -> None:
        self._block_bytes = block_bytes
        self._done: list[int] = []
        self._crc = 0
        self._room = block_bytes

    def update(self, block: Array) -> None:
        """Add the next entries."""
        data: memoryview = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
        while len(data):
            piece = data[: self._room]
            self._crc = zlib.crc32(piece, self._crc)
            self._room -= len(piece)
            data = data[len(piece) :]
            if self._room == 0:
                self._done.append(self._crc)
                self._crc, self._room = 0, self._block_bytes

    def values(self) -> list[int]:
        """Return the checksums so far, including that of a partial last block."""
        return self._done if self._room == self._block_bytes else [*self._done, self._crc]


def round_up(n: int, to: int) -> int:
    """Round up to a multiple.

    >>> round_up(5, 4), round_up(8, 4)
    (8, 8)
    """
    return -(-n // to) * to
