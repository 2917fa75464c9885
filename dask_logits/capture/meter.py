"""Where a partition's time goes, and how far it is from the limit: spans by stage, FLOPs, the rate of a large GEMM.

Dimension letters: T tokens of a sequence.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from dask_logits.capture.teacher import ScoringPath, Teacher

_GEMM_ROUNDS = 16
# Its classes have no types.
cuda: Any = torch.cuda


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a teacher computes.

    Parameters
    ----------
    linear_flops
        Per token, two for every multiplication with a weight that takes part, the head's included.
    attention_flops
        Per pair of a token and one it looks at, over all layers: 4 · heads · width (scores and mixing).
    peak_flops
        Per second, of one large matrix product in the teacher's dtype, on the device and threads of the run.
    """

    linear_flops: float = 0.0
    attention_flops: float = 0.0
    peak_flops: float = 0.0

    def flops(self, lengths: Iterable[int]) -> float:
        """Return what scoring sequences of these lengths takes, padding not counted; T·(T+1)/2 pairs each."""
        return float(sum(self.linear_flops * n + self.attention_flops * n * (n + 1) / 2 for n in lengths))


@dataclass
class Stopwatch:
    """Adds up the seconds of named stages; on CUDA between events, so that nothing waits for the device.

    Of a stage inside another each second counts once, for the inner one.
    """

    device: torch.device
    _seconds: dict[str, float] = field(default_factory=dict)
    _events: list[tuple[str, str | None, Any, Any]] = field(default_factory=list)
    _open: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def span(self, stage: str) -> Iterator[None]:
        """Time a stage."""
        outer = self._open[-1] if self._open else None
        self._open.append(stage)
        try:
            if self.device.type == "cuda":
                begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                yield
                end.record()
                self._events.append((stage, outer, begin, end))
            else:
                started = time.perf_counter()
                yield
                self._add(stage, outer, time.perf_counter() - started)
        finally:
            self._open.pop()

    def seconds(self) -> dict[str, float]:
        """Return stage → seconds; on CUDA waits for the device once."""
        if self._events:
            cuda.synchronize(self.device)
        for stage, outer, begin, end in self._events:
            self._add(stage, outer, begin.elapsed_time(end) / 1e3)
        self._events.clear()
        return {stage: round(seconds, 4) for stage, seconds in self._seconds.items()}

    def _add(self, stage: str, outer: str | None, seconds: float) -> None:
        self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds
        if outer is not None:
            self._seconds[outer] = self._seconds.get(outer, 0.0) - seconds


@torch.inference_mode()
def measure_cost(teacher: Teacher) -> Cost:
    """Count a teacher's FLOPs by running it on a few tokens, and measure the limit; leaves it on the plain path."""
    from torch.utils.flop_counter import FlopCounterMode

    # The compiler gives up for good on code that it meets under a counter, and says nothing.
    teacher.take(ScoringPath())
    tokens_BT = torch.arange(16, device=teacher.device).view(4, 4) % teacher.vocab_size
    with FlopCounterMode(display=False) as counter:
        teacher.logits_forward(tokens_BT)
    config = teacher.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0) or 0
    width = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", 0) // heads if heads else 0)
    return Cost(
        linear_flops=counter.get_total_flops() / tokens_BT.numel(),
        attention_flops=4.0 * heads * width * len(teacher.layers()),
        peak_flops=sum(peak_flops(device, teacher.dtype) for device in teacher.devices),
    )


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOPs per second of one large matrix product: the best of some rounds, random factors.

    It takes up to a second, so a process measures it once for each number of threads.
    """
    return _peak_flops(device, dtype, torch.get_num_threads())


@functools.cache
def _peak_flops(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    # Few threads need no larger one, and take long for it; many would not all be busy with a small one.
    size = 8192 if device.type == "cuda" else 1024 if threads <= 2 else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    fastest = float("inf")
    for _ in range(_GEMM_ROUNDS):
        if device.type == "cuda":
            cuda.synchronize(device)
        started = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * size**3 / fastest
