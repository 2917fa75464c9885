"""A Dask client for the job: a LocalCUDACluster, a LocalCluster, or an existing scheduler.

Local clusters have two threads per worker, three with a GPU (one scores while the others read or write), no memory
limit (Dask's counts memory-mapped checkpoints), no spilling (tasks return about a kilobyte), queueing without prefetch
and work stealing (a task waits at the scheduler, not at a worker that may die), and a dashboard on loopback.

This is the only module that imports ``dask_cuda`` and creates cluster objects.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import dask
from distributed import Client, LocalCluster, Security, rpc

from dask_logits.config.groups import ClusterConfig, GenerationConfig, JobConfig
from dask_logits.errors import ClusterError, first_line
from dask_logits.job.dask_executor import DaskExecutor
from dask_logits.job.gpus import (
    WorkerFacts,
    gpu_groups,
    grouped_cluster,
    misplaced,
    restore_environment,
    unfit,
)
from dask_logits.job.newcomers import Newcomers, ask, broken
from dask_logits.job.processes import check_can_start_processes, close_cluster, start_cluster, without_main_module
from dask_logits.job.roster import Roster
from dask_logits.job.scheduler import CALL_SECONDS, address_in, call_scheduler, run_on_scheduler
from dask_logits.job.workers import joins_scheduler, local_device, local_workers, partitions_each, threads_each
from dask_logits.worker.environment import environment

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 30
# Workers that are started together have arrived if no other came for this time.
_SETTLE_SECONDS = 5.0
_LONGEST_SETTLE_SECONDS = 30.0
_SETTLE_POLL_SECONDS = 0.5
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def open_cluster(
    generation: GenerationConfig,
    config: ClusterConfig,
    job: JobConfig = JobConfig(),  # noqa: B008
) -> AbstractContextManager[DaskExecutor]:
    """Start or join a cluster. A local cluster is closed at the end.

    Parameters
    ----------
    generation, config
        Settings of the teacher's generation and of the cluster.
    job
        Settings. ``retries`` is the number of further workers that a partition may lose before it fails. A joined
        scheduler has its own limit. For ``stall_seconds``, the client keeps connecting to a joined scheduler.

    Raises
    ------
    ClusterError
        If it cannot be started or reached, or no worker arrives.
    """
    return (_joined if joins_scheduler(config) else _local)(generation, config, job)


@contextlib.contextmanager
def _local(generation: GenerationConfig, config: ClusterConfig, job: JobConfig) -> Iterator[DaskExecutor]:
    check_can_start_processes()
    device = local_device(generation, config)
    workers = local_workers(generation, config, device)
    threads = threads_each(generation, workers)
    settings = {
        "distributed.scheduler.worker-saturation": 1.0,
        "distributed.scheduler.work-stealing": False,
        "distributed.scheduler.allowed-failures": job.retries,
        "distributed.scheduler.worker-ttl": "30 minutes",
        # It would fail every waiting partition as if its rows were bad. A stalled job ends by itself.
        "distributed.scheduler.no-workers-timeout": None,
        # distributed 2026.7.1 closes the nanny of a lost worker when this time has passed since any of its deaths.
        "distributed.deploy.lost-worker-timeout": "30 days",
        # By default every event loop wakes 50 times a second and every worker's stack is sampled 100 times. On a CPU
        # this takes 7 % of a core from a teacher whose threads wait for each other.
        "distributed.admin.tick.interval": "1s",
        "distributed.worker.profile.interval": "1s",
    }
    if config.dashboard_address is not None:
        name = "distributed.scheduler.preload"
        settings[name] = [*dask.config.get(name), "dask_logits.job.dashboard"]
    if not _uses_dask_cuda(config, device):
        # distributed 2026.7.1 looks for GPUs in every process. Hidden ones, or a driver that waits for a restart of the
        # machine, would end the cluster. dask-cuda needs what distributed finds.
        settings["distributed.diagnostics.nvml"] = False
    kept = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    # Dask would set these to 1, and torch would score on one core. Existing environment variables take precedence.
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    with without_main_module(), dask.config.set(settings):
        try:
            made = _start(generation, config, device, workers)
        except ClusterError:
            raise
        except (RuntimeError, ValueError, OSError, ImportError) as error:
            raise ClusterError(
                f"distillation.cluster: expected a local cluster, got {error!r}; see the log of the workers above"
            ) from error
        finally:
            # A nanny changes them in this process, too.
            restore_environment(kept)
        try:
            with Client(made) as client:
                _wait_for_worker(client, config.wait_seconds)
                if device == "cuda":
                    facts, roster = _facts(client, config.wait_seconds)
                    fit = _fit(facts, roster, device, generation)
                    environments = {address: fact.environments[device] for address, fact in fit.items()}
                    if misplaced(facts, generation.gpus_per_worker):
                        raise ClusterError(
                            f"distillation.cluster: expected workers with a GPU each, got:\n{roster.listed()}"
                        )
                else:
                    # All workers share this machine and installation, so there is nothing to ask.
                    environments, roster = dict.fromkeys(client.ncores(), environment(device)), Roster()
                yield DaskExecutor(
                    client=client,
                    job=job,
                    device=device,
                    torch_threads=threads,
                    dashboard=client.dashboard_link if config.dashboard_address else None,
                    environments=environments,
                    roster=roster,
                )
        finally:
            # Closing can hang when a worker has died (seen with distributed 2026.7.1). Its processes end with this one.
            try:
                close_cluster(made, _CLOSE_SECONDS)
            except TimeoutError:
                logger.warning("the cluster did not close within %d s; left to the end of this process", _CLOSE_SECONDS)
            restore_environment(kept)


def _uses_dask_cuda(config: ClusterConfig, device: str) -> bool:
    return config.kind == "local_cuda" or device != "cpu"


def _start(generation: GenerationConfig, config: ClusterConfig, device: str, workers: int) -> Any:
    common: dict[str, Any] = {
        "n_workers": workers,
        "threads_per_worker": partitions_each(device),
        "memory_limit": None,
        "dashboard_address": config.dashboard_address,
        "host": "127.0.0.1",
    }
    if (secured := security(config)) is not None:
        common |= {"security": secured, "protocol": "tls"}
    if config.dashboard_address is None:
        # distributed 2026.7.1 serves its health page on port 8787 even without a dashboard. Any free port will do.
        common["scheduler_kwargs"] = {"dashboard_address": "127.0.0.1:0"}
    if not _uses_dask_cuda(config, device):
        return start_cluster(LocalCluster, common | {"processes": True})
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        raise ClusterError(
            f"distillation.cluster: expected dask-cuda for GPU workers, got {error}; run pip "
            "install -c constraints.txt '.[cuda13]' in the checkout, or set distillation.teacher.generation.device=cpu"
        ) from error
    import pynvml

    try:
        settings = common | {"groups": gpu_groups(generation), "device_memory_limit": None}
        with _any_cores_without_affinity():
            return start_cluster(grouped_cluster(LocalCUDACluster), settings)
    except pynvml.NVMLError as error:
        raise ClusterError(
            f"distillation.cluster.kind: expected an NVIDIA driver for local_cuda, got {error}; "
            "set cluster=local_cpu, or repair the driver"
        ) from error


@contextlib.contextmanager
def _any_cores_without_affinity() -> Iterator[None]:
    """Give the workers of GPUs without near cores, such as those of a virtual machine, all cores of this process.

    dask-cuda 26.10.0 cannot print its warning of that for a GPU that is named by its UUID, and fails with a TypeError.
    """
    from dask_cuda import worker_common

    known = worker_common.get_cpu_affinity

    def cores_of(gpu: int | str) -> list[int]:
        try:
            cores: list[int] = known(gpu)
        except TypeError:
            return sorted(os.sched_getaffinity(0))
        return cores

    worker_common.get_cpu_affinity = cores_of
    try:
        yield
    finally:
        worker_common.get_cpu_affinity = known


@contextlib.contextmanager
def _joined(generation: GenerationConfig, config: ClusterConfig, job: JobConfig) -> Iterator[DaskExecutor]:
    address = str(config.scheduler)
    if config.scheduler_file is not None:
        file = Path(config.scheduler_file).expanduser()
        address = address_in(file, config.wait_seconds, "distillation.cluster.scheduler_file")
    logger.info("joining %s, for which distillation.cluster.wait_seconds=%g s are waited", address, config.wait_seconds)
    try:
        # distributed 2026.7.1 would wait forever for a peer that accepts the connection but never answers.
        secured = security(config) or Security()
        asyncio.run(_answers(address, config.wait_seconds, secured))
        # It has answered. From now on this is the time for which the client reconnects after a lost connection.
        client = Client(address, timeout=max(config.wait_seconds, job.stall_seconds), security=secured)
    except (OSError, ValueError, TypeError, MemoryError) as error:
        # distributed 2026.7.1 raises a TypeError for a tls:// address without certificates.
        if isinstance(error, TimeoutError):
            got = f"no answer within distillation.cluster.wait_seconds={config.wait_seconds:g}"
        elif isinstance(error, MemoryError):
            # It takes the first bytes of another protocol for the size of a message.
            got = "an answer that is not a Dask scheduler's"
        else:
            got = first_line(error)
        raise ClusterError(
            f"distillation.cluster.scheduler: expected a scheduler at {address!r}, got {got}; start `dask scheduler` "
            "and give the address that it prints, such as tcp://host:8786, not that of the dashboard (and "
            "distillation.cluster.security, if it asks for TLS)"
        ) from error
    with _closed_soon(client):
        with _occupied(client, 3 * config.wait_seconds):
            _wait_for_worker(client, config.wait_seconds)
            _settle(client, min(_LONGEST_SETTLE_SECONDS, config.wait_seconds))
            facts, roster = _facts(client, config.wait_seconds)
        name = "distributed.scheduler.worker-saturation"
        saturation = run_on_scheduler(client, lambda: dask.config.get(name))
        if float(saturation) > 1.0:
            logger.warning(
                "the scheduler's worker-saturation is %s; export DASK_DISTRIBUTED__SCHEDULER__WORKER_SATURATION=1.0 "
                "before starting it, so that partitions wait there and not at workers",
                saturation,
            )
        device = generation.device
        if device == "auto":
            has_gpus = any(fact.gpus for fact in facts.values())
            device = "cuda" if has_gpus or generation.gpus_per_worker > 1 else "cpu"
        facts = _fit(facts, roster, device, generation)
        hosts = Counter(fact.host for fact in facts.values())
        cores_each = min(fact.cores // hosts[fact.host] for fact in facts.values())
        threads = max(1, cores_each) if generation.torch_threads == "auto" else int(generation.torch_threads)
        yield DaskExecutor(
            client=client,
            job=job,
            device=device,
            torch_threads=threads,
            dashboard=client.dashboard_link,
            environments={address: fact.environments[device] for address, fact in facts.items()},
            roster=roster,
            newcomers=Newcomers(client, roster, device, generation.gpus_per_worker, facts),
        )


@contextlib.contextmanager
def _closed_soon(client: Client) -> Iterator[None]:
    """Close a client in bounded time, even if its scheduler does not answer."""
    try:
        yield
    finally:
        with contextlib.suppress(TimeoutError):
            client.close(timeout=_CLOSE_SECONDS)


def security(config: ClusterConfig) -> Security | None:
    """Return the configured certificates. None: Dask's own configuration applies."""
    files = {name: str(Path(path).expanduser().absolute()) for name, path in config.security if path}
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


@contextlib.contextmanager
def _occupied(client: Client, seconds: float) -> Iterator[None]:
    """Keep one task at the scheduler, because an adaptive cluster without tasks starts no workers or stops them."""
    name = f"dask_logits-start-{uuid.uuid4().hex[:8]}"

    # Defined inside, so that it is pickled by value and runs where this package is missing.
    def hold(name: str, seconds: float) -> None:
        from distributed import Event

        Event(name).wait(timeout=seconds)

    task = client.submit(hold, name, seconds, pure=False)
    try:
        yield
    finally:
        with contextlib.suppress(ClusterError):
            call_scheduler(client, lambda: client.scheduler.event_set(name=name))
        task.release()


def _wait_for_worker(client: Client, seconds: float) -> None:
    try:
        client.wait_for_workers(1, timeout=seconds)
    except TimeoutError as error:
        raise ClusterError(
            f"distillation.cluster: expected a worker within {seconds:g} s, got none; "
            "start `dask worker` with this scheduler's address"
        ) from error


def _settle(client: Client, seconds: float) -> None:
    """Wait until no more workers arrive. They share the cores of a host, and the first may be the one without a GPU."""
    deadline = time.monotonic() + seconds
    while _seconds_since_arrival(client) < _SETTLE_SECONDS and time.monotonic() < deadline:
        time.sleep(_SETTLE_POLL_SECONDS)


def _seconds_since_arrival(client: Client) -> float:
    """Return the time since the last worker came, by the scheduler's clock."""

    # Defined inside, so that it is pickled by value: the scheduler may not have this package. (distributed 2026.7.1)
    def since(dask_scheduler: Any) -> float:
        from time import time

        events = dask_scheduler.get_events("all")
        arrivals = [at for at, event in events if isinstance(event, dict) and event.get("action") == "add-worker"]
        return time() - max(arrivals, default=0.0)

    seconds: float = run_on_scheduler(client, since)
    return seconds


def _facts(client: Client, seconds: float) -> tuple[dict[str, WorkerFacts], Roster]:
    """Return the facts of each worker that answers in time, and a roster of the unusable workers.

    Raises
    ------
    ClusterError
        If no worker answers, or none can report, because all have another environment.
    """

    async def ask_all() -> tuple[dict[str, Any], list[Any]]:
        workers = (await client.scheduler.identity(n_workers=-1))["workers"]
        calls = (ask(client, address, seconds) for address in workers)
        return workers, await asyncio.gather(*calls, return_exceptions=True)

    workers, answers = call_scheduler(client, ask_all, seconds + CALL_SECONDS)
    facts, silent, roster = {}, [], Roster()
    roster.note_nannies(workers)
    for address, answer in zip(workers, answers, strict=True):
        if isinstance(answer, WorkerFacts):
            facts[address] = answer
            roster.note_facts(address, answer)
        elif isinstance(answer, OSError):
            silent.append(f"{address} ({first_line(answer)})")
        else:
            roster.leave_out({address: broken(answer)})
    if roster.left_out and not facts:
        raise ClusterError(
            f"distillation.cluster: expected workers with this environment, got none:\n{roster.listed()}"
        )
    quiet = ", ".join(silent)
    if not facts:
        raise ClusterError(
            f"distillation.cluster: expected an answer of a worker within {seconds:g} s, got "
            f"{f'none from {quiet}' if quiet else 'no worker'}; look at the workers' logs"
        )
    if quiet:
        logger.warning("no answer from %s; going on without", quiet)
    return facts, roster


def _fit(
    facts: Mapping[str, WorkerFacts], roster: Roster, device: str, generation: GenerationConfig
) -> dict[str, WorkerFacts]:
    """Leave out workers that cannot score. Return the facts of the others.

    Raises
    ------
    ClusterError
        If there are no others.
    """
    roster.leave_out(unfit(facts, device, generation.gpus_per_worker))
    fit = {address: facts[address] for address in sorted(roster.usable(facts))}
    if not fit and generation.gpus_per_worker > 1:
        raise ClusterError(
            f"distillation.teacher.generation.gpus_per_worker: expected workers with {generation.gpus_per_worker} GPUs "
            f"each, got none:\n{roster.listed()}"
        )
    if not fit:
        raise ClusterError(
            "distillation.teacher.generation.device: expected workers with a GPU, got none:\n"
            f"{roster.listed()}\nset distillation.teacher.generation.device=cpu, or start workers where GPUs are "
            "visible"
        )
    if roster.left_out:
        logger.error("these workers get no work:\n%s", roster.listed())
    return fit
