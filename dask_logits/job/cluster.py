"""A Dask client for the job: a LocalCUDACluster, a LocalCluster, or an existing scheduler that is joined.

Chosen for clusters we make: two threads per worker (one scores while the other reads or writes), no memory limit
(Dask's counts memory-mapped checkpoints), no spilling (tasks return a few hundred bytes), queueing without prefetch and
without stealing (a task waits at the scheduler, not at a worker that may die), dashboard on loopback.

Home of ``dask_cuda`` and of cluster objects.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
from distributed import Client, LocalCluster, Security, rpc

from dask_logits.config import ClusterConfig, GenerationConfig
from dask_logits.errors import ClusterError
from dask_logits.store.durable import read_json

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 30
_FILE_POLL_SECONDS = 0.2
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A connected client and what was settled when it was made.

    Parameters
    ----------
    client
        The client.
    device
        ``cpu`` or ``cuda``.
    torch_threads
        CPU threads for each worker.
    dashboard
        Address of the dashboard, None if there is none.
    """

    client: Client
    device: str
    torch_threads: int
    dashboard: str | None


def visible_gpus() -> int:
    """Count the GPUs this process may use, without starting CUDA."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None and named.strip() in ("", "-1", "NoDevFiles"):
        return 0
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        return 0
    except pynvml.NVMLError:
        return 0
    count = int(pynvml.nvmlDeviceGetCount())
    # Named devices may be slices of a GPU, which NVML does not count.
    return count if named is None or count == 0 else len(named.split(","))


def local_device(generation: GenerationConfig, cluster: ClusterConfig) -> str:
    """Return the device of a cluster made on this machine.

    Raises
    ------
    ClusterError
        If a GPU is asked for and none is visible.
    """
    if generation.device == "cpu" or cluster.kind == "local_cpu":
        return "cpu"
    gpus = visible_gpus()
    if generation.device == "cuda" and gpus == 0:
        raise ClusterError(
            "distillation.teacher.generation.device: expected a visible GPU for 'cuda', got none; "
            "set distillation.teacher.generation.device=cpu, or check nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    return "cuda" if gpus else "cpu"


def joins_scheduler(cluster: ClusterConfig) -> bool:
    """Whether the configuration names an existing scheduler."""
    return cluster.kind == "scheduler" or (cluster.kind == "auto" and bool(cluster.scheduler or cluster.scheduler_file))


def local_workers(generation: GenerationConfig, device: str) -> int:
    """Return the number of workers of a cluster made on this machine."""
    if generation.num_workers is not None:
        return generation.num_workers
    if generation.worker_id is not None:
        return 1
    if device == "cuda":
        return len(generation.devices.split(",")) if generation.devices else max(1, visible_gpus())
    return max(1, cores() // 2)


def cores() -> int:
    """Return the CPU cores this process may use."""
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def open_cluster(generation: GenerationConfig, config: ClusterConfig, *, retries: int = 2) -> Iterator[Cluster]:
    """Make or join a cluster; close what was made.

    Parameters
    ----------
    generation, config
        Settings.
    retries
        How many more workers a partition may lose before it fails; a scheduler that is joined has its own bound.

    Raises
    ------
    ClusterError
        If it cannot be made or reached, or no worker comes.
    """
    with _joined(generation, config) if joins_scheduler(config) else _local(generation, config, retries) as cluster:
        yield cluster


@contextlib.contextmanager
def _local(generation: GenerationConfig, config: ClusterConfig, retries: int) -> Iterator[Cluster]:
    device = local_device(generation, config)
    workers = local_workers(generation, device)
    threads = _threads(generation, workers)
    settings = {
        "distributed.scheduler.worker-saturation": 1.0,
        "distributed.scheduler.work-stealing": False,
        "distributed.scheduler.allowed-failures": retries,
        "distributed.scheduler.worker-ttl": "30 minutes",
        "distributed.scheduler.no-workers-timeout": "10 minutes",
        # Dask's own sets a MALLOC_TRIM_THRESHOLD_ that gives activations back to the system after every layer.
        "distributed.nanny.pre-spawn-environ": {},
    }
    kept = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    # Dask would set these to 1, and torch would score on one core; what is in the environment already wins.
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    with dask.config.set(settings):
        try:
            made = _start(generation, config, device, workers)
        except ClusterError:
            raise
        except (RuntimeError, ValueError, OSError, ImportError) as error:
            raise ClusterError(f"distillation.cluster: expected a local cluster, got {error!r}") from error
        finally:
            _restore(kept)
        try:
            with Client(made) as client:
                _wait_for_worker(client, config.wait_seconds)
                yield Cluster(
                    client=client,
                    device=device,
                    torch_threads=threads,
                    dashboard=client.dashboard_link if config.dashboard_address else None,
                )
        finally:
            # Closing can hang when a worker has died (seen with distributed 2026.7.1); its processes go with this one.
            try:
                made.close(timeout=_CLOSE_SECONDS)
            except TimeoutError:
                logger.warning("the cluster did not close within %d s; left to the end of this process", _CLOSE_SECONDS)
            _restore(kept)


def _start(generation: GenerationConfig, config: ClusterConfig, device: str, workers: int) -> Any:
    common: dict[str, Any] = {
        "n_workers": workers,
        # One scores while the other reads, tokenises or writes.
        "threads_per_worker": 2,
        "memory_limit": None,
        "dashboard_address": config.dashboard_address,
        "host": "127.0.0.1",
    }
    if config.dashboard_address is None:
        # distributed 2026.7.1 serves its health page on port 8787 even so; any free port will do.
        common["scheduler_kwargs"] = {"dashboard_address": "127.0.0.1:0"}
    if config.kind != "local_cuda" and device == "cpu":
        return LocalCluster(processes=True, **common)
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        raise ClusterError(
            f"distillation.cluster: expected dask-cuda for GPU workers, got {error}; install it with "
            "pip install 'dask-logits[cuda13]' (or [cuda12]), or set distillation.teacher.generation.device=cpu"
        ) from error
    import pynvml

    try:
        return LocalCUDACluster(CUDA_VISIBLE_DEVICES=_devices(generation), device_memory_limit=None, **common)
    except pynvml.NVMLError as error:
        raise ClusterError(
            f"distillation.cluster.kind: expected an NVIDIA driver for local_cuda, got {error}; "
            "set cluster=local_cpu, or repair the driver"
        ) from error


def _devices(generation: GenerationConfig) -> str | None:
    """Return the GPUs of a cluster: those named, or for a static worker one of those visible; None: all."""
    if generation.worker_id is None:
        return generation.devices
    named = generation.devices or os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = named.split(",") if named else [str(index) for index in range(max(1, visible_gpus()))]
    return visible[generation.worker_id % len(visible)]


@contextlib.contextmanager
def _joined(generation: GenerationConfig, config: ClusterConfig) -> Iterator[Cluster]:
    address = _address(config)
    try:
        # distributed 2026.7.1 would wait without end for a peer that takes the connection and says nothing.
        asyncio.run(_answers(address, config.wait_seconds))
        client = Client(address, timeout=config.wait_seconds)
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"distillation.cluster.scheduler: expected a scheduler at {address!r}, got {error!r}; "
            "start `dask scheduler` and give its address"
        ) from error
    with client:
        _wait_for_worker(client, config.wait_seconds)
        saturation = client.run_on_scheduler(lambda: dask.config.get("distributed.scheduler.worker-saturation"))
        if float(saturation) > 1.0:
            logger.warning(
                "the scheduler's worker-saturation is %s; export DASK_DISTRIBUTED__SCHEDULER__WORKER_SATURATION=1.0 "
                "before starting it, so that partitions wait there and not at workers",
                saturation,
            )
        facts = list(client.run(_worker_facts).values())
        device = generation.device
        if device == "auto":
            device = "cuda" if all(fact[1] for fact in facts) else "cpu"
        cores_each = min(fact[0] // sum(1 for other in facts if other[2] == fact[2]) for fact in facts)
        threads = max(1, cores_each) if generation.torch_threads == "auto" else int(generation.torch_threads)
        yield Cluster(client=client, device=device, torch_threads=threads, dashboard=client.dashboard_link)


def _address(config: ClusterConfig) -> str:
    """Return the scheduler's address, from its file as soon as that is there."""
    if config.scheduler_file is None:
        return str(config.scheduler)
    file = Path(config.scheduler_file).expanduser()
    deadline = time.monotonic() + config.wait_seconds
    while not file.exists():
        if time.monotonic() > deadline:
            raise ClusterError(
                f"distillation.cluster.scheduler_file: expected {str(file)!r} within {config.wait_seconds:g} s, got "
                "none; start `dask scheduler --scheduler-file` with it, on a file system that all machines see"
            )
        time.sleep(_FILE_POLL_SECONDS)
    return str((read_json(file) or {}).get("address"))


async def _answers(address: str, seconds: float) -> None:
    connection = Security().get_connection_args("client")
    async with asyncio.timeout(seconds), rpc(address, timeout=seconds, connection_args=connection) as scheduler:
        await scheduler.identity(n_workers=0)


def _wait_for_worker(client: Client, seconds: float) -> None:
    try:
        client.wait_for_workers(1, timeout=seconds)
    except TimeoutError as error:
        raise ClusterError(
            f"distillation.cluster: expected a worker within {seconds:g} s, got none; "
            "start `dask worker` (or `dask cuda worker`) with this scheduler's address"
        ) from error


def _worker_facts() -> tuple[int, bool, str]:
    """Return a worker's cores, whether it has a GPU, and its host."""
    import socket

    import torch

    return len(os.sched_getaffinity(0)), torch.cuda.is_available(), socket.gethostname()


def _threads(generation: GenerationConfig, workers: int) -> int:
    return max(1, cores() // workers) if generation.torch_threads == "auto" else int(generation.torch_threads)


def _restore(kept: dict[str, str | None]) -> None:
    """Undo what a nanny wrote into this process's environment."""
    for name, value in kept.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
