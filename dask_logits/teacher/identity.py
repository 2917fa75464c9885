"""The identity of a teacher: which files define it, and whether another worker has the same ones.

The driver of a new run reads all bytes, because 140 GB take minutes. Later starts and workers compare less:

* The *stamp* is a digest of sizes, times and inode numbers. It is equal only where the very same files are seen, on
  this machine or through a network file system. Nothing is read.
* The *sample* is a digest of 4 KiB in every 4 MiB of a large file, of the headers of safetensors, and of small files
  as a whole. It is compared where the stamp differs, usually for a copy on another machine. It finds other weights and
  incomplete or damaged copies, unless the difference lies between the blocks: a thousandth of the bytes is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dask_logits.errors import TeacherError
from dask_logits.teacher.locate import Location

_CONTENT, _SAMPLE = "sha256:", "sample:"
_PATTERNS = ("*.safetensors", "*.bin", "config.json", "*.py", "*.index.json", "adapter_config.json")
_BLOCK_BYTES, _STRIDE_BYTES = 4 << 10, 4 << 20
# A safetensors file starts with the length of its header. The library refuses longer headers.
_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000
# Files up to this size are read as a whole.
_SMALL_BYTES = 16 << 20
_SHOWN_DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a teacher is, as seen by one process.

    Parameters
    ----------
    content
        Digest of the files, or ``commit:`` and the commit of a hub teacher.
    sample, stamp
        Digests for the comparison with other copies. Empty for a hub teacher.
    """

    content: str
    sample: str = ""
    stamp: str = ""

    @property
    def is_of_folder(self) -> bool:
        """Whether the teacher is in a folder, not on the hub."""
        return self.content.startswith(_CONTENT)


def identify(location: Location, commit: str | None, known: Mapping[str, Any]) -> Identity:
    """Identify a teacher, without reading files that have not changed.

    Parameters
    ----------
    location
        The teacher's files.
    commit
        Commit of a hub model.
    known
        Facts recorded by an earlier start: ``identity``, ``sample`` and ``stamp``. Empty: none.
    """
    files, more = _defining(location, commit)
    if not files:
        return Identity(content=f"commit:{commit}")
    # Taken first, so that it differs if a file changes while it is read.
    stamp = _stamp(files, more)
    if stamp == known.get("stamp"):
        return Identity(content=str(known["identity"]), sample=str(known["sample"]), stamp=stamp)
    return Identity(content=_digest(_CONTENT, files, more), sample=_digest(_SAMPLE, files, more), stamp=stamp)


def require_same(location: Location, commit: str | None, seen: Identity) -> None:
    """Refuse other files than those that the driver saw.

    Parameters
    ----------
    location, commit
        As for :func:`identify`.
    seen
        The identity found by the driver. Without a sample, all bytes are compared.

    Raises
    ------
    TeacherError
        If the files differ.
    """
    files, more = _defining(location, commit)
    if not files or _stamp(files, more) == seen.stamp:
        return
    expected = seen.sample or seen.content
    got = _digest(_SAMPLE if seen.sample else _CONTENT, files, more)
    if got != expected:
        raise TeacherError(
            f"distillation.teacher.model_path: expected the teacher {_short(expected)} that the driver saw, got "
            f"{_short(got)} in {location.base!r}; give every machine the same files"
        )


def _short(digest: str) -> str:
    return digest[: digest.index(":") + 1 + _SHOWN_DIGITS] + "…"


def _defining(location: Location, commit: str | None) -> tuple[dict[str, Path], str]:
    """Return the files that define a teacher, by name, and what else defines it: the base model of an adapter."""
    if location.adapter is None:
        return (_files(location.folder), "") if location.folder else ({}, "")
    files = _files(location.adapter.folder)
    if location.folder is None:
        return files, f"base {location.base}@{commit}\n"
    if location.folder != location.adapter.folder:
        files |= {f"base/{name}": path for name, path in _files(location.folder).items()}
    return files, ""


def _files(folder: Path) -> dict[str, Path]:
    return {path.name: path for pattern in _PATTERNS for path in folder.glob(pattern)}


def _stamp(files: Mapping[str, Path], more: str) -> str:
    states = {name: path.stat() for name, path in sorted(files.items())}
    # The time of the last change (ctime) and the inode tell a copy from the original, even one that keeps its times.
    lines = [
        f"{name} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}\n"
        for name, state in states.items()
    ]
    return hashlib.sha256("".join([*lines, more]).encode()).hexdigest()


def _digest(kind: str, files: Mapping[str, Path], more: str) -> str:
    digest_of = _of_sample if kind == _SAMPLE else _of_content
    # In the order recorded by runs of earlier releases.
    names = sorted(files, key=lambda name: files[name])
    with ThreadPoolExecutor(max_workers=8) as pool:
        digests = list(pool.map(digest_of, (files[name] for name in names)))
    lines = "".join(f"{name} {digest}\n" for name, digest in zip(names, digests, strict=True)) + more
    return kind + hashlib.sha256(lines.encode()).hexdigest()


def _of_content(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_sample(path: Path) -> str:
    size = path.stat().st_size
    if size <= _SMALL_BYTES:
        return _of_content(path)
    digest = hashlib.sha256(f"{size}\n".encode())
    with path.open("rb", buffering=_BLOCK_BYTES) as file:
        if path.suffix == ".safetensors":
            start = file.read(_LENGTH_BYTES)
            digest.update(start + file.read(min(int.from_bytes(start, "little"), _LONGEST_HEADER)))
        for place in (*range(0, size - _BLOCK_BYTES, _STRIDE_BYTES), size - _BLOCK_BYTES):
            file.seek(place)
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()
