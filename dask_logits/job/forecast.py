"""Forecast the duration of a plan, from the run's calibration or from this machine's matrix products.

A forward pass of a dense teacher takes two floating-point operations per parameter and token. This machine's rate is
measured with matrix products that take a fraction of a second. Scoring reaches less than half of it. The estimate is
right within a factor of three, and the output says so.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from dask_logits.job.prepare import Job
from dask_logits.job.workers import own_device, threads_each
from dask_logits.run.timings import duration, each_of
from dask_logits.teacher.checkpoint import resolve_dtype

# Share of the rate of a large matrix product that scoring reaches.
_TYPICAL_SHARE = 0.4
_MEASURE_SECONDS = 0.3
_FIRST_WIDTH, _WIDEST = 256, 4096
# The fastest counts, because the first warms up and others may be interrupted.
_REPEATS = 4


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Expected speed of a job.

    Parameters
    ----------
    tokens_per_second
        Rate of each worker.
    is_measured
        Whether the speed comes from the run's calibration.
    """

    tokens_per_second: float
    is_measured: bool


def forecast(job: Job) -> Forecast | None:
    """Return the expected speed, or None if the job joins workers that have not been measured.

    Raises
    ------
    ClusterError
        If this process uses other GPUs than the job's.
    """
    calibration = job.run.calibration()
    if calibration is not None and not job.config.teacher.generation.force_regenerate:
        return Forecast(tokens_per_second=calibration.tokens_per_second, is_measured=True)
    if not job.n_workers:
        return None
    dtype = resolve_dtype(job.config.teacher.dtype, job.teacher.checkpoint_dtype, job.device)
    generation = job.config.teacher.generation
    with own_device(generation, job.device):
        rate = matrix_flops(dtype, job.device, threads_each(generation, job.n_workers))
    per_token = 2 * max(1, job.teacher.parameters)
    return Forecast(tokens_per_second=_TYPICAL_SHARE * rate / per_token, is_measured=False)


def matrix_flops(dtype: str, device: str, threads: int) -> float:
    """Measure the floating-point operations per second of a matrix product, within about a second.

    The width doubles until a product takes long enough to be timed. A CPU without units for `dtype` is measured only
    at a small width, because a wide product would take minutes.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        width = _FIRST_WIDTH
        while True:
            a_DD = torch.ones(width, width, dtype=getattr(torch, dtype), device=device)
            seconds = min(_product_seconds(a_DD) for _ in range(_REPEATS))
            # The next width takes eight times as long.
            if width >= _WIDEST or 8 * seconds > _MEASURE_SECONDS:
                return float(2 * width**3 / max(seconds, 1e-9))
            width *= 2
    finally:
        torch.set_num_threads(before)


def _product_seconds(a_DD: object) -> float:
    import torch

    assert isinstance(a_DD, torch.Tensor)
    started = time.perf_counter()
    product_DD = a_DD @ a_DD
    if product_DD.is_cuda:
        torch.cuda.synchronize(product_DD.device)
    return time.perf_counter() - started


def forecast_lines(job: Job, expected: Forecast | None) -> list[str]:
    """Format speed and duration for display."""
    if expected is None:
        return ["time          unknown until the calibration has measured the speed of the joined workers"]
    workers = max(1, job.n_workers)
    rate = expected.tokens_per_second
    origin = "measured by the calibration" if expected.is_measured else "an estimate within a factor of 3"
    lines = [f"speed         {rate:,.0f} tokens/s for {each_of(workers)}, {origin}"]
    tokens = job.estimate.tokens
    if tokens is not None:
        share = tokens / job.share.total / workers
        lines.append(f"time          about {duration(share / max(rate, 1e-9))}, without starting and calibrating")
    return lines
