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

import dask
from distributed import Client, KilledWorker

from dask_logits.capture.calibrate import TOKENS as CALIBRATION_TOKENS
from dask_logits.capture.calibrate import CalibrationTask, auto_budgets, calibrate, first_documents
from dask_logits.capture.corpus import slice_files, tokenize
from dask_logits.capture.scoring import ScoringSettings
from dask_logits.capture.task import PartitionTask
from dask_logits.capture.teacher import TeacherSpec, resolve_dtype
from dask_logits.config import Config
from dask_logits.errors import ClusterError, PartitionsFailedError, RunConflictError
from dask_logits.job.cluster import Cluster, open_cluster
from dask_logits.job.manifest import CACHE_NAME, FORMAT, LOCK_NAME, VERSION, RunFolder, lease
from dask_logits.job.prepare import Job, check_capacity, check_folder, prepare
from dask_logits.job.window import run_partitions
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
_PREVIOUS = "previous"


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
    start = _start(job)
    if start == "complete":
        logger.info("%s is complete: nothing to do", job.run.path)
        _tidy(job)
        return job.run.cache_path
    check_capacity(job, 0.0 if start == "replace" else _committed_share(job))
    with _held(job.run):
        with open_cluster(config.teacher.generation, config.cluster) as cluster:
            if cluster.dashboard:
                logger.info("dashboard: %s", cluster.dashboard)
            calibration = job.run.calibration() if start == "resume" else None
            if calibration is None:
                calibration = _calibrate(job, cluster)
            _check_device(job, calibration, cluster)
            if start == "replace":
                _set_aside(job.run)
            _record(job, calibration)
            _drop_lost_receipts(job)
            failed = _score(job, cluster.client, calibration)
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
    """Say how this start relates to what the folder holds."""
    manifest = job.run.manifest()
    if manifest is None:
        return "fresh"
    # An old run set aside means that its replacement is under way: a forced start then goes on with it.
    same = manifest["what"] | manifest["numerics"] == job.what | job.numerics
    replacing = (job.run.path / _PREVIOUS).exists()
    if job.config.teacher.generation.force_regenerate and not (replacing and same):
        return "replace"
    return "complete" if open_run_cache(job.run, job.fingerprint, job.plan.n_rows) else "resume"


@contextlib.contextmanager
def _held(run: RunFolder) -> Iterator[None]:
    """Hold the run for this driver; a start that was refused before its manifest leaves no folder behind."""
    missing = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
    run.path.mkdir(parents=True, exist_ok=True)
    try:
        with lease(run.path):
            yield
    finally:
        if not run.manifest_path.exists():
            for folder in missing:
                with contextlib.suppress(OSError):
                    (folder / LOCK_NAME).unlink(missing_ok=True)
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
    name = f"calibrate-{uuid.uuid4().hex[:8]}"
    future = cluster.client.compute(dask.delayed(calibrate, pure=False)(task, dask_key_name=name))
    try:
        calibration: Json = future.result()
    except KilledWorker as error:
        raise ClusterError(
            f"calibration: expected a result, got a worker that died {error.allowed_failures + 1} times; "
            "it may be out of memory: lower batch_tokens, or use fewer workers"
        ) from error
    return calibration


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


def _drop_lost_receipts(job: Job) -> None:
    """Forget receipts whose arrays were deleted from outside: there is no cache, so they must be computed again."""
    for receipt in job.run.receipts(len(job.plan)):
        if receipt is not None and not (job.run.partitions_path / receipt["attempt"]).exists():
            logger.warning("partition %06d: its arrays are gone, computing it again", receipt["partition"])
            job.run.receipt_path(receipt["partition"]).unlink()


def _score(job: Job, client: Client, calibration: Json) -> dict[int, str]:
    """Score what is missing; return the partitions that failed, with reasons."""
    committed = [receipt for receipt in job.run.receipts(len(job.plan)) if receipt is not None]
    if len(committed) == len(job.plan):
        return {}
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
            on_receipt=on_receipt,
            on_tokens=progress.tokens,
        )


def _tasks(job: Job, calibration: Json, committed: set[int]) -> Iterator[PartitionTask]:
    """Yield the tasks of all partitions that are not committed, in order."""
    numerics = calibration["numerics"]
    files = job.corpus.files() or job.corpus.materialise(job.run.dataset_path)
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
                fingerprint=job.fingerprint,
                partition=partition,
                files=slice_files(files, partition.first_row, partition.n_rows),
                column=job.corpus.column,
                tokenizer=job.tokenizer_spec,
                teacher=teacher,
                scoring=scoring,
            )


def _consolidate(job: Job, calibration: Json) -> Path:
    """Write the cache from the committed partitions and tidy up."""
    receipts = [receipt for receipt in job.run.receipts(len(job.plan)) if receipt is not None]
    manifest = job.run.manifest()
    assert manifest is not None
    started = time.perf_counter()
    statistics = sum((Statistics.from_json(receipt["statistics"]) for receipt in receipts), Statistics())
    digest = consolidate(
        job.run.cache_path,
        job.run.partitions_path,
        receipts,
        top_k=job.what["teacher.generation.top_k"],
        vocab_size=job.what["dataset.vocab_size"],
        attributes={
            "fingerprint": job.fingerprint,
            "run_id": manifest["run_id"],
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
    shutil.rmtree(run.dataset_path, ignore_errors=True)
    shutil.rmtree(run.path / _PREVIOUS, ignore_errors=True)


def _set_aside(run: RunFolder) -> None:
    """Move a run into ``previous/``; where one lies there already, this is its unfinished replacement: delete it.

    The cache goes first, so that a move that is cut off leaves nothing that looks complete; the manifest goes last.
    """
    previous = run.path / _PREVIOUS
    replacing = previous.exists()
    previous.mkdir(exist_ok=True)
    for name in (CACHE_NAME, "receipts", "partitions", "dataset", "calibration.json", "status.json", "run.json"):
        path = run.path / name
        if not path.exists():
            continue
        if not replacing:
            path.replace(previous / name)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    logger.info("the old run was set aside in %s until the new one is complete", previous)


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


def _committed_share(job: Job) -> float:
    """Return the share of partitions that are committed."""
    return sum(receipt is not None for receipt in job.run.receipts(len(job.plan))) / len(job.plan)
