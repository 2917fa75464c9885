"""Disk and memory needed by a job, compared with the free amounts, and the output of ``plan``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import psutil

from dask_logits.errors import CapacityError
from dask_logits.job.prepare import Job
from dask_logits.run.timings import each_of, plural

# Memory reserved for the rest of the machine.
_HEADROOM = 0.95


def check_capacity(job: Job, done: float = 0.0) -> None:
    """Refuse a job that does not fit.

    Parameters
    ----------
    job
        The job.
    done
        Share of its rows that is already committed.

    Raises
    ------
    CapacityError
        With the arithmetic.
    """
    whole = job.estimate.peak_disk_bytes if job.share.total == 1 else job.estimate.cache_bytes / job.share.total
    need = round(whole - job.estimate.cache_bytes * done)
    amount = "a partition" if job.estimate.tokens is None else f"{job.estimate.tokens:,} tokens"
    free = free_disk_bytes(job.run.path)
    if need > free:
        raise CapacityError(
            f"distillation.teacher.cache_dir: expected {gib(need)} free for {amount} (partitions "
            f"and cache side by side), got {gib(free)}; free space, or lower "
            "distillation.teacher.generation.top_k or distillation.dataset.max_samples",
            need,
            free,
        )
    if job.device == "cpu" and job.n_workers:
        need = job.estimate.worker_bytes * job.n_workers
        free = free_memory_bytes()
        if need > free * _HEADROOM:
            raise CapacityError(
                f"distillation.teacher.generation.num_workers: expected {gib(need)} of memory for {job.n_workers} "
                f"workers of {gib(job.estimate.worker_bytes)}, got {gib(free)}; use fewer workers, lower "
                "distillation.teacher.generation.batch_tokens or distillation.partition.rows, or take a smaller "
                "teacher",
                need,
                free,
            )


def free_disk_bytes(path: Path) -> int:
    """Return the free space of a folder's disk. The folder need not exist."""
    parent = next(folder for folder in (path, *path.parents) if folder.exists())
    return shutil.disk_usage(parent).free


def free_memory_bytes() -> int:
    """Return the memory still available to processes, limited by the machine and its control group."""
    available = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()).isdigit():
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
        available = min(available, int(limit) - used)
    return available


def gib(count: float) -> str:
    """Format bytes for display.

    >>> gib(3 << 30), gib(5 << 20)
    ('3.0 GiB', '5.0 MiB')
    """
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def plan_lines(job: Job) -> list[str]:
    """Format a plan for display: rows, partitions, and required and free resources."""
    cost = job.estimate
    memory = (
        f"{gib(cost.worker_bytes)} for {each_of(job.n_workers)}, {gib(free_memory_bytes())} free here"
        if job.device == "cpu" and job.n_workers
        else f"{gib(cost.worker_bytes)} for each worker's device"
    )
    rows = job.n_rows
    partitions = "" if rows is None else f"{-(-rows // job.partition_rows):,} "
    return [
        f"run           {job.run.path}",
        f"teacher       {job.config.teacher.model_path}: {job.teacher.parameters / 1e6:,.0f} M parameters, "
        f"{job.teacher.head_width:,} logits, {job.tokenizer_spec.vocab_size:,} valid",
        f"rows          {'all of a stream' if rows is None else f'{rows:,}{job.rows_note}'}",
        f"tokens        {'unknown' if cost.tokens is None else f'{cost.tokens:,} (from a sample)'}",
        *([f"targets       at {cost.target_share:.0%} of the positions"] if cost.target_share < 1 else []),
        f"partitions    {partitions}of {plural(job.partition_rows, 'row')}",
        f"cache         {gib(cost.cache_bytes)}{_each(job)}{_of_compact(job)}",
        f"peak disk     {gib(cost.peak_disk_bytes)}{_each(job)}, {gib(free_disk_bytes(job.run.path))} free",
        f"peak memory   {memory}",
    ]


def plan_figures(job: Job) -> dict[str, Any]:
    """Return a plan as JSON values. Sizes are in bytes, as plain, those of a stream for each partition."""
    return {
        "run": str(job.run.path),
        "teacher": job.config.teacher.model_path,
        "parameters": job.teacher.parameters,
        "vocab_size": job.tokenizer_spec.vocab_size,
        "rows": job.n_rows,
        "partition_rows": job.partition_rows,
        "workers": job.n_workers,
        "tokens": job.estimate.tokens,
        "target_share": job.estimate.target_share,
        "profile": "compact" if job.is_compact else "plain",
        "cache_bytes": job.estimate.cache_bytes,
        "peak_disk_bytes": job.estimate.peak_disk_bytes,
        "worker_bytes": job.estimate.worker_bytes,
    }


def _each(job: Job) -> str:
    return " for each partition" if job.estimate.tokens is None else ""


def _of_compact(job: Job) -> str:
    """Say how much less the profile compact takes, which depends on the targets."""
    if not job.is_compact:
        return ""
    share = "a third" if job.config.teacher.generation.n_draws else "half"
    return f" at most, because compact usually takes less than {share} of it"
