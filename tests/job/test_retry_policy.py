"""The retry policy as tables: when a partition is retried, and when it has failed permanently."""

from __future__ import annotations

import subprocess

import pytest
import torch
import torch._dynamo.exc
import triton.runtime.errors

from dask_logits.errors import CacheError, CapacityError, ClusterError, DatasetError, TeacherError, is_poisoned
from dask_logits.job.retry_policy import Past, Retry, classify, decide


@pytest.mark.parametrize(
    ("event", "tried", "usable", "expected"),
    [
        # Bad data has failed on two workers, or on the only one.
        ("data", "a", "a", None),
        ("data", "a", "ab", 0.0),
        ("data", "ab", "abc", None),
        # An I/O error: retries, and never on one worker alone while there is another.
        ("transient", "a", "a", 2.0),
        ("transient", "aa", "a", 4.0),
        ("transient", "aaa", "a", None),
        ("transient", "aaa", "ab", 8.0),
        ("transient", "aab", "ab", None),
        # Whatever happens, the number of attempts is bounded.
        ("transient", "aaaaaa", "ab", None),
    ],
)
def test_an_error_is_retried_until_it_is_the_partitions_own(event, tried, usable, expected) -> None:
    retry = decide(event, 2, Past(), tried=tried, usable=usable)
    assert (retry and retry.seconds) == expected


@pytest.mark.parametrize(
    ("event", "past", "facts", "expected"),
    [
        ("lost", Past(losses=1), {}, Retry()),
        ("lost", Past(losses=3), {}, Retry()),
        ("lost", Past(losses=4), {}, None),
        # A companion may have ended the worker.
        ("lost", Past(losses=4), {"had_company": True}, Retry(is_alone=True)),
        ("lost", Past(losses=5, is_alone=True), {"had_company": True}, None),
        ("worker-death", Past(), {"had_company": True}, Retry(is_alone=True)),
        ("worker-death", Past(is_alone=True), {"had_company": True}, None),
        ("worker-death", Past(), {"had_company": False}, None),
        # A device's error is the partition's fault only if good devices fail it repeatedly.
        ("device", Past(), {"tried": "abcdef"}, Retry()),
        ("device", Past(), {"on_good_devices": 1}, Retry()),
        ("device", Past(), {"on_good_devices": 2}, None),
        ("hang", Past(), {}, Retry(is_alone=True)),
        ("hang", Past(is_alone=True), {}, None),
    ],
)
def test_a_lost_worker_is_retried_a_bounded_number_of_times(event, past, facts, expected) -> None:
    assert decide(event, 2, past, **facts) == expected


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionResetError("peer"), "transient"),
        (CacheError("half written"), "transient"),
        (ValueError("row"), "data"),
        (DatasetError("row 7"), "data"),
        (TeacherError("not finite", row=7), "data"),
        (CapacityError("too long", row=7), "data"),
        (TeacherError("no such file"), "device"),
        (ImportError("torch"), "device"),
        (CapacityError("no room for the weights"), "device"),
        (ClusterError("another release"), "device"),
        (torch.AcceleratorError("an illegal memory access was encountered"), "device"),
        (RuntimeError("CUDA error: device-side assert triggered"), "device"),
        (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), "device"),
        # A device without room or compiler (Triton 3.7, torch 2.13) cannot be used, and no row is the cause.
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "device"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "device"),
        (
            RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "c10/cuda/CUDACachingAllocator.cpp":1154'),
            "device",
        ),
        (RuntimeError("Failed to find C compiler. Please specify via CC environment variable."), "device"),
        (subprocess.CalledProcessError(1, ["gcc", "cuda_utils.c"]), "device"),
        (RuntimeError("FlexAttention: No valid triton configs"), "device"),
        (triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory"), "device"),
        (torch._dynamo.exc.Unsupported("call"), "device"),
        (RuntimeError("No CUDA GPUs are available"), "device"),
        (MemoryError(), "data"),
        (RuntimeError("shapes do not match"), "data"),
    ],
)
def test_an_exception_has_a_kind(error, kind) -> None:
    assert classify(error) == kind


@pytest.mark.parametrize(
    ("error", "poisoned"),
    [
        (torch.AcceleratorError("unspecified launch failure"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: out of memory"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), False),
        (RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "c10/cuda/CUDACachingAllocator.cpp":1154'), False),
        (TeacherError("no such file"), False),
        (ValueError("CUDA error"), False),
    ],
)
def test_a_process_whose_device_is_lost_is_restarted(error, poisoned) -> None:
    assert is_poisoned(error) == poisoned
