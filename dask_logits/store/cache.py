"""The cache: one HDF5 file with the targets of a whole run, in dataset order. ``docs/FORMAT.md`` specifies it.

Chosen: the *plain* profile, contiguous and uncompressed, so that any HDF5 reader opens it and ours maps it into
memory: after the attributes are read, h5py is closed and nothing is shared between processes, threads or forks.
A CRC-32 per MiB of every array is stored beside it.

This is the home of ``h5py``.

Dimension letters: N tokens, D documents, K kept entries.
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
from dask_logits.records import DOCUMENT_ARRAYS, TOKEN_ARRAYS, Array, ContentDigest, schema
from dask_logits.store.durable import sync

FORMAT = "dask_logits"
FORMAT_VERSION = "1.0"
CRC_BLOCK_BYTES = 1 << 20
ARRAYS = (*TOKEN_ARRAYS, *DOCUMENT_ARRAYS, "document_start")


class CacheWriter:
    """Writes a cache aside, array by array, and finishes it.

    Parameters
    ----------
    path
        Temporary name; the caller renames it once :meth:`finish` has returned.
    n_tokens, n_documents, top_k, vocab_size
        Final sizes.
    """

    def __init__(self, path: Path, *, n_tokens: int, n_documents: int, top_k: int, vocab_size: int) -> None:
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
        }
        entries = {**schema(top_k, vocab_size), "document_start": (np.dtype(np.uint64), ())}
        for name in ARRAYS:
            dtype, shape = entries[name]
            length = n_tokens if name in TOKEN_ARRAYS else n_documents
            self._file.create_dataset(name, shape=(length, *shape), dtype=dtype.newbyteorder("<"))
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
        self._check_arrays(file)
        self.crcs: dict[str, Array] = {name: file[f"crc32/{name}"][:] for name in ARRAYS}
        datasets = {name: file[name] for name in ARRAYS}
        self.arrays: dict[str, Any] = {name: self._mapped(dataset) for name, dataset in datasets.items()}
        if not any(isinstance(array, h5py.Dataset) for array in self.arrays.values()):
            file.close()

    @property
    def document_start(self) -> Array:
        """[D] uint64, first token of each document."""
        start: Array = self.arrays["document_start"]
        return start

    def document(self, index: int) -> dict[str, Array]:
        """Return the token arrays of one document, and its row.

        Parameters
        ----------
        index
            Document in dataset order, from 0.
        """
        start = int(self.arrays["document_start"][index])
        stop = start + int(self.arrays["document_length"][index])
        found = {name: np.asarray(self.arrays[name][start:stop]) for name in TOKEN_ARRAYS}
        found["row"] = np.asarray(self.arrays["document_row"][index])
        return found

    def verify_checksums(self) -> None:
        """Compare every array with its stored CRC-32s.

        Raises
        ------
        CacheError
            Naming the first damaged array and the entries.
        """
        for name in ARRAYS:
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
            if name not in ARRAYS and item.attrs.get("critical", False):
                raise CacheError(
                    f"{self.path}: expected only known arrays, got the critical array {name!r}; "
                    "install a newer dask_logits",
                    str(self.path),
                )

    def _check_arrays(self, file: h5py.File) -> None:
        entries = {**schema(self.top_k, self.vocab_size), "document_start": (np.dtype(np.uint64), ())}
        for name in ARRAYS:
            dtype, entry = entries[name]
            shape = (self.n_tokens if name in TOKEN_ARRAYS else self.n_documents, *entry)
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


def documents(reader: CacheReader) -> Iterator[dict[str, Array]]:
    """Yield every document in order."""
    for index in range(reader.n_documents):
        yield reader.document(index)
