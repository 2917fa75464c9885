"""The tail of scoring as Triton kernels for CUDA: one read of the logits, and the selection of the largest.

:mod:`dask_logits.teacher.topk` has the torch equivalents, which are the oracle and fallback. The calibration decides
whether a run uses the kernels. With ``TRITON_INTERPRET=1`` they run on a CPU, for tests without a GPU.

Dimension letters: R rows, V vocabulary padded to whole blocks, N blocks, W values to choose from, C chosen.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

# Columns whose maximum and sum are computed together.
BLOCK = 64
# Blocks of one program: 4,096 logits, 8 or 16 KiB.
_BLOCKS_EACH = 64
# Maximum number of values in one program.
MOST_VALUES = 1 << 14


def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def run_once(device: torch.device) -> None:
    """Compile and run both kernels on next to nothing, so that a device or machine that cannot do that is known."""
    block_statistics(torch.zeros(1, BLOCK, device=device))
    largest(torch.zeros(1, 1, device=device), 1)


def block_statistics(
    logits_RV: Tensor, scale: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute block statistics in one read of the logits, as :func:`dask_logits.teacher.topk.block_statistics` does.

    Parameters
    ----------
    logits_RV
        Floating, contiguous, width a multiple of 64, on CUDA or on the CPU under Triton's interpreter.
    scale, softcap
        Logits become ``scale · x``, then ``softcap · tanh(x / softcap)`` unless `softcap` is None.

    Returns
    -------
    maxima_RN, sums_RN, bases_RN
        float32. Each block has its own base.
    """
    rows, width = logits_RV.shape
    blocks = width // BLOCK
    maxima_RN = torch.empty(rows, blocks, dtype=torch.float32, device=logits_RV.device)
    sums_RN, bases_RN = torch.empty_like(maxima_RN), torch.empty_like(maxima_RN)
    grid = (rows, -(-blocks // _BLOCKS_EACH))
    arrays = (logits_RV, maxima_RN, sums_RN, bases_RN)
    _statistics_kernel()[grid](*arrays, blocks, scale, softcap or 0.0, EACH=_BLOCKS_EACH, WIDTH=BLOCK)
    return maxima_RN, sums_RN, bases_RN


def largest(values_RW: Tensor, count: int) -> Tensor:
    """Return the places of each row's largest values in ascending order, of equal values the first.

    The count-th largest value is determined bit by bit, in 32 comparisons of a row that stays in registers.

    Parameters
    ----------
    values_RW
        float32, contiguous, at most :data:`MOST_VALUES` wide, on CUDA or on the CPU under Triton's interpreter.
    count
        C, at most W.

    Returns
    -------
    Tensor
        int64 [R, C].
    """
    rows, width = values_RW.shape
    places_RC = torch.empty(rows, count, dtype=torch.int32, device=values_RW.device)
    lanes = 1 << max(0, width - 1).bit_length()
    _largest_kernel()[(rows,)](values_RW, places_RC, width, count, LANES=lanes, num_warps=warps_for(lanes))
    return places_RC.long()


def warps_for(lanes: int) -> int:
    """Return the warps of a program of :func:`largest`, so that its values fit into registers.

    With four warps, 16,384 lanes need 255 registers and half a minute to compile.

    >>> warps_for(64), warps_for(4096), warps_for(16384)
    (4, 4, 16)
    """
    return max(4, lanes // 1024)


@functools.cache
def _largest_kernel() -> Any:
    import triton
    from triton import language as tl

    # Triton evaluates annotations, so only constants of the compiler have one.
    @triton.jit
    def choose(values, places, width, count, LANES: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        lane = tl.arange(0, LANES)
        inside = lane < width
        # Adding 0.0 makes the two zeros equal. Then integers sort like the values.
        bits = (tl.load(values + row * width + lane, mask=inside, other=0.0) + 0.0).to(tl.int32, bitcast=True)
        lowest = -2147483648
        key = tl.where(inside, bits ^ ((bits >> 31) & 0x7FFFFFFF), lowest)
        least = tl.where(tl.sum((key >= 0).to(tl.int32), axis=0) >= count, 0, lowest)
        for step in range(31):
            higher = least + (1 << (30 - step))
            least = tl.where(tl.sum((key >= higher).to(tl.int32), axis=0) >= count, higher, least)
        above = (key > least).to(tl.int32)
        equal = ((key == least) & inside).to(tl.int32)
        open_places = count - tl.sum(above, axis=0)
        taken = above + equal * (tl.cumsum(equal, axis=0) <= open_places).to(tl.int32)
        tl.store(places + row * count + tl.cumsum(taken, axis=0) - 1, lane, mask=taken > 0)

    return choose


@functools.cache
def _statistics_kernel() -> Any:
    import triton
    from triton import language as tl

    @triton.jit
    def statistics(logits, maxima, sums, bases, blocks, scale, softcap, EACH: tl.constexpr, WIDTH: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        block = tl.program_id(1) * EACH + tl.arange(0, EACH)
        inside = block < blocks
        place = (row * blocks + block[:, None]) * WIDTH + tl.arange(0, WIDTH)[None, :]
        values = tl.load(logits + place, mask=inside[:, None], other=float("-inf")).to(tl.float32)
        values = values * scale
        if softcap > 0:
            # tanh(x) = 2 / (1 + e⁻²ˣ) − 1. Columns of −inf are padding and must not change.
            capped = softcap * (2.0 / (1.0 + tl.exp(-2.0 * values / softcap)) - 1.0)
            values = tl.where(values == float("-inf"), values, capped)
        highest = tl.max(values, axis=1)
        # −inf minus −inf would be NaN.
        base = tl.where(highest == float("-inf"), 0.0, highest)
        total = tl.sum(tl.exp(values - base[:, None]), axis=1)
        tl.store(maxima + row * blocks + block, highest, mask=inside)
        tl.store(sums + row * blocks + block, total, mask=inside)
        tl.store(bases + row * blocks + block, base, mask=inside)

    return statistics
