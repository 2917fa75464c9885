"""Committed partitions, and caches made before → one cache: a single writer, constant memory, all or nothing.

Every array of a partition is compared with the digests of its receipt while it is copied, a cache with its checksums
before. The file is written aside, its completeness flag last, flushed, read back, and only then renamed over an older
one.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dask_logits.errors import CacheError
from dask_logits.records import BLOCK_ARRAYS, DOCUMENT_ARRAYS, TOKEN_ARRAYS, Array, ContentDigest
from dask_logits.store.cache import CacheReader, CacheWriter
from dask_logits.store.durable import sync
from dask_logits.store.partition import BLOCK_TOKENS, PartitionReader, compare_digest


class Piece(Protocol):
    """Targets of consecutive dataset rows that lie somewhere."""

    @property
    def path(self) -> Path:
        """Where, for messages."""

    @property
    def first_row(self) -> int:
        """First dataset row."""

    @property
    def n_rows(self) -> int:
        """Dataset rows."""

    def counts(self) -> tuple[int, int, int]:
        """Return tokens, documents and blocks."""

    def blocks(self, name: str) -> Iterator[Array]:
        """Yield an array piece by piece; raise CacheError if it is not what was committed."""


@dataclass(frozen=True, kw_only=True)
class PartitionPiece:
    """A committed partition.

    Parameters
    ----------
    path
        The attempt that its receipt names.
    receipt
        Its receipt.
    """

    path: Path
    receipt: Mapping[str, Any]

    @property
    def first_row(self) -> int:
        """First dataset row."""
        return int(self.receipt["first_row"])

    @property
    def n_rows(self) -> int:
        """Dataset rows."""
        return int(self.receipt["n_rows"])

    def counts(self) -> tuple[int, int, int]:
        """Return tokens, documents and blocks."""
        sums = self.receipt["statistics"]
        return sums["tokens"], sums["documents"], sums.get("blocks", 0)

    def blocks(self, name: str) -> Iterator[Array]:
        """Yield an array piece by piece, and compare it with the receipt's digest at its end."""
        partition = PartitionReader(self.path)
        digest = ContentDigest()
        for block in partition.blocks(name):
            digest.update(name, block)
            yield block
        if digest.array_digests():
            compare_digest(self.path, name, digest.array_digests()[name], self.receipt["digests"][name])
        elif self.counts()[0]:
            raise CacheError(f"{self.path}: expected {name}, got no entries", str(self.path))


@dataclass(frozen=True, kw_only=True)
class CachePiece:
    """Consecutive rows of a cache whose checksums were verified.

    Parameters
    ----------
    reader
        The cache.
    first_row, n_rows
        Dataset rows.
    documents, tokens, packed
        Their ranges (start, stop) on the document, token and block axes.
    """

    reader: CacheReader
    first_row: int
    n_rows: int
    documents: tuple[int, int]
    tokens: tuple[int, int]
    packed: tuple[int, int]

    @property
    def path(self) -> Path:
        """Where, for messages."""
        return self.reader.path

    def counts(self) -> tuple[int, int, int]:
        """Return tokens, documents and blocks."""
        tokens, documents, blocks = (stop - start for start, stop in (self.tokens, self.documents, self.packed))
        return tokens, documents, blocks

    def blocks(self, name: str) -> Iterator[Array]:
        """Yield an array piece by piece."""
        axis = self.tokens if name in TOKEN_ARRAYS else self.packed if name in BLOCK_ARRAYS else self.documents
        for first in range(*axis, BLOCK_TOKENS):
            yield np.asarray(self.reader.arrays[name][first : min(first + BLOCK_TOKENS, axis[1])])


def cache_pieces(reader: CacheReader) -> Iterator[CachePiece]:
    """Verify a cache and cut it into runs of consecutive rows.

    Raises
    ------
    CacheError
        If it is damaged.
    """
    reader.verify_checksums()
    rows = np.asarray(reader.arrays["document_row"]).astype(np.int64)
    if not len(rows):
        return
    cuts = [0, *(np.flatnonzero(np.diff(rows) > 1) + 1).tolist(), len(rows)]
    starts = np.append(np.asarray(reader.arrays["document_start"]), np.uint64(reader.n_tokens)).astype(np.int64)
    block_starts = np.zeros(1, np.int64)
    if reader.is_packed:
        block_starts = np.append(0, np.cumsum(np.asarray(reader.arrays["block_length"]).astype(np.int64)))
    for first, stop in itertools.pairwise(cuts):
        tokens = (int(starts[first]), int(starts[stop]))
        blocks = np.searchsorted(block_starts, tokens) if reader.is_packed else (0, 0)
        yield CachePiece(
            reader=reader,
            first_row=int(rows[first]),
            n_rows=int(rows[stop - 1] - rows[first]) + 1,
            documents=(first, stop),
            tokens=tokens,
            packed=(int(blocks[0]), int(blocks[1])),
        )


def consolidate(
    cache_path: Path,
    pieces: Callable[[], Iterable[Piece]],
    *,
    top_k: int,
    vocab_size: int,
    packed: bool,
    attributes: Mapping[str, Any],
    n_rows: int | None = None,
    on_piece: Callable[[], None] = lambda: None,
) -> str:
    """Write a cache from pieces.

    Parameters
    ----------
    cache_path
        Where the cache goes.
    pieces
        Gives the pieces in dataset order, as often as it is called.
    top_k, vocab_size, packed
        Of the job.
    attributes
        Further attributes of the file.
    n_rows
        Rows from 0 that must be there, without a gap; None: any, in order.
    on_piece
        Called after each piece.

    Returns
    -------
    str
        The content digest.

    Raises
    ------
    CacheError
        If a piece is missing or damaged, or rows are not consecutive. An older cache stays as it was.
    """
    n_tokens, n_documents, n_blocks = _sizes(cache_path, pieces(), n_rows)
    for stale in cache_path.parent.glob(f".{cache_path.name}.*.tmp"):
        stale.unlink()
    aside = cache_path.with_name(f".{cache_path.name}.{os.getpid()}.tmp")
    with CacheWriter(
        aside,
        n_tokens=n_tokens,
        n_documents=n_documents,
        n_blocks=n_blocks if packed else None,
        top_k=top_k,
        vocab_size=vocab_size,
    ) as writer:
        start = 0
        for piece in pieces():
            start = _copy(writer, piece, start, (*TOKEN_ARRAYS, *DOCUMENT_ARRAYS, *(BLOCK_ARRAYS if packed else ())))
            on_piece()
        content_digest = writer.finish(attributes)
        CacheReader(aside).verify_checksums()
    aside.replace(cache_path)
    sync(cache_path.parent)
    return content_digest


def _copy(writer: CacheWriter, piece: Piece, start: int, names: tuple[str, ...]) -> int:
    """Copy one piece; return the first token of the next."""
    for name in names:
        for block in piece.blocks(name):
            writer.append(name, block)
            if name == "document_length":
                ends = start + np.cumsum(block, dtype=np.uint64)
                writer.append("document_start", (ends - block).astype(np.uint64))
                start = int(ends[-1])
    return start


def _sizes(cache_path: Path, pieces: Iterable[Piece], n_rows: int | None) -> tuple[int, int, int]:
    """Check that rows follow each other; return tokens, documents and blocks."""
    sums = (0, 0, 0)
    row = 0
    for piece in pieces:
        if piece.first_row < row or (n_rows is not None and piece.first_row != row):
            raise CacheError(
                f"{cache_path}: expected targets from row {row}, got {piece.path} from row {piece.first_row}",
                str(cache_path),
            )
        row = piece.first_row + piece.n_rows
        tokens, documents, blocks = piece.counts()
        sums = (sums[0] + tokens, sums[1] + documents, sums[2] + blocks)
    if n_rows is not None and row != n_rows:
        raise CacheError(f"{cache_path}: expected {n_rows} rows, got {row}", str(cache_path))
    return sums
