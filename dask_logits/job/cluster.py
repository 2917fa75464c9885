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
from typing import Any, NamedTuple

import dask
from distributed import Client, LocalCluster, Security, rpc

from dask_logits.config import ClusterConfig, GenerationConfig
from dask_logits.errors import CacheError, ClusterError
from dask_logits.job.calls import CALL_SECONDS, call_scheduler
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
        return max(1, len(_visible(generation)) // generation.gpus_per_worker)
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
        # It would fail every partition that waits, as if its rows were bad; a job that stalls ends by itself.
        "distributed.scheduler.no-workers-timeout": None,
        # distributed 2026.7.1 closes the nanny of a worker that is away when this has passed since any of its deaths.
        "distributed.deploy.lost-worker-timeout": "30 days",
        # By default every event loop wakes 50 times a second and every worker's stack is sampled 100 times: on a CPU
        # that keeps 7 % of a core from a teacher whose threads wait for each other.
        "distributed.admin.tick.interval": "1s",
        "distributed.worker.profile.interval": "1s",
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
            raise ClusterError(
                f"distillation.cluster: expected a local cluster, got {error!r}; a script must start the job under "
                '`if __name__ == "__main__":`, else see what the workers said above'
            ) from error
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
    if (secured := security(config)) is not None:
        common |= {"security": secured, "protocol": "tls"}
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
        return _grouped(LocalCUDACluster)(gpu_groups(generation), device_memory_limit=None, **common)
    except pynvml.NVMLError as error:
        raise ClusterError(
            f"distillation.cluster.kind: expected an NVIDIA driver for local_cuda, got {error}; "
            "set cluster=local_cpu, or repair the driver"
        ) from error


def _visible(generation: GenerationConfig) -> list[str]:
    """Return the GPUs of this machine that may be used: those named, or all that are visible."""
    named = generation.devices or os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(max(1, visible_gpus()))]


def gpu_groups(generation: GenerationConfig) -> list[list[str]]:
    """Return each worker's GPUs; a static worker takes one group.

    Raises
    ------
    ClusterError
        If there are fewer than one worker needs.
    """
    visible, size = _visible(generation), generation.gpus_per_worker
    groups = [visible[first : first + size] for first in range(0, len(visible) - size + 1, size)]
    if not groups:
        raise ClusterError(
            f"distillation.teacher.generation.gpus_per_worker: expected at least {size} GPUs for a worker, got "
            f"{len(visible)} ({','.join(visible)}); lower it, or name more in distillation.teacher.generation.devices"
        )
    if len(visible) % size:
        logger.warning("%d of %d GPUs are not used: workers take %d each", len(visible) % size, len(visible), size)
    return groups if generation.worker_id is None else [groups[generation.worker_id % len(groups)]]


def _grouped(base: type) -> Any:
    """Make a cluster whose workers see their own GPUs and no others; dask-cuda lets each see all, its own first."""

    class GroupedCUDACluster(base):  # type: ignore[misc]
        def __init__(self, groups: list[list[str]], **settings: Any) -> None:
            self._groups = [",".join(group) for group in groups]
            super().__init__(CUDA_VISIBLE_DEVICES=[group[0] for group in groups], **settings)

        def new_worker_spec(self) -> dict[Any, Any]:
            spec: dict[Any, Any] = super().new_worker_spec()
            for name, worker in spec.items():
                group = self._groups[self.cuda_visible_devices.index(name)]
                worker["options"]["env"]["CUDA_VISIBLE_DEVICES"] = group
            return spec

    return GroupedCUDACluster


@contextlib.contextmanager
def _joined(generation: GenerationConfig, config: ClusterConfig) -> Iterator[Cluster]:
    address = _address(config)
    logger.info("joining %s, for which distillation.cluster.wait_seconds=%g s are waited", address, config.wait_seconds)
    try:
        # distributed 2026.7.1 would wait without end for a peer that takes the connection and says nothing.
        secured = security(config) or Security()
        asyncio.run(_answers(address, config.wait_seconds, secured))
        client = Client(address, timeout=config.wait_seconds, security=secured)
    except (OSError, ValueError, TypeError) as error:
        # A TypeError is what distributed 2026.7.1 makes of a tls:// address without certificates.
        silent = isinstance(error, TimeoutError)
        got = f"no answer within distillation.cluster.wait_seconds={config.wait_seconds:g}" if silent else repr(error)
        raise ClusterError(
            f"distillation.cluster.scheduler: expected a scheduler at {address!r}, got {got}; "
            "start `dask scheduler` and give its address (and distillation.cluster.security, if it asks for TLS)"
        ) from error
    with client:
        _wait_for_worker(client, config.wait_seconds)
        saturation = call_scheduler(
            client,
            lambda: client.run_on_scheduler(
                lambda: dask.config.get("distributed.scheduler.worker-saturation"), asynchronous=True
            ),
            CALL_SECONDS,
        )
        if float(saturation) > 1.0:
            logger.warning(
                "the scheduler's worker-saturation is %s; export DASK_DISTRIBUTED__SCHEDULER__WORKER_SATURATION=1.0 "
                "before starting it, so that partitions wait there and not at workers",
                saturation,
            )
        facts = _facts(client, config.wait_seconds)
        device = generation.device
        if device == "auto":
            device = "cuda" if all(fact.gpus for fact in facts) else "cpu"
        check_groups(facts, generation.gpus_per_worker)
        cores_each = min(fact.cores // sum(1 for other in facts if other.host == fact.host) for fact in facts)
        threads = max(1, cores_each) if generation.torch_threads == "auto" else int(generation.torch_threads)
        yield Cluster(client=client, device=device, torch_threads=threads, dashboard=client.dashboard_link)


def _address(config: ClusterConfig) -> str:
    """Return the scheduler's address, from its file as soon as that is there."""
    if config.scheduler_file is None:
        return str(config.scheduler)
    file = Path(config.scheduler_file).expanduser()
    deadline = time.monotonic() + config.wait_seconds
    if not file.exists():
        logger.info("waiting for %s, at most distillation.cluster.wait_seconds=%g s", file, config.wait_seconds)
    while True:
        got = "none"
        # The scheduler opens its file first and fills it then.
        try:
            address = (read_json(file) or {}).get("address")
        except CacheError as error:
            address, got = None, error.message
        if isinstance(address, str):
            return address
        if time.monotonic() > deadline:
            raise ClusterError(
                f"distillation.cluster.scheduler_file: expected a scheduler's address in {str(file)!r} within "
                f"{config.wait_seconds:g} s, got {got}; start `dask scheduler --scheduler-file` with it, on a file "
                "system that all machines see"
            )
        time.sleep(_FILE_POLL_SECONDS)


def security(config: ClusterConfig) -> Security | None:
    """Return the certificates that are named; None: what Dask's own configuration says."""
    files = {name: str(Path(path).expanduser().absolute()) for name, path in vars(config.security).items() if path}
    if not files:
        return None
    sides = {
        f"tls_{side}_{part}": files[part] for side in ("client", "scheduler", "worker") for part in ("cert", "key")
    }
    return Security(tls_ca_file=files["ca_file"], require_encryption=True, **sides)


async def _answers(address: str, seconds: float, secured: Security) -> None:
    connection = secured.get_connection_args("client")
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


class WorkerFacts(NamedTuple):
    """What a joined worker has.

    Parameters
    ----------
    host
        Its machine.
    cores
        CPU cores it may use; other workers of the machine may use them too.
    gpus
        GPUs it sees, the one it uses first.
    """

    host: str
    cores: int
    gpus: tuple[str, ...]


def _facts(client: Client, seconds: float) -> list[WorkerFacts]:
    """Return what each worker has that answers in time; one that does not is told, and gone on without.

    Raises
    ------
    ClusterError
        If none answers, or one cannot tell, because it has another environment.
    """
    scheduler = client.scheduler

    async def ask() -> dict[str, Any]:
        addresses = list((await scheduler.identity(n_workers=-1))["workers"])
        calls = (
            asyncio.wait_for(client.run(_worker_facts, workers=[address], asynchronous=True), seconds)
            for address in addresses
        )
        return dict(zip(addresses, await asyncio.gather(*calls, return_exceptions=True), strict=True))

    found = call_scheduler(client, ask, seconds + CALL_SECONDS)
    facts = [answer[address] for address, answer in found.items() if isinstance(answer, dict)]
    silent = {address: answer for address, answer in found.items() if isinstance(answer, OSError)}
    broken = {address: answer for address, answer in found.items() if not isinstance(answer, dict | OSError)}
    if broken:
        raise ClusterError(
            "distillation.cluster: expected workers with this environment, got "
            f"{', '.join(f'{at} ({e!r})' for at, e in broken.items())}; install the same packages there"
        )
    if silent:
        logger.warning("no answer from %s; going on without", ", ".join(f"{at} ({e!r})" for at, e in silent.items()))
    if not facts:
        raise ClusterError(
            f"distillation.cluster: expected an answer of a worker within {seconds:g} s, got {silent or 'no worker'}; "
            "look at the workers' logs"
        )
    return facts


def _worker_facts() -> WorkerFacts:
    import socket

    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",")[:count] if named else [str(index) for index in range(count)]
    return WorkerFacts(socket.gethostname(), cores(), tuple(gpus))


def check_groups(workers: list[WorkerFacts], gpus_per_worker: int) -> None:
    """Refuse workers that would need each other's GPUs, or have too few."""
    if gpus_per_worker == 1:
        return
    cure = (
        "start each group's worker by itself, e.g. `CUDA_VISIBLE_DEVICES=0,1 dask worker ADDRESS --nworkers 1 "
        "--nthreads 2` (`dask cuda worker` starts one for each GPU)"
    )
    used: set[tuple[str, str]] = set()
    for worker in workers:
        group = {(worker.host, gpu) for gpu in worker.gpus[:gpus_per_worker]}
        if len(group) < gpus_per_worker or group & used:
            raise ClusterError(
                f"distillation.teacher.generation.gpus_per_worker: expected {gpus_per_worker} GPUs for each worker and "
                f"no other, got {','.join(worker.gpus) or 'none'} for a worker on {worker.host}; {cure}"
            )
        used |= group


def _threads(generation: GenerationConfig, workers: int) -> int:
    return max(1, cores() // workers) if generation.torch_threads == "auto" else int(generation.torch_threads)


def _restore(kept: dict[str, str | None]) -> None:
    """Undo what a nanny wrote into this process's environment."""
    for name, value in kept.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
