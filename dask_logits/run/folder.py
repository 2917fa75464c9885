"""The run folder: identity of a run, its frozen numerics and its committed partitions.

It holds small, readable JSON files::

    run.json                  the manifest: what is computed, and how it was first run
    plan/000/000000.json      segments of the plan, in order, and its end
    calibration.json          the numerics, frozen before the first partition
    receipts/000/000042.json  commits partition 42, naming the attempt that holds its arrays
    partitions/000042.<attempt>.zarr
    failures/000042.json      why partition 42 failed, until it is committed
    spool/000042.arrow        rows of a stream until their partition is committed
    teacher_logits.h5         the cache, or an index and numbered files in teacher_logits/
    status.json               state and progress of a driver; the first file of a run, written before the
                              calibration (status-1-of-4.json of a static worker)
    report.html               what was computed, written at the end
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field

from dask_logits.cache.find import CACHE_NAME, INDEX_NAME, SHARDS_NAME
from dask_logits.cache.profile import ProfileSpec
from dask_logits.config.root import settings
from dask_logits.errors import CacheError, RunConflictError
from dask_logits.fields import MOST_DRAWS, Count, Record, Temperature, shown
from dask_logits.files.atomic import names_in, read_json, unreadable
from dask_logits.records import Extras
from dask_logits.run.records import FORMAT, VERSION, Calibration, DriverStatus, Manifest, Receipt

logger = logging.getLogger(__name__)

_Positive = Annotated[Count, Field(gt=0)]

PREVIOUS = "previous"
REPORT_NAME = "report.html"
CONSOLIDATION_LOCK = ".consolidate.lock"
SETTING_ASIDE = ".setting-aside"
# Marks a folder in which a start set an older run aside. A folder of that name without the mark belongs to the user.
_SET_ASIDE_MARK = ".set-aside"
# In the order in which a run is set aside: the cache first, so that the remainder never looks complete.
RUN_NAMES = (
    CACHE_NAME, INDEX_NAME, SHARDS_NAME, "receipts", "partitions", "dataset", "spool", "calibration.json", "tables",
    "failures", "status.json", REPORT_NAME, "plan", "run.json",
)  # fmt: skip
# Dask event topic on which drivers publish their status records.
RUNS_TOPIC = "dask_logits.runs"
# States of an active driver.
WORKING_STATES: Final = ("starting", "calibrating", "running", "consolidating")


@dataclass(frozen=True, kw_only=True)
class Share:
    """The partitions assigned to one driver of a run: all, or every `total`-th.

    Parameters
    ----------
    worker
        Index of the static worker, 0 for a cluster.
    total
        Number of static workers that share the run, 1 for a cluster.
    """

    worker: int = 0
    total: int = 1

    @property
    def suffix(self) -> str:
        """Suffix that distinguishes its files from those of other shares."""
        return "" if self.total == 1 else f"-{self.worker}-of-{self.total}"

    def owns(self, index: int) -> bool:
        """Whether a partition belongs to this share."""
        return index % self.total == self.worker

    def count(self, n_partitions: int) -> int:
        """Return how many of the first `n_partitions` partitions belong to this share.

        >>> [Share(worker=worker, total=3).count(7) for worker in range(3)]
        [3, 2, 2]
        """
        return len(range(self.worker, n_partitions, self.total))


class _Inside:
    """A path in a run folder."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run: RunFolder, owner: type[RunFolder]) -> Path:
        return run.path / self.name


@dataclass(frozen=True)
class RunFolder:
    """Paths and small files of one run.

    Parameters
    ----------
    path
        The folder. It need not exist.
    scratch
        Folder in which a process that only reads the run spools a stream's rows for workers. None: the run folder.
    """

    path: Path
    scratch: Path | None = None

    manifest_path = _Inside("run.json")
    """``run.json``."""
    calibration_path = _Inside("calibration.json")
    """``calibration.json``."""
    cache_path = _Inside(CACHE_NAME)
    """The consolidated cache."""
    index_path = _Inside(INDEX_NAME)
    """Index over the files of a cache that is larger than ``cache.max_file_size``."""
    report_path = _Inside(REPORT_NAME)
    """``report.html``."""
    partitions_path = _Inside("partitions")
    """Folder of the Zarr partitions."""
    tables_path = _Inside("tables")
    """Folder of arrays: the compact profile's id table, and one byte of each id's token."""
    dataset_path = _Inside("dataset")
    """Rows of a dataset that did not match its files."""
    failures_path = _Inside("failures")
    """Folder of the failure ledger."""

    @property
    def token_crcs_path(self) -> Path:
        """One byte of each id's token. Absent if rows held ids."""
        return self.tables_path / "token_crcs.npy"

    def profile(self) -> ProfileSpec:
        """Return the storage profile, as fixed by the calibration."""
        manifest, calibration = self.manifest(), self.calibration()
        if manifest is None or calibration is None:
            raise self.not_begun()
        return self.profile_of(manifest, calibration)

    def not_begun(self) -> RunConflictError:
        """Return the error of a folder without a calibrated run."""
        return RunConflictError(f"{self.path}: expected a run that has begun, got no run.json or calibration.json")

    def profile_of(self, manifest: Manifest, calibration: Calibration) -> ProfileSpec:
        """Return the profile that a manifest and a calibration name."""
        sizes, storage = _Sizes.parse(self.manifest_path, manifest.what), calibration.storage
        if storage is None:
            raise CacheError.at(self.calibration_path, "expected storage, got none; restore it")
        return ProfileSpec(
            name=storage.profile,
            top_k=sizes.top_k,
            vocab_size=sizes.vocab_size,
            precision=storage.precision,
            id_table=str(self.tables_path / f"{storage.id_table}.npy") if storage.id_table else None,
            extras=Extras(
                draws=sizes.draws,
                temperatures=sizes.temperatures,
                is_masked=sizes.mask_column is not None or sizes.learn == "assistant",
                has_target_pos=sizes.positions != "all",
            ),
        )

    @property
    def spool_path(self) -> Path:
        """Rows of a stream in transit to the workers."""
        return (self.scratch or self.path) / "spool"

    def status_path(self, share: Share) -> Path:
        """Progress file of a driver."""
        return self.path / f"status{share.suffix}.json"

    def driver_statuses(self, level: int = logging.WARNING) -> dict[str, DriverStatus]:
        """Return file name → status record of every driver. Unreadable records are skipped, and logged at `level`."""
        found = {}
        for path in sorted(self.path.glob("status*.json")):
            try:
                record = read_json(path)
                if record is not None:
                    found[path.name] = DriverStatus.parse(path, record)
            except CacheError as error:
                # A crash of the machine can leave an empty file. These records are informational only.
                logger.log(level, "ignored: %s", error)
        return found

    def plan_path(self, ordinal: int) -> Path:
        """One entry of the plan, in a subfolder per thousand."""
        return self.path / "plan" / f"{ordinal // 1000:03d}" / f"{ordinal:06d}.json"

    def receipt_path(self, index: int) -> Path:
        """Receipt of one partition, in a subfolder per thousand."""
        return self.path / "receipts" / f"{index // 1000:03d}" / f"{index:06d}.json"

    def failure_path(self, index: int) -> Path:
        """Ledger entry of a partition that failed permanently."""
        return self.failures_path / f"{index:06d}.json"

    def attempt_path(self, index: int) -> Path:
        """Return a new, unique folder for an attempt at a partition."""
        return self.partitions_path / f"{index:06d}.{uuid.uuid4().hex[:12]}.zarr"

    def manifest(self) -> Manifest | None:
        """Read the manifest, or return None if there is no run.

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
                "distillation.teacher.cache_dir starts a new run",
                str(self.manifest_path),
            ) from error
        if manifest is None:
            return None
        found = manifest.get("format"), manifest.get("version")
        if found != (FORMAT, VERSION):
            raise CacheError.at(
                self.manifest_path,
                f"expected {FORMAT} version {VERSION}, got {shown(found[0])} version "
                f"{shown(found[1])}; use the release that wrote it, or another folder",
            )
        return Manifest.parse(self.manifest_path, manifest)

    def calibration(self) -> Calibration | None:
        """Read the frozen numerics, or return None before the calibration."""
        calibration = read_json(self.calibration_path)
        return None if calibration is None else Calibration.parse(self.calibration_path, calibration)

    def receipt(self, index: int) -> Receipt | None:
        """Read one receipt, or return None if the partition is not committed.

        Raises
        ------
        CacheError
            If it belongs to another partition, or names files elsewhere.
        """
        path = self.receipt_path(index)
        try:
            values = read_json(path)
        except CacheError as error:
            if unreadable(error):
                raise
            raise CacheError(
                f"{error.message}, or run the job again, which scores its rows again", str(path)
            ) from error
        if values is None:
            return None
        receipt = Receipt.parse(path, values)
        if receipt.partition != index:
            raise CacheError.at(
                path,
                f"expected partition to be {index}, got {receipt.partition}; the file is damaged: restore or delete it",
            )
        return receipt

    def receipt_indices(self) -> set[int]:
        """List the partitions that have a receipt, without reading any."""
        folder = self.path / "receipts"
        thousands = (folder / name for name in names_in(folder) if name.isdecimal())
        return {index for thousand in thousands for index in _indices(thousand)}

    def failure_indices(self) -> set[int]:
        """List the partitions in the failure ledger, without reading any entry."""
        return _indices(self.failures_path)

    def receipts(self, indices: Iterable[int]) -> Iterator[Receipt]:
        """Read the receipts of those of some partitions that are committed. Damaged receipts are skipped.

        Raises
        ------
        CacheError
            If one cannot be read.
        """
        for index in indices:
            try:
                receipt = self.receipt(index)
            except CacheError as error:
                if unreadable(error):
                    raise
                logger.warning("left out: %s", error)
                continue
            if receipt is not None:
                yield receipt


def _indices(folder: Path) -> set[int]:
    """Return the numbers by which the JSON files of a folder are named."""
    stems = (name.removesuffix(".json") for name in names_in(folder) if name.endswith(".json"))
    return {int(stem) for stem in stems if stem.isdecimal()}


_KIND = "teacher.generation.targets"
_OF_ONE_KIND = ("teacher.generation.draws", "teacher.generation.seed", "teacher.generation.top_k")


def compare(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuse a run folder made with other settings: dotted name → value.

    Raises
    ------
    RunConflictError
        Listing all differences.
    """
    differences = {
        name: (old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    }
    if _KIND in differences:
        # Runs of the most probable tokens do not record their kind. The other settings belong to one kind each.
        one, other = differences[_KIND]
        differences = {name: pair for name, pair in differences.items() if name not in _OF_ONE_KIND}
        differences[_KIND] = (one or "topk", other or "topk")
    if differences:
        raise conflict(folder, differences)


def conflict(folder: Path, differences: Mapping[str, tuple[object, object]]) -> RunConflictError:
    """Build the error that refuses a run folder: dotted name → (value in the run, requested value)."""
    # The names of settings in full, so that they can be pasted. The others are facts about teacher and dataset.
    known = {setting.path for setting in settings()}
    names = {name: full if (full := f"distillation.{name}") in known else name for name in differences}
    lines = "\n".join(f"  {names[name]}: the run has {a!r}, now {b!r}" for name, (a, b) in differences.items())
    return RunConflictError(
        f"{folder}: this run was made with other settings:\n{lines}\n"
        "choose another distillation.teacher.cache_dir, restore the settings, or set "
        "distillation.teacher.generation.force_regenerate=true",
        differences,
    )


class _Sizes(Record):
    top_k: _Positive = Field(alias="teacher.generation.top_k")
    vocab_size: _Positive = Field(alias="dataset.vocab_size")
    temperatures: tuple[Temperature, ...] = Field((), alias="teacher.generation.temperatures")
    draws: Annotated[int, Field(strict=True, ge=0, le=MOST_DRAWS)] = Field(0, alias="teacher.generation.draws")
    positions: str = Field("all", alias="teacher.generation.positions")
    mask_column: str | None = Field(None, alias="dataset.mask_column")
    learn: str | None = Field(None, alias="dataset.learn")


def lock_name(share: Share) -> str:
    """Return the name of a driver's lock."""
    return f".driver{share.suffix}.lock"


def set_aside(run: RunFolder) -> None:
    """Move a run into ``previous/``, through a temporary folder that marks an unfinished move.

    If ``previous/`` holds an old run and this run has no cache, it is the unfinished replacement and is deleted.
    """
    check_previous(run)
    previous = run.path / PREVIOUS
    names = [name for name in RUN_NAMES if (run.path / name).exists()]
    if has_previous(run) and not run.cache_path.exists() and not run.index_path.exists():
        for name in names:
            path = run.path / name
            if path == run.partitions_path:
                delete_partitions(run)
            elif path.is_dir():
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
    """Whether a start has set a run aside whose replacement is not yet complete."""
    return (run.path / PREVIOUS / _SET_ASIDE_MARK).exists()


def drop_previous(run: RunFolder) -> None:
    """Delete the replaced run, but never a folder that only shares its name."""
    if not has_previous(run):
        return
    previous = run.path / PREVIOUS
    with contextlib.suppress(OSError):
        for path in previous.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _SET_ASIDE_MARK:
                path.unlink()
    # The mark is deleted last, because an interrupted deletion resumes only if the mark exists.
    shutil.rmtree(previous, ignore_errors=True)


def delete_partitions(run: RunFolder) -> None:
    """Delete the partitions. If their folder is a link to another disk, it stays, with everything else in it."""
    if run.partitions_path.is_symlink():
        for attempt in run.partitions_path.glob("[0-9]*.zarr"):
            shutil.rmtree(attempt, ignore_errors=True)
    else:
        shutil.rmtree(run.partitions_path, ignore_errors=True)


def check_previous(run: RunFolder) -> None:
    """Refuse to set a run aside if the name is in use by something else.

    Raises
    ------
    RunConflictError
        If it is in use.
    """
    previous = run.path / PREVIOUS
    if (previous.exists() or previous.is_symlink()) and not has_previous(run):
        raise RunConflictError(
            f"{previous}: expected no such folder, because the run that is to be replaced is set aside there, got one "
            "that no job made; move it, and run the same command again"
        )


def undo_setting_aside(run: RunFolder) -> None:
    """Move back the files of an interrupted :func:`set_aside`."""
    moving = run.path / SETTING_ASIDE
    if moving.exists():
        (moving / _SET_ASIDE_MARK).unlink(missing_ok=True)
        for path in moving.iterdir():
            path.replace(run.path / path.name)
        moving.rmdir()
