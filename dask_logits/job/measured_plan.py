"""A plan with measured figures: the teacher is loaded and scores a sample in this process."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dask_logits.errors import ConfigError
from dask_logits.job.calibration import calibration_task
from dask_logits.job.capacity import gib
from dask_logits.job.prepare import Job
from dask_logits.job.serial_executor import SerialExecutor
from dask_logits.job.workers import own_device, threads_each
from dask_logits.run.timings import duration, each_of
from dask_logits.worker.measure import Choice, Measurement, measure

# Share by which a run differs from its sample beside the spread of the sample's rounds: other documents, other workers
# on the same memory, starting and ending.
_UNCERTAINTY = 0.1


def measure_plan(job: Job, on_step: Callable[[str], None] = lambda step: None) -> Measurement:
    """Load the teacher in this process, and measure its speed and what k entries keep.

    Parameters
    ----------
    job
        The job. Nothing is written to its folder.
    on_step
        Called with a description of each step when it begins.

    Raises
    ------
    ConfigError
        If the job runs on the workers of a scheduler, whose speed cannot be measured here.
    ClusterError
        If this process uses other GPUs than the job's.
    TeacherError, CapacityError
        If the teacher cannot be loaded or does not fit.
    """
    if not job.n_workers:
        raise ConfigError.from_problems(
            "plan --measure: expected a job on this machine, got one on a scheduler's workers. Leave out "
            "--measure, or run it on one of their machines without the scheduler"
        )
    on_step("reading the first documents")
    generation = job.config.teacher.generation
    threads = threads_each(generation, job.n_workers)
    with own_device(generation, job.device):
        executor = SerialExecutor(device=job.device, torch_threads=threads, job=job.config.job)
        with contextlib.closing(executor):
            found: Measurement = executor.call(measure, calibration_task(job, executor), on_step=on_step)
    return found


def time_range(job: Job, found: Measurement) -> tuple[float, float] | None:
    """Return the least and the most seconds that scoring takes, or None if the plan's tokens are unknown."""
    tokens = job.estimate.tokens
    if tokens is None:
        return None
    each = tokens / job.share.total / max(1, job.n_workers)
    fastest, slowest = max(found.tokens_per_second), min(found.tokens_per_second)
    return each / fastest * (1 - _UNCERTAINTY), each / slowest * (1 + _UNCERTAINTY)


def measured_lines(job: Job, found: Measurement) -> list[str]:
    """Format what was measured for display."""
    rate = statistics.median(found.tokens_per_second)
    spread, generation = time_range(job, found), job.config.teacher.generation
    lines = [
        f"speed         {rate:,.0f} tokens/s for {each_of(max(1, job.n_workers))}, measured",
        f"memory        {gib(found.peak_bytes)} at the peak of the sample",
    ]
    if spread is not None:
        least, most = map(duration, spread)
        lines.append(f"time          {least} to {most}, without starting and calibrating")
    planned = min(found.by_share, key=lambda one: abs(one.size - job.estimate.target_share))
    draws = generation.n_draws
    top_k = [] if draws else [one for one in found.by_k if one.size == generation.top_k]
    lines += [
        "",
        "       k   kept mass   lost (nats)   bytes/token   cache",
        *_rows(job, found.by_k, ".4f", "top_k", top_k),
    ]
    lines += [
        "",
        "   draws    distinct   lost (nats)   bytes/token   cache   (with targets=sample: an unbiased loss)",
        *_rows(job, found.by_draws, ".1f", "draws", [one for one in found.by_draws if one.size == draws]),
        "",
        "   share   kept mass   lost (nats)   bytes/token   cache   (of positions with targets, by highest entropy)",
        *_rows(job, found.by_share, ".4f", "planned", [planned]),
    ]
    return lines


def _rows(job: Job, choices: Sequence[Choice], layout: str, mark: str, marked: Sequence[Choice]) -> Iterator[str]:
    """Yield the rows of a table, some of them with a mark."""
    tokens = job.estimate.tokens
    for one in choices:
        kept = "" if one.kept is None else format(one.kept, layout)
        size = "" if tokens is None else gib(tokens * one.bytes_per_token)
        figures = f"{one.size:8g}   {kept:>9}   {one.lost_nats:11.4f}   {one.bytes_per_token:11.1f}   {size}"
        yield f"{figures}  ← {mark}" if one in marked else figures


def measured_figures(job: Job, found: Measurement) -> dict[str, Any]:
    """Return what was measured as JSON values."""
    spread = time_range(job, found)
    return {
        "tokens_per_second": statistics.median(found.tokens_per_second),
        "seconds": None if spread is None else list(spread),
        "peak_bytes": found.peak_bytes,
        "by_k": [_values(one, "top_k", "kept_mass") for one in found.by_k],
        "by_draws": [_values(one, "draws", "distinct") for one in found.by_draws],
        "by_share": [_values(one, "share", "kept_mass") for one in found.by_share],
    }


def _values(one: Choice, size: str, kept: str) -> dict[str, float | None]:
    return {size: one.size, kept: one.kept, "lost_nats": one.lost_nats, "bytes_per_token": one.bytes_per_token}
