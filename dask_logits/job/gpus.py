"""GPUs of this machine and of workers: count them, group them, and refuse overlapping groups."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from dask_logits.config.groups import GenerationConfig
from dask_logits.errors import ClusterError
from dask_logits.worker.environment import Environment, environment, gpus_in_use

logger = logging.getLogger(__name__)

# Values of CUDA_VISIBLE_DEVICES that hide all GPUs.
HIDDEN = ("", "-1", "NoDevFiles")
# Files of a loaded NVIDIA driver, one per GPU.
_DEVICE_FILES = "nvidia[0-9]*"
# Why a worker gets no work in a job on GPUs.
NO_GPU = (
    "it sees no GPU; start it where nvidia-smi shows one, with a driver that is new enough (580 or newer for CUDA 13) "
    "and a build of torch that has CUDA"
)
# How to start workers with GPUs of their own: several, or one.
_START_GROUPS = (
    "start each group's worker by itself, e.g. `CUDA_VISIBLE_DEVICES=0,1 dask worker ADDRESS --nworkers 1 "
    "--nthreads 3` (`dask cuda worker` starts one for each GPU)"
)
_START_SINGLES = (
    "start one worker for each GPU, e.g. `CUDA_VISIBLE_DEVICES=0 dask worker ADDRESS --nworkers 1 --nthreads 3`"
)


def visible_gpus(devices: Path = Path("/dev")) -> int:
    """Count the GPUs available to this process, without starting CUDA.

    Parameters
    ----------
    devices
        Folder of the device files.

    Raises
    ------
    ClusterError
        If this machine has GPUs, and they cannot be counted.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None and named.strip() in HIDDEN:
        return 0
    try:
        import pynvml
    except ImportError as error:
        return _uncounted(devices, error)
    try:
        pynvml.nvmlInit()
        count = int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError as error:
        return _uncounted(devices, error)
    # Named devices may be slices of a GPU, which NVML does not count.
    return count if named is None or count == 0 else len(named.split(","))


def _uncounted(devices: Path, error: Exception) -> int:
    if not any(devices.glob(_DEVICE_FILES)):
        return 0
    raise ClusterError(
        f"distillation.teacher.generation.device: expected to count the GPUs of this machine, got {error}; check that "
        "nvidia-smi works, run pip install -c constraints.txt '.[cuda13]' in the checkout, or set "
        "distillation.teacher.generation.device=cpu"
    ) from error


def require_cuda_build(gpus: int) -> None:
    """Refuse a build of torch that cannot use the GPUs of this machine.

    Raises
    ------
    ClusterError
        If it was built without CUDA.
    """
    import torch

    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        raise ClusterError(
            f"distillation.teacher.generation.device: expected a build of torch with CUDA on a machine with {gpus} "
            f"GPUs, got {torch.__version__}; run pip uninstall -y torch && pip install -c constraints.txt torch "
            "'.[cuda13]' in the checkout, or set distillation.teacher.generation.device=cpu"
        )


def cores() -> int:
    """Return the CPU cores available to this process, by its affinity and its control group."""
    from dask.system import CPU_COUNT

    return int(CPU_COUNT)


def named_gpus(generation: GenerationConfig) -> list[str]:
    """Return the GPUs of this machine to use: the configured ones, or all visible ones.

    Raises
    ------
    ClusterError
        If one is configured that ``CUDA_VISIBLE_DEVICES`` does not name.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    allowed = _names(visible) if visible else [str(index) for index in range(max(1, visible_gpus()))]
    named = _names(generation.devices) if generation.devices else allowed
    if visible and (others := [name for name in named if name not in allowed]):
        raise ClusterError(
            f"distillation.teacher.generation.devices: expected GPUs of CUDA_VISIBLE_DEVICES={visible}, got "
            f"{','.join(others)}; name some of those, or leave it out to use all"
        )
    return named


def _names(devices: str) -> list[str]:
    return [name.strip() for name in devices.split(",") if name.strip()]


def gpu_groups(generation: GenerationConfig) -> list[list[str]]:
    """Return each worker's GPUs. A static worker uses as many groups as it has Dask workers, in turn.

    Raises
    ------
    ClusterError
        If there are fewer GPUs than one worker needs, or fewer groups than workers, or only some have a UUID as name,
        or this machine does not have one.
    """
    visible, size = named_gpus(generation), generation.gpus_per_worker
    setting = "distillation.teacher.generation.devices" if generation.devices else "CUDA_VISIBLE_DEVICES"
    # dask-cuda 26.10.0 sorts the names.
    if len({name.isdigit() for name in visible}) > 1:
        raise ClusterError(
            f"{setting}: expected GPUs that are all named by their index or all by their UUID, got "
            f"{','.join(visible)!r}; `nvidia-smi -L` lists both"
        )
    visible = _in_full(visible, setting)
    groups = [visible[first : first + size] for first in range(0, len(visible) - size + 1, size)]
    if not groups:
        raise ClusterError(
            f"distillation.teacher.generation.gpus_per_worker: expected at least {size} GPUs for a worker, got "
            f"{len(visible)} ({','.join(visible)}); lower it, or name more in distillation.teacher.generation.devices"
        )
    n_workers = generation.num_workers or 1
    if n_workers > len(groups):
        raise ClusterError(
            f"distillation.teacher.generation.num_workers: expected at most {len(groups)} with the GPUs "
            f"{','.join(visible)} and gpus_per_worker={size}, got {n_workers}; leave it out for one worker for each "
            f"{size} GPUs"
        )
    if not os.environ.get("CUDA_VISIBLE_DEVICES") and (n_cut := sum(gpu.is_cut for gpu in _gpus())):
        logger.warning(
            "%d GPUs are cut into slices (MIG), and a worker takes only the first slice of its GPU; name the slices in "
            "CUDA_VISIBLE_DEVICES=MIG-…,MIG-…, as `nvidia-smi -L` lists them",
            n_cut,
        )
    if len(visible) % size:
        logger.warning("%d of %d GPUs are not used: workers take %d each", len(visible) % size, len(visible), size)
    if generation.worker_id is None:
        return groups
    return [groups[(generation.worker_id * n_workers + place) % len(groups)] for place in range(n_workers)]


def _in_full(names: list[str], setting: str) -> list[str]:
    """Return the names of GPUs of this machine with each UUID in full.

    CUDA allows shortened ones, dask-cuda 26.10.0 does not.

    Raises
    ------
    ClusterError
        If it does not have one, as far as NVML answers.
    """
    gpus = _gpus()
    full = []
    for name in names:
        if gpus and name.isdigit() and int(name) >= len(gpus):
            raise ClusterError(
                f"{setting}: expected a GPU of this machine, from 0 to {len(gpus) - 1}, got {name}; `nvidia-smi -L` "
                "lists them"
            )
        uuids = [gpu.uuid for gpu in gpus if gpu.uuid.startswith(name)] if name.startswith("GPU-") and gpus else [name]
        if len(uuids) != 1:
            raise ClusterError(
                f"{setting}: expected the UUID of a GPU of this machine, or a beginning that only one has, got "
                f"{name!r}, with which {len(uuids)} begin; `nvidia-smi -L` lists them"
            )
        full += uuids
    return full


class _Gpu(NamedTuple):
    """UUID of a GPU (empty: unknown), and whether it is cut into slices."""

    uuid: str
    is_cut: bool


def _gpus() -> list[_Gpu]:
    """Return the GPUs of this machine by their places on the bus. None where NVML does not answer."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        count = int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return []
    found = []
    for index in range(count):
        uuid, is_cut = "", False
        # Nothing is known of a GPU that has failed. Older GPUs raise an error here: they cannot be cut.
        with contextlib.suppress(pynvml.NVMLError):
            gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
            uuid = str(pynvml.nvmlDeviceGetUUID(gpu))
            is_cut = bool(pynvml.nvmlDeviceGetMigMode(gpu)[0] == pynvml.NVML_DEVICE_MIG_ENABLE)
        found.append(_Gpu(uuid, is_cut))
    return found


@contextlib.contextmanager
def own_gpus(generation: GenerationConfig) -> Iterator[None]:
    """Show this process only its own GPUs.

    Raises
    ------
    ClusterError
        If it uses CUDA already, with other GPUs.
    """
    import torch

    names = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
    before, mine = {name: os.environ.get(name) for name in names}, gpu_groups(generation)[0]
    # CUDA has read the variable if it is initialised, and also if GPUs were only counted, which torch does not tell.
    is_late = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if not is_late:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        # Otherwise CUDA counts from the fastest GPU, and nvidia-smi by their places on the bus.
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    try:
        if (is_late or torch.cuda.is_available()) and not _are_first(mine):
            raise ClusterError(
                "distillation.teacher.generation.devices: expected a process that can be given the GPUs "
                f"{','.join(mine)}, got one that uses CUDA already with others "
                f"(CUDA_VISIBLE_DEVICES={before['CUDA_VISIBLE_DEVICES']}); set CUDA_DEVICE_ORDER=PCI_BUS_ID and "
                f"CUDA_VISIBLE_DEVICES={','.join(mine)} before Python starts, or distillation.cluster.kind=local_cuda"
            )
        yield
    finally:
        if not is_late:
            restore_environment(before)


def restore_environment(values: Mapping[str, str | None]) -> None:
    """Set variables of this process's environment to earlier values, or delete them."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _are_first(names: list[str]) -> bool:
    """Whether these GPUs, by index or UUID, are the first ones that torch sees in this process."""
    used, gpus = [gpu.rpartition(" ")[2] for gpu in gpus_in_use(len(names))], _gpus()
    if len(used) != len(names) or any(name.isdigit() and int(name) >= len(gpus) for name in names):
        return False
    # torch may give a slice its own UUID or that of its GPU, so slices are not compared. A name may be shortened.
    pairs = zip(used, _by_uuid(names, gpus), strict=True)
    return all(name.startswith("MIG-") or name.isdigit() or gpu.startswith(name) for gpu, name in pairs)


def _by_uuid(names: list[str], gpus: list[_Gpu]) -> list[str]:
    """Return the names of GPUs with each index replaced by the UUID of the GPU at this place on the bus.

    The index of a GPU that is cut into slices stays, because CUDA takes it for a slice.
    """
    whole = {str(index): gpu.uuid for index, gpu in enumerate(gpus) if gpu.uuid and not gpu.is_cut}
    return [whole.get(name, name) for name in names]


def grouped_cluster(base: type) -> Any:
    """Create a cluster class whose workers see only their own GPUs. dask-cuda shows all, the worker's own first."""

    class GroupedCUDACluster(base):  # type: ignore[misc]
        def __init__(self, groups: list[list[str]], **settings: Any) -> None:
            self._groups = [",".join(group) for group in groups]
            super().__init__(CUDA_VISIBLE_DEVICES=[group[0] for group in groups], **settings)

        def new_worker_spec(self) -> dict[Any, Any]:
            spec: dict[Any, Any] = super().new_worker_spec()
            for name, worker in spec.items():
                group = self._groups[self.cuda_visible_devices.index(name)]
                environment = worker["options"]["env"]
                environment["CUDA_VISIBLE_DEVICES"] = group
                # As in `own_gpus`. dask-cuda counts GPUs by their places on the bus, too.
                environment.setdefault("CUDA_DEVICE_ORDER", os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID"))
            return spec

    return GroupedCUDACluster


class WorkerFacts(NamedTuple):
    """Resources of a worker.

    Parameters
    ----------
    host
        Its machine.
    cores
        CPU cores available to it, possibly shared with other workers of the machine.
    gpus
        Visible GPUs as they were given to it, starting with the one used first. An index is replaced by the UUID where
        ``CUDA_DEVICE_ORDER=PCI_BUS_ID`` tells whose it is.
    gpus_in_use
        Model and UUID of the same GPUs, as torch reports them.
    environments
        Device → environment for scoring on it.
    """

    host: str
    cores: int
    gpus: tuple[str, ...]
    environments: Mapping[str, Environment] = MappingProxyType({})
    gpus_in_use: tuple[str, ...] = ()


def worker_facts() -> WorkerFacts:
    """Return the resources of this process. Called on a worker."""
    import socket

    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = _names(named)[:count] if named else [str(index) for index in range(count)]
    # In CUDA's own order, an index names another GPU than it does to NVML.
    if gpus and os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
        gpus = _by_uuid(gpus, _gpus())
    environments = {device: environment(device) for device in ("cpu", "cuda")[: 2 if count else 1]}
    return WorkerFacts(socket.gethostname(), cores(), tuple(gpus), environments, gpus_in_use(count))


def misplaced(workers: Mapping[str, WorkerFacts], gpus_per_worker: int) -> dict[str, str]:
    """Return the workers that compute on a GPU that is not theirs: worker → reason.

    Parameters
    ----------
    workers
        Address → facts.
    gpus_per_worker
        Number of GPUs that each of them uses.
    """
    owners: dict[tuple[str, str], str] = {}
    reasons: dict[str, str] = {}
    for address, worker in workers.items():
        for given, used in list(zip(worker.gpus, worker.gpus_in_use, strict=False))[:gpus_per_worker]:
            # Slices of one GPU may share its UUID.
            device = given if given.startswith("MIG-") else used
            owner = owners.setdefault((worker.host, device), address)
            if given.startswith("GPU-") and not used.rpartition(" ")[2].startswith(given):
                reasons[address] = f"it was given {given}, and computes on {used}; it used CUDA before it was given one"
            elif owner != address:
                cure = _START_GROUPS if gpus_per_worker > 1 else _START_SINGLES
                reasons[address] = f"it computes on {device}, as {owner} does; {cure}"
    return reasons


def unfit(workers: Mapping[str, WorkerFacts], device: str, gpus_per_worker: int) -> dict[str, str]:
    """Return the workers that cannot score: worker → reason.

    Parameters
    ----------
    workers
        Address → facts.
    device, gpus_per_worker
        The device of the job, and how many GPUs a worker uses.
    """
    if device != "cuda":
        return {}
    blind = {address: NO_GPU for address, worker in workers.items() if device not in worker.environments}
    few = {
        address: f"it has {len(worker.gpus)} of the {gpus_per_worker} GPUs that a worker takes "
        f"(distillation.teacher.generation.gpus_per_worker); {_START_GROUPS}"
        for address, worker in workers.items()
        if len(worker.gpus) < gpus_per_worker
    }
    # They leave their GPUs to others.
    out = few | blind
    return out | misplaced({each: workers[each] for each in workers if each not in out}, gpus_per_worker)
