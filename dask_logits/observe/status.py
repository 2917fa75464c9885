"""The state of a run, read from its files alone: no cluster, no driver, no server has to be alive."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dask_logits.errors import CacheError, RunConflictError
from dask_logits.job.manifest import RunFolder
from dask_logits.job.plan import Plan
from dask_logits.records import Statistics
from dask_logits.store.cache import CacheReader


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
        Planned and done.
    rows
        Dataset rows in the plan.
    statistics
        Sums over committed partitions.
    tokens_per_second
        Of one worker, scoring only; NaN before the first partition.
    cache
        Path of the cache; None before it is complete.
    bytes_per_token
        Size of the cache file per token; None before.
    content_digest
        Of the cache; None before.
    kept_mass_by_k
        From the calibration.
    """

    run: str
    state: str
    partitions: int
    committed: int
    rows: int
    statistics: Statistics
    tokens_per_second: float
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
        }
        return json.dumps(values, indent=1)

    def lines(self) -> list[str]:
        """Write it for people."""
        sums = self.statistics
        out = [
            f"run           {self.run}",
            f"state         {self.state}",
            f"partitions    {self.committed} of {self.partitions} committed",
            f"documents     {sums.documents:,} of {self.rows:,}",
            f"tokens        {sums.tokens:,}",
        ]
        if sums.tokens:
            out.append(f"tokens/s      {self.tokens_per_second:,.0f} per worker, while scoring")
            out.append(f"kept mass     {sums.mean_kept_mass:.4f}")
        if sums.labels:
            out.append(f"perplexity    {sums.perplexity:.2f} (teacher, on these documents)")
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
    run = RunFolder(Path(path).expanduser().absolute())
    manifest = run.manifest()
    if manifest is None:
        raise RunConflictError(f"{run.path}: expected a run folder with run.json, got none; check the path")
    plan = Plan(n_rows=manifest["what"]["dataset.rows"], partition_rows=manifest["what"]["partition.rows"])
    receipts = [receipt for receipt in run.receipts(len(plan)) if receipt is not None]
    sums = sum((Statistics.from_json(receipt["statistics"]) for receipt in receipts), Statistics())
    seconds = sum(receipt["seconds"]["score"] for receipt in receipts)
    state = "scored" if len(receipts) == len(plan) else "unfinished"
    try:
        cache = open_run_cache(run, manifest["fingerprint"])
        state = "complete" if cache else state
    except CacheError:
        cache, state = None, "damaged"
    return Status(
        run=str(run.path),
        state=state,
        partitions=len(plan),
        committed=len(receipts),
        rows=plan.n_rows,
        statistics=sums,
        tokens_per_second=sums.tokens / seconds if seconds else float("nan"),
        cache=str(run.cache_path) if cache else None,
        bytes_per_token=run.cache_path.stat().st_size / max(1, cache.n_tokens) if cache else None,
        content_digest=str(cache.attributes["content_digest"]) if cache else None,
        kept_mass_by_k=(run.calibration() or {}).get("kept_mass_by_k", {}),
    )


def open_run_cache(run: RunFolder, fingerprint: str) -> CacheReader | None:
    """Open a run's cache; None if there is none, or it is another run's.

    Raises
    ------
    CacheError
        If it is there and cannot be read: nobody but the user may decide to compute it again.
    """
    if not run.cache_path.exists():
        return None
    cache = CacheReader(run.cache_path)
    return cache if cache.attributes.get("fingerprint") == fingerprint else None
