"""The one read of the logits as a Triton kernel for CUDA: maximum and sum of exponentials of every block of 64 columns.

Its oracle and fallback is :func:`dask_logits.capture.topk.block_statistics` in torch; with ``TRITON_INTERPRET=1`` the
kernel runs on a CPU, which is how it is tested where there is no GPU.

Dimension letters: R rows, V vocabulary padded to whole blocks, N blocks.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

_BLOCK = 64
# Blocks of one program: 4,096 logits, 8 or 16 KiB.
_BLOCKS_EACH = 64


def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def block_statistics(
    logits_RV: Tensor, scale: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Read the logits once; as :func:`dask_logits.capture.topk.block_statistics`.

    Parameters
    ----------
    logits_RV
        Floating, contiguous, width a multiple of 64; on CUDA, or on the CPU under Triton's interpreter.
    scale, softcap
        Logits become ``scale · x``, then ``softcap · tanh(x / softcap)`` unless that is None.

    Returns
    -------
    maxima_RN, sums_RN, bases_RN
        float32; each block has a base of its own.
    """
    rows, width = logits_RV.shape
    blocks = width // _BLOCK
    maxima_RN = torch.empty(rows, blocks, dtype=torch.float32, device=logits_RV.device)
    sums_RN, bases_RN = torch.empty_like(maxima_RN), torch.empty_like(maxima_RN)
    grid = (rows, -(-blocks // _BLOCKS_EACH))
    arrays = (logits_RV, maxima_RN, sums_RN, bases_RN)
    _kernel()[grid](*arrays, blocks, scale, softcap or 0.0, EACH=_BLOCKS_EACH, WIDTH=_BLOCK)
    return maxima_RN, sums_RN, bases_RN


@functools.cache
def _kernel() -> Any:
    import triton
    from triton import language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def statistics(
        logits: Any,
        maxima: Any,
        sums: Any,
        bases: Any,
        blocks: Any,
        scale: Any,
        softcap: Any,
        EACH: tl.constexpr,
        WIDTH: tl.constexpr,
    ) -> None:
        row = tl.program_id(0).to(tl.int64)
        block = tl.program_id(1) * EACH + tl.arange(0, EACH)
        inside = block < blocks
        place = (row * blocks + block[:, None]) * WIDTH + tl.arange(0, WIDTH)[None, :]
        values = tl.load(logits + place, mask=inside[:, None], other=float("-inf")).to(tl.float32)
        values = values * scale
        if softcap > 0:
            # tanh(x) = 2 / (1 + e⁻²ˣ) − 1; −inf columns are padding and stay what they are.
            capped = softcap * (2.0 / (1.0 + tl.exp(-2.0 * values / softcap)) - 1.0)
            values = tl.where(values == float("-inf"), values, capped)
        highest = tl.max(values, axis=1)
        # −inf less −inf would be NaN.
        base = tl.where(highest == float("-inf"), 0.0, highest)
        total = tl.sum(tl.exp(values - base[:, None]), axis=1)
        tl.store(maxima + row * blocks + block, highest, mask=inside)
        tl.store(sums + row * blocks + block, total, mask=inside)
        tl.store(bases + row * blocks + block, base, mask=inside)

    return statistics
