"""Where a job runs: in this process, in a local cluster, or at an existing scheduler."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

from dask_logits.config.groups import ClusterConfig, GenerationConfig
from dask_logits.errors import ClusterError
from dask_logits.job.gpus import cores, named_gpus, own_gpus, require_cuda_build, visible_gpus


def joins_scheduler(cluster: ClusterConfig) -> bool:
    """Whether the configuration names an existing scheduler."""
    return cluster.kind == "scheduler" or (cluster.kind == "auto" and bool(cluster.scheduler or cluster.scheduler_file))


def runs_here(generation: GenerationConfig, cluster: ClusterConfig) -> bool:
    """Whether partitions are scored in this process: if requested, and for a static worker of one Dask worker."""
    is_static = generation.worker_id is not None and generation.num_workers in (None, 1)
    return cluster.kind == "serial" or (cluster.kind == "auto" and is_static and not joins_scheduler(cluster))


def local_workers(generation: GenerationConfig, cluster: ClusterConfig, device: str) -> int:
    """Return the number of workers on this machine."""
    if runs_here(generation, cluster):
        return 1
    if generation.num_workers is not None:
        return generation.num_workers
    if generation.worker_id is not None:
        return 1
    if device == "cuda":
        return max(1, len(named_gpus(generation)) // generation.gpus_per_worker)
    return max(1, cores() // 2)


def threads_each(generation: GenerationConfig, workers: int) -> int:
    """Return the CPU threads of each of the workers on this machine."""
    return max(1, cores() // workers) if generation.torch_threads == "auto" else int(generation.torch_threads)


def partitions_each(device: str) -> int:
    """Return how many partitions a worker has at one time: one is scored, the others are read, tokenized or written.

    A fast GPU needs two others, one before and one after the one that is scored.
    """
    return 3 if device == "cuda" else 2


def local_device(generation: GenerationConfig, cluster: ClusterConfig) -> str:
    """Return the device of a local cluster.

    Raises
    ------
    ClusterError
        If a GPU is requested and none is visible, or one is visible and cannot be used.
    """
    if generation.device == "cpu" or cluster.kind == "local_cpu":
        return "cpu"
    gpus = visible_gpus()
    if generation.gpus_per_worker > max(gpus, 1):
        raise ClusterError(
            f"distillation.teacher.generation.gpus_per_worker: expected {generation.gpus_per_worker} visible GPUs, got "
            f"{gpus}; lower it, or check nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    if generation.device == "cuda" and gpus == 0:
        raise ClusterError(
            "distillation.teacher.generation.device: expected a visible GPU for 'cuda', got none; "
            "set distillation.teacher.generation.device=cpu, or check nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    if generation.devices is not None and gpus == 0:
        raise ClusterError(
            f"distillation.teacher.generation.devices: expected visible GPUs for {generation.devices!r}, got none; "
            "leave it out to run on the CPU, or check nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    if gpus:
        require_cuda_build(gpus)
    return "cuda" if gpus else "cpu"


def own_device(generation: GenerationConfig, device: str) -> AbstractContextManager[None]:
    """Show this process only its own GPUs if it computes on them, as a worker does.

    Raises
    ------
    ClusterError
        If it uses CUDA already, with other GPUs.
    """
    return own_gpus(generation) if device == "cuda" else contextlib.nullcontext()
