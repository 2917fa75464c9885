"""Recognise allocations that failed, whichever library made them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from dask_logits.errors import OUT_OF_MEMORY, CapacityError, first_line


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a failed allocation.

    >>> is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    True
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error)))


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
