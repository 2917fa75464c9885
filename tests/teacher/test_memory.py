"""Allocations that failed, as the libraries report them."""

from __future__ import annotations

import pytest
import torch

from dask_logits.errors import CapacityError
from dask_logits.teacher.memory import is_out_of_memory, must_fit


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "c10/cuda/CUDACachingAllocator.cpp":1154'), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_a_failed_allocation_is_recognised(error, expected) -> None:
    assert is_out_of_memory(error) == expected


def refuse(error: Exception) -> None:
    with must_fit("the logits", "lower it"):
        raise error


def test_what_must_fit_and_does_not_is_a_message_with_the_cure() -> None:
    with pytest.raises(CapacityError, match="the logits: expected to fit into memory, got no room; lower it"):
        refuse(torch.OutOfMemoryError("no room"))
    with pytest.raises(RuntimeError, match="odd"):
        refuse(RuntimeError("odd"))
