"""Consolidate the pieces of a job into its cache: one file, or numbered files with an index.

A cache has a single writer, which holds :data:`~dask_logits.run.folder.CONSOLIDATION_LOCK`. An existing file made of
exactly the same pieces is left unchanged. Repeating a consolidation therefore changes nothing, and after a crash only
the rest is done.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dask_logits.cache.find import INDEX_FORMAT, INDEX_VERSION, CacheIndex, IndexEntry
from dask_logits.cache.pieces import PartitionPiece, Piece, consolidate
from dask_logits.cache.profile import Profile
from dask_logits.cache.reader import CacheReader
from dask_logits.errors import CacheError, PartitionsFailedError, RunConflictError
from dask_logits.files.atomic import read_json, replace_json, unreadable
from dask_logits.files.lock import lease
from dask_logits.records import Statistics, total_digest
from dask_logits.run.failures import Failure, listed, note_failure
from dask_logits.run.folder import CONSOLIDATION_LOCK, RunFolder, delete_partitions, drop_previous
from dask_logits.run.parts import CachePart, Part, RunPart, check_cover
from dask_logits.run.timings import plural

logger = logging.getLogger(__name__)

# Bytes of a file beside its pieces and tables: HDF5's own structures and the attributes.
_FILE_BYTES = 1 << 17
_NUMBERED = "[0-9][0-9][0-9][0-9][0-9]-*.h5"


def consolidate_run(
    run: RunFolder,
    *,
    keep_partitions: bool = False,
    max_file_bytes: int | None = None,
    on_piece: Callable[[], None] = lambda: None,
) -> Path:
    """Write the cache of a run whose partitions are all committed, then delete superfluous files.

    Parameters
    ----------
    run
        The run folder.
    keep_partitions
        Keep the Zarr partitions.
    max_file_bytes
        Write numbered files of at most this size (or one partition) if one file would be larger. None: one file.
    on_piece
        Called after each partition.

    Returns
    -------
    Path
        The cache, or the index over its files.

    Raises
    ------
    RunConflictError
        If partitions are missing, with their numbers.
    PartitionsFailedError
        If some have changed on disk since they were committed. Their receipts are removed and the next run recomputes
        them.
    CacheError
        If other data is damaged.
    """
    with lease(run.path / CONSOLIDATION_LOCK):
        # What was read before the lease may be out of date: another process may have written the cache.
        part = RunPart.open(run)
        check_cover(part, part.pieces)
        try:
            written = write_cache(run.cache_path, part, part.pieces, max_file_bytes=max_file_bytes, on_piece=on_piece)
        except CacheError as error:
            _refuse_damaged(part, error)
            raise
        tidy(run, keep_partitions=keep_partitions)
    return written


def _refuse_damaged(part: RunPart, error: CacheError) -> None:
    """Remove the receipts of partitions whose files do not match them."""
    run = part.run
    reasons: dict[int, str] = {}
    for piece in part.pieces:
        if isinstance(piece, PartitionPiece):
            try:
                piece.check()
            except CacheError as damage:
                if unreadable(damage):
                    continue
                reasons[piece.receipt.partition] = damage.message
    for index, reason in reasons.items():
        note_failure(run, Failure(index=index, kind="damaged", reason=reason))
        run.receipt_path(index).unlink()
    if reasons:
        raise PartitionsFailedError(
            f"{run.path}: expected {plural(len(reasons), 'partition')} as committed, got other files:\n"
            f"{listed(run, reasons)}\n"
            "their receipts were deleted: run the job again, which recomputes them, and check the disk",
            reasons,
        ) from error


def tidy(run: RunFolder, *, keep_partitions: bool) -> None:
    """Delete files superseded by a complete cache: partitions (unless kept), lost attempts, a replaced run."""
    if keep_partitions:
        _delete_lost_attempts(run)
    else:
        delete_partitions(run)
    for path in (run.dataset_path, run.spool_path):
        shutil.rmtree(path, ignore_errors=True)
    drop_previous(run)


def _delete_lost_attempts(run: RunFolder) -> None:
    """Delete the attempts beside those that receipts name.

    Only receipts of partitions with several attempts are read. A single attempt is kept.
    """
    attempts: dict[int, list[str]] = {}
    for path in run.partitions_path.glob("*.zarr"):
        index = path.name.split(".")[0]
        if index.isdecimal():
            attempts.setdefault(int(index), []).append(path.name)
    # Without a receipt the valid attempt is unknown, so all attempts are kept.
    for receipt in run.receipts(index for index, names in attempts.items() if len(names) > 1):
        for name in attempts[receipt.partition]:
            if name != receipt.attempt:
                shutil.rmtree(run.partitions_path / name, ignore_errors=True)


def index_path(cache_path: Path) -> Path:
    """Return the path of the index over a cache's numbered files.

    >>> index_path(Path("teacher_logits.h5")).name
    'teacher_logits.index.json'
    """
    return cache_path.with_suffix(".index.json")


def write_cache(
    target: Path,
    part: Part,
    pieces: Sequence[Piece],
    *,
    partial: bool = False,
    max_file_bytes: int | None = None,
    on_piece: Callable[[], None] = lambda: None,
) -> Path:
    """Write a cache, or numbered files and their index, unless one made of exactly the same pieces exists.

    Parameters
    ----------
    target
        The cache. Numbered files go into a folder of the same name without ``.h5``, and their index next to it.
    part
        The job and its storage profile.
    pieces
        The pieces in dataset order.
    partial
        Whether the cache holds only a part of the job.
    max_file_bytes
        Write numbered files of at most this size (or one piece) if one file would be larger. None: one file.
    on_piece
        Called after each piece.

    Returns
    -------
    Path
        The file or the index.

    Raises
    ------
    RunConflictError
        If a cache of another job occupies the path of this one, its index or its numbered files.
    """
    profile, attributes = part.profile, {**part.attributes(), **({"partial": True} if partial else {})}
    index, folder = index_path(target), target.with_suffix("")
    check_replaceable(target, part)
    stale = _numbered(target)
    groups = [pieces] if max_file_bytes is None else _groups(pieces, profile, max_file_bytes)
    if len(groups) == 1:
        _write(target, pieces, profile, attributes, on_piece)
        if stale:
            # An earlier start had another limit, and readers prefer the single file.
            index.unlink(missing_ok=True)
            _remove(folder, stale)
        return target
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, group in enumerate(groups):
        said = {**attributes, "partial": True, "shard": number}
        name = hashlib.sha256(json.dumps([_digest(group), said["plan_digest"], number]).encode()).hexdigest()[:8]
        files.append(folder / f"{number:05d}-{name}.h5")
        _write(files[-1], group, profile, said, on_piece)
    write_index(index, files, n_rows=attributes["n_rows"])
    target.unlink(missing_ok=True)
    _remove(folder, stale - set(files))
    return index


def check_replaceable(target: Path, part: Part) -> None:
    """Refuse to replace or delete anything other than a cache of this job with no larger plan than now.

    Parameters
    ----------
    target
        A cache, with its index and numbered files, or an index over caches. It need not exist.
    part
        The job.

    Raises
    ------
    RunConflictError
        If the file belongs to another job.
    """
    is_list = target.suffix == ".json"
    for path in _listed(target) if is_list else [target, *_listed(index_path(target)), *_numbered(target)]:
        if path.exists() and not _is_earlier(path, part):
            raise RunConflictError(f"{path}: expected no file, or an older cache of this job, got another; move it")


def _is_earlier(path: Path, part: Part) -> bool:
    try:
        earlier = CachePart.open(path)
    except CacheError:
        return False
    n_rows = earlier.n_rows
    is_same = earlier.job == part.job and n_rows <= part.n_rows
    return is_same and earlier.plan_digest(n_rows) == part.plan_digest(n_rows)


def _listed(index: Path) -> list[Path]:
    """Return the caches named by an index. An invalid index is returned itself and then refused as foreign."""
    if not index.exists():
        return []
    try:
        return [index.parent / entry.path for entry in CacheIndex.read(index).caches]
    except CacheError:
        return [index]


def _numbered(target: Path) -> set[Path]:
    """Return the numbered files of a cache: those named by its index, or in a run folder all in their folder."""
    folder = target.with_suffix("")
    found = set(folder.glob(_NUMBERED))
    return found if (target.parent / "run.json").exists() else found & set(_listed(index_path(target)))


def write_index(index: Path, files: Iterable[Path], *, n_rows: int) -> None:
    """Write the index of the files that make up a cache, unless it is unchanged.

    Parameters
    ----------
    index
        The file to write.
    files
        Caches, in order. Those below the index's folder are named relative to it.
    n_rows
        Dataset rows of the whole job.
    """
    folder = index.parent
    entries = []
    for path in files:
        # One at a time, because each has some 20 file descriptors.
        cache = CacheReader(path)
        entries.append(
            IndexEntry(
                path=str(path.relative_to(folder) if path.is_relative_to(folder) else path),
                documents=cache.n_documents,
                tokens=cache.n_tokens,
                content_digest=cache.header.content_digest,
            )
        )
    value = CacheIndex(
        format=INDEX_FORMAT,
        version=INDEX_VERSION,
        n_rows=n_rows,
        content_digest=total_digest(entry.content_digest for entry in entries),
        caches=tuple(entries),
    ).to_json()
    if not index.exists() or read_json(index) != value:
        replace_json(index, value, durable=True)


def _groups(pieces: Sequence[Piece], profile: Profile, max_file_bytes: int) -> list[list[Piece]]:
    """Return the pieces of each file."""
    overhead = _FILE_BYTES + sum(table.nbytes for table in profile.tables.values())
    groups: list[list[Piece]] = [[]]
    n_bytes = overhead
    for piece in pieces:
        if groups[-1] and n_bytes + piece.n_bytes > max_file_bytes:
            groups.append([])
            n_bytes = overhead
        groups[-1].append(piece)
        n_bytes += piece.n_bytes
    return groups


def _remove(folder: Path, numbered: Iterable[Path]) -> None:
    for path in numbered:
        path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _write(
    target: Path,
    pieces: Sequence[Piece],
    profile: Profile,
    attributes: dict[str, Any],
    on_piece: Callable[[], None],
) -> None:
    """Write one file, unless it exists and was made of exactly the same pieces."""
    made_of = _digest(pieces)
    if target.exists():
        old = CacheReader(target)
        same = bool(old.attributes.get("partial")) == bool(attributes.get("partial"))
        if same and old.attributes.get("made_of") == made_of:
            logger.info("%s is made of the same parts: nothing to do", target)
            return
    started = time.perf_counter()
    statistics = _statistics(pieces)
    what = attributes["what"]
    digest = consolidate(
        target,
        lambda: pieces,
        profile=profile,
        packed=what["dataset.packing"] == "concat",
        attributes={**attributes, "made_of": made_of, "statistics": statistics.model_dump()},
        n_rows=attributes["n_rows"] if not attributes.get("partial") else None,
        on_piece=on_piece,
    )
    logger.info("cache %s in %.1f s, content %s", target, time.perf_counter() - started, digest)
    reader = CacheReader(target)
    if reader.n_empty:
        logger.warning(
            "documents without a token: %d of %d; their rows are null, empty or skipped",
            reader.n_empty,
            reader.n_documents,
        )
    if statistics.skipped_rows:
        logger.warning("skipped %s that cannot be used (on_bad_row=skip)", plural(statistics.skipped_rows, "row"))
    if statistics.double_bos_rows:
        # A warning before the job says what to do. This is the count.
        logger.info("the token at the beginning is there twice in %s", plural(statistics.double_bos_rows, "text"))


def _digest(pieces: Iterable[Piece]) -> str:
    """SHA-256 of the content digests of pieces."""
    lines = hashlib.sha256()
    for piece in pieces:
        if isinstance(piece, PartitionPiece):
            known: Any = piece.content_digest()
        else:
            known = [piece.reader.header.content_digest, *piece.documents]
        lines.update(json.dumps([piece.first_row, piece.n_rows, known], sort_keys=True).encode())
    return lines.hexdigest()


def _statistics(pieces: Iterable[Piece]) -> Statistics:
    """Sum the statistics in receipts and caches."""
    sums = Statistics()
    seen: set[Path] = set()
    for piece in pieces:
        if isinstance(piece, PartitionPiece):
            sums += piece.receipt.statistics
        elif piece.path not in seen:
            seen.add(piece.path)
            sums += piece.reader.header.statistics or Statistics()
    return sums
