"""Consolidation of committed partitions and older caches into one cache: single writer, constant memory, atomic.

Every file of a partition is checked against its receipt before it is copied, a cache against its own checksums. If
both sides use the same storage, compressed chunks are copied unchanged. Otherwise token arrays are decoded and
re-encoded. The file is written under a temporary name with its completeness flag last, flushed and read back. Only then
does it replace an older one.
"""

from __future__ import annotations

import itertools
import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dask_logits.cache.partition import BLOCK_TOKENS, PartitionReader
from dask_logits.cache.profile import Profile, as_kept, entries_of, file_arrays
from dask_logits.cache.reader import CacheReader
from dask_logits.cache.writer import CacheWriter
from dask_logits.errors import CacheError
from dask_logits.files.atomic import sync
from dask_logits.records import (
    BLOCK_ARRAYS,
    DOCUMENT_ARRAYS,
    EVERY_TOKEN,
    Array,
    Records,
    Statistics,
    digest_of,
    total_digest,
)

# Bytes per chunk of our index and HDF5's own.
_INDEX_BYTES = 64
# Chunks of a cache copied at a time.
_CHUNKS = 256


class Committed(Protocol):
    """The fields of a receipt that describe a partition's rows and files."""

    partition: int
    first_row: int
    n_rows: int
    statistics: Statistics
    content_digest: str
    # Name → bytes and CRC-32.
    files: dict[str, tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class PartitionPiece:
    """A committed partition.

    Parameters
    ----------
    path
        Folder of the attempt named by its receipt.
    receipt
        Its receipt.
    profile
        Storage of the run's token arrays.
    """

    path: Path
    receipt: Committed
    profile: Profile

    @property
    def first_row(self) -> int:
        """First dataset row."""
        return self.receipt.first_row

    @property
    def n_rows(self) -> int:
        """Number of dataset rows."""
        return self.receipt.n_rows

    @property
    def n_bytes(self) -> int:
        """Bytes in a cache: compressed chunks unchanged, all other arrays unpacked."""
        tokens, targets, documents, blocks = self.counts()
        entries, n_bytes = entries_of(self.profile, tokens, targets), 0
        for name, stored in file_arrays(self.profile, entries, documents, blocks).items():
            if stored.chunked:
                files = (size for file, (size, _) in self.receipt.files.items() if file.startswith(f"{name}/c/"))
                n_bytes += sum(files) + stored.shape[0] // self.profile.alignment * _INDEX_BYTES
            else:
                n_bytes += stored.dtype.itemsize * math.prod(stored.shape)
        return n_bytes

    def counts(self) -> tuple[int, int, int, int]:
        """Return tokens, targets, documents and blocks."""
        sums = self.receipt.statistics
        return sums.tokens, sums.targets, sums.documents, sums.blocks

    def content_digest(self) -> str:
        """Return the digest computed by the worker."""
        return self.receipt.content_digest

    def runs(self) -> Iterator[Records]:
        """Yield the whole partition."""
        yield self._reader.records()

    @cached_property
    def _reader(self) -> PartitionReader:
        return PartitionReader(self.path, self.profile)

    def check(self) -> None:
        """Check every file against the receipt."""
        self._reader.check(self.receipt.files)
        found = self._reader.counts()
        if found != self.counts():
            raise CacheError.at(
                self.path,
                f"expected {self.counts()} tokens, targets, documents and blocks, got {found}; delete the "
                "partition's receipt and run the job again",
            )

    def blocks(self, name: str) -> Iterator[Array]:
        """Yield a stored array piece by piece."""
        yield from self._reader.blocks(name)

    def frames(self) -> Iterator[Mapping[str, Sequence[memoryview]]]:
        """Yield all chunks of the chunked arrays."""
        yield {name: self._reader.chunks(name) for name, stored in self.profile.arrays.items() if stored.chunked}

    def tokens(self) -> Iterator[dict[str, Array]]:
        """Yield the logical token arrays piece by piece."""
        yield from self._reader.tokens()


@dataclass(frozen=True, kw_only=True)
class CachePiece:
    """Consecutive rows of a cache with verified checksums.

    Parameters
    ----------
    reader
        The cache.
    first_row, n_rows
        Dataset rows.
    documents, token_range, targets, packed
        Their ranges (start, stop) on the document, token, target and block axes.
    """

    reader: CacheReader
    first_row: int
    n_rows: int
    documents: tuple[int, int]
    token_range: tuple[int, int]
    targets: tuple[int, int]
    packed: tuple[int, int]

    @property
    def path(self) -> Path:
        """Location, for messages."""
        return self.reader.path

    @property
    def profile(self) -> Profile:
        """Storage of the cache's token arrays."""
        return self.reader.profile

    @property
    def n_bytes(self) -> int:
        """Its share of the file, in bytes."""
        start, stop = self.token_range
        return -(-self.path.stat().st_size * (stop - start) // max(1, self.reader.n_entries))

    def counts(self) -> tuple[int, int, int, int]:
        """Return tokens, targets, documents and blocks."""
        ranges = (self.token_range, self.targets, self.documents, self.packed)
        tokens, targets, documents, blocks = (stop - start for start, stop in ranges)
        return tokens, targets, documents, blocks

    def content_digest(self) -> str:
        """Compute the content digest of these rows."""
        return digest_of(self.runs())

    def runs(self) -> Iterator[Records]:
        """Yield the targets, some documents at a time."""
        yield from self.reader.runs(self.documents, self.packed)

    def check(self) -> None:
        """Do nothing: the whole cache was verified before it was cut into pieces."""

    def blocks(self, name: str) -> Iterator[Array]:
        """Yield a stored array piece by piece."""
        axes = {BLOCK_ARRAYS: self.packed, DOCUMENT_ARRAYS: self.documents, EVERY_TOKEN: self.token_range}
        axis = next((axis for names, axis in axes.items() if name in names), self.targets)
        for first in range(*axis, BLOCK_TOKENS):
            block = np.asarray(self.reader.arrays[name][first : min(first + BLOCK_TOKENS, axis[1])])
            yield block - np.uint64(self.token_range[0]) if name == "target_pos" else block

    def frames(self) -> Iterator[Mapping[str, Sequence[memoryview]]]:
        """Yield chunks of the chunked arrays, some at a time."""
        step = _CHUNKS * self.profile.alignment
        for first in range(*self.targets, step):
            yield self.reader.frames(first, min(first + step, self.targets[1]))

    def tokens(self) -> Iterator[dict[str, Array]]:
        """Yield the logical token arrays piece by piece."""
        for skip in range(0, self.counts()[0], BLOCK_TOKENS):
            tokens, targets = (
                (min(start + skip, stop), min(start + skip + BLOCK_TOKENS, stop))
                for start, stop in (self.token_range, self.targets)
            )
            yield self.profile.decode(self.reader.stored_at(tokens, targets, self.token_range[0]))


# Targets of consecutive dataset rows at one location, without gaps between documents.
Piece = PartitionPiece | CachePiece


def cache_pieces(reader: CacheReader, *, trailers: bool = False) -> Iterator[CachePiece]:
    """Verify a cache and cut it into ranges of consecutive rows without gaps between their tokens.

    Parameters
    ----------
    reader
        The cache.
    trailers
        Also check the Fletcher-32 behind each chunk.

    Raises
    ------
    CacheError
        If the cache is damaged.
    """
    reader.verify_checksums(trailers=trailers)
    rows = np.asarray(reader.arrays["document_row"]).astype(np.int64)
    if not len(rows):
        return
    starts = np.asarray(reader.arrays["document_start"]).astype(np.int64)
    ends = starts + np.asarray(reader.arrays["document_length"])
    cut = (np.diff(rows) > 1) | (starts[1:] != ends[:-1])
    cuts = [0, *(np.flatnonzero(cut) + 1).tolist(), len(rows)]
    for first, stop in itertools.pairwise(cuts):
        tokens = (int(starts[first]), int(ends[stop - 1]))
        yield CachePiece(
            reader=reader,
            first_row=int(rows[first]),
            n_rows=int(rows[stop - 1] - rows[first]) + 1,
            documents=(first, stop),
            token_range=tokens,
            targets=reader.targets_of(*tokens),
            packed=reader.blocks_between(*tokens),
        )


def consolidate(
    cache_path: Path,
    pieces: Callable[[], Iterable[Piece]],
    *,
    profile: Profile,
    packed: bool,
    attributes: Mapping[str, Any],
    n_rows: int | None = None,
    on_piece: Callable[[], None] = lambda: None,
) -> str:
    """Write a cache from pieces.

    Parameters
    ----------
    cache_path
        Path of the new cache.
    pieces
        Returns the pieces in dataset order. It is called more than once.
    profile
        Storage of the cache's token arrays.
    packed
        Whether documents were packed into blocks.
    attributes
        Further attributes of the file.
    n_rows
        Number of rows, from 0, that the pieces must cover without a gap. None: any rows in order.
    on_piece
        Called after each piece.

    Returns
    -------
    str
        The content digest.

    Raises
    ------
    CacheError
        If a piece is missing or damaged, or rows are not consecutive. An older cache is unchanged.
    """
    entries, (n_tokens, n_targets, n_documents, n_blocks) = _sizes(cache_path, pieces(), n_rows, profile)
    for stale in cache_path.parent.glob(f".{cache_path.name}.*.tmp"):
        stale.unlink()
    aside = cache_path.with_name(f".{cache_path.name}.{uuid.uuid4().hex[:8]}.tmp")
    digests = []
    with CacheWriter(
        aside,
        profile=profile,
        n_tokens=n_tokens,
        n_targets=n_targets,
        entries=entries,
        n_documents=n_documents,
        n_blocks=n_blocks if packed else None,
    ) as writer:
        start = 0
        for piece in pieces():
            piece.check()
            digests.append(_copy(writer, piece, start, packed=packed))
            start += entries_of(profile, *piece.counts()[:2])[0]
            on_piece()
        digest = total_digest(digests)
        writer.finish({**attributes, "content_digest": digest})
        CacheReader(aside).verify_checksums(trailers=False)
    aside.replace(cache_path)
    sync(cache_path.parent)
    return digest


def _copy(writer: CacheWriter, piece: Piece, start: int, *, packed: bool) -> str:
    """Copy one piece to its place on the token axis. Return its content digest as stored in the cache."""
    profile = writer.profile
    alike = profile.equals(piece.profile)
    if alike:
        for name, stored in profile.arrays.items():
            if not stored.chunked:
                for block in piece.blocks(name):
                    writer.append(name, block + np.uint64(start) if name == "target_pos" else block)
        for frames in piece.frames():
            writer.append_chunks(frames)
    else:
        for tokens in piece.tokens():
            if "target_pos" in tokens:
                tokens["target_pos"] = tokens["target_pos"] + np.uint64(start)
            writer.append_tokens(tokens)
    writer.align()
    for name in (*DOCUMENT_ARRAYS, *(BLOCK_ARRAYS if packed else ())):
        at = start
        for block in piece.blocks(name):
            writer.append(name, block)
            if name.endswith("_length"):
                ends = at + np.cumsum(block, dtype=np.uint64)
                writer.append(name.replace("_length", "_start"), (ends - block).astype(np.uint64))
                at = int(ends[-1])
    return piece.content_digest() if alike else digest_of(as_kept(records, profile) for records in piece.runs())


def _sizes(
    cache_path: Path, pieces: Iterable[Piece], n_rows: int | None, profile: Profile
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Check that rows are consecutive. Return entries of both axes, and tokens, targets, documents and blocks."""
    sums = np.zeros(6, np.int64)
    row = 0
    for piece in pieces:
        if piece.first_row < row or (n_rows is not None and piece.first_row != row):
            raise CacheError.at(
                cache_path, f"expected targets from row {row}, got {piece.path} from row {piece.first_row}"
            )
        row = piece.first_row + piece.n_rows
        counts = piece.counts()
        sums += np.array([*entries_of(profile, *counts[:2]), *counts])
    if n_rows is not None and row != n_rows:
        raise CacheError.at(cache_path, f"expected {n_rows} rows, got {row}")
    n_entries, n_target_entries, tokens, targets, documents, blocks = sums.tolist()
    return (n_entries, n_target_entries), (tokens, targets, documents, blocks)
