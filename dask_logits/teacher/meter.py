"""Time and efficiency of a partition: spans by stage, FLOPs, and the rate of a large GEMM as the limit.

FLOPs are counted from the shapes of the weights in use, without running the model. Measuring the limit takes about a
second on any device. Both are informational: if they are unknown, the job continues without them.

Dimension letters: T tokens of a sequence.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dask_logits.errors import first_line
from dask_logits.teacher.model import Teacher

logger = logging.getLogger(__name__)

_GEMM_ROUNDS = 16
# Total time. A product of the smallest size takes milliseconds even if the device only emulates the dtype.
_GEMM_SECONDS = 1.0
_SMALLEST_GEMM = 128
# Configuration names for the number of experts, and for the number of experts per token.
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN_COUNTS = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
# Weights of routed experts, excluding the router's and those of experts used by every token.
_ROUTED = re.compile(r"(^|\.)experts\.(?!.*(router|gate\.weight$))")
_OUTPUT_PROJECTION = re.compile(r"(attn|attention|mixer|temporal_block)\w*\.(\w+\.)*(o_proj|out_proj|c_proj|dense|wo)$")
# Its classes are untyped.
cuda: Any = torch.cuda


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Compute cost of a teacher. All values are zero if unknown.

    Parameters
    ----------
    linear_flops
        Per token, two for every multiplication with a weight in use, the head's included.
    attention_flops
        Per pair of a token and an attended token, over the layers without a window: 4 · heads · width (scores, mixing).
    window_flops, window
        The same over the layers with a sliding window, and the window length.
    peak_flops
        Per second, of one large matrix product in the teacher's dtype, on the device and threads of the run.
    """

    linear_flops: float = 0.0
    attention_flops: float = 0.0
    window_flops: float = 0.0
    window: int = 0
    peak_flops: float = 0.0

    def flops(self, lengths: Iterable[int]) -> float:
        """Return the FLOPs for sequences of these lengths, without padding. T·(T+1)/2 pairs if there is no window.

        >>> Cost(attention_flops=1.0, window_flops=1.0, window=2).flops([3])
        11.0
        """
        return float(sum(self._sequence(n) for n in lengths))

    def _sequence(self, n: int) -> float:
        seen = min(n, self.window)
        windowed = seen * n - seen * (seen - 1) / 2
        return self.linear_flops * n + self.attention_flops * n * (n + 1) / 2 + self.window_flops * windowed

    def mfu(self, flops: float, seconds: float) -> float | None:
        """Return the share of the peak rate reached by this many FLOPs in this time. None if unknown.

        >>> Cost(peak_flops=10.0).mfu(30.0, 6.0), Cost().mfu(30.0, 6.0)
        (0.5, None)
        """
        if not self.peak_flops or not flops:
            return None
        # Four digits. A tiny teacher on a busy CPU reaches a small share.
        return float(f"{flops / max(seconds, 1e-9) / self.peak_flops:.4g}")


@dataclass
class Stopwatch:
    """Sums the seconds of named stages. On CUDA it uses events, so that nothing waits for the device.

    In nested stages, each second counts once, for the inner stage.
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
        """Return stage → seconds. On CUDA this waits for the end of the last stage, and not for work queued later."""
        if self._events:
            self._events[-1][3].synchronize()
        for stage, outer, begin, end in self._events:
            self._add(stage, outer, begin.elapsed_time(end) / 1e3)
        self._events.clear()
        return {stage: round(seconds, 4) for stage, seconds in self._seconds.items()}

    def _add(self, stage: str, outer: str | None, seconds: float) -> None:
        self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds
        if outer is not None:
            self._seconds[outer] = self._seconds.get(outer, 0.0) - seconds


def measure_cost(teacher: Teacher) -> Cost:
    """Count a teacher's FLOPs from the shapes of its weights, and measure the limit.

    An informational figure never stops a job: after any failure the cost is unknown, and one log line reports it.
    """
    try:
        linear = count_linear_flops(teacher)
        full, windowed, window = _attention_flops(teacher)
        peak = sum(peak_flops(device, teacher.dtype, torch.get_num_threads()) for device in teacher.devices)
    except Exception as error:  # noqa: BLE001 - configurations of any family and drivers of any device
        logger.info("MFU is unknown: the teacher's FLOPs could not be counted (%s)", first_line(error))
        return Cost()
    return Cost(linear_flops=linear, attention_flops=full, window_flops=windowed, window=window, peak_flops=peak)


def count_linear_flops(teacher: Teacher) -> float:
    """Return two FLOPs per token for every weight that multiplies it. Of routed experts, only selected ones count."""
    # Of a multimodal wrapper, only the text path counts.
    decoder: nn.Module = getattr(teacher.trunk, "language_model", teacher.trunk)
    embeddings = {id(module.weight) for module in decoder.modules() if isinstance(module, nn.Embedding)}
    share = _expert_share(teacher.model.config.get_text_config())
    count = float(teacher.head.weight.numel())
    counted = embeddings | {id(teacher.head.weight)}
    sizes: list[tuple[str, int]] = []
    for name, module in decoder.named_modules():
        # Quantized weights are packed, and only the module knows their shape.
        if isinstance(getattr(module, "in_features", None), int):
            sizes.append((f"{name}.weight", module.in_features * module.out_features))
            counted |= {id(parameter) for parameter in module.parameters()}
    sizes += [(name, p.numel()) for name, p in decoder.named_parameters() if p.dim() > 1 and id(p) not in counted]
    return 2.0 * (count + sum(size * (share if _ROUTED.search(name) else 1.0) for name, size in sizes))


def _expert_share(config: Any) -> float:
    """Return the share of experts that process a token."""
    experts, chosen = (_first_number(config, names) for names in (_EXPERT_COUNTS, _CHOSEN_COUNTS))
    return min(1.0, chosen / experts) if experts and chosen else 1.0


def _first_number(config: Any, names: Sequence[str]) -> float | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, list | tuple) and value:
            value = sum(value) / len(value)
        if isinstance(value, int | float) and value:
            return float(value)
    return None


def _attention_flops(teacher: Teacher) -> tuple[float, float, int]:
    """Return the FLOPs per pair in layers without and with a sliding window, and the window.

    Heads and widths are read from each layer's own output projection, because they differ within some families
    (Gemma 4). Layers without one, such as recurrent ones, have no pairs.
    """
    config = teacher.model.config.get_text_config()
    window = int(getattr(config, "sliding_window", None) or 0)
    kinds = getattr(config, "layer_types", None) or []
    full = windowed = 0.0
    for index, layer in enumerate(teacher.layers()):
        kind = kinds[index] if index < len(kinds) else "full_attention"
        if "linear" in kind or kind in ("mamba", "conv", "recurrent"):
            continue
        flops = 4.0 * _mixed_width(layer)
        if window and "sliding" in kind:
            windowed += flops
        else:
            full += flops
    return full, windowed, window if windowed else 0


def _mixed_width(layer: nn.Module) -> int:
    """Return heads · width of a layer's attention, the input width of its output projection, 0 without attention."""
    for name, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        if _OUTPUT_PROJECTION.search(name) and isinstance(weight, torch.Tensor) and weight.dim() == 2:
            # transformers' Conv1D (GPT-2) stores the transpose.
            return int(weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[1])
    return 0


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """Measure the FLOPs per second of one large matrix product: the best of several rounds with random factors.

    This takes at most about a second, and a process measures it once for each number of threads.
    """
    # A few threads take long for a large product, and many threads are not all busy with a small one.
    largest = 8192 if device.type == "cuda" else 1024 if threads <= 2 else 2048
    deadline = time.perf_counter() + _GEMM_SECONDS
    size, best = _SMALLEST_GEMM, 0.0
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        # The first product of a shape also prepares code, and any product may have to wait for other processes.
        fastest = _gemm_seconds(a, b)
        for _ in range(_GEMM_ROUNDS):
            # Twice the size takes eight times as long, and is run twice.
            grows = size < largest and time.perf_counter() + 16 * fastest < deadline
            if grows or time.perf_counter() + fastest > deadline:
                break
            fastest = min(fastest, _gemm_seconds(a, b))
        best = max(best, 2 * size**3 / fastest)
        if size == largest or time.perf_counter() + 16 * fastest > deadline:
            return best
        size *= 2


def _gemm_seconds(a: Tensor, b: Tensor) -> float:
    if a.device.type == "cuda":
        cuda.synchronize(a.device)
    started = time.perf_counter()
    torch.mm(a, b)
    if a.device.type == "cuda":
        cuda.synchronize(a.device)
    return max(time.perf_counter() - started, 1e-9)
