"""HDF5 files that somebody may have made to do harm: opened and read without believing what they claim.

Nothing outside the file is read (links, external and virtual storage), nothing takes more memory than the file's size
can justify, and what h5py raises becomes this package's error.

One of the three homes of ``h5py``.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dask_logits.cache.chunks import content_bytes, fletcher32
from dask_logits.cache.heaps import broken_heap
from dask_logits.cache.layout import ZSTD_FILTER
from dask_logits.errors import CacheError, first_line
from dask_logits.files.atomic import parse_json
from dask_logits.records import Array

# Deflate, shuffle, Fletcher-32, LZF: none makes more than about a thousand bytes of one.
_FILTERS = frozenset({1, 2, 3, 32_000, ZSTD_FILTER})
_MOST_RATIO = 1100
_MOST_CHUNK_BYTES = 64 << 20
_MOST_TEXT_BYTES = 64 << 20
# The first bytes of an HDF5 file; our writer puts nothing before them.
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_LOCKED = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)
# What h5py makes of HDF5's errors, which of them depends on where a file is damaged.
_HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError)


def open_file(path: Path) -> h5py.File:
    """Open a file to read it, without a lock.

    Raises
    ------
    CacheError
        If there is none, or it is no HDF5 file.
    """
    _check_kind(path)
    try:
        try:
            return h5py.File(path, "r", locking=False)
        except OSError:
            # A handle that someone in this process opened with locks does not allow one without.
            return h5py.File(path, "r")
    except _HDF5_ERRORS as error:
        if isinstance(error, OSError) and error.errno in _LOCKED:
            raise CacheError(
                f"{path}: expected a cache that can be read, but another process has locked it; close the program that "
                "writes it, then try again",
                str(path),
            ) from error
        raise CacheError(
            f"{path}: expected a complete HDF5 file, got a truncated or damaged one ({first_line(error)}); copy it "
            "again; if a job wrote it and no copy exists, delete it and run the job again",
            str(path),
        ) from error


def _check_kind(path: Path) -> None:
    """Refuse a path that is absent, not a file, not readable, or a file of another kind."""
    try:
        if not path.exists():
            raise CacheError(f"{path}: expected a cache, got nothing; run the job, or correct the path", str(path))
        if not path.is_file():
            raise CacheError(f"{path}: expected a file, got something else; correct the path", str(path))
        with path.open("rb") as file:
            start = file.read(len(_SIGNATURE))
    except CacheError:
        raise
    except PermissionError as error:
        raise CacheError(
            f"{path}: expected a cache that can be read, but permission is denied; ask its owner, or change its mode",
            str(path),
        ) from error
    except OSError as error:
        raise CacheError(
            f"{path}: expected a cache that can be read, got {error}; check the disk", str(path)
        ) from error
    if start != _SIGNATURE:
        raise CacheError(
            f"{path}: expected a cache (an HDF5 file), got {_kind_of(path, start)}; give the path of a cache or of a "
            "run folder",
            str(path),
        )


def _kind_of(path: Path, start: bytes) -> str:
    """Say what a file is that does not begin like HDF5."""
    if not start:
        return "an empty file"
    try:
        start.decode("ascii")
    except UnicodeDecodeError:
        return f"a file of another kind ({path.suffix or 'without a suffix'})"
    return f"a text file ({path.suffix or 'without a suffix'})"


def root_attributes(file: h5py.File, path: Path) -> dict[str, Any]:
    """Return the scalar attributes of the root; no other has a meaning.

    Raises
    ------
    CacheError
        If texts of variable length, which our writer made up to 1.2, lie where HDF5 would not come back from.
    """
    if any(_is_in_heap(file.attrs.get_id(name)) for name in file.attrs):
        at = broken_heap(path) if file.id.get_create_plist().get_sizes() == (8, 8) else 0
        if at is not None:
            raise damaged(path, "texts one after the other", f"a heap at byte {at} where they are not")
    found = {name: _scalar(file.attrs, name) for name in file.attrs}
    return {name: value for name, value in found.items() if value is not None}


def find_dataset(file: h5py.File, path: Path, name: str) -> h5py.Dataset | None:
    """Return the dataset of a name, which no soft or external link leads to; None if there is none."""
    at = h5py.h5g.open(file.id, b"/")
    for part in name.encode().split(b"/"):
        if not isinstance(at, h5py.h5g.GroupID) or not at.links.exists(part):
            return None
        if at.links.get_info(part).type != h5py.h5l.TYPE_HARD:
            raise damaged(path, f"{name} in the file itself", "a link")
        at = h5py.h5o.open(at, part)
    if not isinstance(at, h5py.h5d.DatasetID):
        raise damaged(path, f"the array {name}", "something else")
    return h5py.Dataset(at)


def check_dataset(
    dataset: h5py.Dataset,
    path: Path,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    *,
    indexed: bool = False,
) -> None:
    """Compare a dataset's shape and dtype with what is expected, and its claims with the size of the file.

    Parameters
    ----------
    dataset
        It.
    path, name
        For messages.
    shape, dtype
        What is expected.
    indexed
        Its chunks are found by an index of ours, which is compared with the file where they are read.

    Raises
    ------
    CacheError
        If it is another, or does not lie in the file.
    """
    found, file_bytes = (dataset.shape, dataset.dtype), path.stat().st_size
    if found != (shape, dtype):
        raise damaged(path, f"{name} with {shape} of {dtype}", str(found))
    properties = dataset.id.get_create_plist()
    layout, filters = properties.get_layout(), set(_filters(properties))
    if layout == h5py.h5d.VIRTUAL or properties.get_external_count() or not filters <= _FILTERS:
        raise damaged(path, f"{name} in the file itself, behind known filters", f"another file, or {filters}")
    end = 0 if indexed else dataset.nbytes // _MOST_RATIO
    if layout == h5py.h5d.CONTIGUOUS and dataset.nbytes:
        offset = dataset.id.get_offset()
        end = dataset.nbytes + (file_bytes if offset is None else offset)
    elif layout == h5py.h5d.CHUNKED and math.prod(dataset.chunks) * dtype.itemsize > _MOST_CHUNK_BYTES:
        raise damaged(path, f"{name} in chunks of at most 64 MiB", f"chunks of {dataset.chunks}")
    if end > file_bytes:
        raise damaged(path, f"{name} in {file_bytes} bytes", f"{dataset.nbytes} bytes, to {end}")


class SlowArray:
    """An array that is read through HDF5, because it is chunked or that is asked for.

    HDF5's zstd plugin makes room for as many bytes as a frame says it holds, so that is compared with the chunk first.

    Parameters
    ----------
    path, name
        For messages.
    dataset
        The array.
    """

    def __init__(self, path: Path, name: str, dataset: h5py.Dataset) -> None:
        self.path, self.name = path, name
        self.shape, self.dtype = dataset.shape, dataset.dtype
        self._dataset = dataset
        self._is_zstd = ZSTD_FILTER in _filters(dataset.id.get_create_plist())

    def __len__(self) -> int:
        return int(self.shape[0])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        found: Array = self[:]
        return found if dtype is None else found.astype(dtype)

    def __getitem__(self, rows: Any) -> Any:
        with translated(self.path, f"to read {self.name} (with the package hdf5plugin, if it is compressed)"):
            if self._is_zstd:
                self._check_frames(*(rows.indices(len(self))[:2] if isinstance(rows, slice) else (rows, rows + 1)))
            return self._dataset[rows]

    def _check_frames(self, start: int, stop: int) -> None:
        steps = self._dataset.chunks
        most = math.prod(steps) * self.dtype.itemsize + len(fletcher32(b""))
        # HDF5 would make room for what the file says that a chunk takes; this is all that one can.
        room = bytearray(2 * most + 1024)
        first = int(start) // steps[0] * steps[0]
        sides = (range(0, size, step) for size, step in zip(self.shape[1:], steps[1:], strict=True))
        for place in itertools.product(range(first, int(stop), steps[0]), *sides):
            found = content_bytes(self._dataset.id.read_direct_chunk(place, out=room)[1])
            if found is None or found > most:
                raise ValueError(f"a frame of {found} bytes in chunk {place} of {most}")


def is_critical(item: h5py.HLObject) -> bool:
    """Whether an array or group says so; in a way that is not understood, too."""
    if "critical" not in item.attrs:
        return False
    return _is_in_heap(item.attrs.get_id("critical")) or _scalar(item.attrs, "critical") not in (False, 0)


@contextlib.contextmanager
def translated(path: Path, what: str) -> Iterator[None]:
    """Make a CacheError of what h5py raises meanwhile."""
    try:
        yield
    except CacheError:
        raise
    except _HDF5_ERRORS as error:
        raise CacheError(
            f"{path}: expected {what}, got {first_line(error)}; the file is damaged: restore it, or delete it and run "
            "the job again",
            str(path),
        ) from error


def damaged(path: Path, expected: str, found: str) -> CacheError:
    """Return the error of a file whose parts do not fit each other."""
    return CacheError(
        f"{path}: expected {expected}, got {found}; the file is damaged: restore it, or delete it and run the job "
        "again",
        str(path),
    )


def _filters(properties: Any) -> list[int]:
    return [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]


def _is_in_heap(held: h5py.h5a.AttrID) -> bool:
    """Whether a text is of variable length."""
    text = h5py.check_string_dtype(held.dtype)
    return text is not None and text.length is None


def _scalar(attributes: h5py.AttributeManager, name: str) -> Any:
    """Return an attribute that is one text, number or truth value, JSON decoded; None if it is something else."""
    held = attributes.get_id(name)
    if held.shape != () or held.dtype.itemsize > _MOST_TEXT_BYTES:
        return None
    if held.dtype.kind not in "biufS" and not _is_in_heap(held):
        return None
    return _decoded(attributes[name])


def _decoded(value: Any) -> Any:
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, str) and value[:1] in ("{", "["):
        with contextlib.suppress(ValueError):
            return parse_json(value)
    return value.item() if isinstance(value, np.generic) else value
