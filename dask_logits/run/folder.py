"""The record on disk: what a run computes, what it has settled, what it has committed.

Small JSON files that a person can read. The folder::

    run.json                  the manifest: what is computed, and how it was first run
    plan/000/000000.json      segments of the plan, in order, and its end
    calibration.json          the numerics, frozen before the first partition
    receipts/000/000042.json  commits partition 42, naming the attempt that holds its arrays
    partitions/000042.<attempt>.zarr
    failures/000042.json      why partition 42 failed, until it is committed
    spool/000042.arrow        rows of a stream until their partition is committed
    teacher_logits.h5         the cache, or an index and numbered files in teacher_logits/
    status.json               what a driver does and how far it is; the first file of a run, written before the
                              calibration (status-1-of-4.json of a static worker)
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dask_logits.cache.find import CACHE_NAME, INDEX_NAME, SHARDS_NAME
from dask_logits.cache.profile import ProfileSpec, check_calibration
from dask_logits.errors import CacheError, RunConflictError
from dask_logits.files.atomic import (
    COUNT,
    DIGEST,
    INNER_PATH,
    NAME,
    NUMBER,
    NUMBERS,
    OBJECT,
    TEXT,
    Json,
    Kind,
    check_fields,
    names_in,
    read_json,
    shown,
    unreadable,
)
from dask_logits.records import Statistics

logger = logging.getLogger(__name__)

PREVIOUS = "previous"
CONSOLIDATION_LOCK = ".consolidate.lock"
SETTING_ASIDE = ".setting-aside"
# Lies in a folder that a start made of an older run; one of that name without it is the user's.
_SET_ASIDE_MARK = ".set-aside"
# In the order in which a run is set aside: the cache first, so that what is left never looks complete.
RUN_NAMES = (
    CACHE_NAME, INDEX_NAME, SHARDS_NAME, "receipts", "partitions", "dataset", "spool", "calibration.json", "tables",
    "failures", "status.json", "plan", "run.json",
)  # fmt: skip
FORMAT = "dask_logits.run"
VERSION = 4
# Dask events of all drivers of a scheduler.
RUNS_TOPIC = "dask_logits.runs"
# States of a driver that is at work.
WORKING_STATES = ("starting", "calibrating", "running", "consolidating")
DRIVER_STATUS = {
    "state": TEXT,
    "at": NUMBER,
    "since": NUMBER.or_none(),
    "step": TEXT.or_none(),
    "reason": TEXT.or_none(),
    "tokens_per_second": NUMBER,
    "seconds_left": NUMBER.or_none(),
    "dashboard": TEXT.or_none(),
    "left_out": OBJECT.or_none(),
}
_POSITIVE = Kind("a count from 1", lambda value: COUNT.holds(value) and value > 0)
_MANIFEST = {
    "run_id": TEXT,
    "fingerprint": TEXT,
    "what": OBJECT,
    "how": OBJECT,
    # Each of them has a status file, which is looked for.
    "total_workers": Kind("a count from 1 to 65,536", lambda value: COUNT.holds(value) and 0 < value <= 1 << 16),
}
_SIZES = {"teacher.generation.top_k": _POSITIVE, "dataset.vocab_size": _POSITIVE}
_PLACES = Kind(
    "files below the partition with their bytes and CRC-32",
    lambda value: (
        isinstance(value, dict)
        and all(map(INNER_PATH.holds, value))
        and all(isinstance(pair, list) and len(pair) == 2 and all(map(COUNT.holds, pair)) for pair in value.values())
    ),
)
_RECEIPT = {
    "first_row": COUNT,
    "n_rows": COUNT,
    "run_id": TEXT,
    "attempt": NAME,
    "statistics": OBJECT,
    "content_digest": DIGEST,
    "files": _PLACES,
    "seconds": NUMBERS,
    "flops": NUMBER,
    "mfu": NUMBER.or_none(),
    "splits": OBJECT,
    # Only where it is not the calibration's.
    "environment": OBJECT.or_none(),
}


@dataclass(frozen=True, kw_only=True)
class Share:
    """The partitions one driver of a run takes: all, or every `total`-th.

    Parameters
    ----------
    worker
        Index of the static worker; 0 for a cluster.
    total
        Static workers that share the run; 1 for a cluster.
    """

    worker: int = 0
    total: int = 1

    @property
    def suffix(self) -> str:
        """What its files are told apart by."""
        return "" if self.total == 1 else f"-{self.worker}-of-{self.total}"

    def owns(self, index: int) -> bool:
        """Whether a partition is its own."""
        return index % self.total == self.worker

    def count(self, n_partitions: int) -> int:
        """Return how many of the first partitions are its own.

        >>> [Share(worker=worker, total=3).count(7) for worker in range(3)]
        [3, 2, 2]
        """
        return len(range(self.worker, n_partitions, self.total))


@dataclass(frozen=True)
class RunFolder:
    """Names and small files of one run.

    Parameters
    ----------
    path
        The folder; it need not exist.
    scratch
        Where the rows of a stream are left for workers by who only looks at the run; None: in the folder.
    """

    path: Path
    scratch: Path | None = None

    @property
    def manifest_path(self) -> Path:
        """``run.json``."""
        return self.path / "run.json"

    @property
    def calibration_path(self) -> Path:
        """``calibration.json``."""
        return self.path / "calibration.json"

    @property
    def cache_path(self) -> Path:
        """The consolidated cache."""
        return self.path / CACHE_NAME

    @property
    def index_path(self) -> Path:
        """Index over the files of a cache that is larger than ``cache.max_file_size``."""
        return self.path / INDEX_NAME

    @property
    def partitions_path(self) -> Path:
        """Folder of the Zarr partitions."""
        return self.path / "partitions"

    @property
    def tables_path(self) -> Path:
        """Folder of arrays: the compact profile's id table, a byte of each id's token."""
        return self.path / "tables"

    @property
    def token_crcs_path(self) -> Path:
        """A byte of each id's token; absent where rows held ids."""
        return self.tables_path / "token_crcs.npy"

    def profile(self) -> ProfileSpec:
        """Return how the run stores targets, which its calibration settled."""
        return self.profile_of(*self.begun())

    def begun(self) -> tuple[Json, Json]:
        """Return the manifest and the calibration.

        Raises
        ------
        RunConflictError
            If the run has not begun.
        """
        manifest, calibration = self.manifest(), self.calibration()
        if manifest is None or calibration is None:
            raise RunConflictError(f"{self.path}: expected a run that has begun, got no run.json or calibration.json")
        return manifest, calibration

    def profile_of(self, manifest: Json, calibration: Json) -> ProfileSpec:
        """Return the profile that a manifest and a calibration name."""
        check_fields(self.calibration_path, calibration, {"storage": OBJECT})
        check_fields(self.manifest_path, manifest["what"], _SIZES)
        storage = calibration["storage"]
        return ProfileSpec(
            name=storage["profile"],
            top_k=manifest["what"]["teacher.generation.top_k"],
            vocab_size=manifest["what"]["dataset.vocab_size"],
            precision=storage["precision"],
            id_table=str(self.tables_path / f"{storage['id_table']}.npy") if storage["id_table"] else None,
        )

    @property
    def dataset_path(self) -> Path:
        """Rows of a dataset that was not plainly in files."""
        return self.path / "dataset"

    @property
    def spool_path(self) -> Path:
        """Rows of a stream on their way to the workers."""
        return (self.scratch or self.path) / "spool"

    def status_path(self, share: Share) -> Path:
        """Progress of a driver."""
        return self.path / f"status{share.suffix}.json"

    def driver_statuses(self) -> dict[str, Json]:
        """Return file name → status record of every driver that left one; unreadable records are left out."""
        found = {}
        for path in sorted(self.path.glob("status*.json")):
            try:
                record = read_json(path)
                if record is not None:
                    check_fields(path, record, DRIVER_STATUS)
                    found[path.name] = record
            except CacheError as error:
                # A crash of the machine can leave an empty file. Nothing depends on these records.
                logger.warning("ignored: %s", error)
        return found

    def plan_path(self, ordinal: int) -> Path:
        """One entry of the plan, fanned out by thousands."""
        return self.path / "plan" / f"{ordinal // 1000:03d}" / f"{ordinal:06d}.json"

    def receipt_path(self, index: int) -> Path:
        """Receipt of one partition, fanned out by thousands."""
        return self.path / "receipts" / f"{index // 1000:03d}" / f"{index:06d}.json"

    @property
    def failures_path(self) -> Path:
        """Folder of the ledger of what failed."""
        return self.path / "failures"

    def failure_path(self, index: int) -> Path:
        """Entry of a partition that failed for good."""
        return self.failures_path / f"{index:06d}.json"

    def attempt_path(self, index: int) -> Path:
        """Return a new, unique folder for an attempt at a partition."""
        return self.partitions_path / f"{index:06d}.{uuid.uuid4().hex[:12]}.zarr"

    def manifest(self) -> Json | None:
        """Read the manifest; None where there is no run.

        Raises
        ------
        CacheError
            If it is not a manifest, or of a newer version.
        """
        try:
            manifest = read_json(self.manifest_path)
        except CacheError as error:
            if unreadable(error):
                raise
            raise CacheError(
                f"{error.message} from a copy; a cache beside it is read without it, and another "
                "distillation.teacher.cache_dir starts anew",
                str(self.manifest_path),
            ) from error
        if manifest is None:
            return None
        found = manifest.get("format"), manifest.get("version")
        if found != (FORMAT, VERSION):
            raise CacheError(
                f"{self.manifest_path}: expected {FORMAT} version {VERSION}, got {shown(found[0])} version "
                f"{shown(found[1])}; use the release that wrote it, or another folder",
                str(self.manifest_path),
            )
        check_fields(self.manifest_path, manifest, _MANIFEST)
        return manifest

    def calibration(self) -> Json | None:
        """Read the frozen numerics; None before the calibration."""
        calibration = read_json(self.calibration_path)
        if calibration is not None:
            check_calibration(self.calibration_path, calibration)
        return calibration

    def receipt(self, index: int) -> Json | None:
        """Read one receipt; None where the partition is not committed.

        Raises
        ------
        CacheError
            If it is not one of this partition, or names files elsewhere.
        """
        path = self.receipt_path(index)
        try:
            receipt = read_json(path)
        except CacheError as error:
            if unreadable(error):
                raise
            raise CacheError(f"{error.message}, or run the job again, which scores its rows anew", str(path)) from error
        if receipt is not None:
            number = Kind(str(index), lambda value: type(value) is int and value == index)
            check_fields(path, receipt, {"partition": number, **_RECEIPT})
            try:
                Statistics.from_json(receipt["statistics"])
            except CacheError as error:
                raise CacheError(f"{path}: {error.message}", str(path)) from error
        return receipt

    def receipts(self, n_partitions: int) -> Iterator[Json]:
        """Read the receipts of all committed partitions in order; time goes with their number, not the plan's.

        Those that are damaged are left out: nothing can be said of them.

        Raises
        ------
        CacheError
            If one cannot be read.
        """
        folder = self.path / "receipts"
        found = (
            int(name.removesuffix(".json"))
            for thousand in names_in(folder)
            if thousand.isdecimal()
            for name in names_in(folder / thousand)
            if name.endswith(".json") and name.removesuffix(".json").isdecimal()
        )
        for index in sorted(index for index in found if index < n_partitions):
            try:
                receipt = self.receipt(index)
            except CacheError as error:
                if unreadable(error):
                    raise
                logger.warning("left out: %s", error)
                continue
            if receipt is not None:
                yield receipt


def compare(folder: Path, recorded: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse a run folder that was made with other settings.

    Raises
    ------
    RunConflictError
        With every difference.
    """
    old, new = dict(_leaves(recorded)), dict(_leaves(asked))
    differences = {
        name: (old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    }
    if differences:
        raise conflict(folder, differences)


def conflict(folder: Path, differences: Mapping[str, tuple[object, object]]) -> RunConflictError:
    """Make the error that refuses a run folder: dotted name → (value in the run, value asked for)."""
    lines = "\n".join(f"  {name}: the run has {a!r}, now {b!r}" for name, (a, b) in differences.items())
    return RunConflictError(
        f"{folder}: this run was made with other settings:\n{lines}\n"
        "choose another distillation.teacher.cache_dir, restore the settings, or set "
        "distillation.teacher.generation.force_regenerate=true",
        differences,
    )


def lock_name(share: Share) -> str:
    """Return the name of a driver's lock."""
    return f".driver{share.suffix}.lock"


def set_aside(run: RunFolder) -> None:
    """Move a run into ``previous/``, by way of a folder that says the move is not finished.

    Where an old run lies in ``previous/`` and this one has no cache, this one is its unfinished replacement: it goes.
    """
    check_previous(run)
    previous = run.path / PREVIOUS
    names = [name for name in RUN_NAMES if (run.path / name).exists()]
    if has_previous(run) and not run.cache_path.exists() and not run.index_path.exists():
        for name in names:
            path = run.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        return
    drop_previous(run)
    moving = run.path / SETTING_ASIDE
    moving.mkdir()
    for name in names:
        (run.path / name).replace(moving / name)
    (moving / _SET_ASIDE_MARK).touch()
    moving.replace(previous)
    logger.info("the old run was set aside in %s until the new one is complete", previous)


def has_previous(run: RunFolder) -> bool:
    """Whether a start has set a run aside, until its replacement is complete."""
    return (run.path / PREVIOUS / _SET_ASIDE_MARK).exists()


def drop_previous(run: RunFolder) -> None:
    """Delete the run that was replaced, and nothing that only has its name."""
    if not has_previous(run):
        return
    previous = run.path / PREVIOUS
    with contextlib.suppress(OSError):
        for path in previous.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _SET_ASIDE_MARK:
                path.unlink()
    # The mark goes last: without it nobody would go on.
    shutil.rmtree(previous, ignore_errors=True)


def check_previous(run: RunFolder) -> None:
    """Refuse to set a run aside where something else has the name.

    Raises
    ------
    RunConflictError
        If there is such a thing.
    """
    previous = run.path / PREVIOUS
    if (previous.exists() or previous.is_symlink()) and not has_previous(run):
        raise RunConflictError(
            f"{previous}: expected no such folder, because the run that is to be replaced is set aside there, got one "
            "that no job made; move it, and run the same command again"
        )


def undo_setting_aside(run: RunFolder) -> None:
    """Put back what a start moved that was cut off in the middle of it."""
    moving = run.path / SETTING_ASIDE
    if moving.exists():
        (moving / _SET_ASIDE_MARK).unlink(missing_ok=True)
        for path in moving.iterdir():
            path.replace(run.path / path.name)
        moving.rmdir()


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# Dask event topic on which drivers say where their run folder is, with the figures of its status file.
