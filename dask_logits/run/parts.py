"""The content of a run folder or cache file as a part of a job: its pieces, attributes and gaps."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dask_logits.cache.pieces import PartitionPiece, Piece, cache_pieces
from dask_logits.cache.profile import Profile, load_profile
from dask_logits.cache.reader import CacheReader
from dask_logits.errors import CacheError, RunConflictError
from dask_logits.files.atomic import is_there
from dask_logits.records import Array
from dask_logits.run.folder import RunFolder
from dask_logits.run.records import Calibration
from dask_logits.run.state import RunState

_NAMED = 8
# Settings that name a dataset for people. The plan identifies its rows by content.
_DATASET_NAMES = ("name", "config_name", "split", "revision", "data_files", "streaming")
# Attributes of a cache that describe its job.
JOB_ATTRIBUTES = (
    "fingerprint", "run_id", "what", "plan_digest", "plan_end", "n_rows", "total_workers", "calibration", "teacher",
    "teacher_path", "dataset", "tokenizer_map_digest",
)  # fmt: skip


@dataclass(kw_only=True)
class _Part:
    """A part of a job.

    Parameters
    ----------
    path
        The run folder or cache file.
    n_rows
        Number of rows of the whole job.
    end
        Reason why its plan ends. None: the plan is open.
    total_workers
        Number of static workers that share the job.
    job
        The values that must be equal in all parts of a job.
    """

    path: Path
    n_rows: int
    end: str | None
    total_workers: int
    job: dict[str, Any]


@dataclass(kw_only=True)
class RunPart(_Part):
    """A run folder as a part of a job."""

    state: RunState
    calibration: Calibration

    @classmethod
    def open(cls, run: RunFolder) -> RunPart:
        """Open an existing run.

        Raises
        ------
        RunConflictError
            If the run has not begun.
        CacheError
            If its cache cannot be read.
        """
        state, calibration = RunState.find(run), run.calibration()
        if state is None or calibration is None:
            raise run.not_begun()
        if state.cache_error is not None:
            raise state.cache_error
        return cls(
            path=run.path,
            n_rows=state.log.n_rows,
            end=state.log.end,
            total_workers=state.manifest.total_workers,
            job=_job(state.manifest.what, calibration),
            state=state,
            calibration=calibration,
        )

    @property
    def run(self) -> RunFolder:
        """The run folder."""
        return self.state.run

    @cached_property
    def profile(self) -> Profile:
        """Its storage profile."""
        return load_profile(self.run.profile_of(self.state.manifest, self.calibration))

    def plan_digest(self, n_rows: int) -> str:
        """Return the digest of its plan up to a row."""
        return self.state.log.digest(n_rows)

    @cached_property
    def pieces(self) -> list[Piece]:
        """Its pieces in dataset order."""
        readers = () if self.state.cache is None else self.state.cache.readers
        cached: list[Piece] = [piece for reader in readers for piece in cache_pieces(reader)]
        return cached + [
            PartitionPiece(path=self.run.partitions_path / receipt.attempt, receipt=receipt, profile=self.profile)
            for receipt in self.state.committed()
            if receipt.first_row >= self.state.n_cached and receipt.n_rows
        ]

    def attributes(self) -> dict[str, Any]:
        """Return the attributes of a cache of this job."""
        manifest = self.state.manifest
        crcs = self.run.token_crcs_path
        return {
            **({"token_crcs": _load(crcs)} if is_there(crcs) else {}),
            "fingerprint": manifest.fingerprint,
            "run_id": manifest.run_id,
            "what": manifest.what,
            "plan_digest": self.state.log.digest(),
            "plan_end": self.state.log.end or "",
            "n_rows": self.state.log.n_rows,
            "total_workers": manifest.total_workers,
            "calibration": self.calibration.to_json(),
            "teacher": manifest.teacher,
            "teacher_path": str(manifest.setting("teacher.model_path")),
            "tokenizer_path": str(manifest.setting("teacher.tokenizer_path") or ""),
            "dataset": {name: manifest.setting(f"dataset.{name}") for name in _DATASET_NAMES},
            "tokenizer_map_digest": manifest.tokenizer_map_digest or "",
            "tokenizer_ids": manifest.tokenizer_ids,
        }

    def gaps(self, covered: Sequence[tuple[int, int]]) -> list[str]:
        """Return the partitions outside the covered row ranges, and the static workers they belong to."""
        total = self.state.manifest.total_workers
        names = []
        i = 0
        for partition in self.state.log.partitions():
            while i + 1 < len(covered) and covered[i][1] <= partition.first_row:
                i += 1
            worker = f" (worker {partition.index % total} of {total})" if total > 1 else ""
            if not partition.n_rows:
                names.append(f"partition {partition.name}, which could not be read{worker}")
            elif not covered[i][0] <= partition.first_row < covered[i][1]:
                names.append(f"partition {partition.name}{worker}")
        return names


@dataclass(kw_only=True)
class CachePart(_Part):
    """A separate cache file as a part of a job."""

    cache: CacheReader

    @classmethod
    def open(cls, path: Path) -> CachePart:
        """Open a cache.

        Raises
        ------
        CacheError
            If it cannot be read, or does not say of which job it is a part.
        """
        cache = CacheReader(path)
        missing = [name for name in JOB_ATTRIBUTES if name not in cache.attributes]
        if missing:
            raise CacheError.at(
                path,
                f"expected a cache that says of which job it is a part, got none of {missing} in format version "
                f"{cache.attributes['format_version']}; merge its run folder, or make it again",
            )
        header = cache.header
        return cls(
            path=path,
            n_rows=header.n_rows or 0,
            end=header.plan_end or None,
            total_workers=header.total_workers or 1,
            job=_job(header.what or {}, Calibration.parse(path, header.calibration or {})),
            cache=cache,
        )

    @property
    def profile(self) -> Profile:
        """Its storage profile."""
        return self.cache.profile

    def plan_digest(self, n_rows: int) -> str:
        """Return the digest of its original plan."""
        return self.cache.header.plan_digest or ""

    @cached_property
    def pieces(self) -> list[Piece]:
        """Its pieces in dataset order."""
        return list(cache_pieces(self.cache))

    def attributes(self) -> dict[str, Any]:
        """Return its attributes that describe the job."""
        said = self.cache.said()
        return {
            name: said[name]
            for name in (*JOB_ATTRIBUTES, "tokenizer_path", "source_precision", "tokenizer_ids", "token_crcs")
            if name in said
        }

    def gaps(self, covered: Sequence[tuple[int, int]]) -> list[str]:
        """Return the rows outside the covered row ranges."""
        ends = [*covered, (self.n_rows, self.n_rows)]
        return [f"rows {a[1]} to {b[0] - 1}" for a, b in itertools.pairwise(ends) if b[0] > a[1]]


Part = RunPart | CachePart


def _load(path: Path) -> Array:
    try:
        loaded: Array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CacheError.at(path, f"expected an array, got {error}; restore the file") from error
    return loaded


def _job(what: Mapping[str, Any], calibration: Calibration) -> dict[str, Any]:
    """Return the values equal in all parts of a job. The id table may differ, because targets are recoded then."""
    storage = calibration.storage
    kept = storage.precision if storage is not None and storage.profile == "compact" else None
    # Separate run folders each had their own calibration.
    environment = {} if calibration.mixed_workers else calibration.environment or {}
    named = {f"environment.{name}": value for name, value in environment.items()}
    return {**what, **calibration.numerics.to_json(), "cache.precision": kept, **named}


def check_cover(part: Part, pieces: Iterable[Piece]) -> None:
    """Refuse a job with gaps, and name them."""
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
            f"{part.path}: expected the targets of all {part.n_rows} rows, got gaps: {some(gaps)}; run the job, or "
            "the workers that are named, to the end"
        )


def some(names: Sequence[str]) -> str:
    """Return the first few of many names."""
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"
