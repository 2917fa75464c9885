"""Direct reads of compressed chunks in an HDF5 file: by index, with ``pread``, without locks.

h5py serialises all reads of a process, its handles must not cross a fork, and HDF5 looks chunks up in a tree. Here the
index of (offset, bytes, CRC-32) is memory-mapped, only a file descriptor is shared, and threads, forks and worker
processes read independently. Every chunk is checked against its CRC-32 before decompression, because HDF5's zstd
plugin returns garbage for a damaged one without an error.

Dimension letters: C chunks.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from dask_logits.cache.profile import Profile
from dask_logits.errors import CacheError, damaged
from dask_logits.records import Array

# Gap between two chunks, in bytes, up to which both are read in one request.
_GAP_BYTES = 1 << 16
LEVEL = 1
# Of the Fletcher-32 behind each chunk.
TRAILER_BYTES = 4


def whole_chunks(array: Array, rows: int) -> Iterator[Array]:
    """Yield an array in chunks, the last one filled up with zeros.

    >>> [chunk.tolist() for chunk in whole_chunks(np.array([1, 2, 3]), 2)]
    [[1, 2], [3, 0]]
    """
    for first in range(0, len(array), rows):
        chunk = array[first : first + rows]
        short = np.zeros((rows - len(chunk), *array.shape[1:]), array.dtype)
        yield np.concatenate([chunk, short]) if len(short) else chunk


def compress(chunk: Array) -> bytes:
    """Compress a chunk into a zstd frame with a checksum, as Zarr's zstd codec writes it."""
    from numcodecs.zstd import Zstd

    return bytes(Zstd(level=LEVEL, checksum=True).encode(np.ascontiguousarray(chunk)))


def decompress(frame: bytes | memoryview, out: Array) -> None:
    """Decode a zstd frame into an array of exactly its size.

    Raises
    ------
    ValueError
        If the size differs or the frame is damaged.
    """
    from numcodecs.zstd import decompress as decode
    from zstandard import ZstdError, frame_content_size

    try:
        # A decoder allocates as many bytes as the frame's header says (RFC 8878, 3.1.1.1). -1: it says nothing.
        if (n_bytes := frame_content_size(frame)) != out.nbytes:
            raise ValueError(f"a frame of {n_bytes} bytes instead of {out.nbytes}")
        decode(frame, out)
    except (RuntimeError, ZstdError) as error:
        raise ValueError(str(error)) from error


def with_trailer(frame: bytes) -> bytes:
    """Append the trailer of HDF5's Fletcher-32 filter.

    >>> with_trailer(bytes([0, 1, 0, 2]))[-TRAILER_BYTES:].hex()
    '03000400'
    """
    from numcodecs.fletcher32 import Fletcher32

    return bytes(Fletcher32().encode(frame))


class ChunkIndex:
    """Locations of the chunks of one array.

    Parameters
    ----------
    offset, size, crc32
        [C] uint64, uint32, uint32, for each chunk's zstd frame, without the filter's trailer.
    """

    def __init__(self, offset: Array, size: Array, crc32: Array) -> None:
        self.offset, self.size, self.crc32 = offset, size, crc32

    def __len__(self) -> int:
        return len(self.offset)


class PlaneReader:
    """Reads rows of byte planes with the same chunk bounds.

    Parameters
    ----------
    path
        The file, for messages.
    descriptor
        The open file.
    profile
        Storage of the planes.
    indices
        Plane → locations of its chunks.
    """

    def __init__(self, path: Path, descriptor: int, profile: Profile, indices: Mapping[str, ChunkIndex]) -> None:
        self.path = path
        self.profile = profile
        self.indices = indices
        self._descriptor = descriptor
        self._file_bytes = os.fstat(descriptor).st_size
        raw_bytes = profile.alignment * profile.top_k
        # ZSTD_compressBound, plus a margin for other encoders.
        self._most_bytes = raw_bytes + (raw_bytes >> 7) + 1024

    def frames(self, first: int, stop: int) -> dict[str, list[memoryview]]:
        """Return the verified zstd frames of chunks [first, stop) of every plane.

        Raises
        ------
        CacheError
            If one is damaged or does not match the index.
        """
        places = [
            (int(index.offset[chunk]), int(index.size[chunk]), name, chunk)
            for name, index in self.indices.items()
            for chunk in range(first, stop)
        ]
        places.sort()
        found: dict[str, list[memoryview]] = {name: [memoryview(b"")] * (stop - first) for name in self.indices}
        at = 0
        for offset, size, name, chunk in places:
            if not 0 < size <= self._most_bytes or offset + size > self._file_bytes:
                expected = f"chunk {chunk} of {name} in a file of {self._file_bytes} bytes"
                raise damaged(self.path, expected, f"{size} at {offset}")
        while at < len(places):
            # The writer stores the planes of a chunk, and the next chunk, side by side: usually one read.
            begin = end = places[at][0]
            stop_at = at
            while stop_at < len(places) and places[stop_at][0] <= end + _GAP_BYTES:
                end = max(end, places[stop_at][0] + places[stop_at][1])
                stop_at += 1
            data = memoryview(self._read(end - begin, begin))
            for offset, size, name, chunk in places[at:stop_at]:
                frame = data[offset - begin : offset - begin + size]
                crc = int(self.indices[name].crc32[chunk])
                if zlib.crc32(frame) != crc:
                    raise damaged(self.path, f"CRC-32 {crc} for {name}, chunk {chunk}", zlib.crc32(frame))
                found[name][chunk - first] = frame
            at = stop_at
        return found

    def _read(self, size: int, offset: int) -> bytes:
        try:
            return os.pread(self._descriptor, size, offset)
        except OSError as error:
            raise CacheError.at(
                self.path, f"expected to read {size} bytes at {offset}, got {error}; check the disk"
            ) from error

    def check(self, first: int, stop: int, *, trailers: bool) -> None:
        """Check chunks [first, stop) of every plane against their checksums.

        Raises
        ------
        CacheError
            If one is damaged.
        """
        for name, frames in self.frames(first, stop).items():
            for chunk, frame in enumerate(frames, first) if trailers else ():
                end = int(self.indices[name].offset[chunk]) + len(frame)
                found, expected = self._read(TRAILER_BYTES, end), with_trailer(bytes(frame))[-TRAILER_BYTES:]
                if found != expected:
                    wanted = f"Fletcher-32 {expected.hex()} behind {name}, chunk {chunk}"
                    raise damaged(self.path, wanted, found.hex())

    def rows(self, start: int, stop: int) -> dict[str, Array]:
        """Return rows [start, stop) of every plane, each [stop − start, entries] uint8."""
        tokens = self.profile.alignment
        first, last = start // tokens, -(-stop // tokens)
        out = {}
        for name, frames in self.frames(first, last).items():
            rows = np.empty((len(frames) * tokens, self.profile.top_k), np.uint8)
            for i, frame in enumerate(frames):
                try:
                    decompress(frame, rows[i * tokens : (i + 1) * tokens])
                except ValueError as error:
                    expected = f"chunk {first + i} of {name} with {tokens} tokens"
                    raise damaged(self.path, expected, error) from error
            out[name] = rows
        try:
            unpacked = self.profile.unpack(out)
        except ValueError as error:
            raise damaged(self.path, f"the draws of positions {start} to {stop}", error) from error
        return {name: rows[start - first * tokens : stop - first * tokens] for name, rows in unpacked.items()}
