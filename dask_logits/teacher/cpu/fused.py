"""Causal attention in bfloat16 as one loop of native code, for CPUs with AVX512-BF16.

As several torch operators, attention took 43 % of the trunk's time for a document of 1,664 tokens, 13 of them for the
softmax alone. One loop over blocks of queries with scores in registers and caches is 2.2 to 2.7 times as fast as
:mod:`dask_logits.teacher.cpu.attention`. Its error is a third, because scores and sums stay in float32 and only the
weights are rounded to bfloat16. PyTorch's own builder compiles ``fused.cpp`` within a second and caches it.

Dimension letters: B sequences, T tokens, H query heads, D width of a head.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dask_logits.teacher.torch_internals import load_cpp

_SOURCE = Path(__file__).with_suffix(".cpp")
# Floats of a register. Values are processed in whole registers, queries in pairs.
_LANES = 16


def available() -> bool:
    """Whether this machine's CPU has the instructions. Compiling also requires a C++ compiler."""
    return platform.system() == "Linux" and bool(torch.cpu.get_capabilities().get("avx512_bf16"))


@cache
def _library() -> ctypes.CDLL:
    library = load_cpp(_SOURCE, ("-march=native",))
    library.attention_scratch.restype = ctypes.c_int64
    return library


def fits(query_BHTD: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the code supports the tensors: bfloat16, equal lengths, whole registers of values."""
    return (
        {part.dtype for part in (query_BHTD, key, value)} == {torch.bfloat16}
        and query_BHTD.device.type == "cpu"
        and query_BHTD.shape[2] == key.shape[2]
        and query_BHTD.shape[-1] % 2 == 0
        and value.shape[-1] % _LANES == 0
    )


def fused_attention(query_BHTD: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Compute causal attention. A row's bits do not depend on the batch or the number of threads.

    Parameters
    ----------
    query_BHTD, key, value
        bfloat16 [B, H, T, D], and [B, H/G, T, D] twice. The values' width may differ. See :func:`fits`.
    scaling
        Factor on the scores.

    Returns
    -------
    Tensor
        [B, T, H, D of the values].

    Raises
    ------
    torch._inductor.exc.InductorError, RuntimeError
        On first use, without a C++ compiler.
    """
    library = _library()
    B, H, T, D = query_BHTD.shape
    threads = torch.get_num_threads()
    sizes = [ctypes.c_int64(size) for size in (B, H, key.shape[1], T, D, value.shape[-1])]
    scratch = torch.empty(library.attention_scratch(*sizes, ctypes.c_int64(threads)), dtype=torch.uint8)
    out_BTHD = query_BHTD.new_empty(B, T, H, value.shape[-1])
    # The numbers of a head must be contiguous. Strides describe the other dimensions.
    parts = [part if part.stride(-1) == 1 else part.contiguous() for part in (query_BHTD, key, value)]
    pointers = [
        argument
        for part in parts
        for argument in (ctypes.c_void_p(part.data_ptr()), (ctypes.c_int64 * 3)(*part.stride()[:3]))
    ]
    library.attention(
        *pointers,
        ctypes.c_void_p(out_BTHD.data_ptr()),
        *sizes,
        ctypes.c_float(scaling),
        ctypes.c_void_p(scratch.data_ptr()),
        ctypes.c_int64(threads),
    )
    return out_BTHD
