"""Resolve a user's path (a file, run folder, index or folder of caches) to cache files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dask_logits.cache.reader import CacheReader
from dask_logits.errors import CacheError
from dask_logits.files.atomic import DIGEST, TEXT, check_fields, read_json, shown
from dask_logits.records import total_digest

CACHE_NAME = "teacher_logits.h5"
INDEX_NAME = "teacher_logits.index.json"
# Folder of the numbered files of a cache that is larger than `cache.max_file_size`.
SHARDS_NAME = "teacher_logits"
INDEX_FORMAT = "dask_logits.index"
INDEX_VERSION = 1


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
        raise CacheError(f"{path}: expected {CACHE_NAME} in it, or caches to serve as one, got none; {cure}", str(path))
    return found


def is_index(path: Path) -> bool:
    """Whether a path refers to the caches listed in an index."""
    return path.suffix == ".json" or (not (path / CACHE_NAME).exists() and (path / INDEX_NAME).exists())


def _indexed(path: Path) -> list[Path]:
    index = read_json(path)
    if index is None or index.get("format") != INDEX_FORMAT or index.get("version") != INDEX_VERSION:
        found = "nothing" if index is None else f"{shown(index.get('format'))} version {shown(index.get('version'))}"
        raise CacheError(
            f"{path}: expected {INDEX_FORMAT} version {INDEX_VERSION}, got {found}; merge again", str(path)
        )
    entries = index.get("caches")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise CacheError(
            f"{path}: expected caches to be a list of objects, got {shown(entries)}; merge again", str(path)
        )
    caches: dict[Path, None] = {}
    for entry in entries:
        check_fields(path, entry, {"path": TEXT, "content_digest": DIGEST})
        cache = path.parent / entry["path"]
        said = CacheReader(cache).attributes
        digest = str(said.get("content_digest"))
        if digest != entry["content_digest"] or cache in caches:
            raise CacheError(
                f"{path}: expected {cache} with content {entry['content_digest'][:16]}…, once, got {digest[:16]}…; "
                "merge again",
                str(cache),
            )
        if index.get("n_rows", said.get("n_rows")) != said.get("n_rows"):
            raise CacheError(
                f"{path}: expected parts of a job of {shown(index['n_rows'])} rows, got {cache} of one of "
                f"{shown(said.get('n_rows'))}; merge again",
                str(cache),
            )
        caches[cache] = None
    whole = total_digest(entry["content_digest"] for entry in entries)
    if index.get("content_digest", whole) != whole:
        raise CacheError(
            f"{path}: expected caches with content {shown(index['content_digest'])} in all, got {whole}; merge again",
            str(path),
        )
    return list(caches)


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
                raise CacheError(
                    f"{reader.path}: expected a part of the same job as {readers[0].path}, with {name} {expected!r}, "
                    f"got {found!r}; join datasets of different jobs with torch.utils.data.ConcatDataset",
                    str(reader.path),
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
    expected = int(readers[0].attributes["n_rows"])
    if len(rows) != expected:
        raise CacheError(
            f"{readers[0].path}: expected the parts of all {expected} rows of the job, got {len(rows)} rows in "
            f"{len(readers)} parts; name the others too",
            str(readers[0].path),
        )
