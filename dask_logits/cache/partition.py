"""One partition as one Zarr group: written by a single worker, read back in blocks.

Choices: one group per *attempt*, so that two writers never share an array and nothing is resized (parallel appends and
writes smaller than a shard silently lose data). One shard per array, so that a partition is a dozen files. Core codecs
only (zstd with its own checksum), so that any Zarr reader opens it. Zarr reads a missing chunk, and possibly a damaged
one, as zeros. Therefore the CRC-32 of every file is stored in the receipt and checked before any read.

This is the only module that imports ``zarr``.

Dimension letters: N tokens, K kept entries.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dask_logits.cache.chunks import LEVEL, compress, decompress, whole_chunks
from dask_logits.cache.profile import Profile, Stored, encode_all
from dask_logits.errors import CacheError
from dask_logits.fields import MOST_COUNT
from dask_logits.files.atomic import is_there, read_json, sync_tree
from dask_logits.records import BLOCK_ARRAYS, DOCUMENT_ARRAYS, EVERY_TOKEN, Array, Records, schema

FORMAT = "dask_logits.partition"
VERSION = 2
BLOCK_TOKENS = 16_384
_METADATA = "zarr.json"


def write_partition(
    path: Path, records: Records, profile: Profile, stored: Mapping[str, Array] | None = None
) -> dict[str, tuple[int, int]]:
    """Write a partition into a new group and make it durable.

    Parameters
    ----------
    path
        Folder of this attempt. It must not exist.
    records
        The partition.
    profile
        Storage of its token arrays.
    stored
        Its token arrays from :func:`encode_all`. None: they are encoded here.

    Returns
    -------
    dict
        File → its size in bytes and CRC-32, for the receipt.
    """
    import zarr

    attributes = {"format": FORMAT, "version": VERSION, "profile": profile.name}
    zarr.create_group(str(path), zarr_format=3, attributes=attributes)
    if stored is None:
        stored = encode_all(records.tokens(), profile)
    for name, array in profile.pack(stored).items():
        chunked = profile.arrays[name].chunked
        # Rank bytes do not compress. Arrays that are contiguous in the cache are decoded when they are copied.
        compressed = chunked or name != "topk_ids_b0"
        _write_array(path / name, array, profile.alignment if chunked else BLOCK_TOKENS, compressed)
    for name in (*DOCUMENT_ARRAYS, *BLOCK_ARRAYS):
        if (array := getattr(records, name)) is not None:
            _write_array(path / name, array, BLOCK_TOKENS, True)
    sync_tree(path)
    return {
        str(file.relative_to(path)): (file.stat().st_size, _crc32(file))
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def _write_array(path: Path, array: Array, rows: int, compressed: bool) -> None:
    import zarr
    from zarr.codecs import ZstdCodec

    files: dict[str, Any] = {}
    zarr.create_array(
        zarr.storage.MemoryStore(files),
        shape=array.shape,
        dtype=array.dtype,
        chunks=(rows, *array.shape[1:]),
        shards=(max(1, -(-len(array) // rows)) * rows, *array.shape[1:]),
        compressors=[ZstdCodec(level=LEVEL, checksum=True)] if compressed else None,
    )
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_bytes(content.as_numpy_array())
    if len(array):
        shard = path.joinpath("c", *"0" * array.ndim)
        shard.parent.mkdir(parents=True)
        with shard.open("wb") as out:
            out.writelines(_shard(array, rows, compressed))


def _shard(array: Array, rows: int, compressed: bool) -> Iterator[bytes]:
    """Yield the bytes of a shard, as Zarr writes them. Zarr takes twice the time, most of it to change threads.

    The chunks are followed by the (offset, bytes) of each and the CRC-32C of these numbers (Zarr v3,
    ``sharding_indexed``).
    """
    from google_crc32c import value as crc32c

    index = np.empty((-(-len(array) // rows), 2), "<u8")
    offset = 0
    for place, chunk in enumerate(whole_chunks(array.astype(array.dtype.newbyteorder("<"), copy=False), rows)):
        frame = compress(chunk) if compressed else chunk.tobytes()
        index[place] = offset, len(frame)
        offset += len(frame)
        yield frame
    yield index.tobytes() + crc32c(index.tobytes()).to_bytes(4, "little")


@dataclass(frozen=True, kw_only=True)
class _Layout:
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    rows: int
    compressed: bool


class PartitionReader:
    """Reads one committed partition in constant memory, bypassing Zarr: its receipt has verified it.

    Parameters
    ----------
    path
        Folder of the committed attempt.
    profile
        Storage profile of the partition.

    Raises
    ------
    CacheError
        If it is missing, not a partition of this version, or of another profile.
    """

    def __init__(self, path: Path, profile: Profile) -> None:
        self.path = path
        self.profile = profile
        self._layouts: dict[str, _Layout] = {}
        self._real_path = os.path.realpath(path)
        metadata = None if path.is_symlink() else read_json(self._inside(_METADATA))
        if metadata is None:
            raise CacheError.at(path, "expected a partition, got nothing; run the job again")
        attributes = metadata.get("attributes")
        keys = ("format", "version", "profile")
        found = tuple(attributes.get(key) for key in keys) if isinstance(attributes, dict) else None
        if found != (FORMAT, VERSION, profile.name):
            raise CacheError.at(
                path, f"expected {FORMAT} version {VERSION}, {profile.name}, got {str(found)[:200]}; run the job again"
            )

    @property
    def n_tokens(self) -> int:
        """Number of tokens, N."""
        return self._layout("input_ids").shape[0]

    @property
    def n_targets(self) -> int:
        """Number of positions with targets, M."""
        return self._layout("target_pos" if self.profile.extras.has_target_pos else "input_ids").shape[0]

    def counts(self) -> tuple[int, int, int, int]:
        """Return tokens, targets, documents and blocks."""
        n_blocks = self._layout("block_length").shape[0] if self._has("block_length") else 0
        return self.n_tokens, self.n_targets, self._layout("document_row").shape[0], n_blocks

    def _has(self, name: str) -> bool:
        return is_there(self._inside(name))

    def _inside(self, name: str) -> Path:
        """Return the path of a file of this partition. Links that lead out of the partition are refused."""
        path = self.path / name
        if not Path(os.path.realpath(path)).is_relative_to(self._real_path):
            raise self._unreadable(name, "a path that leads elsewhere")
        return path

    def check(self, files: Mapping[str, Sequence[int]]) -> None:
        """Check every file against the receipt.

        Raises
        ------
        CacheError
            At the first missing or different file.
        """
        for name, (size, crc) in files.items():
            file = self._inside(name)
            found = None
            try:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    status = file.stat()
                    if stat.S_ISREG(status.st_mode):
                        found = status.st_size, _crc32(file) if status.st_size == size else 0
            except OSError as error:
                raise CacheError(
                    f"{file}: expected to read it, got {error}; check the disk, then run the same command again",
                    str(self.path),
                ) from error
            if found != (size, crc):
                raise CacheError(
                    f"{file}: expected {size} bytes with CRC-32 {crc:08x}, got "
                    f"{'nothing' if found is None else f'{found[0]} with {found[1]:08x}'}: the data are damaged; "
                    "delete the partition's receipt and run the job again",
                    str(self.path),
                )

    def blocks(self, name: str) -> Iterator[Array]:
        """Yield one stored array in blocks of at most 16,384 entries."""
        layout = self._layout(name)
        shape = (layout.rows, *layout.shape[1:])
        rows: list[Array] = []
        left = layout.shape[0]
        for frame in self.chunks(name):
            try:
                if layout.compressed:
                    block = np.empty(shape, layout.dtype)
                    decompress(frame, block)
                else:
                    block = np.frombuffer(frame, layout.dtype).reshape(shape)
                rows.append(block[: min(left, layout.rows)])
            except ValueError as error:
                raise self._unreadable(name, error) from error
            left -= layout.rows
            if len(rows) * layout.rows >= BLOCK_TOKENS or left <= 0:
                yield rows[0] if len(rows) == 1 else np.concatenate(rows)
                rows = []

    def tokens(self) -> Iterator[dict[str, Array]]:
        """Yield the logical token arrays in blocks of at most 16,384 entries of each axis. The targets end first."""
        none = self._no_tokens()
        for parts in itertools.zip_longest(*(self.blocks(name) for name in none)):
            found = {name: part for name, part in zip(none, parts, strict=True) if part is not None}
            try:
                yield self.profile.decode(self.profile.unpack({**none, **found}))
            except ValueError as error:
                raise self._unreadable("its targets", error) from error

    def _no_tokens(self) -> dict[str, Array]:
        """Return the stored token arrays of no position."""
        return {name: np.empty((0, *kind.shape), kind.dtype) for name, kind in self.profile.arrays.items()}

    def chunks(self, name: str) -> list[memoryview]:
        """Return the chunks of an array's shard unchanged.

        A shard ends with the (offset, bytes) of each chunk and a checksum of 4 bytes (Zarr v3, ``sharding_indexed``).
        """
        layout = self._layout(name)
        count = -(-layout.shape[0] // layout.rows)
        if not count:
            return []
        # Twice the size of incompressible frames, plus the index.
        raw_bytes = count * layout.rows * layout.dtype.itemsize * math.prod(layout.shape[1:])
        most, least = 2 * raw_bytes + 1024 * count, 16 * count + 4
        try:
            file = self._inside("/".join((name, "c", *("0",) * len(layout.shape))))
            if not least <= file.stat().st_size <= most:
                raise ValueError(f"a shard of {file.stat().st_size} bytes for {layout.shape}")
            shard = memoryview(file.read_bytes())
            index = np.frombuffer(shard, "<u8", 2 * count, len(shard) - least).reshape(count, 2).tolist()
            if any(offset + size > len(shard) - least for offset, size in index):
                raise ValueError("chunks beyond its shard")
        except (OSError, ValueError) as error:
            raise self._unreadable(name, error) from error
        return [shard[offset : offset + size] for offset, size in index]

    def _layout(self, name: str) -> _Layout:
        """Read an array's metadata directly. Zarr takes half a millisecond per array."""
        if name not in self._layouts:
            kind = self._kind(name)
            rows = self.profile.alignment if kind.chunked else BLOCK_TOKENS
            found = read_json(self._inside(f"{name}/{_METADATA}")) or {}
            try:
                (sharding,) = found["codecs"]
                inner = sharding["configuration"]
                codecs = [codec["name"] for codec in inner["codecs"]]
                length, *entry = found["shape"]
                described = (entry, found["data_type"], inner["chunk_shape"])
            except (ValueError, KeyError, TypeError) as error:
                raise self._unreadable(name, f"metadata without {error}") from error
            expected = ([*kind.shape], kind.dtype.name, [rows, *kind.shape])
            is_count = type(length) is int and 0 <= length < MOST_COUNT
            if described != expected or not is_count or codecs not in (["bytes"], ["bytes", "zstd"]):
                raise self._unreadable(name, f"{str((length, described, codecs))[:200]} instead of {expected}")
            self._layouts[name] = _Layout(
                shape=(length, *kind.shape),
                dtype=kind.dtype.newbyteorder("<"),
                rows=rows,
                compressed="zstd" in codecs,
            )
            if name in self.profile.arrays:
                n_entries = self.n_tokens if name in EVERY_TOKEN else self.n_targets
                if length != n_entries or length > self.n_tokens:
                    raise self._unreadable(name, f"{length} entries instead of {n_entries} of {self.n_tokens} tokens")
        return self._layouts[name]

    def _kind(self, name: str) -> Stored:
        return self.profile.arrays.get(name) or Stored(*schema(self.profile.top_k, self.profile.vocab_size)[name])

    def _unreadable(self, name: str, error: Exception | str) -> CacheError:
        return CacheError.at(
            self.path, f"expected to read {name}, got {error}; delete its receipt and run the job again"
        )

    def records(self) -> Records:
        """Read the whole partition."""
        blocks = [self.profile.decode(self._no_tokens()), *self.tokens()]
        columns = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
        for name in (*DOCUMENT_ARRAYS, *BLOCK_ARRAYS):
            if self._has(name):
                columns[name] = np.concatenate([np.empty(0, self._layout(name).dtype), *self.blocks(name)])
        try:
            return Records(**columns)
        except (TypeError, ValueError) as error:
            raise self._unreadable("its documents", error) from error


def _crc32(file: Path) -> int:
    crc = 0
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            crc = zlib.crc32(piece, crc)
    return crc
