"""A plan with measured figures: the teacher is loaded and scores a sample in this process."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from typing import Any

from dask_logits.errors import ConfigError
from dask_logits.job.calibration import calibration_task
from dask_logits.job.capacity import gib
from dask_logits.job.prepare import Job
from dask_logits.job.serial_executor import SerialExecutor
from dask_logits.job.workers import own_device, threads_each
from dask_logits.run.timings import duration, each_of
from dask_logits.worker.measure import Measurement, measure

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
    lines += ["", "       k   kept mass   lost (nats)   bytes/token   cache"]
    tokens = job.estimate.tokens
    for one in found.choices:
        size = "" if tokens is None else gib(tokens * one.bytes_per_token)
        mark = "  ← top_k" if one.top_k == generation.top_k and not generation.n_draws else ""
        figures = f"{one.top_k:8}   {one.kept_mass:9.4f}   {one.lost_nats:11.4f}   {one.bytes_per_token:11.1f}"
        lines.append(f"{figures}   {size}{mark}")
    lines += [
        "",
        "   draws   distinct ids   lost (nats)   bytes/token   cache   (with targets=sample: an unbiased loss)",
    ]
    for drawn in found.draw_choices:
        size = "" if tokens is None else gib(tokens * drawn.bytes_per_token)
        mark = "  ← draws" if drawn.draws == generation.n_draws else ""
        figures = f"{drawn.draws:8}   {drawn.distinct:12.1f}   {drawn.lost_nats:11g}   {drawn.bytes_per_token:11.1f}"
        lines.append(f"{figures}   {size}{mark}")
    lines += [
        "",
        "   share   kept mass   lost (nats)   bytes/token   cache   (of positions with targets, by highest entropy)",
    ]
    planned = min(found.share_choices, key=lambda one: abs(one.share - job.estimate.target_share))
    for some in found.share_choices:
        size = "" if tokens is None else gib(tokens * some.bytes_per_token)
        mass = f"{'':9}" if some.kept_mass is None else f"{some.kept_mass:9.4f}"
        figures = f"{some.share:8g}   {mass}   {some.lost_nats:11.4f}   {some.bytes_per_token:11.1f}"
        lines.append(f"{figures}   {size}{'  ← planned' if some is planned else ''}")
    return lines


def measured_figures(job: Job, found: Measurement) -> dict[str, Any]:
    """Return what was measured as JSON values."""
    spread = time_range(job, found)
    return {
        "tokens_per_second": statistics.median(found.tokens_per_second),
        "seconds": None if spread is None else list(spread),
        "peak_bytes": found.peak_bytes,
        "by_k": [vars(one) for one in found.choices],
        "by_draws": [vars(one) for one in found.draw_choices],
        "by_share": [vars(one) for one in found.share_choices],
    }
