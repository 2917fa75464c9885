"""The cache: one HDF5 file with the targets of a whole run, in dataset order. ``docs/FORMAT.md`` specifies it.

Chosen: the *plain* profile, contiguous and uncompressed, so that any HDF5 reader opens it and ours maps it into
memory: after the attributes are read, h5py is closed and nothing is shared between processes, threads or forks.
A CRC-32 per MiB of every array is stored beside it.

This is the home of ``h5py``.

Dimension letters: N tokens, D documents, B blocks, K kept entries.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from dask_logits.errors import CacheError
from dask_logits.records import BLOCK_ARRAYS, DOCUMENT_ARRAYS, TOKEN_ARRAYS, Array, ContentDigest, schema
from dask_logits.store.durable import read_json, sync

FORMAT = "dask_logits"
FORMAT_VERSION = "1.1"
CRC_BLOCK_BYTES = 1 << 20
CACHE_NAME = "teacher_logits.h5"
INDEX_NAME = "teacher_logits.index.json"
INDEX_FORMAT = "dask_logits.index"
INDEX_VERSION = 1
ARRAYS = (*TOKEN_ARRAYS, *DOCUMENT_ARRAYS, "document_start")


class CacheWriter:
    """Writes a cache aside, array by array, and finishes it.

    Parameters
    ----------
    path
        Temporary name; the caller renames it once :meth:`finish` has returned.
    n_tokens, n_documents, top_k, vocab_size
        Final sizes.
    n_blocks
        Packed blocks; None where documents were not packed.
    """

    def __init__(
        self, path: Path, *, n_tokens: int, n_documents: int, top_k: int, vocab_size: int, n_blocks: int | None = None
    ) -> None:
        self.path = path
        self.digest = ContentDigest()
        self._filled: dict[str, int] = {}
        self._crcs: dict[str, _BlockCrc] = {}
        # v110: what libver="latest" writes today, HDF5 1.14 cannot read.
        self._file = h5py.File(path, "w", libver=("v110", "v110"))
        self._sizes = {
            "n_tokens": n_tokens,
            "n_documents": n_documents,
            "top_k": top_k,
            "vocab_size": vocab_size,
            **({} if n_blocks is None else {"n_blocks": n_blocks}),
        }
        entries = {**schema(top_k, vocab_size), "document_start": (np.dtype(np.uint64), ())}
        for name in (*ARRAYS, *(BLOCK_ARRAYS if n_blocks is not None else ())):
            dtype, shape = entries[name]
            length = {**dict.fromkeys(TOKEN_ARRAYS, n_tokens), "block_length": n_blocks}.get(name, n_documents)
            array = self._file.create_dataset(name, shape=(length, *shape), dtype=dtype.newbyteorder("<"))
            if name in BLOCK_ARRAYS:
                # Who does not know it would take segments of blocks for documents that were scored alone.
                array.attrs["critical"] = True
            self._filled[name] = 0
            self._crcs[name] = _BlockCrc()

    def append(self, name: str, block: Array) -> None:
        """Write the next entries of one array."""
        first = self._filled[name]
        dataset = self._file[name]
        if block.dtype != dataset.dtype:
            raise CacheError(f"{self.path}: expected {name} as {dataset.dtype}, got {block.dtype}", str(self.path))
        if len(block):
            dataset[first : first + len(block)] = block
        self._filled[name] = first + len(block)
        self._crcs[name].update(block)
        if name != "document_start":
            self.digest.update(name, block)

    def finish(self, attributes: Mapping[str, Any]) -> str:
        """Write checksums and attributes, the completeness flag last, and flush to the disk.

        Returns
        -------
        str
            The content digest.

        Raises
        ------
        CacheError
            If an array was not filled.
        """
        for name, filled in self._filled.items():
            if filled != len(self._file[name]):
                raise CacheError(
                    f"{self.path}: expected {len(self._file[name])} entries of {name}, got {filled}",
                    str(self.path),
                )
            self._file.create_dataset(f"crc32/{name}", data=np.array(self._crcs[name].values(), np.uint32))
        content_digest = self.digest.hexdigest()
        header = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "profile": "plain",
            **self._sizes,
            "crc32_block_bytes": CRC_BLOCK_BYTES,
            "temperature": 1.0,
            "target_shift": 1,
            "order": "logprob descending, ties by lower id",
            "content_digest": content_digest,
        }
        for key, value in {**header, **attributes}.items():
            self._file.attrs[key] = json.dumps(value) if isinstance(value, dict | list) else value
        self._file.flush()
        self._file.attrs["complete"] = True
        self._file.close()
        sync(self.path)
        return content_digest

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is not None:
            self.path.unlink(missing_ok=True)


class CacheReader:
    """Reads documents of a cache; safe to use from several threads and after a fork.

    Parameters
    ----------
    path
        The HDF5 file.

    Raises
    ------
    CacheError
        If it is missing, truncated, incomplete, not a cache, or of a newer format.

    Attributes
    ----------
    attributes : dict
        The file's attributes; JSON ones decoded.
    n_tokens, n_documents, top_k, vocab_size : int
        Sizes.
    arrays : dict
        Logical name → array: a memory map, or an open HDF5 dataset where the file was repacked with chunks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        file = _open(path)
        self.attributes = {key: _decoded(value) for key, value in file.attrs.items()}
        self._check_header(file)
        self.n_tokens = int(self.attributes["n_tokens"])
        self.n_documents = int(self.attributes["n_documents"])
        self.top_k = int(self.attributes["top_k"])
        self.vocab_size = int(self.attributes["vocab_size"])
        self.names = (*ARRAYS, *(name for name in BLOCK_ARRAYS if name in file))
        self._check_arrays(file)
        self.crcs: dict[str, Array] = {name: file[f"crc32/{name}"][:] for name in self.names}
        datasets = {name: file[name] for name in self.names}
        self.arrays: dict[str, Any] = {name: self._mapped(dataset) for name, dataset in datasets.items()}
        if not any(isinstance(array, h5py.Dataset) for array in self.arrays.values()):
            file.close()
        self._block_start: Array | None = None
        if self.is_packed:
            lengths = np.asarray(self.arrays["block_length"]).astype(np.int64)
            self._block_start = np.cumsum(lengths) - lengths

    @property
    def is_packed(self) -> bool:
        """Whether documents were packed into blocks."""
        return "block_length" in self.names

    @property
    def n_items(self) -> int:
        """Items: blocks of a packed cache, else documents (windows count each)."""
        return len(self.arrays["block_length"]) if self.is_packed else self.n_documents

    def item(self, index: int) -> dict[str, Array]:
        """Return the token arrays of one item, and its segments.

        Parameters
        ----------
        index
            Item in dataset order, from 0.

        Returns
        -------
        dict
            The token arrays; ``segments`` [S, 3] int64, (row, offset, length) of each run of one row's tokens; ``row``,
            the first segment's.
        """
        if self._block_start is None:
            start = int(self.arrays["document_start"][index])
            stop = start + int(self.arrays["document_length"][index])
            documents = slice(index, index + 1)
        else:
            start = int(self._block_start[index])
            stop = start + int(self.arrays["block_length"][index])
            starts = self.arrays["document_start"]
            documents = slice(*(int(i) for i in np.searchsorted(starts, np.array([start, stop], starts.dtype))))
        found = {name: np.asarray(self.arrays[name][start:stop]) for name in TOKEN_ARRAYS}
        found["segments"] = np.stack([self.arrays[name][documents].astype(np.int64) for name in DOCUMENT_ARRAYS], 1)
        found["row"] = found["segments"][0, 0]
        return found

    def item_places(self) -> tuple[Array, Array]:
        """Return the dataset row of each item's first token, and its place in the row's tokens: [items] int64 each."""
        rows, offsets = (np.asarray(self.arrays[name]).astype(np.int64) for name in DOCUMENT_ARRAYS[:2])
        if self._block_start is None:
            return rows, offsets
        starts = np.asarray(self.arrays["document_start"])
        first = np.searchsorted(starts, self._block_start.astype(starts.dtype), side="right") - 1
        return rows[first], offsets[first]

    @property
    def document_start(self) -> Array:
        """[D] uint64, first token of each document."""
        start: Array = self.arrays["document_start"]
        return start

    def verify_checksums(self) -> None:
        """Compare every array with its stored CRC-32s.

        Raises
        ------
        CacheError
            Naming the first damaged array and the entries.
        """
        for name in self.names:
            array = self.arrays[name]
            crc = _BlockCrc()
            rows = max(1, (8 << 20) // max(1, array.dtype.itemsize * int(np.prod(array.shape[1:], dtype=int))))
            for first in range(0, len(array), rows):
                crc.update(np.asarray(array[first : first + rows]))
            found, expected = crc.values(), self.crcs[name].tolist()
            if found != expected:
                block = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), 0)
                raise CacheError(
                    f"{self.path}: expected CRC-32 {expected[block : block + 1]} for {name}, MiB {block}, got "
                    f"{found[block : block + 1]}: the file is damaged; restore it or run the job again",
                    str(self.path),
                )

    def _check_header(self, file: h5py.File) -> None:
        found = self.attributes.get("format")
        if found != FORMAT:
            raise CacheError(
                f"{self.path}: expected a dask_logits cache, got format {found!r}; give the teacher_logits.h5 of a run",
                str(self.path),
            )
        version = str(self.attributes.get("format_version"))
        if version.split(".")[0] != FORMAT_VERSION.split(".")[0] or self.attributes.get("profile") != "plain":
            raise CacheError(
                f"{self.path}: expected format version {FORMAT_VERSION.split('.')[0]}.x, profile 'plain', got "
                f"{version}, {self.attributes.get('profile')!r}; install a newer dask_logits",
                str(self.path),
            )
        if not self.attributes.get("complete"):
            raise CacheError(
                f"{self.path}: expected a complete cache, got one whose writing was cut off; run the job again",
                str(self.path),
            )
        sizes = ("n_tokens", "n_documents", "top_k", "vocab_size")
        lacking = [name for name in sizes if name not in self.attributes]
        lacking += [f"crc32/{name}" for name in ARRAYS if f"crc32/{name}" not in file]
        if lacking:
            raise CacheError(
                f"{self.path}: expected {', '.join(lacking)}, got none; the file is damaged: restore it or run the job "
                "again",
                str(self.path),
            )
        for name, item in file.items():
            if name not in (*ARRAYS, *BLOCK_ARRAYS) and item.attrs.get("critical", False):
                raise CacheError(
                    f"{self.path}: expected only known arrays, got the critical array {name!r}; "
                    "install a newer dask_logits",
                    str(self.path),
                )

    def _check_arrays(self, file: h5py.File) -> None:
        entries = {**schema(self.top_k, self.vocab_size), "document_start": (np.dtype(np.uint64), ())}
        for name in self.names:
            dtype, entry = entries[name]
            lengths = {**dict.fromkeys(TOKEN_ARRAYS, self.n_tokens), "block_length": self.attributes.get("n_blocks")}
            shape = (lengths.get(name, self.n_documents), *entry)
            found = (file[name].shape, file[name].dtype) if name in file else None
            if found != (shape, dtype):
                raise CacheError(
                    f"{self.path}: expected {name} with {shape} of {dtype}, got {found}; the file is damaged",
                    str(self.path),
                )

    def _mapped(self, dataset: h5py.Dataset) -> Any:
        offset = dataset.id.get_offset()
        if dataset.size == 0:
            return np.empty(dataset.shape, dataset.dtype)
        if offset is None:
            return dataset
        # An ndarray over the map: np.memmap itself costs microseconds a slice.
        return np.asarray(np.memmap(self.path, dataset.dtype, "r", offset, dataset.shape))


class _BlockCrc:
    """CRC-32 of every MiB of a stream of arrays."""

    def __init__(self) -> None:
        self._done: list[int] = []
        self._crc = 0
        self._room = CRC_BLOCK_BYTES

    def update(self, block: Array) -> None:
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
        return self._done if self._room == CRC_BLOCK_BYTES else [*self._done, self._crc]


def _open(path: Path) -> h5py.File:
    if not path.exists():
        raise CacheError(f"{path}: expected a cache, got nothing; run the job, or correct the path", str(path))
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        raise CacheError(
            f"{path}: expected an HDF5 file, got a truncated or foreign one ({error}); copy it again "
            "or run the job again",
            str(path),
        ) from error


def _decoded(value: Any) -> Any:
    if isinstance(value, str) and value[:1] in ("{", "["):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value.item() if isinstance(value, np.generic) else value


def items(reader: CacheReader) -> Iterator[dict[str, Array]]:
    """Yield every item in order."""
    for index in range(reader.n_items):
        yield reader.item(index)


def find_caches(path: Path) -> list[Path]:
    """Return the cache files that a path stands for.

    Parameters
    ----------
    path
        A cache; an index over several; or a folder with one of these, or with several caches in it or in its folders.

    Raises
    ------
    CacheError
        If there is none, or an index names one that is missing or has changed.
    """
    if path.suffix == ".json":
        return _indexed(path)
    if not path.is_dir():
        return [path]
    if (path / CACHE_NAME).exists():
        return [path / CACHE_NAME]
    if (path / INDEX_NAME).exists():
        return _indexed(path / INDEX_NAME)
    found = sorted([*path.glob("*.h5"), *path.glob(f"[!.]*/{CACHE_NAME}")])
    # A run folder without a cache may hold an older one, set aside.
    if not found or (path / "run.json").exists():
        raise CacheError(f"{path}: expected {CACHE_NAME} in it, or caches to serve as one, got none", str(path))
    return found


def _indexed(path: Path) -> list[Path]:
    index = read_json(path)
    if index is None or index.get("format") != INDEX_FORMAT or index.get("version") != INDEX_VERSION:
        found = "nothing" if index is None else f"{index.get('format')!r} version {index.get('version')!r}"
        raise CacheError(f"{path}: expected {INDEX_FORMAT} version {INDEX_VERSION}, got {found}", str(path))
    caches = []
    for entry in index["caches"]:
        cache = path.parent / str(entry["path"])
        digest = CacheReader(cache).attributes["content_digest"]
        if digest != entry["content_digest"]:
            raise CacheError(
                f"{path}: expected {cache} with content {entry['content_digest'][:16]}…, got {digest[:16]}…; "
                "merge again",
                str(cache),
            )
        caches.append(cache)
    return caches
