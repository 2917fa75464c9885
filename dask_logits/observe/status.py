"""The state of a run, read from its files alone: no cluster, no driver, no server has to be alive."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from dask_logits.errors import CacheError, RunConflictError
from dask_logits.job.committed import cache_state, counts, covers, open_run_cache
from dask_logits.job.failures import read_failures
from dask_logits.job.manifest import RunFolder
from dask_logits.job.planlog import PlanLog
from dask_logits.observe.progress import add_seconds, shares
from dask_logits.records import Statistics
from dask_logits.store.durable import NUMBER, OBJECT, TEXT, Json, check_fields, expanded, read_json

logger = logging.getLogger(__name__)

# Dask event topic on which drivers say where their run folder is, with the figures of its status file.
RUNS_TOPIC = "dask_logits.runs"
# A driver that has written nothing for so long is not counted as running.
_ALIVE_SECONDS = 120.0
# What a driver leaves as a sign of life.
_FACTS = {
    "state": TEXT,
    "at": NUMBER,
    "tokens_per_second": NUMBER,
    "seconds_left": NUMBER.or_none(),
    "dashboard": TEXT.or_none(),
    "left_out": OBJECT.or_none(),
}


@dataclass(frozen=True, kw_only=True)
class Status:
    """What a run has done so far.

    Parameters
    ----------
    run
        Its folder.
    state
        ``complete``, ``scored`` (all partitions committed, no cache yet), ``unfinished``, or ``damaged`` (there is a
        cache that cannot be read).
    partitions, committed
        Planned so far and done.
    planned_all
        Whether the plan has ended; that of a stream grows while it is read.
    rows, committed_rows
        Dataset rows planned so far and done.
    statistics
        Sums over committed partitions.
    tokens_per_second
        Of one worker, scoring only; NaN before the first partition.
    seconds
        Stage → seconds of all workers: ``read``, ``tokenize``, ``wait`` (for the teacher, while it scores another
        partition), ``load``, ``trunk``, ``head``, ``tail``, ``refine``, ``transfer``, ``write``; ``score`` for scoring
        in all.
    mfu
        FLOPs of the tokens' own sequences over those a large matrix product would have done in the scoring's time; NaN
        before the first partition.
    splits
        Batches that did not fit into memory and were split.
    running
        Drivers that are at work, by the sign of life they left in the folder.
    running_tokens_per_second, seconds_left
        Of all drivers at work, by the clock; 0 and None without one, or where the amount of work is unknown.
    failed
        Partition → reason, of those that failed for good.
    left_out
        Worker and host → why it got no work, of the last start of each driver.
    dashboard
        Address of the Dask dashboard of a driver at work; None without one.
    cache
        Path of the cache, or of the index over its files; None before it is complete.
    bytes_per_token
        Size of the cache per token; None before.
    content_digest
        Of the cache; None before.
    kept_mass_by_k
        From the calibration.
    """

    run: str
    state: str
    partitions: int
    committed: int
    planned_all: bool
    rows: int
    committed_rows: int
    statistics: Statistics
    tokens_per_second: float
    seconds: dict[str, float]
    mfu: float
    splits: int
    running: int
    running_tokens_per_second: float
    seconds_left: float | None
    failed: dict[int, str]
    left_out: dict[str, str]
    dashboard: str | None
    cache: str | None
    bytes_per_token: float | None
    content_digest: str | None
    kept_mass_by_k: dict[str, float]

    def to_json(self) -> str:
        """Write it for programs."""
        values = {name: value for name, value in vars(self).items() if name != "statistics"}
        sums = self.statistics
        values |= {
            "documents": sums.documents,
            "tokens": sums.tokens,
            "kept_mass": sums.mean_kept_mass if sums.tokens else None,
            "perplexity": sums.perplexity if sums.labels else None,
            "tokens_per_second": self.tokens_per_second if sums.tokens else None,
            "mfu": self.mfu if self.mfu == self.mfu else None,
        }
        return json.dumps(values, indent=1)

    def lines(self) -> list[str]:
        """Write it for people."""
        sums = self.statistics
        out = [
            f"run           {self.run}",
            f"state         {self.state}",
            f"partitions    {self.committed} of {self.partitions} committed"
            f"{'' if self.planned_all else ', the plan is still growing'}",
            f"rows          {self.committed_rows:,} of {self.rows:,}",
            f"documents     {sums.documents:,}",
            f"tokens        {sums.tokens:,}",
        ]
        if sums.tokens:
            out.append(f"tokens/s      {self.tokens_per_second:,.0f} per worker, while scoring")
            out.append(f"time          {shares(self.seconds)}")
            if self.mfu == self.mfu:
                out.append(f"MFU           {self.mfu:.2f} of the rate of a large matrix product")
            if self.splits:
                out.append(f"splits        {self.splits} batches did not fit into memory; lower batch_tokens")
            out.append(f"kept mass     {sums.mean_kept_mass:.4f}")
        if sums.labels:
            out.append(f"perplexity    {sums.perplexity:.2f} (teacher, on these documents)")
        if self.running:
            left = "unknown" if self.seconds_left is None else f"{self.seconds_left:,.0f} s"
            out.append(
                f"running       {self.running} drivers, {self.running_tokens_per_second:,.0f} tokens/s, {left} left"
            )
        for index, reason in sorted(self.failed.items()):
            out.append(f"failed        partition {index:06d}: {reason.splitlines()[0]}")
        for worker, reason in sorted(self.left_out.items()):
            out.append(f"no work for   {worker}: {reason.splitlines()[0]}")
        if self.cache is not None:
            out.append(f"bytes/token   {self.bytes_per_token:.1f}")
            out.append(f"content       {self.content_digest}")
            out.append(f"cache         {self.cache}")
        return out


def read_status(path: Path | str) -> Status:
    """Read the state of a run.

    Parameters
    ----------
    path
        The run folder.

    Raises
    ------
    RunConflictError
        If there is no run.
    CacheError
        If its files cannot be read.
    """
    run = RunFolder(expanded(path))
    before = cache_state(run)
    status = _read_status(run)
    # If the job wrote its cache meanwhile, it took its partitions away.
    return status if cache_state(run) == before else _read_status(run)


def _read_status(run: RunFolder) -> Status:
    manifest = run.manifest()
    if manifest is None:
        raise RunConflictError(f"{run.path}: expected a run folder with run.json, got none; check the path")
    log = PlanLog(run)
    damaged = False
    try:
        cache = open_run_cache(run)
    except CacheError:
        cache, damaged = None, True
    # What a damaged cache holds is not known; whoever deletes it will find what is missing.
    cached_rows = cache.n_rows if cache else log.n_rows if damaged else 0
    cached = {partition.index for partition in log.partitions() if cache and covers(cached_rows, partition)}
    lacking = set(cached)
    sums, count, rows, splits, flops = Statistics(), len(cached), min(cached_rows, log.n_rows) if cache else 0, 0, 0.0
    seconds: dict[str, float] = {}
    for receipt in run.receipts(log.n_partitions):
        if not counts(run, manifest, receipt, cached_rows):
            continue
        lacking.discard(receipt["partition"])
        sums += Statistics.from_json(receipt["statistics"])
        seconds = add_seconds(seconds, receipt["seconds"])
        flops += receipt["flops"]
        splits += len(receipt["splits"])
        if receipt["partition"] not in cached:
            count += 1
            rows += receipt["n_rows"]
    if lacking:
        logger.warning("%d receipts are damaged or gone; their partitions are in the cache, not in sums", len(lacking))
    if cache is not None and log.end is not None and not log.n_unread and cache.n_rows == log.n_rows:
        state = "complete"
    else:
        state = "damaged" if damaged else "scored" if _is_scored(log, count) else "unfinished"
        cache = None
    scoring, peak = seconds.get("score", 0.0), ((run.calibration() or {}).get("cost") or {}).get("peak_flops", 0.0)
    drivers = _drivers(run)
    alive = [] if state == "complete" else [driver for driver in drivers if _is_alive(driver)]
    left = [driver["seconds_left"] for driver in alive]
    return Status(
        run=str(run.path),
        state=state,
        partitions=log.n_partitions,
        committed=count,
        planned_all=log.end is not None,
        rows=log.n_rows,
        committed_rows=rows,
        statistics=sums,
        tokens_per_second=sums.tokens / scoring if scoring else float("nan"),
        seconds=seconds,
        mfu=flops / scoring / peak if scoring and peak else float("nan"),
        splits=splits,
        running=len(alive),
        running_tokens_per_second=sum(driver["tokens_per_second"] for driver in alive),
        seconds_left=max(left) if left and None not in left else None,
        failed={} if state == "complete" else {i: _reason(entry) for i, entry in read_failures(run).items()},
        left_out={
            str(worker): str(why) for driver in drivers for worker, why in (driver.get("left_out") or {}).items()
        },
        dashboard=next((driver["dashboard"] for driver in alive if driver.get("dashboard")), None),
        cache=str(cache.path) if cache else None,
        bytes_per_token=cache.n_bytes / max(1, cache.n_tokens) if cache else None,
        content_digest=cache.content_digest if cache else None,
        kept_mass_by_k=(run.calibration() or {}).get("kept_mass_by_k", {}),
    )


def _is_scored(log: PlanLog, committed: int) -> bool:
    return log.end is not None and committed == log.n_partitions


def _reason(entry: Json) -> str:
    rows = ", ".join(str(row) for row in entry["rows"])
    return f"{entry['kind']}: {entry['reason']}" + (f" (dataset rows {rows})" if rows else "")


def _drivers(run: RunFolder) -> list[Json]:
    found = []
    for path in sorted(run.path.glob("status*.json")):
        try:
            facts = read_json(path)
            if facts is not None:
                check_fields(path, facts, _FACTS)
                found.append(facts)
        except CacheError as error:
            # A crash of the machine may leave one empty: it is for the eye, and never waited for.
            logger.warning("left out: %s", error)
    return found


def _is_alive(driver: Json) -> bool:
    return bool(driver["state"] in ("running", "consolidating") and time.time() - driver["at"] < _ALIVE_SECONDS)
