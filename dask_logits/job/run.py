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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from dask_logits.config.checks import parse_bytes
from dask_logits.config.compose import override
from dask_logits.config.groups import ClusterConfig, GenerationConfig, JobConfig
from dask_logits.config.root import Config
from dask_logits.errors import CacheError, ConfigError, DaskLogitsError, PartitionsFailedError, RunConflictError
from dask_logits.files.atomic import expanded, room
from dask_logits.files.lock import lease
from dask_logits.job.calibration import check_environment, record, run_calibration
from dask_logits.job.capacity import check_capacity
from dask_logits.job.cluster import open_cluster
from dask_logits.job.driver import score
from dask_logits.job.executor import Executor
from dask_logits.job.launch import check_launcher
from dask_logits.job.prepare import Job, check_folder, prepare
from dask_logits.job.progress import step_lines
from dask_logits.job.reporter import Reporter, reported
from dask_logits.job.serial_executor import open_process
from dask_logits.job.watchdog import Watch, watched
from dask_logits.job.workers import runs_here
from dask_logits.run.consolidate import consolidate_run, tidy
from dask_logits.run.failures import listed, read_failures
from dask_logits.run.folder import (
    CONSOLIDATION_LOCK,
    RunFolder,
    Share,
    has_previous,
    lock_name,
    set_aside,
    undo_setting_aside,
)
from dask_logits.run.plan_log import PlanLog
from dask_logits.run.settings import check_named, settings_of
from dask_logits.run.state import Done, RunState, discard_stale, open_run_cache
from dask_logits.run.timings import plural

logger = logging.getLogger(__name__)

_WORKER = "distillation.teacher.generation.worker_id"


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
    check_named(run, dataset, "call dask_logits.retry with the run and that object")
    config = override(settings_of(run, log), overrides, dataset_given=dataset is not None)
    state = RunState.find(run, log)
    only = frozenset(read_failures(run, state.done_of) if state else ())
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
        reasons = {index: reason for error in failed for index, reason in error.reasons.items()}
        raise PartitionsFailedError("\n".join(error.message for error in failed), reasons)
    return run.path


def _generate(config: Config, dataset: Any, *, only: frozenset[int] | None = None, bisects: bool = False) -> Path:
    check_launcher(config.teacher.generation, os.environ)
    run = RunFolder(Path(config.teacher.cache_dir).expanduser().absolute())
    with room(run.path, begun=run.manifest_path.exists):
        # Not watched, because this thread waits for other threads that write downloads.
        job = prepare(config, dataset, on_step=step_lines("preparing"))
        job = dataclasses.replace(job, only=only, bisects=bisects)
        check_folder(job)
        with watched(config.job.stall_seconds) as watch:
            return _do(job, watch)


def _do(job: Job, watch: Watch) -> Path:
    config = job.config
    with _held(job) as is_lost:
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
        done = Done() if start == "replace" or state is None else discard_stale(state, job.share)
        check_capacity(job, done.rows / max(1, job.source.n_rows or 0))
        with reported(job, is_lost) as reporter, watch.explained():
            if not (start == "resume" and job.run.calibration() and _is_scored(job, log, done)):
                failed = _run_tasks(job, start, done, reporter)
                if failed:
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
    same = manifest.what | manifest.numerics == job.what | job.numerics
    forced = bool(manifest.setting("teacher.generation.force_regenerate"))
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
def _held(job: Job) -> Iterator[Callable[[], bool]]:
    """Hold the share of the run for this driver. A start refused before its manifest leaves no trace.

    Yields a function that returns whether another driver has taken the share over.
    """
    run = job.run
    missing = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
    try:
        run.path.mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise ConfigError.from_problems(
            f"distillation.teacher.cache_dir: expected a folder that can be made, got {error}; choose another"
        ) from error
    try:
        with lease(run.path / lock_name(job.share)) as is_lost:
            yield is_lost
    finally:
        if not run.manifest_path.exists():
            for folder in missing:
                with contextlib.suppress(OSError):
                    folder.rmdir()


@contextlib.contextmanager
def _alone(job: Job) -> Iterator[None]:
    """Hold all other locks that users of the run could hold: static workers' shares and the consolidation."""
    manifest = job.run.manifest()
    total = 1 if manifest is None else manifest.total_workers
    names = [CONSOLIDATION_LOCK, *(lock_name(Share(worker=worker, total=total)) for worker in range(total))]
    with contextlib.ExitStack() as held:
        for name in names:
            if name != lock_name(job.share):
                held.enter_context(lease(job.run.path / name))
        yield


def _is_scored(job: Job, log: PlanLog, done: Done) -> bool:
    """Whether nothing is left to score and the plan cannot grow."""
    return log.end is not None and not _grows(job, log) and len(done.indices) == job.share.count(log.n_partitions)


def _run_tasks(job: Job, start: Start, done: Done, reporter: Reporter) -> dict[int, str]:
    """Calibrate if necessary, and score the missing partitions. Return the failures."""
    config = job.config
    calibration = job.run.calibration() if start == "resume" else None
    with open_executor(config.teacher.generation, config.cluster, config.job) as executor:
        reporter.executor = executor
        if executor.dashboard:
            logger.info("dashboard: %s", executor.dashboard)
        check_environment(job, calibration, executor)
        table = None
        if calibration is None:
            calibration, table = run_calibration(job, executor, reporter)
        if start == "replace":
            with _alone(job):
                set_aside(job.run)
        with _ran():
            calibration = record(job, calibration, table)
            # Another static worker's, if it was first.
            check_environment(job, calibration, executor)
            return score(_dated(job), executor, calibration, done, reporter)


def _dated(job: Job) -> Job:
    """Return the job with the date of its run, which another static worker or an earlier forced start may have set."""
    manifest = job.run.manifest()
    if manifest is None or manifest.template_date is None:
        return job
    spec = dataclasses.replace(job.tokenizer_spec, template_date=manifest.template_date)
    return dataclasses.replace(job, tokenizer_spec=spec)


def open_executor(
    generation: GenerationConfig, cluster: ClusterConfig, job: JobConfig
) -> AbstractContextManager[Executor]:
    """Open what runs the tasks: this process, a local cluster, or an existing scheduler."""
    if runs_here(generation, cluster):
        return open_process(generation, cluster, job)
    return open_cluster(generation, cluster, job)


def _failure(failed: dict[int, str], job: Job) -> PartitionsFailedError:
    n_partitions = PlanLog(job.run).n_partitions
    others = "; the others are committed" if len(failed) < n_partitions else ""
    return PartitionsFailedError(
        f"{len(failed):,} of {plural(n_partitions, 'partition')} failed{others}:\n"
        f"{listed(job.run, failed)}\n"
        f"fix the cause and run the same command again, or `dask-logits retry {job.run.path}`, which takes up just "
        "these (--bisect names the rows)",
        failed,
    )
