"""Defensive reading of untrusted HDF5 files.

Nothing outside the file is read (links, external and virtual storage). Sizes in the header must match the arrays, and
arrays must lie inside the file. Errors of h5py become :class:`~dask_logits.errors.CacheError`.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dask_logits.cache.profile import Stored
from dask_logits.errors import CacheError, damaged, first_line
from dask_logits.files.atomic import parse_json

_MOST_TEXT_BYTES = 64 << 20
# The first bytes of an HDF5 file. The writer puts nothing before them.
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_LOCKED = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)
# Exceptions that h5py raises for HDF5 errors. Which one depends on where a file is damaged.
_HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """Open a file for reading, without a lock.

    Raises
    ------
    CacheError
        If the file is missing or not HDF5, and in place of exceptions of h5py in the context.
    """
    with _open_file(path) as file:
        try:
            yield file
        except CacheError:
            raise
        except _HDF5_ERRORS as error:
            raise damaged(path, "to open it", first_line(error)) from error


def _open_file(path: Path) -> h5py.File:
    _check_kind(path)
    try:
        try:
            return h5py.File(path, "r", locking=False)
        except OSError:
            # A handle opened with locks in this process prevents opening without one.
            return h5py.File(path, "r")
    except _HDF5_ERRORS as error:
        if isinstance(error, OSError) and error.errno in _LOCKED:
            raise CacheError.at(
                path,
                "expected a cache that can be read, but another process has locked it; close the program that "
                "writes it, then try again",
            ) from error
        raise CacheError.at(
            path,
            f"expected a complete HDF5 file, got a truncated or damaged one ({first_line(error)}); copy it "
            "again; if a job wrote it and no copy exists, delete it and run the job again",
        ) from error


def _check_kind(path: Path) -> None:
    """Refuse a path that is absent, not a file, not readable, or of another file type."""
    try:
        if not path.exists():
            raise CacheError.at(path, "expected a cache, got nothing; run the job, or correct the path")
        if not path.is_file():
            raise CacheError.at(path, "expected a file, got something else; correct the path")
        with path.open("rb") as file:
            start = file.read(len(_SIGNATURE))
    except CacheError:
        raise
    except PermissionError as error:
        raise CacheError.at(
            path, "expected a cache that can be read, but permission is denied; ask its owner, or change its mode"
        ) from error
    except OSError as error:
        raise CacheError.at(path, f"expected a cache that can be read, got {error}; check the disk") from error
    if start != _SIGNATURE:
        raise CacheError.at(
            path,
            f"expected a cache (an HDF5 file), got {_kind_of(path, start)}; give the path of a cache or of a "
            "run folder",
        )


def _kind_of(path: Path, start: bytes) -> str:
    """Describe a file that lacks the HDF5 signature."""
    if not start:
        return "an empty file"
    kind = "a text file" if start.isascii() else "a file of another kind"
    return f"{kind} ({path.suffix or 'without a suffix'})"


def root_attributes(file: h5py.File) -> dict[str, Any]:
    """Return the scalar attributes of the root. Others have no meaning."""
    found = {name: _scalar(file.attrs, name) for name in file.attrs}
    return {name: value for name, value in found.items() if value is not None}


def find_dataset(file: h5py.File, path: Path, name: str) -> h5py.Dataset | None:
    """Return a dataset by name, or None if it is missing or behind a soft or external link."""
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


def check_dataset(dataset: h5py.Dataset, path: Path, name: str, expected: Stored) -> None:
    """Compare a dataset's shape, dtype and storage with the format's.

    Parameters
    ----------
    dataset
        The dataset to check.
    path, name
        For error messages.
    expected
        The storage and the whole shape implied by the header.

    Raises
    ------
    CacheError
        If they differ, or the array does not lie inside the file.
    """
    found = (dataset.shape, dataset.dtype)
    if found != (expected.shape, expected.dtype):
        raise damaged(path, f"{name} with {expected.shape} of {expected.dtype}", str(found))
    properties = dataset.id.get_create_plist()
    layout = h5py.h5d.CHUNKED if expected.chunked else h5py.h5d.CONTIGUOUS
    if properties.get_layout() != layout or properties.get_external_count():
        raise CacheError.at(
            path,
            f"expected {name} {'in chunks' if expected.chunked else 'contiguous'} in the file itself, got another "
            "layout: the file was repacked or damaged; restore the original, or read this one with h5py as "
            "docs/FORMAT.md shows",
        )
    if not expected.chunked and dataset.nbytes:
        end = dataset.nbytes + (dataset.id.get_offset() or 0)
        file_bytes = os.fstat(dataset.file.id.get_vfd_handle()).st_size
        if dataset.id.get_offset() is None or end > file_bytes:
            raise damaged(path, f"{name} in {file_bytes} bytes", f"{dataset.nbytes} bytes, to {end}")


def is_critical(item: h5py.HLObject) -> bool:
    """Whether an array or group is marked critical, including marks that cannot be interpreted."""
    if "critical" not in item.attrs:
        return False
    return _scalar(item.attrs, "critical") not in (False, 0)


def _scalar(attributes: h5py.AttributeManager, name: str) -> Any:
    """Return a scalar text, number or boolean attribute, JSON decoded, or None for any other type.

    Variable-length texts count as other types, because HDF5 2.0 loops forever on some damaged heaps of them.
    """
    held = attributes.get_id(name)
    if held.shape != () or held.dtype.itemsize > _MOST_TEXT_BYTES or held.dtype.kind not in "biufS":
        return None
    value = attributes[name]
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, str) and value[:1] in ("{", "["):
        with contextlib.suppress(ValueError):
            return parse_json(value)
    return value.item() if isinstance(value, np.generic) else value
