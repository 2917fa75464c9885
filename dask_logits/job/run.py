"""``generate``: prepare, calibrate, score all missing partitions, consolidate.

Writes are ordered: nothing before all checks and the calibration have passed, then the manifest, the frozen numerics,
the plan as it grows, the arrays and receipt of each partition, and the cache last. After any interruption, the next
start finds the files and does the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dask_logits.cache.profile import earns, save_array, save_id_table
from dask_logits.config import Config, parse_bytes
from dask_logits.data.items import make_items
from dask_logits.data.tokens import sample_documents
from dask_logits.errors import CacheError, ClusterError, DaskLogitsError, PartitionsFailedError, RunConflictError
from dask_logits.files.atomic import Json, create_json, expanded, read_json, room
from dask_logits.files.lock import lease
from dask_logits.hydra_config import override
from dask_logits.job.capacity import check_capacity
from dask_logits.job.cluster import Cluster, leave_out_misfits, open_cluster
from dask_logits.job.driver import Done, score, teacher_spec
from dask_logits.job.launch import check_launcher
from dask_logits.job.prepare import Job, check_folder, prepare, settings_of
from dask_logits.job.progress import Steps
from dask_logits.job.reporter import Reporter, reported
from dask_logits.job.single import run_one
from dask_logits.job.watchdog import watched
from dask_logits.records import Array, Statistics
from dask_logits.run.consolidate import consolidate_run, tidy
from dask_logits.run.failures import read_failures
from dask_logits.run.folder import (
    CONSOLIDATION_LOCK,
    FORMAT,
    VERSION,
    RunFolder,
    Share,
    has_previous,
    lock_name,
    set_aside,
    undo_setting_aside,
)
from dask_logits.run.plan_log import PlanLog
from dask_logits.run.state import RunState, discard_stale, open_run_cache
from dask_logits.run.timings import plural
from dask_logits.teacher.checkpoint import resolve_dtype
from dask_logits.worker.calibrate import TOKENS as CALIBRATION_TOKENS
from dask_logits.worker.calibrate import CalibrationTask, auto_budgets, calibrate, first_documents

logger = logging.getLogger(__name__)

_WORKER = "distillation.teacher.generation.worker_id"
# Divisor for a trial's time limit. All trials at their limits leave half of the calibration's total time.
_TRIALS_IN_STALL = 8


def generate(config: Config, dataset: Any = None) -> Path:
    """Run the whole job, or the rest of it.

    Parameters
    ----------
    config
        Validated settings (:func:`dask_logits.load_config`).
    dataset
        Replaces ``dataset.name``: an opened ``datasets.Dataset``, or a stream of rows (an ``IterableDataset``, an
        iterator, a generator).

    Returns
    -------
    Path
        The cache, or for a static worker the run folder. :func:`dask_logits.merge` builds one cache from its parts.

    Raises
    ------
    PartitionsFailedError
        If some partitions could not be scored. All others are committed, and the next call retries only these.
    DaskLogitsError
        If an input must be changed before the job can run. In that case, nothing was written.
    """
    return _generate(config, dataset)


def retry(path: str | Path, dataset: Any = None, *, overrides: Sequence[str] = (), bisect: bool = False) -> Path:
    """Retry only the failed partitions of a run, with its original settings.

    Parameters
    ----------
    path
        The run folder.
    dataset
        As passed to :func:`generate`. None: the run names it.
    overrides
        Settings that are free to change, such as ``distillation.cluster.kind=local_cpu``. With ``worker_id``, only the
        failures in that static worker's share are retried.
    bisect
        Find the rows that make a partition fail, by scoring halves of it down to single rows.

    Returns
    -------
    Path
        As returned by :func:`generate`.

    Raises
    ------
    RunConflictError
        If nothing failed, or other partitions are missing, too.
    PartitionsFailedError
        If some failed again, for a run shared by static workers in any share.
    DaskLogitsError
        As raised by :func:`generate`.
    """
    run = RunFolder(expanded(path))
    log = PlanLog(run)
    config = override(settings_of(run, log), overrides, dataset_given=dataset is not None)
    only = frozenset(read_failures(run))
    state = RunState.find(run, log)
    if not only and not (state and state.is_complete):
        raise RunConflictError(
            f"{run.path}: expected partitions that failed, got none; to do the rest, give `generate` the settings of "
            "the run"
        )
    total = config.teacher.generation.total_workers or 1
    if total == 1 or any(_WORKER in given for given in overrides):
        return _generate(config, dataset, only=only, bisects=bisect)
    failed: list[PartitionsFailedError] = []
    for worker in sorted({index % total for index in only}):
        share = override(settings_of(run, log), [*overrides, f"{_WORKER}={worker}"], dataset_given=dataset is not None)
        try:
            _generate(share, dataset, only=only, bisects=bisect)
        except PartitionsFailedError as error:
            failed.append(error)
    if failed:
        with _ran():
            reasons = {index: reason for error in failed for index, reason in error.reasons.items()}
            raise PartitionsFailedError("\n".join(error.message for error in failed), reasons)
    return run.path


def _generate(config: Config, dataset: Any, *, only: frozenset[int] | None = None, bisects: bool = False) -> Path:
    check_launcher(config.teacher.generation, os.environ)
    run = RunFolder(Path(config.teacher.cache_dir).expanduser().absolute())
    with room(run.path, begun=run.manifest_path.exists):
        # Not watched, because this thread waits for other threads that write downloads.
        with Steps("preparing", is_live=False) as steps:
            job = prepare(config, dataset, on_step=steps.show)
        check_folder(job)
        with watched(config.job.stall_seconds):
            return _do(job, only, bisects)


def _do(job: Job, only: frozenset[int] | None, bisects: bool) -> Path:
    config = job.config
    with _held(job):
        # Repeated, because no other process can change the folder from here on.
        undo_setting_aside(job.run)
        check_folder(job)
        log = PlanLog(job.run)
        state = RunState.find(job.run, log)
        start = _start(job, state)
        if start == "complete":
            logger.info("%s is complete: nothing to do", job.run.path)
            tidy(job.run, keep_partitions=config.job.keep_partitions)
            return _complete_path(job)
        done = Done() if start == "replace" or state is None else _done(job, state)
        check_capacity(job, done.rows / max(1, job.source.n_rows or 0))
        with reported(job) as reporter:
            if not (start == "resume" and job.run.calibration() and _is_scored(job, log, done)):
                failed = _run_cluster(job, start, done, reporter, only, bisects)
                if failed:
                    with _ran():
                        raise _failure(failed, job)
            return _finish(job, reporter)


def _finish(job: Job, reporter: Reporter) -> Path:
    """Write the cache. For a static worker, the merge does this."""
    config = job.config
    if job.share.total > 1:
        logger.info("share %d of %d of %s is complete", job.share.worker, job.share.total, job.run.path)
        return job.run.path
    with _ran():
        reporter.report("consolidating")
        limit = config.cache.max_file_size
        return consolidate_run(
            job.run,
            keep_partitions=config.job.keep_partitions,
            max_file_bytes=None if limit is None else parse_bytes(limit),
            takeover=config.job.takeover,
            on_piece=reporter.tick,
        )


def _complete_path(job: Job) -> Path:
    cache = open_run_cache(job.run)
    return job.run.path if cache is None or job.share.total > 1 else cache.path


Start = Literal["fresh", "resume", "replace", "complete"]


def _start(job: Job, state: RunState | None) -> Start:
    """Determine how to start, from the content of the folder.

    A forced start resumes an unfinished forced start with the same settings.
    """
    if state is None:
        return "fresh"
    forced = job.config.teacher.generation.force_regenerate
    if forced and not _replaces(job, state):
        return "replace"
    return "complete" if state.is_complete and not _grows(job, state.log) else "resume"


def _replaces(job: Job, state: RunState) -> bool:
    """Whether the folder holds an unfinished replacement with the requested settings.

    It is identified by the run that it replaces, or without one, by being forced and incomplete.
    """
    manifest = state.manifest
    same = manifest["what"] | manifest["numerics"] == job.what | job.numerics
    forced = bool(manifest["how"]["teacher"]["generation"]["force_regenerate"])
    try:
        begun = has_previous(job.run) or (forced and not state.is_complete)
    except CacheError:
        # A cache existed, and its remains are replaced.
        begun = False
    if not same or not begun:
        return False
    try:
        job.source.check(state.log)
    except RunConflictError:
        return False
    return True


def _grows(job: Job, log: PlanLog) -> bool:
    """Whether more rows are requested than allowed by an earlier start's ``max_samples``."""
    return log.end == "max_samples" and job.source.n_rows != log.n_rows


@contextlib.contextmanager
def _ran() -> Iterator[None]:
    """Mark further errors as failures of a running job rather than refusals."""
    try:
        yield
    except DaskLogitsError as error:
        error.ran = True
        raise


@contextlib.contextmanager
def _held(job: Job) -> Iterator[None]:
    """Hold the share of the run for this driver. A start refused before its manifest leaves no trace."""
    run = job.run
    lock = run.path / lock_name(job.share)
    missing = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
    run.path.mkdir(parents=True, exist_ok=True)
    with lease(lock, takeover=job.config.job.takeover):
        try:
            yield
        finally:
            if not run.manifest_path.exists():
                lock.unlink(missing_ok=True)
                for folder in missing:
                    with contextlib.suppress(OSError):
                        folder.rmdir()


@contextlib.contextmanager
def _alone(job: Job) -> Iterator[None]:
    """Hold all other locks that users of the run could hold: static workers' shares and the consolidation."""
    total = (job.run.manifest() or {}).get("total_workers", 1)
    names = [CONSOLIDATION_LOCK, *(lock_name(Share(worker=worker, total=total)) for worker in range(total))]
    with contextlib.ExitStack() as held:
        for name in names:
            if name != lock_name(job.share) and (job.run.path / name).exists():
                held.enter_context(lease(job.run.path / name, takeover=job.config.job.takeover))
        yield


def _done(job: Job, state: RunState) -> Done:
    done = Done()
    for each in discard_stale(state, job.share).partitions():
        if not each.is_done or not job.share.owns(each.partition.index):
            continue
        done.indices.add(each.partition.index)
        done.rows += each.partition.n_rows
        if each.receipt is not None:
            done.statistics += Statistics.from_json(each.receipt["statistics"])
    return done


def _is_scored(job: Job, log: PlanLog, done: Done) -> bool:
    """Whether nothing is left to score and the plan cannot grow."""
    return log.end is not None and not _grows(job, log) and len(done.indices) == job.share.count(log.n_partitions)


def _run_cluster(
    job: Job, start: Start, done: Done, reporter: Reporter, only: frozenset[int] | None, bisects: bool
) -> dict[int, str]:
    """Calibrate if necessary, and score the missing partitions. Return the failures."""
    config = job.config
    calibration = job.run.calibration() if start == "resume" else None
    with open_cluster(
        config.teacher.generation,
        config.cluster,
        retries=config.job.retries,
        stall_seconds=config.job.stall_seconds,
    ) as cluster:
        reporter.cluster = cluster
        if cluster.dashboard:
            logger.info("dashboard: %s", cluster.dashboard)
        _check_environment(job, calibration, cluster)
        calibration = calibration or _calibrate(job, cluster, reporter)
        _check_device(job, calibration, cluster)
        if start == "replace":
            with _alone(job):
                set_aside(job.run)
        with _ran():
            calibration = _record(job, calibration)
            # Another static worker's, if it was first.
            _check_device(job, calibration, cluster)
            _check_environment(job, calibration, cluster)
            return score(job, cluster, calibration, done, reporter, only=only, bisects=bisects)


def _failure(failed: dict[int, str], job: Job) -> PartitionsFailedError:
    reasons = "\n".join(f"  partition {index:06d}: {reason}" for index, reason in sorted(failed.items()))
    return PartitionsFailedError(
        f"{len(failed)} of {PlanLog(job.run).n_partitions} partitions failed; the others are committed:\n{reasons}\n"
        f"mend the cause and run the same command again, or `dask-logits retry {job.run.path}`, which takes up just "
        "these (--bisect names the rows)",
        failed,
    )


def _calibrate(job: Job, cluster: Cluster, reporter: Reporter) -> Json:
    """Determine the numerics on a worker."""
    reporter.report("calibrating")
    generation = job.config.teacher.generation
    batch_tokens, head_rows = auto_budgets(cluster.device, generation.batch_tokens, generation.head_rows)
    documents: list[Array] = []
    tokens = 0
    plan_tokens = _tokens_each(job, cluster)
    for one in sample_documents(enumerate(job.source.head()), job.tokenizer_spec):
        documents += one.tokens
        tokens += sum(map(len, one.tokens))
        if tokens >= CALIBRATION_TOKENS:
            break
    else:
        # The stream has ended here, whatever its limit is.
        plan_tokens = tokens
    sequences = [item.tokens for item in make_items(documents, job.items)]
    task = CalibrationTask(
        teacher=teacher_spec(
            job,
            dtype=resolve_dtype(job.config.teacher.dtype, job.teacher.checkpoint_dtype, cluster.device),
            device=cluster.device,
            torch_threads=cluster.torch_threads,
        ),
        documents=first_documents(sequences, CALIBRATION_TOKENS),
        plan_tokens=plan_tokens,
        top_k=generation.top_k,
        vocab_size=job.tokenizer_spec.vocab_size,
        batch_size=generation.batch_size,
        batch_tokens=batch_tokens,
        batch_tokens_fixed=generation.batch_tokens != "auto",
        head_rows=head_rows,
        logits=job.config.scoring.logits,
        compile=job.config.scoring.compile,
        compact=_is_compact(job),
        most_trial_seconds=job.config.job.stall_seconds / _TRIALS_IN_STALL,
    )
    logger.info(
        "calibrating on %s; a long plan also tries larger batches and compiled layers",
        plural(len(task.documents), "sequence"),
    )
    with Steps("calibrating") as steps:

        def on_step(step: str) -> None:
            steps.show(step)
            reporter.report("calibrating", step=step)

        return run_one(
            cluster.client,
            calibrate,
            task,
            job.config.job,
            roster=cluster.roster,
            on_step=on_step,
            on_turn=reporter.tick,
        )


def _log_calibration(calibration: Json) -> None:
    numerics = calibration["numerics"]
    path = numerics["path"]
    logger.info(
        "calibrated: %s on %s, %.0f tokens/s for each worker, MFU %s, batches of %d tokens",
        numerics["dtype"],
        numerics["device"],
        calibration["tokens_per_second"],
        "unknown" if calibration["mfu"] is None else f"{calibration['mfu']:.2f}",
        numerics["batch_tokens"],
    )
    layers = "compiled" if path["compiled"] else "eager"
    logger.info("scoring path: %s layers, attention %s, head %s", layers, path["attention"], path["head"])
    masses = ", ".join(f"{k}: {mass:.3f}" for k, mass in calibration["kept_mass_by_k"].items())
    logger.info("kept mass by k: %s", masses or "no tokens")


def _is_compact(job: Job) -> bool:
    wanted = job.config.cache.profile
    if wanted != "auto":
        return wanted == "compact"
    top_k, vocab_size = job.config.teacher.generation.top_k, job.tokenizer_spec.vocab_size
    return earns(top_k, vocab_size, job.estimate.tokens, job.estimate.partition_tokens)


def _tokens_each(job: Job, cluster: Cluster) -> int | None:
    """Return the tokens that one worker will score, or None if unknown."""
    if job.estimate.tokens is None:
        return None
    return job.estimate.tokens // (job.share.total * max(1, len(cluster.client.ncores())))


def _check_device(job: Job, calibration: Json, cluster: Cluster) -> None:
    frozen = calibration["numerics"]["device"]
    if frozen != cluster.device:
        raise RunConflictError(
            f"{job.run.path}: this run was calibrated on {frozen!r}, the workers now are {cluster.device!r}, and the "
            "bits would differ; resume it there, or choose another distillation.teacher.cache_dir",
            {"device": (frozen, cluster.device)},
        )


def _check_environment(job: Job, calibration: Json | None, cluster: Cluster) -> None:
    """Exclude workers with another environment than the run's, and refuse if none remains.

    Raises
    ------
    RunConflictError
        If all workers have another environment than the calibration's.
    ClusterError
        If no worker has this release of the package.
    """
    if job.config.cluster.allow_mixed_workers or not cluster.environments:
        return
    expected = (calibration or {}).get("environment")
    if calibration is not None and expected is None:
        return
    leave_out_misfits(cluster, expected)
    if cluster.fit():
        return
    if expected is None:
        raise ClusterError(
            "distillation.cluster: expected workers with this release of dask_logits, got none:\n"
            f"{cluster.roster.listed()}\ninstall the same release on this machine and on all workers"
        )
    raise RunConflictError(
        f"{job.run.path}: this run was calibrated in another environment, and its targets would differ in their last "
        f"bits or more:\n{cluster.roster.listed()}\n"
        "use workers with the environment of the run, or set distillation.cluster.allow_mixed_workers=true, which "
        "records the environment of each partition, or start over with "
        "distillation.teacher.generation.force_regenerate=true",
    )


def _record(job: Job, calibration: Json) -> Json:
    """Write the manifest, the id table and the numerics, unless they exist. Return the valid numerics."""
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
            "total_workers": job.share.total,
            "commit": job.source.commit,
            "files": list(job.source.file_states),
            "how": job.config.model_dump(),
            "teacher": dataclasses.asdict(job.teacher),
            "tokenizer_map_digest": job.tokenizer.map_digest if job.tokenizer else None,
            "tokenizer_ids": job.tokenizer.vocab_size if job.tokenizer else 0,
        },
    )
    if not created:
        # Another static worker may have been first since the last check of the folder.
        check_folder(job)
    if job.tokenizer:
        save_array(job.run.token_crcs_path, job.tokenizer.crcs)
    table = calibration.pop("id_table", None)
    calibration["storage"] = {
        "profile": "plain" if table is None else "compact",
        "precision": job.config.cache.precision,
        "id_table": None if table is None else save_id_table(job.run.tables_path, np.asarray(table)),
    }
    calibration["mixed_workers"] = job.config.cluster.allow_mixed_workers
    if create_json(job.run.calibration_path, calibration):
        _log_calibration(calibration)
    logger.info("%s run in %s", "new" if created else "resumed", job.run.path)
    return read_json(job.run.calibration_path) or calibration
