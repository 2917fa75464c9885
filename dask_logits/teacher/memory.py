"""Recognise allocations that failed, whichever library made them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch

from dask_logits.errors import CapacityError, first_line

# torch's allocator raises OutOfMemoryError. Pinned host memory, modules that CUDA loads lazily, Triton, cuBLAS, cuDNN
# and torch's CPU allocator raise a RuntimeError (torch 2.13: c10/core/impl/alloc_cpu.cpp, ATen/cuda/Exceptions.h).
_SIGNS = re.compile(r"out of memory|ALLOC_FAILED|can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a failed allocation.

    >>> is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    True
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_SIGNS.search(str(error)))


@contextlib.contextmanager
def must_fit(what: str, cure: str) -> Iterator[None]:
    """Turn a failed allocation into a CapacityError.

    Parameters
    ----------
    what
        What was to be allocated, or the setting that determines its size.
    cure
        What the user can do.

    Raises
    ------
    CapacityError
        With both.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise CapacityError(f"{what}: expected to fit into memory, got {first_line(error)}; {cure}") from error
