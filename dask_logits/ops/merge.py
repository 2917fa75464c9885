"""Merge parts of one job from any location into one cache, or build an index over them.

Manifests identify the parts of one job (its settings, frozen numerics and plan). Overlaps are compared by content, and
gaps are named. All input is read from files, and repeating a merge changes nothing.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

from dask_logits.cache.find import CACHE_NAME, INDEX_NAME, find_caches
from dask_logits.cache.pieces import Piece
from dask_logits.config.checks import parse_bytes
from dask_logits.errors import ConfigError, RunConflictError
from dask_logits.files.atomic import expanded, room
from dask_logits.files.lock import lease
from dask_logits.run.consolidate import check_replaceable, consolidate_run, tidy, write_cache, write_index
from dask_logits.run.folder import CONSOLIDATION_LOCK, RunFolder
from dask_logits.run.parts import CachePart, Part, RunPart, check_cover, some

logger = logging.getLogger(__name__)


def merge(
    parts: Sequence[str | Path],
    *,
    output: str | Path | None = None,
    num_workers: int | None = None,
    index: bool = False,
    max_file_size: int | str | None = None,
) -> Path:
    """Merge the parts of a job into one cache, or build an index over them.

    Parameters
    ----------
    parts
        Run folders, cache files, or one folder that contains them. A single run folder shared by static workers is
        consolidated in place.
    output
        File to write. None: ``teacher_logits.h5`` in the run folder, or next to the parts.
    num_workers
        Expected number of static workers. None: not checked.
    index
        Write ``teacher_logits.index.json`` over a cache of each part instead, without copying data again.
    max_file_size
        Maximum size of a file (``"20GB"``). A larger cache becomes numbered files with an index. None: the setting of
        the run, else one file.

    Returns
    -------
    Path
        The cache or the index.

    Raises
    ------
    ConfigError
        If `output` is not a valid name for the file.
    RunConflictError
        If parts belong to different jobs, overlap with different content (for an index: at all), or leave gaps. All
        problems are named.
    CacheError
        If a part is damaged.
    """
    paths = [expanded(part) for part in parts]
    folder = paths[0] if len(paths) == 1 and paths[0].is_dir() else paths[0].parent
    target = expanded(output or folder / (INDEX_NAME if index else CACHE_NAME))
    _check_name(target, index)
    max_bytes = None if max_file_size is None else parse_bytes(max_file_size)
    opened = _open_parts(paths, target)
    if num_workers is not None:
        _check_workers(opened, num_workers)
    # The part with the longest plan.
    whole = max(opened, key=lambda part: (part.end is not None, part.n_rows))
    with room(target.parent):
        if isinstance(whole, RunPart) and len(opened) == 1 and target in (whole.run.cache_path, whole.run.index_path):
            written = _consolidated(whole, max_bytes)
            if not index or written == target:
                return written
            opened = [RunPart.open(whole.run)]
        else:
            _check_one_job(whole, opened)
            pieces = _ordered(opened, once=index)
            check_cover(whole, pieces)
        target.parent.mkdir(parents=True, exist_ok=True)
        with lease(target.parent / CONSOLIDATION_LOCK):
            if index:
                check_replaceable(target, whole)
                write_index(target, _caches(opened, target.parent), n_rows=opened[0].n_rows)
            elif [part.path for part in opened] != [target]:
                return write_cache(target, whole, pieces, max_file_bytes=max_bytes)
    return target


def _check_name(target: Path, index: bool) -> None:
    """Refuse a name that readers, or the folder of numbered files, would misinterpret."""
    good = target.suffix == ".json" if index else target.suffix not in ("", ".json")
    if not good or target.is_dir():
        expected = f"a file like {INDEX_NAME}" if index else f"a file like {CACHE_NAME}"
        found = "a folder" if target.is_dir() else "another name"
        raise ConfigError(f"--output: expected {expected}, got {found}: {target}; name a file")


def _consolidated(part: RunPart, max_bytes: int | None) -> Path:
    """Return the cache of a separate run, consolidating it if necessary."""
    keep = bool(part.state.manifest.setting("job.keep_partitions"))
    limit = part.state.manifest.setting("cache.max_file_size")
    if not part.state.is_complete:
        max_bytes = max_bytes or (None if limit is None else parse_bytes(limit))
        return consolidate_run(part.run, keep_partitions=keep, max_file_bytes=max_bytes)
    cache = part.state.cache
    assert cache is not None
    logger.info("%s is complete: nothing to do", cache.path)
    tidy(part.run, keep_partitions=keep)
    return cache.path


def _open_parts(paths: Sequence[Path], target: Path) -> list[Part]:
    """Open run folders, caches, and folders that contain them, except for the output of an earlier merge."""
    parts: list[Part] = []
    for path in paths:
        inside = sorted(child for child in path.iterdir() if (child / "run.json").exists()) if path.is_dir() else []
        if (path / "run.json").exists():
            parts.append(RunPart.open(RunFolder(path)))
        elif inside:
            parts += [RunPart.open(RunFolder(child)) for child in inside]
        else:
            found = sorted(file for file in path.glob("*.h5") if file != target) if path.is_dir() else []
            parts += [CachePart.open(file) for file in found or find_caches(path)]
    return parts


def _check_one_job(whole: Part, parts: Sequence[Part]) -> None:
    for part in parts:
        differences = {
            name: (value, part.job.get(name)) for name, value in whole.job.items() if value != part.job.get(name)
        }
        if not differences and whole.plan_digest(part.n_rows) != part.plan_digest(part.n_rows):
            differences = {"plan": (whole.plan_digest(part.n_rows), part.plan_digest(part.n_rows))}
        if differences:
            lines = "\n".join(f"  {name}: {a!r} and {b!r}" for name, (a, b) in differences.items())
            raise RunConflictError(
                f"{part.path}: expected a part of the same job as {whole.path}, got another one:\n{lines}\n"
                "merge only what static workers of one job made",
                differences,
            )


def _check_workers(parts: Sequence[Part], num_workers: int) -> None:
    total = parts[0].total_workers
    if total != num_workers or len(parts) not in (1, num_workers):
        raise RunConflictError(
            f"--num-workers: expected the {total} workers that the job was shared among, got {num_workers} and "
            f"{len(parts)} parts: {', '.join(part.path.name for part in parts)}"
        )


def _ordered(parts: Sequence[Part], *, once: bool) -> list[Piece]:
    """Return all pieces in dataset order, each row once. `once`: refuse duplicates."""
    pieces = sorted((piece for part in parts for piece in part.pieces), key=lambda piece: piece.first_row)
    chosen: list[Piece] = []
    overlaps = []
    for piece in pieces:
        before = chosen[-1] if chosen else None
        if before is None or piece.first_row >= before.first_row + before.n_rows:
            chosen.append(piece)
        elif _equal(before, piece):
            overlaps.append(f"rows {piece.first_row} to {piece.first_row + piece.n_rows - 1}")
        else:
            raise RunConflictError(
                f"{piece.path}: expected rows {piece.first_row} to {piece.first_row + piece.n_rows - 1} once, or with "
                f"equal targets, got others than in {before.path}; leave one of them out"
            )
    if overlaps and once:
        raise RunConflictError(
            f"--index: expected each row in one part, because an index lists whole files, got {some(overlaps)} in more "
            "than one; leave out the copy, or merge without --index"
        )
    if overlaps:
        logger.warning("taken once, being there more than once with equal targets: %s", some(overlaps))
    return chosen


def _equal(one: Piece, other: Piece) -> bool:
    same_rows = (one.first_row, one.n_rows) == (other.first_row, other.n_rows)
    return same_rows and one.content_digest() == other.content_digest()


def _caches(parts: Sequence[Part], held: Path) -> list[Path]:
    """Ensure that every part has its own cache. Return the files. We already hold the lease of the folder `held`."""
    caches = []
    for part in parts:
        if isinstance(part, CachePart):
            caches.append(part.path)
        elif part.state.cache is not None and part.state.n_cached == part.n_rows:
            caches += [reader.path for reader in part.state.cache.readers]
        else:
            lock = part.run.path / CONSOLIDATION_LOCK
            with contextlib.nullcontext() if part.run.path.samefile(held) else lease(lock):
                caches.append(write_cache(part.run.cache_path, part, part.pieces, partial=True))
    return caches
