"""The state of a run, read from its files alone, without a running cluster, driver or server."""

from __future__ import annotations

import json
import logging
import math
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from dask_logits.config.compose import generate_command
from dask_logits.errors import RunConflictError
from dask_logits.files.atomic import expanded
from dask_logits.observe.history import History
from dask_logits.records import Statistics
from dask_logits.run.drivers import Drivers, State
from dask_logits.run.failures import read_failures
from dask_logits.run.folder import WORKING_STATES, RunFolder
from dask_logits.run.plan_log import PlanLog
from dask_logits.run.records import FailureEntry
from dask_logits.run.settings import settings_of
from dask_logits.run.state import RunState, read_consistently
from dask_logits.run.timings import duration, plural, shares

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Status:
    """Progress of a run. The defaults are those of a run that has not been calibrated.

    Parameters
    ----------
    run
        The run folder.
    state
        State of an active driver: ``starting``, ``calibrating``, ``running`` or ``consolidating``. Without one:
        ``stopped``, ``failed`` (partitions or the driver failed), ``scored`` (all partitions committed, no cache yet),
        ``complete``, or ``damaged`` (the cache cannot be read).
    since
        Start time of the active driver (Unix time). None without one.
    step
        Step of a calibration. None outside it.
    reason
        Reason why the last driver failed, or why the cache cannot be read. None if neither is so.
    next_command
        Command to run next.
    items_noun
        Unit made from dataset rows: ``documents``, ``windows`` of them, or ``segments`` of packed blocks.
    partitions, committed
        Planned so far, and done.
    planned_all
        Whether the plan has ended. A stream's plan grows while it is read.
    rows, committed_rows
        Dataset rows planned so far, and done.
    statistics
        Sums over committed partitions.
    tokens_per_second
        Scoring rate of one worker. NaN before the first partition.
    seconds
        Stage → seconds of all workers: ``read``, ``tokenize``, ``wait`` (for the teacher, while it scores another
        partition), ``load``, ``trunk``, ``head``, ``tail``, ``refine``, ``transfer``, ``write``, and ``score`` for the
        total scoring time.
    mfu
        FLOPs of the tokens' own sequences, relative to those of a large matrix product in the same scoring time. NaN
        before the first partition.
    splits
        Batches that were split because they did not fit into memory.
    retried
        Committed partitions of which earlier attempts failed.
    failed_attempts
        Kind → number of these attempts.
    running
        Active drivers, according to their status records and locks.
    running_tokens_per_second, seconds_left
        Total of all active drivers, in wall-clock time. 0 and None without one, or if the amount of work is unknown.
    failed
        Partition → reason, for permanent failures.
    left_out
        Worker and host → reason why it got no work, from the last start of each driver.
    dashboard
        Dashboard address of an active driver. None without one.
    cache
        Path of the cache, or of the index over its files. None before it is complete.
    bytes_per_token
        Size of the cache per token. None before it is complete.
    content_digest
        Content digest of the cache. None before it is complete.
    report
        The report that the last driver left. None if there is none.
    kept_mass_by_k
        Kept mass by k from the calibration.
    """

    run: str
    state: State
    since: float | None
    step: str | None
    reason: str | None
    next_command: str
    items_noun: str = "documents"
    partitions: int = 0
    committed: int = 0
    planned_all: bool = True
    rows: int = 0
    committed_rows: int = 0
    statistics: Statistics = field(default_factory=Statistics)
    tokens_per_second: float = float("nan")
    seconds: dict[str, float] = field(default_factory=dict)
    mfu: float = float("nan")
    splits: int = 0
    retried: int = 0
    failed_attempts: dict[str, int] = field(default_factory=dict)
    running: int
    running_tokens_per_second: float = 0.0
    seconds_left: float | None = None
    failed: dict[int, str] = field(default_factory=dict)
    left_out: dict[str, str]
    dashboard: str | None
    cache: str | None = None
    bytes_per_token: float | None = None
    content_digest: str | None = None
    report: str | None = None
    kept_mass_by_k: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """Format the status as JSON. Figures that are unknown or infinite are null."""
        values = {name: value for name, value in vars(self).items() if name != "statistics"}
        sums = self.statistics
        values |= {
            "documents": sums.documents,
            "tokens": sums.tokens,
            "targets": sums.targets,
            "kept_mass": None if sums.distinct else _finite(sums.mean_kept_mass),
            "distinct_draws": round(sums.mean_distinct, 3) if sums.distinct else None,
            "perplexity": _finite(sums.perplexity),
            "tokens_per_second": _finite(self.tokens_per_second) if sums.tokens else None,
            "mfu": _finite(self.mfu),
        }
        return json.dumps(values, indent=1, allow_nan=False)

    def lines(self) -> list[str]:
        """Format the status for display."""
        out = [f"run           {self.run}", f"state         {self._state_text()}"]
        if self.reason is not None:
            out.append(f"reason        {self.reason}")
        if self.partitions or not self.planned_all:
            out += self._count_lines()
        out += self._speed_lines()
        if self.cache is not None:
            out.append(f"bytes/token   {self.bytes_per_token:.1f}")
            out.append(f"content       {self.content_digest}")
            out.append(f"cache         {self.cache}")
        if self.report is not None and self.state not in WORKING_STATES:
            out.append(f"report        {self.report}")
        first, *more = self.next_command.splitlines()
        if self.state == "complete":
            more = [
                f"dask-logits verify {shlex.quote(self.run)}",
                f"training: CachedLogitsDataset({self.run!r}), see docs/DISTILLATION.md",
            ]
        return [*out, f"next          {first}", *(f"              {line.strip()}" for line in more)]

    def _count_lines(self) -> list[str]:
        return [
            f"partitions    {self.committed} of {self.partitions} committed"
            f"{'' if self.planned_all else ', the plan is still growing'}",
            f"rows          {self.committed_rows:,} of {self.rows:,}",
            f"{self.items_noun:13} {self.statistics.documents:,}",
            f"tokens        {self.statistics.tokens:,}",
            *([f"targets       {sums.targets:,}"] if (sums := self.statistics).targets != sums.tokens else []),
        ]

    def _speed_lines(self) -> list[str]:
        sums, out = self.statistics, []
        if sums.tokens:
            out.append(f"tokens/s      {self.tokens_per_second:,.0f} per worker, while scoring")
            out.append(f"time          {shares(self.seconds)}")
            if self.mfu == self.mfu:
                out.append(f"MFU           {self.mfu:.2f} of the rate of a large matrix product")
            if self.splits:
                out.append(f"splits        {plural(self.splits, 'batch')} did not fit into memory; lower batch_tokens")
        if sums.targets:
            label, value = sums.entries
            out.append(f"{label:13} {value}")
        if sums.labels:
            out.append(f"perplexity    {sums.perplexity:.2f} (teacher, on these documents)")
        if self.retried:
            kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(self.failed_attempts.items()))
            out.append(f"retried       {plural(self.retried, 'partition')} committed after failed attempts ({kinds})")
        if self.running and self.state in ("running", "consolidating"):
            left = "time left unknown" if self.seconds_left is None else f"{duration(self.seconds_left)} left"
            rate = f"{self.running_tokens_per_second:,.0f} tokens/s, " if self.running_tokens_per_second else ""
            out.append(f"running       {plural(self.running, 'driver')}, {rate}{left}")
        for index, reason in sorted(self.failed.items()):
            out.append(f"failed        partition {index:06d}: {reason.splitlines()[0]}")
        for worker, reason in sorted(self.left_out.items()):
            out.append(f"no work for   {worker}: {reason.splitlines()[0]}")
        return out

    def _state_text(self) -> str:
        if self.since is None:
            return self.state
        started = datetime.fromtimestamp(self.since)
        form = "%H:%M:%S" if started.date() == datetime.now().date() else "%Y-%m-%d %H:%M"
        step = f": {self.step}" if self.step else ""
        return f"{self.state} since {started:{form}} ({duration(max(0.0, time.time() - self.since))}){step}"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A status, and what it was computed from.

    Parameters
    ----------
    status
        The status.
    history
        The partitions and their receipts.
    failures
        Partition → its failure, unless it was committed since then.
    """

    status: Status
    history: History = field(default_factory=History)
    failures: Mapping[int, FailureEntry] = field(default_factory=dict)


def read_status(path: Path | str) -> Status:
    """Read the state of a run.

    Parameters
    ----------
    path
        The run folder.

    Raises
    ------
    RunConflictError
        If the folder contains no run.
    CacheError
        If its files cannot be read.
    """
    run = RunFolder(expanded(path))
    return read_consistently(run, lambda: reading_of(run)).status


def reading_of(
    run: RunFolder,
    count: Callable[[RunState], History] = History.of,
    *,
    log: PlanLog | None = None,
    level: int = logging.WARNING,
) -> Reading:
    """Read the state of a run once. Otherwise as `read_status`.

    Parameters
    ----------
    run
        The run folder.
    count
        Adds up the partitions of a run.
    log
        Its plan. None: read from its files.
    level
        Level at which damaged receipts and status records are logged.
    """
    drivers = Drivers.of(run, level)
    found = RunState.find(run, log)
    if found is None:
        return Reading(status=_before_manifest(run, drivers))
    manifest, log, damaged = found.manifest, found.log, found.cache_error is not None
    history = count(found)
    for error in history.damaged:
        logger.log(level, "left out: %s", error)
    if history.lacking:
        logger.log(
            level,
            "sums leave out %s of the cache, because receipts are damaged or gone",
            plural(history.lacking, "partition"),
        )
    is_complete = not damaged and found.is_complete
    cache = found.cache if is_complete else None
    calibration = run.calibration()
    cost = (calibration.cost if calibration else None) or {}
    scoring, peak = history.seconds.get("score", 0.0), cost.get("peak_flops", 0.0)
    failures = {} if is_complete else read_failures(run, found.done_of)
    left_out = drivers.left_out
    state: State
    if is_complete and (not drivers.alive or drivers.state() == "consolidating"):
        state, drivers = "complete", Drivers()
    elif drivers.alive:
        state = drivers.state()
    elif damaged:
        state = "damaged"
    elif log.end is not None and history.committed == log.n_partitions:
        state = "scored"
    else:
        state = "failed" if failures or drivers.reason else "stopped"
    n_open = log.n_partitions - history.committed - len(failures)
    status = Status(
        run=str(run.path),
        state=state,
        since=drivers.since,
        step=drivers.step,
        reason=str(found.cache_error) if damaged else None if state in ("complete", "scored") else drivers.reason,
        next_command=_next_command(
            run, state, found, only_failed=bool(failures) and not n_open and log.end is not None
        ),
        items_noun=_items_noun(manifest.what),
        partitions=log.n_partitions,
        committed=history.committed,
        planned_all=log.end is not None,
        rows=log.n_rows,
        committed_rows=history.rows,
        statistics=history.statistics,
        tokens_per_second=history.statistics.tokens / scoring if scoring else float("nan"),
        seconds=history.seconds,
        mfu=history.flops / scoring / peak if scoring and peak else float("nan"),
        splits=history.splits,
        retried=history.n_retried,
        failed_attempts=dict(history.failed_attempts),
        left_out=left_out,
        running=len(drivers.alive),
        running_tokens_per_second=drivers.tokens_per_second,
        seconds_left=drivers.seconds_left,
        failed={index: _reason(entry) for index, entry in failures.items()},
        dashboard=drivers.dashboard,
        cache=str(cache.path) if cache else None,
        bytes_per_token=cache.n_bytes / max(1, cache.n_tokens) if cache else None,
        content_digest=cache.content_digest if cache else None,
        report=str(run.report_path) if run.report_path.exists() else None,
        kept_mass_by_k=(calibration.kept_mass_by_k if calibration else None) or {},
    )
    return Reading(status=status, history=history, failures=failures)


def _before_manifest(run: RunFolder, drivers: Drivers) -> Status:
    """Return the status of a run without a manifest: its driver is starting or calibrating, was killed or failed."""
    if not drivers.records:
        raise RunConflictError(
            f"{run.path}: expected a run folder with run.json, got none; check the path: it is the value of "
            "distillation.teacher.cache_dir"
        )
    state: State = drivers.state() if drivers.alive else "failed" if drivers.reason else "stopped"
    ended = drivers.reason or "the driver ended during the calibration; nothing is scored yet"
    return Status(
        run=str(run.path),
        state=state,
        since=drivers.since,
        step=drivers.step,
        reason=None if drivers.alive else ended,
        next_command=_next_command(run, state, None),
        running=len(drivers.alive),
        left_out=drivers.left_out,
        dashboard=drivers.dashboard,
    )


def _next_command(run: RunFolder, state: State, found: RunState | None, *, only_failed: bool = False) -> str:
    path = shlex.quote(str(run.path))
    if state in WORKING_STATES:
        return f"dask-logits status {path}"
    if state == "complete":
        return f"dask-logits show {path}"
    total = found.manifest.total_workers if found else 1
    if state == "scored" and total > 1:
        return f"dask-logits merge --input-dir {path} --num-workers {total}"
    if state == "failed" and only_failed:
        return f"dask-logits retry {path}"
    command = None
    if state == "damaged":
        return "restore the cache, or delete it and start the job again with the same command"
    if found and total == 1 and not _is_cut_short(found):
        command = generate_command(settings_of(run, found.log))
    return command or "start the job again with the same command"


def _is_cut_short(found: RunState) -> bool:
    """Whether a run stopped while it grew to a number of rows that its files do not tell."""
    limit = found.manifest.setting("dataset.max_samples")
    return found.log.end is None and isinstance(limit, int) and limit < found.log.n_rows


def _finite(value: float) -> float | None:
    """Return a figure for JSON, which has neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def _items_noun(what: Mapping[str, Any]) -> str:
    """Name the units made from dataset rows: whole documents, windows of them, or segments of packed blocks."""
    if what.get("dataset.packing") == "concat":
        return "segments"
    return "windows" if what.get("dataset.long_documents") == "window" else "documents"


def _reason(entry: FailureEntry) -> str:
    rows = ", ".join(str(row) for row in entry.rows)
    return f"{entry.kind}: {entry.reason}" + (f" (dataset rows {rows})" if rows else "")
