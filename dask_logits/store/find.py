"""From what a user names (a file, a run folder, an index, a folder of caches) to the cache files it stands for."""

from __future__ import annotations

from pathlib import Path

from dask_logits.errors import CacheError
from dask_logits.store.cache import CacheReader
from dask_logits.store.durable import DIGEST, TEXT, check_fields, read_json, shown

CACHE_NAME = "teacher_logits.h5"
INDEX_NAME = "teacher_logits.index.json"
# Folder of the numbered files of a cache that is larger than `cache.max_file_size`.
SHARDS_NAME = "teacher_logits"
INDEX_FORMAT = "dask_logits.index"
INDEX_VERSION = 1


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
        found = "nothing" if index is None else f"{shown(index.get('format'))} version {shown(index.get('version'))}"
        raise CacheError(
            f"{path}: expected {INDEX_FORMAT} version {INDEX_VERSION}, got {found}; merge again", str(path)
        )
    entries = index.get("caches")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CacheError(
            f"{path}: expected caches to be a list of objects, got {shown(entries)}; merge again", str(path)
        )
    caches: dict[Path, None] = {}
    for entry in entries:
        check_fields(path, entry, {"path": TEXT, "content_digest": DIGEST})
        cache = path.parent / entry["path"]
        digest = str(CacheReader(cache).attributes.get("content_digest"))
        if digest != entry["content_digest"] or cache in caches:
            raise CacheError(
                f"{path}: expected {cache} with content {entry['content_digest'][:16]}…, once, got {digest[:16]}…; "
                "merge again",
                str(cache),
            )
        caches[cache] = None
    return list(caches)
