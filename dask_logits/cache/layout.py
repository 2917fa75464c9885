"""Names, version and checksums shared by the writer and reader of a cache. ``docs/FORMAT.md`` specifies them."""

from __future__ import annotations

import zlib

import numpy as np

from dask_logits.records import BLOCK_ARRAYS, DOCUMENT_ARRAYS, Array

FORMAT = "dask_logits"
FORMAT_VERSION = "1.0"
CRC_BLOCK_BYTES = 1 << 20
DOCUMENTS = (*DOCUMENT_ARRAYS, "document_start")
BLOCKS = (*BLOCK_ARRAYS, "block_start")
# HDF5's registered number of the zstd filter (https://github.com/HDFGroup/hdf5_plugins).
ZSTD_FILTER = 32_015
# Larger than any dataset, and sums of a few such numbers fit into 64 bits.
MOST_ROWS = 1 << 48
# For each chunk of a chunked array.
INDEX = ("offset", "size", "crc32")


class BlockCrc:
    """CRC-32 of every MiB of a stream of arrays."""

    def __init__(self) -> None:
        self._done: list[int] = []
        self._crc = 0
        self._room = CRC_BLOCK_BYTES

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
                self._crc, self._room = 0, CRC_BLOCK_BYTES

    def values(self) -> list[int]:
        """Return the checksums so far, including that of a partial last block."""
        return self._done if self._room == CRC_BLOCK_BYTES else [*self._done, self._crc]


def round_up(n: int, to: int) -> int:
    """Round up to a multiple.

    >>> round_up(5, 4), round_up(8, 4)
    (8, 8)
    """
    return -(-n // to) * to
