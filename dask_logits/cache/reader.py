"""Reader of a cache: one HDF5 file with the targets of a run, in dataset order. ``docs/FORMAT.md`` specifies it.

There are two profiles (:mod:`dask_logits.cache.profile`). *Plain* is contiguous and uncompressed: any HDF5 reader opens
it, and this one maps it into memory. In *compact*, all but the lowest byte planes are chunked and compressed by zstd
behind a Fletcher-32, with an index of our own. h5py is closed after the header is read, and nothing is shared between
processes, threads or forks.

Dimension letters: N tokens, M positions with targets, D documents, B blocks, K kept entries.
"""

from __future__ import annotations

import io
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dask_logits.cache.chunks import TRAILER_BYTES, ChunkIndex, PlaneReader
from dask_logits.cache.hdf5 import check_dataset, find_dataset, is_critical, opened, root_attributes
from dask_logits.cache.layout import (
    BLOCKS,
    DOCUMENTS,
    FORMAT,
    FORMAT_VERSION,
    INDEX,
    BlockCrc,
    CompactHeader,
    Header,
)
from dask_logits.cache.profile import Compact, Plain, Profile, Stored, file_arrays
from dask_logits.errors import CacheError, damaged
from dask_logits.fields import MOST_COUNT, MOST_DRAWS, MOST_TEMPERATURES
from dask_logits.records import (
    ALL_TOKEN_ARRAYS,
    DOCUMENT_ARRAYS,
    EVERY_TOKEN,
    OPTIONAL_TOKEN_ARRAYS,
    Array,
    Extras,
    Records,
    is_rising,
)

# Tokens whose documents are hashed together.
_DIGEST_TOKENS = 1 << 16
# Bytes of an array, and chunks of all planes, checked together.
_READ_BYTES, _READ_CHUNKS = 8 << 20, 256


class CacheReader:
    """Reads documents of a cache. Safe to use from several threads and after a fork.

    Parameters
    ----------
    path
        The HDF5 file.

    Raises
    ------
    CacheError
        If it is missing, truncated, incomplete, repacked, not a cache, or of a newer format.

    Attributes
    ----------
    attributes : dict
        The file's attributes, JSON ones decoded.
    profile : Plain or Compact
        Storage of token arrays.
    n_tokens, n_entries, n_targets, n_target_entries, n_documents, top_k, vocab_size : int
        Sizes. The token axis has ``n_entries``, some of which may belong to no document. The target axis has
        ``n_target_entries``. Both are the same axis unless the cache has ``target_pos``.
    arrays : dict
        Stored name → memory map of every contiguous array.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with opened(path) as file:
            self._read_header(file)

    def _read_header(self, file: h5py.File) -> None:
        # The same open file, because a new cache may get the name while this one is opened.
        self._descriptor = os.dup(file.id.get_vfd_handle())
        weakref.finalize(self, os.close, self._descriptor)
        self.attributes = root_attributes(file)
        self.header = self._check_header()
        self.n_tokens = self.header.n_tokens
        self.n_entries = self.header.n_entries
        self.n_documents = self.header.n_documents
        self.top_k = self.header.top_k
        self.vocab_size = self.header.vocab_size
        self.profile = self._profile(file)
        has_target_pos = self.profile.extras.has_target_pos
        self.n_targets = self._count("n_targets") if has_target_pos else self.n_tokens
        self.n_target_entries = self._count("n_target_entries") if has_target_pos else self.n_entries
        self._check_entries()
        datasets = self._check_arrays(file)
        chunked = [name for name, stored in self.profile.arrays.items() if stored.chunked]
        mapped = {name: dataset for name, dataset in datasets.items() if name not in chunked}
        self.crcs = {name: self._table(file, f"crc32/{name}", None, np.dtype(np.uint32)) for name in mapped}
        self._offsets = {name: dataset.id.get_offset() for name, dataset in mapped.items()}
        self.arrays = {name: _mapped(self._descriptor, dataset) for name, dataset in mapped.items()}
        self._planes = self._opened_planes(datasets, chunked) if chunked else None
        self.is_packed = "block_length" in self.arrays
        unit = "block" if self.is_packed else "document"
        self._starts, self._lengths = self.arrays[f"{unit}_start"], self.arrays[f"{unit}_length"]
        if self.is_packed and self.n_items and not self.n_documents:
            raise damaged(self.path, "segments of its blocks", "none")

    def _count(self, name: str, array: str = "target_pos") -> int:
        value = getattr(self.header, name)
        if value is None:
            raise damaged(self.path, f"{name} of a cache with {array}", "none")
        return int(value)

    def said(self) -> dict[str, Any]:
        """Return the attributes for a writer: the file's, plus a byte of each id's token if it has them."""
        crcs = {"token_crcs": self.arrays["token_crcs"]} if "token_crcs" in self.arrays else {}
        return {**self.attributes, **crcs}

    @property
    def n_items(self) -> int:
        """Number of items: blocks of a packed cache, else documents (each window counts)."""
        return len(self._lengths)

    @property
    def n_empty(self) -> int:
        """Number of documents without tokens, whose rows were null or empty."""
        return self.n_documents - int(np.count_nonzero(self.arrays["document_length"]))

    def targets_of(self, start: int, stop: int) -> tuple[int, int]:
        """Return the range on the target axis of the entries [start, stop) of the token axis.

        Raises
        ------
        CacheError
            If its ``target_pos`` do not rise from `start` to `stop`.
        """
        if not self.profile.extras.has_target_pos:
            return start, stop
        target_pos = self.arrays["target_pos"]
        # In the array's dtype, because numpy would convert the whole array otherwise.
        first, last = (int(at) for at in np.searchsorted(target_pos, np.array([start, stop], np.uint64)))
        chosen = target_pos[first:last]
        if first > last or not is_rising(chosen, stop) or (len(chosen) and int(chosen[0]) < start):
            raise damaged(self.path, f"target_pos that rise from {start} to {stop}", f"{chosen[:4]} and others")
        return first, last

    def stored(self, start: int, stop: int) -> dict[str, Array]:
        """Return the encoded token arrays of entries [start, stop), with ``target_pos`` counted from `start`.

        Raises
        ------
        CacheError
            If a chunk or ``target_pos`` is damaged.
        """
        return self.stored_at((start, stop), self.targets_of(start, stop), start)

    def stored_at(self, tokens: tuple[int, int], targets: tuple[int, int], origin: int) -> dict[str, Array]:
        """Return the encoded arrays of a range of each axis, with ``target_pos`` counted from `origin`."""
        found = {
            name: self.arrays[name][slice(*(tokens if name in EVERY_TOKEN else targets))]
            for name in self.profile.arrays
            if name in self.arrays
        }
        if "target_pos" in found:
            found["target_pos"] = found["target_pos"] - np.uint64(origin)
        return found if self._planes is None else {**found, **self._planes.rows(*targets)}

    def tokens(self, start: int, stop: int) -> dict[str, Array]:
        """Return the logical token arrays of entries [start, stop)."""
        return self.profile.decode(self.stored(start, stop))

    def frames(self, start: int, stop: int) -> dict[str, list[memoryview]]:
        """Return the verified compressed chunks of all chunked arrays with the target entries [start, stop)."""
        if self._planes is None:
            return {}
        return self._planes.frames(start // self.profile.alignment, -(-stop // self.profile.alignment))

    def place(self, index: int) -> tuple[int, int, slice]:
        """Return an item's first entry, its end, and the slice of its documents (or of a block's segments).

        Raises
        ------
        CacheError
            If it lies outside the file.
        """
        start = int(self._starts[index])
        stop = start + int(self._lengths[index])
        if stop > self.n_entries:
            raise damaged(self.path, f"item {index} in {self.n_entries} entries", f"{start} to {stop}")
        documents = slice(index, index + 1)
        if self.is_packed:
            starts = self.arrays["document_start"]
            # Documents without tokens begin where the next one does: from the first token's document to the last's.
            first = int(np.searchsorted(starts, np.uint64(start), side="right")) - 1
            last = int(np.searchsorted(starts, np.uint64(stop)))
            documents = slice(first, last)
            if not 0 <= first < last or int(starts[first]) != start:
                raise damaged(self.path, f"segments of block {index}", "none")
        return start, stop, documents

    def item(self, index: int) -> dict[str, Array]:
        """Return the logical token arrays of one item, and its segments.

        Parameters
        ----------
        index
            Item in dataset order, from 0.

        Returns
        -------
        dict
            The token arrays, ``segments`` [S, 3] int64 with (row, offset, length) of each stretch of one row's tokens,
            and ``row``, the first segment's.
        """
        start, stop, documents = self.place(index)
        return {**self.tokens(start, stop), **self.segments(documents)}

    def segments(self, documents: slice) -> dict[str, Array]:
        """Return ``segments`` [S, 3] int64 and ``row`` of some documents."""
        segments = np.stack([self.arrays[name][documents].astype(np.int64) for name in DOCUMENT_ARRAYS], 1)
        return {"segments": segments, "row": segments[0, 0]}

    def item_lengths(self) -> Array:
        """Return the tokens of each item: [items] int64."""
        return self._lengths.astype(np.int64)

    def item_starts(self) -> Array:
        """Return the first entry of each item: [items] int64."""
        return self._starts.astype(np.int64)

    def item_places(self) -> tuple[Array, Array]:
        """Return the dataset row of each item's first token, and its position in the row: [items] int64 each."""
        rows, offsets = (self.arrays[name].astype(np.int64) for name in DOCUMENT_ARRAYS[:2])
        if not self.is_packed:
            return rows, offsets
        first = np.searchsorted(self.arrays["document_start"], self._starts, side="right") - 1
        return rows[first], offsets[first]

    def blocks_between(self, start: int, stop: int) -> tuple[int, int]:
        """Return the packed blocks [first, stop) that begin in a range of entries, (0, 0) without packing."""
        if not self.is_packed:
            return 0, 0
        first, last = np.searchsorted(self._starts, np.array([start, stop], np.uint64))
        return int(first), int(last)

    def runs(self, documents: tuple[int, int], blocks: tuple[int, int]) -> Iterator[Records]:
        """Yield contiguous documents [first, stop) with their blocks, some at a time."""
        columns = {name: self.arrays[name][slice(*documents)] for name in DOCUMENTS}
        starts = columns.pop("document_start").astype(np.int64)
        ends = starts + columns["document_length"]
        lengths = self._lengths[slice(*blocks)] if self.is_packed else None
        # Possible ends: after a document, or a block.
        stops = ends if lengths is None else starts[:1] + np.cumsum(lengths, dtype=np.int64)
        first = first_stop = 0
        while first < len(starts):
            begin = int(starts[first])
            n_stops = int(np.searchsorted(stops[first_stop:], begin + _DIGEST_TOKENS, side="right"))
            last_stop = min(len(stops), first_stop + max(1, n_stops))
            end = int(stops[last_stop - 1]) if len(stops) else begin
            whole = last_stop == len(stops)
            last = len(starts) if whole else last_stop if lengths is None else int(np.searchsorted(starts, end))
            yield Records(
                **self.tokens(begin, end),
                **{name: column[first:last] for name, column in columns.items()},
                block_length=None if lengths is None else lengths[first_stop:last_stop],
            )
            first, first_stop = last, last_stop

    def verify_checksums(self, *, trailers: bool = True) -> None:
        """Check all arrays and chunks against their CRC-32, and documents against blocks.

        Parameters
        ----------
        trailers
            Also check the Fletcher-32 behind each chunk, which only HDF5 readers use.

        Raises
        ------
        CacheError
            Naming the first damaged array and the entries.
        """
        for name in self.arrays:
            crc = BlockCrc(self.header.crc32_block_bytes)
            for piece in self._pieces(name):
                crc.update(piece)
            found, expected = crc.values(), self.crcs[name].tolist()
            if found != expected:
                block = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), 0)
                where = slice(block, block + 1)
                raise damaged(self.path, f"CRC-32 {expected[where]} for {name}, block {block}", found[where])
        if self._planes is not None:
            n_chunks = self.n_target_entries // self.profile.alignment
            for first in range(0, n_chunks, _READ_CHUNKS):
                self._planes.check(first, min(first + _READ_CHUNKS, n_chunks), trailers=trailers)
        self._check_places()

    def _pieces(self, name: str) -> Iterator[Array]:
        """Yield an array in pieces, read with ``pread``: an I/O error in a memory map would end the process."""
        n_bytes = self.arrays[name].nbytes
        for at in range(0, n_bytes, _READ_BYTES):
            try:
                data = os.pread(self._descriptor, min(_READ_BYTES, n_bytes - at), self._offsets[name] + at)
            except OSError as error:
                raise CacheError.at(self.path, f"expected to read {name}, got {error}; check the disk") from error
            yield np.frombuffer(data, np.uint8)

    def _check_places(self) -> None:
        """Refuse documents and blocks that overlap, exceed the file, or have inconsistent totals."""
        row, offset, length, start = (
            np.minimum(self.arrays[name].astype(np.uint64), np.uint64(MOST_COUNT)).astype(np.int64)
            for name in DOCUMENTS
        )
        end = start + length
        if (np.diff(row) < 0).any() or (row >= MOST_COUNT).any():
            raise damaged(self.path, "document_row to rise", "another order")
        if ((np.diff(row) == 0) & (np.diff(offset) < 0)).any():
            raise damaged(self.path, "document_offset to rise in a row", "another order")
        if (end > self.n_entries).any() or (start[1:] < end[:-1]).any() or length.sum() != self.n_tokens:
            raise damaged(
                self.path,
                f"documents of {self.n_tokens} tokens, one after the other in {self.n_entries} entries",
                f"{length.sum()} tokens, which end at {end.max(initial=0)}, or overlap",
            )
        self._check_target_pos(start, end)
        if not self.is_packed:
            return
        starts, lengths = self.item_starts(), self.item_lengths()
        stops = starts + lengths
        firsts, lasts = (np.searchsorted(start, at) for at in (starts, stops))
        before = np.concatenate([[0], np.cumsum(length)])
        held = before[lasts] - before[firsts]
        is_wrong = (held != lengths) | (lengths == 0)
        if is_wrong.any() or (starts[1:] < stops[:-1]).any() or lengths.sum() != self.n_tokens:
            raise damaged(self.path, f"blocks of the {self.n_tokens} tokens of their segments", "others")

    def _check_target_pos(self, start: Array, end: Array) -> None:
        """Refuse target positions that do not rise, or of which documents hold another number than the header says."""
        if not self.profile.extras.has_target_pos:
            return
        target_pos = np.minimum(self.arrays["target_pos"], np.uint64(MOST_COUNT)).astype(np.int64)
        document = np.searchsorted(start, target_pos, side="right") - 1
        is_inside = (document >= 0) & (target_pos < np.append(end, 0)[document])
        rises = (np.diff(target_pos) >= 0).all() and is_rising(target_pos[is_inside], self.n_entries)
        if not rises or is_inside.sum() != self.n_targets or (target_pos >= self.n_entries).any():
            raise damaged(
                self.path,
                f"{self.n_targets} rising target_pos inside documents",
                f"{is_inside.sum()}{'' if rises else ' in another order'}",
            )

    def _check_entries(self) -> None:
        """Refuse axes that are too short, or not cut into chunks."""
        step = self.profile.alignment
        if self.n_entries < self.n_tokens or self.n_target_entries < self.n_targets or self.n_target_entries % step:
            raise damaged(
                self.path,
                f"n_entries for {self.n_tokens} tokens and {self.n_targets} targets in chunks of {step}",
                f"{self.n_entries} and {self.n_target_entries}",
            )

    def _check_header(self) -> Header:
        found = self.attributes.get("format")
        if found != FORMAT:
            raise CacheError.at(
                self.path, f"expected a dask_logits cache, got format {found!r}; give the teacher_logits.h5 of a run"
            )
        version, profile = str(self.attributes.get("format_version"))[:80], self.attributes.get("profile")
        if version.split(".")[0] != FORMAT_VERSION.split(".")[0] or profile not in ("plain", "compact"):
            raise CacheError.at(
                self.path,
                f"expected format version {FORMAT_VERSION.split('.')[0]}.x, profile 'plain' or 'compact', "
                f"got {version}, {profile!r}; install a newer dask_logits",
            )
        if not self.attributes.get("complete"):
            raise CacheError.at(
                self.path, "expected a complete cache, got one whose writing was cut off; run the job again"
            )
        header = (CompactHeader if profile == "compact" else Header).parse(self.path, self.attributes)
        if self.attributes.get("partial") and header.n_rows is None:
            raise damaged(self.path, "n_rows of the whole job in a part of it", "none")
        for name, expected in (("temperature", 1), ("target_shift", 1)):
            if self.attributes.get(name, expected) != expected:
                raise CacheError.at(
                    self.path,
                    f"expected {name} {expected}, got {self.attributes[name]!r}: these are other targets; "
                    "install a newer dask_logits",
                )
        if not 0 < header.top_k <= header.vocab_size <= 1 << 32:
            raise damaged(self.path, "0 < top_k <= vocab_size", f"{header.top_k} and {header.vocab_size}")
        return header

    def _profile(self, file: h5py.File) -> Profile:
        extras = self._extras(file)
        if not isinstance(self.header, CompactHeader):
            return Plain(top_k=self.top_k, vocab_size=self.vocab_size, extras=extras)
        try:
            return Compact(
                top_k=self.top_k,
                vocab_size=self.vocab_size,
                precision=self.header.precision,
                id_table=self._table(file, "id_table", self.vocab_size, np.dtype(np.uint32)),
                gap_table=self._table(file, "gap_table", 1 << self.header.precision, np.dtype(np.float32)),
                chunk_tokens=self.header.chunk_tokens,
                extras=extras,
            )
        except ValueError as error:
            raise damaged(self.path, "the tables of a compact cache", str(error)) from error

    def _extras(self, file: h5py.File) -> Extras:
        values: dict[str, Any] = {
            str(ALL_TOKEN_ARRAYS[name].extra): find_dataset(file, self.path, name) is not None
            for name in OPTIONAL_TOKEN_ARRAYS
        }
        values["draws"] = self._draws() if values["draws"] else 0
        values["temperatures"] = self._temperatures(file) if values["temperatures"] else ()
        return Extras(**values)

    def _draws(self) -> int:
        draws = self._count("draws", "topk_counts")
        if not self.top_k <= draws <= MOST_DRAWS:
            raise damaged(self.path, f"draws from top_k {self.top_k} to {MOST_DRAWS}", str(draws))
        return draws

    def _temperatures(self, file: h5py.File) -> tuple[float, ...]:
        temperatures = self._table(file, "temperatures", None, np.dtype(np.float64))
        is_valid = (np.diff(temperatures, prepend=0.0) > 0).all() and 1.0 not in temperatures
        if not is_valid or not 0 < len(temperatures) <= MOST_TEMPERATURES or not np.isfinite(temperatures).all():
            expected = f"1 to {MOST_TEMPERATURES} rising temperatures other than 1"
            raise damaged(self.path, expected, str(temperatures[: MOST_TEMPERATURES + 1]))
        return tuple(temperatures.tolist())

    def _table(self, file: h5py.File, name: str, length: int | None, dtype: np.dtype[Any]) -> Array:
        dataset = find_dataset(file, self.path, name)
        if dataset is None:
            raise damaged(self.path, name, "none")
        check_dataset(dataset, self.path, name, Stored(dtype, (dataset.size if length is None else length,)))
        return np.asarray(dataset[...])

    def _check_arrays(self, file: h5py.File) -> dict[str, h5py.Dataset]:
        """Check names, shapes and dtypes against the profile's. Return the datasets."""
        root = h5py.h5g.open(file.id, b"/")
        has_blocks = any(root.links.exists(name.encode()) for name in BLOCKS)
        n_blocks = self._count("n_blocks", "block_length") if has_blocks else None
        expected = file_arrays(self.profile, (self.n_entries, self.n_target_entries), self.n_documents, n_blocks)
        expected |= {name: Stored(table.dtype, table.shape) for name, table in self.profile.tables.items()}
        n_chunks = self.n_target_entries // self.profile.alignment
        for name in [name for name, stored in expected.items() if stored.chunked]:
            expected |= {f"chunks/{name}/{part}": Stored(np.dtype(dtype), (n_chunks,)) for part, dtype in INDEX.items()}
        if root.links.exists(b"token_crcs"):
            expected["token_crcs"] = Stored(np.dtype(np.uint8), (self._count("tokenizer_ids", "token_crcs"),))
        found = {name: find_dataset(file, self.path, name) for name in expected}
        if lacking := [name for name, dataset in found.items() if dataset is None]:
            raise damaged(self.path, ", ".join(lacking), "none")
        for name, stored in expected.items():
            check_dataset(found[name], self.path, name, stored)
        known = {name.encode() for name in expected}
        for key in root:
            if key not in known and root.links.get_info(key).type == h5py.h5l.TYPE_HARD and is_critical(file[key]):
                raise CacheError.at(
                    self.path,
                    f"expected only known arrays, got the critical array {key.decode(errors='replace')!r};"
                    " install a newer dask_logits",
                )
        return found

    def _opened_planes(self, datasets: dict[str, h5py.Dataset], chunked: Sequence[str]) -> PlaneReader:
        indices = {}
        for name in chunked:
            indices[name] = ChunkIndex(*(self.arrays[f"chunks/{name}/{part}"] for part in INDEX))
            if len(indices[name]):
                self._check_index(datasets[name], name, indices[name])
        return PlaneReader(self.path, self._descriptor, self.profile, indices)

    def _check_index(self, dataset: h5py.Dataset, name: str, index: ChunkIndex) -> None:
        """Refuse an index whose first or last entry differs from HDF5's own chunk locations."""
        for chunk in {0, len(index) - 1}:
            found = dataset.id.get_chunk_info_by_coord((chunk * self.profile.alignment, 0))
            expected = (int(index.offset[chunk]), int(index.size[chunk]) + TRAILER_BYTES)
            if (found.byte_offset, found.size) != expected:
                raise CacheError.at(
                    self.path,
                    f"expected chunk {chunk} of {name} at (offset, bytes) {expected}, as the index says, "
                    f"got {(found.byte_offset, found.size)}: the file was repacked; restore the original, or read this "
                    "one with h5py as docs/FORMAT.md shows",
                )


def _mapped(descriptor: int, dataset: h5py.Dataset) -> Array:
    if dataset.size == 0:
        return np.empty(dataset.shape, dataset.dtype)
    # An ndarray over the map, because np.memmap itself costs microseconds per slice.
    file: Any = io.FileIO(descriptor, closefd=False)
    return np.asarray(np.memmap(file, dataset.dtype, "r", dataset.id.get_offset(), dataset.shape))
