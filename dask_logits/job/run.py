"""``generate``: prepare, calibrate, score every partition that is missing, consolidate.

The order of what touches the disk: nothing before every check and the calibration have passed; then the manifest, the
frozen numerics, partition by partition its arrays and its receipt, the cache last. Whatever ends the process, the next
start finds the files and does the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from distributed import Client

from dask_logits.capture.calibrate import TOKENS as CALIBRATION_TOKENS
from dask_logits.capture.calibrate import CalibrationTask, auto_budgets, calibrate, first_documents
from dask_logits.capture.corpus import slice_files
from dask_logits.capture.scoring import ScoringSettings
from dask_logits.capture.task import PartitionTask
from dask_logits.capture.teacher import TeacherSpec, resolve_dtype
from dask_logits.capture.tokens import tokenize
from dask_logits.config import Config
from dask_logits.errors import DaskLogitsError, PartitionsFailedError, RunConflictError
from dask_logits.job.cluster import Cluster, open_cluster
from dask_logits.job.manifest import (
    FORMAT,
    LOCK_NAME,
    PREVIOUS,
    VERSION,
    RunFolder,
    lease,
    set_aside,
    undo_setting_aside,
)
from dask_logits.job.prepare import Job, check_capacity, check_folder, prepare
from dask_logits.job.window import run_one, run_partitions
from dask_logits.observe.progress import JobProgress
from dask_logits.observe.status import open_run_cache
from dask_logits.records import Array, Statistics
from dask_logits.store.consolidate import consolidate
from dask_logits.store.durable import Json, create_json, replace_json
from dask_logits.store.partition import remove_partition

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_READ_ROWS = 256


def generate(config: Config, dataset: Dataset | None = None) -> Path:
    """Run the whole job, or what is left of it.

    Parameters
    ----------
    config
        Validated settings (:func:`dask_logits.load_config`).
    dataset
        An opened dataset, instead of ``dataset.name``.

    Returns
    -------
    Path
        The cache.

    Raises
    ------
    PartitionsFailedError
        If some partitions could not be scored; all others are committed, and the next call takes up just those.
    DaskLogitsError
        Whatever else has to change before the job can run; nothing was written then.
    """
    job = prepare(config, dataset)
    check_folder(job)
    with _held(job.run):
        # Again, now that nobody else can change the folder.
        undo_setting_aside(job.run)
        check_folder(job)
        start = _start(job)
        if start == "complete":
            logger.info("%s is complete: nothing to do", job.run.path)
            _tidy(job)
            return job.run.cache_path
        committed = 0 if start == "replace" else len(_committed(job))
        check_capacity(job, committed / len(job.plan))
        calibration = job.run.calibration() if start == "resume" else None
        failed: dict[int, str] = {}
        if calibration is None or committed < len(job.plan):
            with open_cluster(config.teacher.generation, config.cluster, retries=config.job.retries) as cluster:
                if cluster.dashboard:
                    logger.info("dashboard: %s", cluster.dashboard)
                calibration = calibration or _calibrate(job, cluster)
                _check_device(job, calibration, cluster)
                if start == "replace":
                    set_aside(job.run)
                with _ran():
                    _record(job, calibration)
                    failed = _score(job, cluster.client, calibration)
        with _ran():
            if failed:
                reasons = "\n".join(f"  partition {index:06d}: {reason}" for index, reason in sorted(failed.items()))
                raise PartitionsFailedError(
                    f"{len(failed)} of {len(job.plan)} partitions failed; the others are committed:\n{reasons}\n"
                    "mend the cause and run the same command again: only these are taken up",
                    failed,
                )
            return _consolidate(job, calibration)


Start = Literal["fresh", "resume", "replace", "complete"]


def _start(job: Job) -> Start:
    """Say how this start relates to what the folder holds.

    An old run in ``previous/`` beside one without a cache means that its replacement is under way: a forced start with
    the same settings goes on with it.
    """
    manifest = job.run.manifest()
    if manifest is None:
        return "fresh"
    forced = job.config.teacher.generation.force_regenerate
    same = manifest["what"] | manifest["numerics"] == job.what | job.numerics
    replacing = (job.run.path / PREVIOUS).exists()
    if forced and not (replacing and same):
        return "replace"
    return "complete" if open_run_cache(job.run, job.fingerprint) else "resume"


@contextlib.contextmanager
def _ran() -> Iterator[None]:
    """Mark errors from here on as failures of a job that ran, not as refusals."""
    try:
        yield
    except DaskLogitsError as error:
        error.ran = True
        raise


@contextlib.contextmanager
def _held(run: RunFolder) -> Iterator[None]:
    """Hold the run for this driver; a start that was refused before its manifest leaves no trace."""
    missing = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
    run.path.mkdir(parents=True, exist_ok=True)
    with lease(run.path):
        try:
            yield
        finally:
            if not run.manifest_path.exists():
                (run.path / LOCK_NAME).unlink(missing_ok=True)
                for folder in missing:
                    with contextlib.suppress(OSError):
                        folder.rmdir()


def _calibrate(job: Job, cluster: Cluster) -> Json:
    """Settle the numerics on a worker."""
    generation = job.config.teacher.generation
    batch_tokens, head_rows = auto_budgets(cluster.device, generation.batch_tokens, generation.head_rows)
    documents: list[Array] = []
    first = 0
    while first < job.corpus.n_rows and sum(map(len, documents)) < CALIBRATION_TOKENS:
        rows = job.corpus.rows(first, _READ_ROWS)
        documents += tokenize(rows, job.tokenizer_spec, first_row=first)
        first += len(rows)
    task = CalibrationTask(
        teacher=_teacher_spec(
            job,
            dtype=resolve_dtype(job.config.teacher.dtype, job.teacher.checkpoint_dtype, cluster.device),
            device=cluster.device,
            torch_threads=cluster.torch_threads,
        ),
        documents=first_documents(documents, CALIBRATION_TOKENS),
        top_k=generation.top_k,
        vocab_size=job.tokenizer_spec.vocab_size,
        batch_size=generation.batch_size,
        batch_tokens=batch_tokens,
        head_rows=head_rows,
    )
    logger.info("calibrating on %d documents", len(task.documents))
    return run_one(cluster.client, calibrate, task, job.config.job)


def _check_device(job: Job, calibration: Json, cluster: Cluster) -> None:
    frozen = calibration["numerics"]["device"]
    if frozen != cluster.device:
        raise RunConflictError(
            f"{job.run.path}: this run was calibrated on {frozen!r}, the workers now are {cluster.device!r}, and the "
            "bits would differ; resume it there, or choose another distillation.teacher.cache_dir",
            {"device": (frozen, cluster.device)},
        )


def _record(job: Job, calibration: Json) -> None:
    """Write the manifest and the frozen numerics, unless they are there."""
    created = create_json(
        job.run.manifest_path,
        {
            "format": FORMAT,
            "version": VERSION,
            "run_id": uuid.uuid4().hex,
            "created": time.time(),
            "fingerprint": job.fingerprint,
            "what": job.what,
            "numerics": job.numerics,
            "how": dataclasses.asdict(job.config),
            "teacher": dataclasses.asdict(job.teacher),
            "tokenizer_map_digest": job.tokenizer.map_digest if job.tokenizer else None,
        },
    )
    if create_json(job.run.calibration_path, calibration):
        logger.info(
            "calibrated: %s on %s, head path %s, %.0f tokens/s, kept mass by k %s",
            calibration["numerics"]["dtype"],
            calibration["numerics"]["device"],
            calibration["numerics"]["head"],
            calibration["tokens_per_second"],
            calibration["kept_mass_by_k"],
        )
    logger.info("%s run in %s: %d partitions", "new" if created else "resumed", job.run.path, len(job.plan))


def _committed(job: Job) -> list[Json]:
    """Return the receipts whose arrays are there, in order; forget the others, to be computed again.

    Arrays may have been deleted from outside, and a worker of a run that was replaced may have committed late.
    """
    manifest = job.run.manifest()
    kept = []
    for receipt in job.run.receipts(len(job.plan)):
        if receipt is None or manifest is None:
            continue
        ours = receipt["run_id"] == manifest["run_id"]
        if ours and (job.run.partitions_path / receipt["attempt"]).exists():
            kept.append(receipt)
        else:
            logger.warning("partition %06d: arrays gone, or another run's; computing it again", receipt["partition"])
            job.run.receipt_path(receipt["partition"]).unlink()
    return kept


def _score(job: Job, client: Client, calibration: Json) -> dict[int, str]:
    """Score what is missing; return the partitions that failed, with reasons."""
    committed = _committed(job)
    done = sum((Statistics.from_json(receipt["statistics"]) for receipt in committed), Statistics())
    with JobProgress(
        partitions=len(job.plan), committed=len(committed), done=done, expected_tokens=job.estimate.tokens
    ) as progress:

        def on_receipt(receipt: Json) -> None:
            statistics = Statistics.from_json(receipt["statistics"])
            progress.partition(statistics)
            logger.info(
                "partition %06d: %d documents, %d tokens, %.0f tokens/s",
                receipt["partition"],
                statistics.documents,
                statistics.tokens,
                statistics.tokens / max(receipt["seconds"]["score"], 1e-9),
            )
            replace_json(job.run.status_path, {"at": time.time(), "progress": progress.line()})

        return run_partitions(
            client,
            _tasks(job, calibration, {receipt["partition"] for receipt in committed}),
            job.config.job,
            run_id=_run_id(job),
            on_receipt=on_receipt,
            on_tokens=progress.tokens,
        )


def _tasks(job: Job, calibration: Json, committed: set[int]) -> Iterator[PartitionTask]:
    """Yield the tasks of all partitions that are not committed, in order."""
    numerics = calibration["numerics"]
    files = job.corpus.files or job.corpus.materialise(job.run.dataset_path)
    run_id = _run_id(job)
    teacher = _teacher_spec(
        job, dtype=numerics["dtype"], device=numerics["device"], torch_threads=numerics["torch_threads"]
    )
    scoring = ScoringSettings(
        top_k=job.config.teacher.generation.top_k,
        vocab_size=job.tokenizer_spec.vocab_size,
        batch_tokens=numerics["batch_tokens"],
        batch_size=numerics["batch_size"],
        head_rows=numerics["head_rows"],
        head=numerics["head"],
    )
    for index in range(len(job.plan)):
        if index not in committed:
            partition = job.plan.partition(index)
            yield PartitionTask(
                run=str(job.run.path),
                run_id=run_id,
                partition=partition,
                files=slice_files(files, partition.first_row, partition.n_rows),
                column=job.corpus.column,
                tokenizer=job.tokenizer_spec,
                teacher=teacher,
                scoring=scoring,
            )


def _consolidate(job: Job, calibration: Json) -> Path:
    """Write the cache from the committed partitions and tidy up."""
    receipts = _committed(job)
    run_id = _run_id(job)
    started = time.perf_counter()
    statistics = sum((Statistics.from_json(receipt["statistics"]) for receipt in receipts), Statistics())
    digest = consolidate(
        job.run.cache_path,
        job.run.partitions_path,
        receipts,
        n_rows=job.plan.n_rows,
        top_k=job.what["teacher.generation.top_k"],
        vocab_size=job.what["dataset.vocab_size"],
        attributes={
            "fingerprint": job.fingerprint,
            "run_id": run_id,
            "what": job.what,
            "calibration": calibration,
            "teacher": dataclasses.asdict(job.teacher),
            "teacher_path": str(job.config.teacher.model_path),
            "tokenizer_map_digest": job.tokenizer.map_digest if job.tokenizer else "",
            "statistics": dataclasses.asdict(statistics),
        },
    )
    logger.info("cache %s in %.1f s, content %s", job.run.cache_path, time.perf_counter() - started, digest)
    _tidy(job)
    return job.run.cache_path


def _tidy(job: Job) -> None:
    """Delete what a complete cache makes superfluous: partitions (unless kept), lost attempts, a replaced run."""
    run = job.run
    if job.config.job.keep_partitions:
        named = {receipt["attempt"] for receipt in run.receipts(len(job.plan)) if receipt is not None}
        for attempt in run.partitions_path.glob("*.zarr"):
            if attempt.name not in named:
                remove_partition(attempt)
    else:
        shutil.rmtree(run.partitions_path, ignore_errors=True)
    if job.corpus.files is None:
        shutil.rmtree(run.dataset_path, ignore_errors=True)
    shutil.rmtree(run.path / PREVIOUS, ignore_errors=True)


def _run_id(job: Job) -> str:
    manifest = job.run.manifest()
    if manifest is None:
        raise RunConflictError(f"{job.run.path}: expected run.json, got none: it was deleted while the job ran")
    return str(manifest["run_id"])


def _teacher_spec(job: Job, *, dtype: str, device: str, torch_threads: int) -> TeacherSpec:
    folder = Path(str(job.config.teacher.model_path)).expanduser()
    return TeacherSpec(
        path=str(folder.absolute()) if folder.is_dir() else str(job.config.teacher.model_path),
        revision=job.teacher.revision,
        identity=job.teacher.identity,
        dtype=dtype,
        device=device,
        torch_threads=torch_threads,
        trust_remote_code=job.config.teacher.trust_remote_code,
    )
