"""The unit of work: read, score, write and commit one partition, in a plain function that Dask only transports.

Its last step is one small atomic write, the receipt. A partition with a receipt is never recomputed, and any number of
attempts, even concurrent ones, leaves exactly one committed result.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from dask_logits.cache.partition import write_partition
from dask_logits.cache.profile import ProfileSpec, encode_records, load_profile
from dask_logits.data.columns import Column
from dask_logits.data.items import ItemSettings, make_items
from dask_logits.data.source import FileRows, read_rows
from dask_logits.data.tokens import TokenizerSpec, read_documents
from dask_logits.errors import CacheError, ClusterError, RunConflictError
from dask_logits.files.atomic import create_json
from dask_logits.records import Records, Statistics, digest_of
from dask_logits.run.folder import RunFolder
from dask_logits.run.plan import Partition
from dask_logits.run.records import FailedAttempt, Receipt
from dask_logits.teacher.checkpoint import TeacherSpec, load_teacher
from dask_logits.teacher.meter import Cost
from dask_logits.teacher.scoring import Scored, ScoringSettings, score_items, start_scoring
from dask_logits.worker.encoder import encoder_for
from dask_logits.worker.environment import Environment, describe, differences, environment, fix_for, gpus_in_use

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# Bounds of what a task and a receipt say of failed attempts.
_MOST_ATTEMPTS = 8
_MOST_LETTERS = 200


@dataclass(kw_only=True)
class Stages:
    """What the threads of a worker share, so that one partition is read or written while another is scored.

    Parameters
    ----------
    text
        Held while rows are read and tokenized, because a tokenizer serves one thread at a time.
    teacher
        Held while the teacher is loaded or in use.
    scorer
        Single thread for scoring. Each thread has its own OpenMP team, and two teams slow each other down. None: the
        calling thread.
    """

    text: threading.Lock = field(default_factory=threading.Lock)
    teacher: threading.Lock = field(default_factory=threading.Lock)
    scorer: Executor | None = None
    _ended: float = 0.0
    # Sign of life of the partition at the scorer.
    _on_life: Callable[[], None] | None = None

    def run(self, function: Callable[[], _T], on_life: Callable[[], None]) -> _T:
        """Call a function in the scorer's thread. :meth:`beat` gives signs of life until it ends."""
        if self.scorer is None:
            return function()
        self._on_life = on_life
        try:
            return self.scorer.submit(function).result()
        finally:
            self._on_life = None

    def beat(self) -> None:
        """Give a sign of life of the partition that is at the scorer, or waits there while a teacher is loaded."""
        on_life = self._on_life
        if on_life is not None:
            on_life()

    def scoring_seconds(self, begun: float, ended: float) -> float:
        """Return the seconds of scoring of a partition that has just ended, in times of ``time.perf_counter``.

        A device may begin it before the last results of the one before arrive. These seconds do not count twice.
        """
        before, self._ended = self._ended, ended
        return ended - min(max(begun, before), ended)


ALONE = Stages()


@dataclass(frozen=True, kw_only=True)
class PartitionTask:
    """Everything a worker needs to compute one partition: some hundred bytes, without rows.

    Parameters
    ----------
    run
        The run folder, as visible to the worker.
    run_id
        Id of the run. A folder with a replaced run accepts no more results of the old one.
    partition, files, column
        The rows and their location.
    tokenizer, items, teacher, scoring
        Conversion of the rows to targets.
    profile
        Storage of the targets.
    cost
        Compute cost of the teacher, for the meter.
    environment
        Software and hardware of the worker that calibrated the run. None: not recorded, so not compared.
    allow_mixed
        Also score in another environment, and record it in the receipt.
    failed_attempts
        Attempts that failed before, for the receipt.
    trial
        The first row, counted from the partition's first, and the number of rows that are scored without storing the
        results. No rows: the files are read and the teacher is loaded. None: the partition is scored and committed.
    """

    run: str
    run_id: str
    partition: Partition
    files: tuple[FileRows, ...]
    column: Column
    tokenizer: TokenizerSpec
    items: ItemSettings
    teacher: TeacherSpec
    scoring: ScoringSettings
    profile: ProfileSpec
    cost: Cost
    environment: Environment | None = None
    allow_mixed: bool = False
    failed_attempts: tuple[FailedAttempt, ...] = ()
    trial: tuple[int, int] | None = None

    def after(self, kind: str, reason: str, worker: str | None = None, at: float | None = None) -> PartitionTask:
        """Return the task of the next attempt, after one that failed at a time (None: now)."""
        failed = FailedAttempt(
            kind=kind, reason=reason[:_MOST_LETTERS], worker=worker, at=time.time() if at is None else at
        )
        return replace(self, failed_attempts=(*self.failed_attempts, failed)[-_MOST_ATTEMPTS:])


def process_partition(
    task: PartitionTask,
    on_tokens: Callable[[int], None] = lambda tokens: None,
    stages: Stages = ALONE,
) -> Receipt:
    """Compute and commit one partition, or return its receipt if it is already committed.

    Parameters
    ----------
    task
        The partition.
    on_tokens
        Called after each batch with the tokens scored since the last call, and with 0 while the teacher is loaded.
    stages
        Locks shared with other threads of this process.

    Returns
    -------
    Receipt
        The receipt of the partition.

    Raises
    ------
    DatasetError
        If a row cannot be used.
    TeacherError
        If the teacher cannot be loaded or its logits are not finite.
    ClusterError
        If this worker's environment differs from the run's.
    RunConflictError
        If the run was replaced during the computation.
    CacheError
        If a worker of another plan committed other rows meanwhile. The next attempt deletes its receipt.
    """
    run = RunFolder(Path(task.run))
    receipt = run.receipt(task.partition.index)
    if receipt is not None and receipt.run_id == task.run_id:
        if (receipt.first_row, receipt.n_rows) == (task.partition.first_row, task.partition.n_rows):
            return receipt
        # Left by a worker that was still busy when the plan was replaced from here on.
        run.receipt_path(task.partition.index).unlink(missing_ok=True)
    here = environment(task.teacher.device)
    differing = {} if task.environment is None else differences(task.environment, here)
    if differing and not task.allow_mixed:
        raise ClusterError(
            f"expected the environment that the run was calibrated in, got another ({describe(differing)}); "
            f"{fix_for(differing)}"
        )
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[name] = round(seconds.get(name, 0.0) + now - clock, 4)
        clock = now

    with stages.text:
        lap("wait")
        rows = read_rows(task.files, task.column)
        lap("read")
        documents = read_documents(rows, task.tokenizer, first_row=task.partition.first_row)
        items = make_items(documents.tokens, task.items, first_row=task.partition.first_row, masks=documents.masks)
        lap("tokenize")
    packed = task.items.packing == "concat"
    profile = load_profile(task.profile)

    def start() -> Callable[[], Scored]:
        teacher = load_teacher(task.teacher, task.scoring.vocab_size, on_life=lambda: on_tokens(0))
        lap("load")
        encode = encoder_for(profile, teacher.device)
        return start_scoring(teacher, items, task.scoring, packed=packed, on_tokens=on_tokens, encode=encode)

    with stages.teacher:
        lap("wait")
        finish = stages.run(start, lambda: on_tokens(0))
    # The device may begin the next partition before the last results of this one arrive.
    begun = clock
    scored = finish()
    lap("score")
    seconds["score"] = round(stages.scoring_seconds(begun, clock), 4)
    stored, kept = encode_records(scored.records, profile, scored.encoded)
    statistics, content_digest = _said_of(kept)
    del kept
    statistics = statistics.model_copy(
        update={"skipped_rows": len(documents.skipped), "double_bos_rows": documents.n_double_bos}
    )
    for row, reason in documents.skipped.items():
        logger.warning("skipped dataset row %d: %s", row, reason)
    flops = task.cost.flops(len(item.tokens) for item in items)
    attempt = run.attempt_path(task.partition.index)
    try:
        files = write_partition(attempt, scored.records, profile, stored)
    except BaseException:
        shutil.rmtree(attempt, ignore_errors=True)
        raise
    lap("write")
    more: dict[str, Any] = {"environment": here} if differing else {}
    if task.failed_attempts:
        more["failed_attempts"] = task.failed_attempts
    receipt = Receipt(
        partition=task.partition.index,
        first_row=task.partition.first_row,
        n_rows=task.partition.n_rows,
        run_id=task.run_id,
        attempt=attempt.name,
        statistics=statistics,
        content_digest=content_digest,
        files=files,
        seconds=scored.seconds | seconds,
        flops=flops,
        mfu=task.cost.mfu(flops, seconds["score"]),
        padded_tokens=scored.padded_tokens,
        splits={str(batch): sizes for batch, sizes in scored.splits.items()},
        finished=time.time(),
        host=socket.gethostname(),
        process=os.getpid(),
        peak_rss_bytes=peak_rss_bytes(),
        gpus=gpus_in_use(task.teacher.n_gpus) if task.teacher.device == "cuda" else (),
        **more,
    )
    manifest = run.manifest()
    ours = manifest is not None and manifest.run_id == task.run_id
    try:
        if ours and create_json(run.receipt_path(task.partition.index), receipt.to_json()):
            return receipt
    except OSError:
        # The receipt may exist although its folder was not flushed.
        found = run.receipt(task.partition.index)
        if found is None or found.attempt != attempt.name:
            shutil.rmtree(attempt, ignore_errors=True)
        raise
    shutil.rmtree(attempt, ignore_errors=True)
    winner = run.receipt(task.partition.index)
    if winner is None or winner.run_id != task.run_id:
        raise RunConflictError(f"{run.path}: expected run {task.run_id}, got another in its place; stop one driver")
    if (winner.first_row, winner.n_rows) != (task.partition.first_row, task.partition.n_rows):
        # This task's plan may be the replaced one, so nothing is deleted here. The next attempt of the valid plan does.
        raise CacheError(
            f"{run.receipt_path(task.partition.index)}: expected rows {task.partition.first_row} to "
            f"{task.partition.first_row + task.partition.n_rows - 1}, got a receipt of another plan that a worker has "
            "just written; run the same command again"
        )
    return winner


def try_rows(task: PartitionTask, on_tokens: Callable[[int], None], stages: Stages) -> None:
    """Read, tokenize and score the rows of a trial, and discard the results.

    Parameters
    ----------
    task
        The partition, with a trial.
    on_tokens, stages
        As for :func:`process_partition`.

    Raises
    ------
    DatasetError, TeacherError
        As by :func:`process_partition` for these rows.
    """
    assert task.trial is not None
    first, n_rows = task.trial
    first_row = task.partition.first_row + first
    with stages.text:
        rows = read_rows(task.files, task.column)[first : first + n_rows]
        documents = read_documents(rows, task.tokenizer, first_row=first_row)
        items = make_items(documents.tokens, task.items, first_row=first_row, masks=documents.masks) if rows else []

    def score() -> None:
        teacher = load_teacher(task.teacher, task.scoring.vocab_size, on_life=lambda: on_tokens(0))
        if items:
            score_items(teacher, items, task.scoring, packed=task.items.packing == "concat", on_tokens=on_tokens)

    with stages.teacher:
        stages.run(score, lambda: on_tokens(0))


def _said_of(kept: Records) -> tuple[Statistics, str]:
    """Return the statistics and the content digest of targets that are no longer needed."""
    return Statistics.of(kept), digest_of([kept])


def peak_rss_bytes() -> int:
    """Return this process's peak memory so far."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux KiB.
    return peak if sys.platform == "darwin" else peak << 10
