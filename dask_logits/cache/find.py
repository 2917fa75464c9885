"""Resolve a user's path (a file, run folder, index or folder of caches) to cache files, and open them as one cache."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

import numpy as np
from pydantic import Field

from dask_logits.cache.reader import CacheReader
from dask_logits.errors import CacheError
from dask_logits.fields import Count, Digest, Record, shown
from dask_logits.files.atomic import read_json
from dask_logits.records import Statistics, total_digest

CACHE_NAME = "teacher_logits.h5"
INDEX_NAME = "teacher_logits.index.json"
# Folder of the numbered files of a cache that is larger than `cache.max_file_size`.
SHARDS_NAME = "teacher_logits"
INDEX_FORMAT: Final = "dask_logits.index"
INDEX_VERSION: Final = 1


def find_caches(path: Path) -> list[Path]:
    """Return the cache files that a path refers to.

    Parameters
    ----------
    path
        A cache, an index over several, or a folder that contains one of these or several caches, directly or in
        subfolders.

    Raises
    ------
    CacheError
        If there is none, or a cache named by an index is missing or has changed.
    """
    if path.suffix == ".json":
        return _indexed(path)
    if not path.is_dir():
        return [path]
    if (path / CACHE_NAME).exists():
        return [path / CACHE_NAME]
    if is_index(path):
        return _indexed(path / INDEX_NAME)
    found = sorted([*path.glob("*.h5"), *path.glob(f"[!.]*/{CACHE_NAME}")])
    # A run folder without a cache may contain an older run that was set aside.
    if not found or (path / "run.json").exists():
        is_run = (path / "run.json").exists() or any(path.glob("status*.json"))
        cure = f"the run is not complete: see `dask-logits status {path}`" if is_run else "correct the path"
        raise CacheError.at(path, f"expected {CACHE_NAME} in it, or caches to serve as one, got none; {cure}")
    return found


def is_index(path: Path) -> bool:
    """Whether a path refers to the caches listed in an index."""
    return path.suffix == ".json" or (not (path / CACHE_NAME).exists() and (path / INDEX_NAME).exists())


@dataclass(frozen=True, kw_only=True)
class CacheFiles:
    """A cache as a whole: one file, or several with an index.

    Parameters
    ----------
    path
        The file, index or folder that a user names.
    readers
        Readers of the files.
    """

    path: Path
    readers: tuple[CacheReader, ...]

    @classmethod
    def open(cls, path: Path) -> CacheFiles:
        """Open all files that a path refers to. Raise as :func:`find_caches`."""
        return cls(path=path, readers=tuple(CacheReader(file) for file in find_caches(path)))

    @property
    def n_rows(self) -> int:
        """Number of dataset rows of the job, from 0."""
        return self.readers[0].header.n_rows or 0

    @property
    def n_tokens(self) -> int:
        """Tokens of all files."""
        return sum(reader.n_tokens for reader in self.readers)

    @property
    def n_documents(self) -> int:
        """Documents of all files."""
        return sum(reader.n_documents for reader in self.readers)

    @cached_property
    def firsts(self) -> tuple[int, ...]:
        """Number of the first item of each file, and the number of all items."""
        return tuple(itertools.accumulate((reader.n_items for reader in self.readers), initial=0))

    def find(self, number: int) -> tuple[CacheReader, int]:
        """Return the file of an item, counted over all files from 0, and the item's number in it."""
        file = bisect.bisect_right(self.firsts, number) - 1
        return self.readers[file], number - self.firsts[file]

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        return sum(reader.path.stat().st_size for reader in self.readers)

    @property
    def content_digest(self) -> str:
        """Content digest of all files."""
        return total_digest(reader.header.content_digest for reader in self.readers)

    @property
    def statistics(self) -> Statistics | None:
        """Sums over all files. None if one of them has none."""
        found = [reader.header.statistics for reader in self.readers]
        known = [statistics for statistics in found if statistics is not None]
        return sum(known, Statistics()) if len(known) == len(found) else None


class IndexEntry(Record):
    """A cache in an index."""

    path: str = Field(description="The file, relative to the index's folder if it is below it.")
    documents: Count | None = Field(default=None, description="Its documents.")
    tokens: Count | None = Field(default=None, description="Its tokens.")
    content_digest: Digest = Field(description="Its content digest.")


class CacheIndex(Record):
    """``teacher_logits.index.json``: the files that make up a cache. A file of another version is refused."""

    format: Literal["dask_logits.index"] = Field(description="Name of the format.")
    version: Literal[1] = Field(description="Version of the format.")
    n_rows: Count | None = Field(default=None, description="Dataset rows of the whole job.")
    content_digest: Digest | None = Field(default=None, description="Content digest of all files.")
    caches: tuple[IndexEntry, ...] = Field(min_length=1, description="The files, in dataset order.")

    @classmethod
    def read(cls, path: Path) -> CacheIndex:
        """Read an index.

        Raises
        ------
        CacheError
            If there is none, or it is damaged or of another version.
        """
        values = read_json(path) or {}
        found = values.get("format"), values.get("version")
        if found != (INDEX_FORMAT, INDEX_VERSION):
            got = f"{shown(found[0])} version {shown(found[1])}" if values else "nothing"
            raise CacheError.at(path, f"expected {INDEX_FORMAT} version {INDEX_VERSION}, got {got}; merge again")
        return cls.parse(path, values, "merge again")


def _indexed(path: Path) -> list[Path]:
    index = CacheIndex.read(path)
    caches = [path.parent / entry.path for entry in index.caches]
    times = Counter(caches)
    for cache, entry in zip(caches, index.caches, strict=True):
        header = CacheReader(cache).header
        for what, expected, found in (
            ("as content digest", entry.content_digest, header.content_digest),
            ("documents", entry.documents, header.n_documents),
            ("tokens", entry.tokens, header.n_tokens),
            ("rows of the whole job", index.n_rows, header.n_rows),
            ("entry in the index", 1, times[cache]),
        ):
            if expected not in (None, found):
                problem = f"expected {cache} with {expected} {what}, got {found}; merge again"
                raise CacheError(f"{path}: {problem}", str(cache))
    whole = total_digest(entry.content_digest for entry in index.caches)
    if index.content_digest not in (None, whole):
        raise CacheError.at(
            path, f"expected caches with content {index.content_digest} in all, got {whole}; merge again"
        )
    return caches


def check_one_job(readers: Sequence[CacheReader]) -> None:
    """Refuse caches of different jobs.

    Raises
    ------
    CacheError
        Naming the first that differs.
    """
    for reader in readers[1:]:
        for name in ("fingerprint", "plan_digest", "top_k", "vocab_size"):
            expected, found = readers[0].attributes.get(name), reader.attributes.get(name)
            if found != expected:
                raise CacheError.at(
                    reader.path,
                    f"expected a part of the same job as {readers[0].path}, with {name} {expected!r}, "
                    f"got {found!r}; join datasets of different jobs with torch.utils.data.ConcatDataset",
                )


def check_whole(readers: Sequence[CacheReader]) -> None:
    """Refuse parts of a job that do not cover all rows.

    Raises
    ------
    CacheError
        If rows are missing.
    """
    if not any(reader.attributes.get("partial") for reader in readers):
        return
    rows = np.unique(np.concatenate([np.unique(np.asarray(reader.arrays["document_row"])) for reader in readers]))
    expected = readers[0].header.n_rows
    if len(rows) != expected:
        raise CacheError.at(
            readers[0].path,
            f"expected the parts of all {expected} rows of the job, got {len(rows)} rows in "
            f"{len(readers)} parts; name the others too",
        )
