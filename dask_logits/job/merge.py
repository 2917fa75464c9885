"""Committed partitions → the run's cache; parts of one job, wherever they lie → one cache, or an index over many.

Parts are told to be of one job by what their manifests say (what is computed, with which frozen numerics, from which
plan), overlaps are compared by content, gaps are named. Everything is read from files; doing it twice changes nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dask_logits.errors import CacheError, RunConflictError
from dask_logits.job.committed import committed, is_complete, open_run_cache
from dask_logits.job.manifest import CONSOLIDATION_LOCK, PREVIOUS, RunFolder, lease
from dask_logits.job.planlog import PlanLog
from dask_logits.records import Statistics
from dask_logits.store.cache import CacheReader
from dask_logits.store.consolidate import CachePiece, PartitionPiece, Piece, cache_pieces, consolidate
from dask_logits.store.durable import Json, read_json, replace_json
from dask_logits.store.find import CACHE_NAME, INDEX_FORMAT, INDEX_NAME, INDEX_VERSION, find_caches
from dask_logits.store.partition import remove_partition
from dask_logits.store.profile import Profile, load_profile

logger = logging.getLogger(__name__)

_NAMED = 8
_KEPT_SINCE_1_2 = ("tokenizer_map_ranges", "tokenizer_ids")
# What a cache says of its job.
_KEPT = (
    "fingerprint", "run_id", "what", "plan_digest", "plan_end", "n_rows", "total_workers", "calibration", "teacher",
    "teacher_path", "tokenizer_map_digest",
)  # fmt: skip


def consolidate_run(
    run: RunFolder, *, keep_partitions: bool = False, on_piece: Callable[[], None] = lambda: None
) -> Path:
    """Write the cache of a run whose partitions are all committed, and tidy up.

    Parameters
    ----------
    run
        The run.
    keep_partitions
        Keep the Zarr partitions.
    on_piece
        Called after each partition.

    Returns
    -------
    Path
        The cache.

    Raises
    ------
    RunConflictError
        If partitions are missing, with their numbers.
    CacheError
        If one is damaged.
    """
    with lease(run.path / CONSOLIDATION_LOCK):
        part = _RunPart.open(run)
        _check_cover(part, part.pieces())
        _write(run.cache_path, part.pieces, part.profile(), part.attributes(), on_piece)
        tidy(run, keep_partitions=keep_partitions)
    return run.cache_path


def tidy(run: RunFolder, *, keep_partitions: bool) -> None:
    """Delete what a complete cache makes superfluous: partitions (unless kept), lost attempts, a replaced run."""
    if keep_partitions:
        named = {receipt["attempt"] for receipt in run.receipts(PlanLog(run).n_partitions)}
        for attempt in run.partitions_path.glob("*.zarr"):
            if attempt.name not in named:
                remove_partition(attempt)
    else:
        shutil.rmtree(run.partitions_path, ignore_errors=True)
    for path in (run.dataset_path, run.spool_path, run.path / PREVIOUS):
        shutil.rmtree(path, ignore_errors=True)


def merge(
    parts: Sequence[str | Path],
    *,
    output: str | Path | None = None,
    num_workers: int | None = None,
    index: bool = False,
) -> Path:
    """Make one cache of the parts of a job, or an index over them.

    Parameters
    ----------
    parts
        Run folders, cache files, or one folder that holds them. A single run folder that static workers shared is
        consolidated in place.
    output
        File to write; None: ``teacher_logits.h5`` in the run folder, or beside the parts.
    num_workers
        Static workers that are expected; None: not checked.
    index
        Write ``teacher_logits.index.json`` over a cache of each part instead: nothing is copied a second time.

    Returns
    -------
    Path
        The cache or the index.

    Raises
    ------
    RunConflictError
        If parts are of different jobs, overlap with other content, or leave gaps; all are named.
    CacheError
        If one is damaged.
    """
    paths = [Path(part).expanduser().absolute() for part in parts]
    folder = paths[0] if len(paths) == 1 and paths[0].is_dir() else paths[0].parent
    target = Path(output or folder / (INDEX_NAME if index else CACHE_NAME)).expanduser().absolute()
    opened = _open_parts(paths, target)
    if num_workers is not None:
        _check_workers(opened, num_workers)
    whole = _reference(opened)
    if isinstance(whole, _RunPart) and len(opened) == 1 and target.parent == whole.path:
        if is_complete(whole.run, whole.log):
            logger.info("%s is complete: nothing to do", whole.run.cache_path)
            tidy(whole.run, keep_partitions=_keeps(whole.run))
        else:
            consolidate_run(whole.run, keep_partitions=_keeps(whole.run))
        if not index:
            return whole.run.cache_path
        opened = [_RunPart.open(whole.run)]
    else:
        _check_one_job(whole, opened)
        pieces = _ordered(opened)
        _check_cover(whole, pieces())
    target.parent.mkdir(parents=True, exist_ok=True)
    with lease(target.parent / CONSOLIDATION_LOCK):
        if index:
            _write_index(target, opened)
        elif [part.path for part in opened] != [target]:
            _write(target, pieces, whole.profile(), whole.attributes())
    return target


@dataclass(kw_only=True)
class _RunPart:
    """What a run folder holds of a job."""

    run: RunFolder
    manifest: Json
    calibration: Json
    log: PlanLog
    cache: CacheReader | None
    _cached: list[CachePiece] | None = None

    @classmethod
    def open(cls, run: RunFolder) -> _RunPart:
        manifest, calibration = run.manifest(), run.calibration()
        if manifest is None or calibration is None:
            raise RunConflictError(f"{run.path}: expected a run that has begun, got no run.json or calibration.json")
        return cls(run=run, manifest=manifest, calibration=calibration, log=PlanLog(run), cache=open_run_cache(run))

    @property
    def path(self) -> Path:
        return self.run.path

    @property
    def n_cached(self) -> int:
        """Rows of its cache; later ones are in partitions."""
        return 0 if self.cache is None else int(self.cache.attributes["n_rows"])

    @property
    def n_rows(self) -> int:
        """Rows of the whole job."""
        return self.log.n_rows

    @property
    def end(self) -> str | None:
        """Why its plan ends; None: it does not."""
        return self.log.end

    @property
    def total_workers(self) -> int:
        """Static workers that share the job."""
        return int(self.manifest["total_workers"])

    def job(self) -> dict[str, Any]:
        """Return what must be equal in all parts of a job."""
        return _job(self.manifest["what"], self.calibration)

    def profile(self) -> Profile:
        """Return how it stores targets."""
        return load_profile(self.run.profile())

    def plan_digest(self, n_rows: int) -> str:
        """Return the digest of its plan as far as some row."""
        return self.log.digest(n_rows)

    def pieces(self) -> Iterator[Piece]:
        """Yield what it holds, in dataset order."""
        if self.cache is not None and self._cached is None:
            self._cached = list(cache_pieces(self.cache))
        yield from self._cached or ()
        for receipt in committed(self.run, self.log):
            if receipt["first_row"] >= self.n_cached and receipt["n_rows"]:
                path = self.run.partitions_path / receipt["attempt"]
                yield PartitionPiece(path=path, receipt=receipt, profile=self.profile())

    def attributes(self) -> dict[str, Any]:
        """Return the attributes of a cache of this job."""
        manifest = self.manifest
        return {
            "fingerprint": manifest["fingerprint"],
            "run_id": manifest["run_id"],
            "what": manifest["what"],
            "plan_digest": self.log.digest(),
            "plan_end": self.log.end or "",
            "n_rows": self.log.n_rows,
            "total_workers": manifest["total_workers"],
            "calibration": self.calibration,
            "teacher": manifest["teacher"],
            "teacher_path": str(manifest["how"]["teacher"]["model_path"]),
            "tokenizer_map_digest": manifest["tokenizer_map_digest"] or "",
            "tokenizer_map_ranges": manifest["tokenizer_map_ranges"],
            "tokenizer_ids": manifest["tokenizer_ids"],
        }

    def gaps(self, covered: Sequence[tuple[int, int]]) -> list[str]:
        """Name the partitions that are not in ranges of rows, and the static workers they belong to."""
        total = self.manifest["total_workers"]
        names = []
        i = 0
        for partition in self.log.partitions():
            while i + 1 < len(covered) and covered[i][1] <= partition.first_row:
                i += 1
            worker = f" (worker {partition.index % total} of {total})" if total > 1 else ""
            if not partition.n_rows:
                names.append(f"partition {partition.name}, which could not be read{worker}")
            elif not covered[i][0] <= partition.first_row < covered[i][1]:
                names.append(f"partition {partition.name}{worker}")
        return names


@dataclass(kw_only=True)
class _CachePart:
    """A cache file on its own."""

    cache: CacheReader

    @property
    def path(self) -> Path:
        return self.cache.path

    @property
    def n_rows(self) -> int:
        return int(self.cache.attributes["n_rows"])

    @property
    def end(self) -> str | None:
        return self.cache.attributes["plan_end"] or None

    @property
    def total_workers(self) -> int:
        return int(self.cache.attributes["total_workers"])

    def job(self) -> dict[str, Any]:
        return _job(self.cache.attributes["what"], self.cache.attributes["calibration"])

    def profile(self) -> Profile:
        return self.cache.profile

    def plan_digest(self, n_rows: int) -> str:
        return str(self.cache.attributes["plan_digest"])

    def pieces(self) -> Iterator[Piece]:
        yield from cache_pieces(self.cache)

    def attributes(self) -> dict[str, Any]:
        names = (*_KEPT, *(name for name in _KEPT_SINCE_1_2 if name in self.cache.attributes))
        return {name: self.cache.attributes[name] for name in names}

    def gaps(self, covered: Sequence[tuple[int, int]]) -> list[str]:
        """Name the rows that are not in ranges of rows."""
        ends = [*covered, (self.n_rows, self.n_rows)]
        return [f"rows {a[1]} to {b[0] - 1}" for a, b in itertools.pairwise(ends) if b[0] > a[1]]


_Part = _RunPart | _CachePart


def _job(what: Json, calibration: Json) -> dict[str, Any]:
    """Return what is equal in all parts of a job; the id table is not: targets are recoded where it differs."""
    storage = calibration.get("storage", {"profile": "plain"})
    kept = storage["precision"] if storage["profile"] == "compact" else None
    return {**what, **calibration["numerics"], "cache.precision": kept}


def _open_parts(paths: Sequence[Path], target: Path) -> list[_Part]:
    """Open run folders, caches, and what lies in folders of them, but not what an earlier merge wrote."""
    parts: list[_Part] = []
    for path in paths:
        inside = sorted(child for child in path.iterdir() if (child / "run.json").exists()) if path.is_dir() else []
        if (path / "run.json").exists():
            parts.append(_RunPart.open(RunFolder(path)))
        elif inside:
            parts += [_RunPart.open(RunFolder(child)) for child in inside]
        else:
            found = sorted(file for file in path.glob("*.h5") if file != target) if path.is_dir() else []
            parts += [_CachePart(cache=_merged(file)) for file in found or find_caches(path)]
    return parts


def _merged(path: Path) -> CacheReader:
    """Open a cache that says what it is a part of."""
    cache = CacheReader(path)
    missing = [name for name in (*_KEPT, "n_rows") if name not in cache.attributes]
    if missing:
        raise CacheError(
            f"{path}: expected a cache that says of which job it is a part, got none of {missing} in format version "
            f"{cache.attributes['format_version']}; merge its run folder, or make it again",
            str(path),
        )
    return cache


def _reference(parts: Sequence[_Part]) -> _Part:
    """Return the part that knows most of the plan."""
    return max(parts, key=lambda part: (part.end is not None, part.n_rows))


def _check_one_job(whole: _Part, parts: Sequence[_Part]) -> None:
    for part in parts:
        differences = {
            name: (value, part.job().get(name)) for name, value in whole.job().items() if value != part.job().get(name)
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


def _check_workers(parts: Sequence[_Part], num_workers: int) -> None:
    total = parts[0].total_workers
    if total != num_workers or len(parts) not in (1, num_workers):
        raise RunConflictError(
            f"--num-workers: expected the {total} workers that the job was shared among, got {num_workers} and "
            f"{len(parts)} parts: {', '.join(part.path.name for part in parts)}"
        )


def _ordered(parts: Sequence[_Part]) -> Callable[[], Iterable[Piece]]:
    """Return what gives the pieces of all parts in dataset order, each row once."""
    if len(parts) == 1:
        return parts[0].pieces
    pieces = sorted((piece for part in parts for piece in part.pieces()), key=lambda piece: piece.first_row)
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
    if overlaps:
        logger.warning("taken once, being there more than once with equal targets: %s", _some(overlaps))
    return lambda: chosen


def _equal(one: Piece, other: Piece) -> bool:
    same_rows = (one.first_row, one.n_rows) == (other.first_row, other.n_rows)
    return same_rows and one.content_digest() == other.content_digest()


def _check_cover(part: _Part, pieces: Iterable[Piece]) -> None:
    """Refuse a job with gaps, naming them."""
    covered = [[0, 0]]
    for piece in pieces:
        if piece.first_row > covered[-1][1]:
            covered.append([piece.first_row, piece.first_row])
        covered[-1][1] = max(covered[-1][1], piece.first_row + piece.n_rows)
    gaps = part.gaps([(first, last) for first, last in covered])
    if part.end is None:
        gaps.append("the plan has not ended")
    if gaps:
        raise RunConflictError(
            f"{part.path}: expected the targets of all {part.n_rows} rows, got gaps: {_some(gaps)}; run the job, or "
            "the workers that are named, to the end"
        )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def _write(
    target: Path,
    pieces: Callable[[], Iterable[Piece]],
    profile: Profile,
    attributes: dict[str, Any],
    on_piece: Callable[[], None] = lambda: None,
) -> None:
    """Write one cache, unless it is there already, made of the very same pieces."""
    made_of = _digest(pieces())
    if target.exists():
        try:
            old = CacheReader(target)
        except CacheError:
            old = None
        same = old is not None and bool(old.attributes.get("partial")) == bool(attributes.get("partial"))
        if old is not None and same and old.attributes.get("made_of") == made_of:
            logger.info("%s is made of the same parts: nothing to do", target)
            return
        if old is None or old.attributes.get("fingerprint") != attributes["fingerprint"]:
            raise RunConflictError(f"{target}: expected no file, or an older cache of this job, got another; move it")
    started = time.perf_counter()
    statistics = _statistics(pieces())
    what = attributes["what"]
    digest = consolidate(
        target,
        pieces,
        profile=profile,
        packed=what["dataset.packing"] == "concat",
        attributes={**attributes, "made_of": made_of, "statistics": statistics},
        n_rows=attributes["n_rows"] if not attributes.get("partial") else None,
        on_piece=on_piece,
    )
    logger.info("cache %s in %.1f s, content %s", target, time.perf_counter() - started, digest)


def _digest(pieces: Iterable[Piece]) -> str:
    """SHA-256 of what pieces say of their content."""
    lines = hashlib.sha256()
    for piece in pieces:
        if isinstance(piece, PartitionPiece):
            known: Any = piece.content_digest()
        else:
            assert isinstance(piece, CachePiece)
            known = [piece.reader.attributes["content_digest"], *piece.documents]
        lines.update(json.dumps([piece.first_row, piece.n_rows, known], sort_keys=True).encode())
    return lines.hexdigest()


def _statistics(pieces: Iterable[Piece]) -> dict[str, Any]:
    """Add up what receipts and caches say of their partitions."""
    sums = Statistics()
    seen: set[Path] = set()
    for piece in pieces:
        if isinstance(piece, PartitionPiece):
            sums += Statistics.from_json(piece.receipt["statistics"])
        elif piece.path not in seen:
            assert isinstance(piece, CachePiece)
            seen.add(piece.path)
            sums += Statistics.from_json(piece.reader.attributes["statistics"])
    return vars(sums)


def _write_index(target: Path, parts: Sequence[_Part]) -> None:
    """Give every part a cache of its own, and write the list of them."""
    caches = []
    for part in parts:
        if isinstance(part, _RunPart):
            whole = part.cache is not None and part.n_cached == part.n_rows
            if not whole:
                _write(part.run.cache_path, part.pieces, part.profile(), {**part.attributes(), "partial": True})
            caches.append(part.run.cache_path)
        else:
            caches.append(part.path)
    entries = []
    for path in caches:
        cache = CacheReader(path)
        inside = path.is_relative_to(target.parent)
        entries.append(
            {
                "path": str(path.relative_to(target.parent) if inside else path),
                "documents": cache.n_documents,
                "tokens": cache.n_tokens,
                "content_digest": cache.attributes["content_digest"],
            }
        )
    index = {"format": INDEX_FORMAT, "version": INDEX_VERSION, "n_rows": parts[0].n_rows, "caches": entries}
    if not target.exists() or read_json(target) != index:
        replace_json(target, index)


def _keeps(run: RunFolder) -> bool:
    manifest = run.manifest() or {}
    return bool(manifest.get("how", {}).get("job", {}).get("keep_partitions", False))
