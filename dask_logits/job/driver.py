"""Give the missing partitions to an executor, and record receipts, failures and figures of the run."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dask_logits.data.source import Planned
from dask_logits.errors import CacheError, PartitionsFailedError, RunConflictError
from dask_logits.job.bisect import bisect
from dask_logits.job.executor import Committed, Executor, Failed, Progress
from dask_logits.job.prepare import Job
from dask_logits.job.progress import JobProgress
from dask_logits.job.read_ahead import ReadAhead
from dask_logits.job.reporter import Reporter
from dask_logits.run.failures import Failure, note_failure, read_failures
from dask_logits.run.plan_log import PlanLog
from dask_logits.run.records import Calibration, FailureEntry, Receipt
from dask_logits.run.state import Done
from dask_logits.run.timings import add_seconds, plural, shares
from dask_logits.teacher.checkpoint import TeacherSpec
from dask_logits.teacher.meter import Cost
from dask_logits.teacher.model import ScoringPath
from dask_logits.teacher.scoring import ScoringSettings
from dask_logits.worker.calibrate import auto_budgets
from dask_logits.worker.task import PartitionTask

logger = logging.getLogger(__name__)


def score(job: Job, executor: Executor, calibration: Calibration, done: Done, reporter: Reporter) -> dict[int, str]:
    """Score the missing partitions of this driver's share.

    Parameters
    ----------
    job, executor, calibration
        The job, what runs its tasks, and its numerics.
    done
        Committed partitions.
    reporter
        Writes the driver's status record.

    Returns
    -------
    dict
        Partition index → reason, for those that failed or could not be read.

    Raises
    ------
    PartitionsFailedError
        If the first ``distillation.job.max_failures`` partitions all fail, because the error is then systematic. If so
        many in a row, and two for each worker, cannot be read or written, because a store or disk is then unavailable.
    DaskLogitsError
        As raised by the executor.
    """
    with _progress(job, done) as progress:
        driver = _Driver(job, done, progress, reporter, executor.n_workers)
        due = tasks(job, calibration, driver.planned(), driver.on_unreadable)
        try:
            with contextlib.closing(executor.run(due, run_id(job), driver.has_read)) as events:
                for event in events:
                    match event:
                        case Committed(receipt):
                            driver.on_receipt(receipt)
                        case Failed(failure):
                            driver.on_failure(failure)
                        case Progress(tokens=tokens):
                            progress.tokens(tokens)
                    reporter.tick()
            for failure in driver.suspects:
                driver.on_rows(bisect(failure, executor))
        finally:
            driver.close()
    return driver.failed


def _progress(job: Job, done: Done) -> JobProgress:
    log, share, expected = PlanLog(job.run), job.share, job.estimate.tokens
    rows_left = (job.source.n_rows or 0) - log.n_rows
    known = None if job.source.streams else log.n_partitions - (-rows_left // job.partition_rows)
    return JobProgress(
        partitions=None if known is None else share.count(known),
        committed=len(done.indices),
        done=done.statistics,
        expected_tokens=None if expected is None else expected // share.total,
    )


class _Driver:
    """State while partitions run: the growing plan, the read-ahead of a stream, failures, figures."""

    def __init__(self, job: Job, done: Done, progress: JobProgress, reporter: Reporter, n_workers: int) -> None:
        self.failed = reporter.failed
        self.suspects: list[Failure] = []
        self._job = job
        self._done = done
        self._progress = progress
        self._log = PlanLog(job.run)
        self._ahead: ReadAhead | None = None
        self._passed = 0
        self._n_committed = self._n_failed = 0
        # Partitions in a row that could not be read or written, and the number that stops the job.
        self._n_unavailable = 0
        self._most_unavailable = max(job.config.job.max_failures, 2 * n_workers)
        self._seconds: dict[str, float] = {}
        self._reporter = reporter
        reporter.progress = progress
        reporter.report("running")

    def planned(self) -> Iterator[Planned | None]:
        """Yield the partitions that are due, or None while a stream has not reached the next one."""
        job = self._job
        due = job.source.plan(self._log, job.partition_rows, self._is_wanted)
        if job.source.streams:
            spooled = max(0, job.config.dataset.streaming_buffer_size - job.partition_rows)
            self._ahead = ReadAhead(due, None if job.what["dataset.stream"] == "parquet" else spooled)
        for planned in self._ahead or due:
            if planned is not None:
                # The executor draws it when it has room.
                self._reporter.running.add(planned.partition.index)
            yield planned

    def on_receipt(self, receipt: Receipt) -> None:
        """Record a committed partition."""
        self._n_committed += 1
        self._n_unavailable = 0
        statistics = receipt.statistics
        self._progress.partition(statistics)
        logger.info(
            "partition %06d: %s, %s, %.0f tokens/s, MFU %s%s",
            receipt.partition,
            plural(statistics.documents, "document"),
            plural(statistics.tokens, "token"),
            statistics.tokens / max(receipt.seconds.get("score", 0.0), 1e-9),
            "unknown" if receipt.mfu is None else f"{receipt.mfu:.2f}",
            f", batches split for lack of memory: {len(receipt.splits)}" if receipt.splits else "",
        )
        self._seconds = add_seconds(self._seconds, receipt.seconds)
        self._reporter.running.discard(receipt.partition)
        self._job.run.failure_path(receipt.partition).unlink(missing_ok=True)
        self._settle(receipt.partition)

    def on_failure(self, failure: Failure) -> None:
        """Record a permanently failed partition. Raise PartitionsFailedError if none succeeds any more."""
        self.on_unreadable(failure)
        self._n_failed += 1
        self._n_unavailable = self._n_unavailable + 1 if failure.kind == "transient" else 0
        if not self._n_committed and self._n_failed >= self._job.config.job.max_failures:
            raise PartitionsFailedError(
                f"{plural(self._n_failed, 'partition')} failed and none succeeded, so the job was stopped; the first "
                f"because: {next(iter(self.failed.values()))}",
                self.failed,
            )
        if self._n_unavailable >= self._most_unavailable:
            raise PartitionsFailedError(
                f"{plural(self._n_unavailable, 'partition')} in a row could not be read or written, so the job was "
                f"stopped; the last because: {failure.reason}; see that the dataset and the run folder can be reached, "
                "then run the same command again",
                self.failed,
            )

    def on_unreadable(self, failure: Failure) -> None:
        """Record a partition that failed permanently, or whose rows could not be read."""
        logger.error("partition %06d failed (%s): %s", failure.index, failure.kind, failure.reason)
        self.failed[failure.index] = failure.reason
        self._reporter.running.discard(failure.index)
        note_failure(self._job.run, failure)
        # An error of a device, or of a file or network, says nothing about rows.
        is_of_rows = failure.task is not None and not failure.rows and failure.kind not in ("device", "transient")
        if self._job.bisects and is_of_rows:
            self.suspects.append(failure)
        else:
            self._settle(failure.index)

    def on_rows(self, failure: Failure) -> None:
        """Record the rows that caused a failure."""
        if failure.rows:
            rows = ", ".join(str(row) for row in failure.rows)
            self.failed[failure.index] = f"{failure.reason}; because of dataset rows {rows}"
            note_failure(self._job.run, failure)
        self._settle(failure.index)

    def has_read(self) -> bool:
        """Whether reading has advanced since the last call."""
        before, self._passed = self._passed, self._job.source.passed
        return self._passed != before

    def close(self) -> None:
        """Stop reading, and log where the time went."""
        if self._seconds:
            logger.info("time of the workers: %s", shares(self._seconds))
        if self._ahead is not None:
            self._ahead.stop()

    def _is_wanted(self, index: int) -> bool:
        anew = self._log.replanned_from is not None and index >= self._log.replanned_from
        # A replanned partition was not in the failure ledger under its new index.
        chosen = self._job.only is None or index in self._job.only or anew
        return chosen and self._job.share.owns(index) and (anew or index not in self._done.indices)

    def _settle(self, index: int) -> None:
        # A failed partition is spooled again when it is retried.
        (self._job.run.spool_path / f"{index:06d}.arrow").unlink(missing_ok=True)
        if self._ahead is not None:
            self._ahead.settle(index)
        if self._log.end is not None:
            self._progress.partitions = self._job.share.count(self._log.n_partitions)
        self._reporter.report()


def tasks(
    job: Job, calibration: Calibration, planned: Iterator[Planned | None], on_failure: Callable[[Failure], None]
) -> Iterator[PartitionTask | None]:
    """Yield the tasks of all due partitions, in order, or None while a stream has not reached the next one."""
    numerics = calibration.numerics
    of_run = run_id(job)
    teacher = teacher_spec(job, dtype=numerics.dtype, device=numerics.device, torch_threads=numerics.torch_threads)
    scoring = dataclasses.replace(
        scoring_settings(job, numerics.device),
        batch_tokens=numerics.batch_tokens,
        batch_size=numerics.batch_size,
        head_rows=numerics.head_rows,
        path=ScoringPath(**numerics.path.model_dump()),
    )
    measured: dict[str, Any] = calibration.cost or {}
    cost = Cost(**measured)
    profile = job.run.profile()
    failed: dict[int, FailureEntry] = {}
    # A damaged ledger does not stop a job.
    with contextlib.suppress(CacheError):
        # Nothing that is planned is done.
        failed = read_failures(job.run, lambda indices: ())
    for due in planned:
        if due is None:
            yield None
        elif due.error is not None:
            on_failure(Failure(index=due.partition.index, kind="unreadable", reason=due.error))
        else:
            task = PartitionTask(
                run=str(job.run.path),
                run_id=of_run,
                partition=due.partition,
                files=due.files,
                column=due.column,
                tokenizer=job.tokenizer_spec,
                items=job.items,
                teacher=teacher,
                scoring=scoring,
                profile=profile,
                cost=cost,
                environment=calibration.environment,
                allow_mixed=job.config.cluster.allow_mixed_workers,
            )
            before = failed.get(due.partition.index)
            yield (
                task
                if before is None
                else task.after(before.kind, before.reason, next(iter(before.workers[-1:]), None), before.at)
            )


def run_id(job: Job) -> str:
    """Return the id of the run in the folder."""
    manifest = job.run.manifest()
    if manifest is None:
        raise RunConflictError(f"{job.run.path}: expected run.json, got none: it was deleted while the job ran")
    return manifest.run_id


def scoring_settings(job: Job, device: str) -> ScoringSettings:
    """Return the settings of a job for scoring, with the budgets and the path that a calibration begins with."""
    generation, vocab_size = job.config.teacher.generation, job.tokenizer_spec.vocab_size
    batch_tokens, head_rows = auto_budgets(device, generation.batch_tokens, generation.head_rows)
    return ScoringSettings(
        top_k=generation.width(vocab_size),
        vocab_size=vocab_size,
        batch_tokens=batch_tokens,
        batch_size=generation.batch_size,
        head_rows=head_rows,
        path=ScoringPath(),
        temperatures=generation.temperatures,
        positions=generation.positions,
        position_share=generation.target_share,
        draws=generation.n_draws,
        seed=generation.draw_seed,
    )


def teacher_spec(job: Job, *, dtype: str, device: str, torch_threads: int) -> TeacherSpec:
    """Return the specification of the teacher for a worker."""
    folder = Path(str(job.config.teacher.model_path)).expanduser()
    return TeacherSpec(
        path=str(folder.absolute()) if folder.is_dir() else str(job.config.teacher.model_path),
        revision=job.teacher.revision,
        identity=job.teacher.identity,
        sample=job.teacher.sample,
        stamp=job.teacher.stamp,
        dtype=dtype,
        device=device,
        torch_threads=torch_threads,
        n_gpus=job.config.teacher.generation.gpus_per_worker if device == "cuda" else 1,
        trust_remote_code=job.config.teacher.trust_remote_code,
        allow_pickle=job.config.teacher.allow_pickle,
    )
