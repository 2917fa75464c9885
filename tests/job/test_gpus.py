"""Each worker computes on a GPU of its own, and a machine whose GPUs cannot be used is told so."""

from __future__ import annotations

import contextlib
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from builders import cache_dir

from dask_logits import generate, load_config, verify
from dask_logits.config.groups import ClusterConfig, GenerationConfig
from dask_logits.errors import ClusterError
from dask_logits.job import gpus as home
from dask_logits.job.forecast import forecast
from dask_logits.job.gpus import WorkerFacts, misplaced, named_gpus, own_gpus, visible_gpus
from dask_logits.job.measured_plan import measure_plan
from dask_logits.job.prepare import prepare
from dask_logits.job.workers import local_device
from dask_logits.run.folder import RunFolder
from dask_logits.worker.environment import environment


def worker(given: str, *used: str, host: str = "a") -> WorkerFacts:
    """A worker that was given GPUs and computes on others: the digits of their UUIDs."""
    return WorkerFacts(host, 8, tuple(given.split(",")), gpus_in_use=tuple(f"NVIDIA H200 GPU-{uuid}" for uuid in used))


def test_workers_on_gpus_of_their_own_are_left_alone() -> None:
    workers = {
        "tcp://a:1": worker("0,1", "e0", "e1"),
        "tcp://a:2": worker("1,0", "e1", "e0"),
        "tcp://a:3": worker("GPU-e2", "e2"),
        "tcp://b:1": worker("0,1", "e0", "e1", host="b"),
        "tcp://c:1": worker("MIG-1", "e5", host="c"),
        "tcp://c:2": worker("MIG-2", "e5", host="c"),
        "tcp://d:1": WorkerFacts("d", 8, ()),
    }
    assert misplaced(workers, 1) == {}
    groups = {"tcp://a:1": worker("0,1", "e0", "e1"), "tcp://a:2": worker("2,3", "e2", "e3")}
    assert misplaced(groups, 2) == {}
    # Each in a control group of its own, where the indices begin at 0.
    assert misplaced({"tcp://a:1": worker("0,1", "e0", "e1"), "tcp://a:2": worker("0,1", "e2", "e3")}, 2) == {}


def test_workers_on_one_gpu_and_on_others_than_given_are_named() -> None:
    # `dask worker --nworkers 3` shows every GPU to every worker, and torch takes the first.
    shared = {f"tcp://a:{port}": worker("0,1,2", "e0", "e1", "e2") for port in (1, 2, 3)}
    reasons = misplaced(shared, 1)
    assert list(reasons) == ["tcp://a:2", "tcp://a:3"]
    assert "computes on NVIDIA H200 GPU-e0, as tcp://a:1 does; start one worker for each GPU" in reasons["tcp://a:3"]
    other = {"tcp://a:1": worker("GPU-e1", "e0")}
    assert "was given GPU-e1, and computes on NVIDIA H200 GPU-e0" in misplaced(other, 1)["tcp://a:1"]
    # Slices may share the UUID of their GPU, so they are told apart by their names.
    slices = {f"tcp://a:{port}": worker("MIG-1,MIG-2", "e0") for port in (1, 2)}
    assert "it computes on MIG-1, as tcp://a:1 does" in misplaced(slices, 1)["tcp://a:2"]
    overlapping = {"tcp://a:1": worker("0,1", "e0", "e1"), "tcp://a:2": worker("1,2", "e1", "e2")}
    assert misplaced(overlapping, 1) == {}
    reasons = misplaced(overlapping, 2)
    assert list(reasons) == ["tcp://a:2"]
    assert "as tcp://a:1 does; start each group's worker by itself" in reasons["tcp://a:2"]


def _no_driver() -> None:
    raise RuntimeError("Driver Not Loaded")


@pytest.mark.parametrize(
    ("pynvml", "got"),
    [
        (None, "import of pynvml"),
        (SimpleNamespace(nvmlInit=_no_driver, NVMLError=RuntimeError), "Driver Not Loaded"),
        (SimpleNamespace(nvmlInit=bool, nvmlDeviceGetCount=_no_driver, NVMLError=RuntimeError), "Driver Not Loaded"),
    ],
)
def test_gpus_that_cannot_be_counted_are_told_of(monkeypatch, tmp_path, pynvml, got) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    assert visible_gpus(tmp_path) == 0
    for name in ("nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_gpus(tmp_path) == 0
    (tmp_path / "nvidia0").touch()
    with pytest.raises(ClusterError, match=rf"expected to count the GPUs of this machine, got {got}.*device=cpu"):
        visible_gpus(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus(tmp_path) == 0


def test_gpus_without_a_build_of_torch_for_them_are_told_of(monkeypatch) -> None:
    monkeypatch.setattr("dask_logits.job.workers.visible_gpus", lambda: 2)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(
        ClusterError, match=r"torch with CUDA on a machine with 2 GPUs, got .*; run pip uninstall -y torch && pip"
    ):
        local_device(GenerationConfig(), ClusterConfig())
    assert local_device(GenerationConfig(device="cpu"), ClusterConfig()) == "cpu"
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    assert local_device(GenerationConfig(), ClusterConfig()) == "cuda"


def test_only_gpus_of_the_allocation_can_be_named(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert named_gpus(GenerationConfig()) == ["2", "3"]
    assert named_gpus(GenerationConfig(devices="3")) == ["3"]
    with pytest.raises(ClusterError, match=r"devices: expected GPUs of CUDA_VISIBLE_DEVICES=2,3, got 0,1; name some"):
        named_gpus(GenerationConfig(devices="0,1,2"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 3")
    assert named_gpus(GenerationConfig()) == ["2", "3"]
    assert named_gpus(GenerationConfig(devices="3")) == ["3"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(home, "visible_gpus", lambda: 2)
    assert named_gpus(GenerationConfig(devices="7")) == ["7"]


@pytest.fixture
def _gpus_e0_to_e3(monkeypatch) -> None:
    """A machine with four GPUs whose UUIDs are GPU-e0 to GPU-e3, and a process that has not used CUDA."""
    pynvml = SimpleNamespace(
        NVMLError=OSError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 4,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda handle: f"GPU-e{handle}",
        nvmlDeviceGetMigMode=lambda handle: [0, 0],
        NVML_DEVICE_MIG_ENABLE=1,
    )
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)


@pytest.mark.usefixtures("_gpus_e0_to_e3")
def test_a_process_sees_only_its_own_gpus(monkeypatch) -> None:
    with own_gpus(GenerationConfig(devices="2,3", gpus_per_worker=2)):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"
        # The order in which NVML and nvidia-smi count them.
        assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert "CUDA_DEVICE_ORDER" not in os.environ
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    with own_gpus(GenerationConfig()):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1,0"


@pytest.mark.usefixtures("_gpus_e0_to_e3")
@pytest.mark.parametrize(("sees", "is_allowed"), [("e2", True), ("e0", False)])
def test_a_process_that_has_only_counted_gpus_is_compared_too(sees, is_allowed, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(home, "gpus_in_use", lambda count: (f"NVIDIA H200 GPU-{sees}",))
    refused = pytest.raises(ClusterError, match="got one that uses CUDA already with others")
    with contextlib.nullcontext() if is_allowed else refused, own_gpus(GenerationConfig(devices="2")):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.usefixtures("_gpus_e0_to_e3")
@pytest.mark.parametrize(
    ("sees", "visible", "devices", "is_allowed"),
    [
        # Such as a second job in a notebook, or one after the notebook's own work on the GPU.
        (("e0", "e1", "e2", "e3"), None, None, True),
        (("e0",), None, None, True),
        (("e2",), "2", None, True),
        (("e2",), None, "GPU-e2", True),
        (("e2",), None, "2", True),
        # The first job had been given the third GPU, and the variable is as it was before.
        (("e2",), None, None, False),
        (("e0", "e1"), None, "1", False),
        ((), None, None, False),
    ],
)
def test_a_process_that_uses_cuda_keeps_its_gpus(sees, visible, devices, is_allowed, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(home, "gpus_in_use", lambda count: tuple(f"NVIDIA H200 GPU-{uuid}" for uuid in sees[:count]))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    refused = pytest.raises(ClusterError, match="got one that uses CUDA already with others")
    with contextlib.nullcontext() if is_allowed else refused, own_gpus(GenerationConfig(devices=devices)):
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


@pytest.mark.usefixtures("_gpus_e0_to_e3")
@pytest.mark.parametrize("sees", ["e0", "the-slice"])
@pytest.mark.parametrize("visible", [None, "MIG-the-slice"])
def test_a_slice_is_accepted_by_its_own_uuid_and_by_that_of_its_gpu(sees, visible, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["pynvml"], "nvmlDeviceGetMigMode", lambda handle: [1, 1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(home, "gpus_in_use", lambda count: (f"NVIDIA H200 MIG 1g.18gb GPU-{sees}",))
    monkeypatch.setattr(home, "environment", {"cpu": {}, "cuda": {}}.get)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with own_gpus(GenerationConfig()):
        facts = home.worker_facts()
    assert facts.gpus == (visible or "0",)
    assert misplaced({"tcp://a:1": facts}, 1) == {}


@pytest.fixture
def sees(_gpus_e0_to_e3, monkeypatch) -> list[str | None]:
    """The GPUs that this process sees when it starts to compute. Nothing is computed, because they are pretended."""
    found: list[str | None] = []

    def look(*given):
        found.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
        return 1e12

    def measure(task, on_step):
        look()

    def tasks(*given):
        look()
        return iter(())

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr("dask_logits.job.forecast.matrix_flops", look)
    monkeypatch.setattr("dask_logits.job.measured_plan.measure", measure)
    monkeypatch.setattr("dask_logits.job.recompute.tasks", tasks)
    on_gpu = {"gpu": "NVIDIA H200, compute capability 9.0"}
    for module in ("serial_executor", "recompute"):
        monkeypatch.setattr(
            f"dask_logits.job.{module}.environment", lambda device: on_gpu if device == "cuda" else environment(device)
        )
    return found


@pytest.mark.parametrize("plan", [forecast, measure_plan])
@pytest.mark.parametrize(
    ("way", "wanted"),
    [
        (["devices=[2,3]"], "2"),
        (["devices=[1,2,3]", "gpus_per_worker=2"], "1,2"),
        (["worker_id=1", "total_workers=2"], "1"),
        (["device=cpu"], None),
    ],
)
def test_a_plan_is_measured_on_the_gpus_of_the_job(plan, way, wanted, overrides, sees) -> None:
    job = prepare(load_config([*overrides, *(f"distillation.teacher.generation.{setting}" for setting in way)]))
    plan(job)
    assert sees == [wanted]
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.parametrize(
    ("devices", "visible", "wanted"),
    [
        ("2", None, "2"),
        ("GPU-e3", None, "GPU-e3"),
        # The run was copied to a machine with fewer GPUs, or a job gives this process others.
        ("7", None, "0"),
        ("2", "3", "3"),
    ],
)
def test_rows_are_scored_again_on_the_gpus_of_the_run(devices, visible, wanted, overrides, sees, monkeypatch) -> None:
    # The targets are those of a CPU.
    way = [*overrides, "cluster=serial", "distillation.teacher.generation.device=cpu"]
    generate(load_config([*way, f"distillation.teacher.generation.devices='{devices}'"]))
    calibration = RunFolder(cache_dir(overrides)).calibration()
    on_gpu = calibration.model_copy(update={"numerics": calibration.numerics.model_copy(update={"device": "cuda"})})
    monkeypatch.setattr(RunFolder, "calibration", lambda self: on_gpu)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert verify(cache_dir(overrides), recompute=1).ok
    assert sees == [wanted]
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


@pytest.fixture
def _computes_on_e0(_gpus_e0_to_e3, monkeypatch) -> None:
    """A process that used CUDA before it was given a GPU, so that it computes on the first one."""
    both = {"cpu": {}, "cuda": {}}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(home, "environment", both.get)
    monkeypatch.setattr(home, "gpus_in_use", lambda count: ("NVIDIA H200 GPU-e0",))


@pytest.mark.usefixtures("_computes_on_e0")
@pytest.mark.parametrize(
    ("given", "order", "gpus", "is_misplaced"),
    [
        ("3", "PCI_BUS_ID", "GPU-e3", True),
        (" 0", "PCI_BUS_ID", "GPU-e0", False),
        (None, "PCI_BUS_ID", "GPU-e0", False),
        ("GPU-e3", None, "GPU-e3", True),
        # CUDA counts from the fastest GPU, so nothing is known.
        ("3", None, "3", False),
        ("MIG-1", "PCI_BUS_ID", "MIG-1", False),
    ],
)
def test_a_gpu_given_by_its_index_is_compared_by_its_uuid(monkeypatch, given, order, gpus, is_misplaced) -> None:
    for name, value in (("CUDA_VISIBLE_DEVICES", given), ("CUDA_DEVICE_ORDER", order)):
        if value is not None:
            monkeypatch.setenv(name, value)
    facts = home.worker_facts()
    assert facts.gpus == (gpus,)
    assert bool(misplaced({"tcp://a:1": facts}, 1)) == is_misplaced


@pytest.mark.usefixtures("_computes_on_e0")
def test_an_index_is_kept_where_nvml_does_not_answer(monkeypatch) -> None:
    def fail() -> None:
        raise OSError("Driver/library version mismatch")

    monkeypatch.setattr(sys.modules["pynvml"], "nvmlInit", fail)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert home.worker_facts().gpus == ("0",)


def test_workers_of_a_local_cluster_count_gpus_as_nvidia_smi_does(monkeypatch) -> None:
    class Base:
        """What dask-cuda's cluster does with the arguments."""

        def __init__(self, CUDA_VISIBLE_DEVICES: list[str]) -> None:
            self.cuda_visible_devices = CUDA_VISIBLE_DEVICES

        def new_worker_spec(self) -> dict:
            return {name: {"options": {"env": {}}} for name in self.cuda_visible_devices}

    def environments() -> list[dict[str, str]]:
        cluster = home.grouped_cluster(Base)(groups=[["0", "1"], ["2", "3"]])
        return [worker["options"]["env"] for worker in cluster.new_worker_spec().values()]

    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    assert environments() == [
        {"CUDA_VISIBLE_DEVICES": each, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"} for each in ("0,1", "2,3")
    ]
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    assert {each["CUDA_DEVICE_ORDER"] for each in environments()} == {"FASTEST_FIRST"}


@pytest.mark.usefixtures("_gpus_e0_to_e3")
def test_a_shortened_uuid_is_completed_or_refused(monkeypatch) -> None:
    pynvml = sys.modules["pynvml"]
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lambda handle: f"GPU-{'abcc'[handle]}{handle}-0000")
    assert home.gpu_groups(GenerationConfig(devices="GPU-b,GPU-c3")) == [["GPU-b1-0000"], ["GPU-c3-0000"]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a0-0000,GPU-c")
    with pytest.raises(ClusterError, match=r"CUDA_VISIBLE_DEVICES: expected .* got 'GPU-c', with which 2 begin"):
        home.gpu_groups(GenerationConfig())
    with pytest.raises(ClusterError, match=r"got 'GPU-d', with which 0 begin; `nvidia-smi -L` lists them"):
        home._in_full(["GPU-d"], "distillation.teacher.generation.devices")


@pytest.mark.usefixtures("_gpus_e0_to_e3")
@pytest.mark.parametrize(("devices", "visible"), [("3,4", None), (None, "4")])
def test_an_index_beyond_the_last_gpu_is_refused(devices, visible, monkeypatch) -> None:
    setting = "devices"
    if visible is not None:
        setting = "CUDA_VISIBLE_DEVICES"
        monkeypatch.setenv(setting, visible)
    with pytest.raises(ClusterError, match=f"{setting}: expected a GPU of this machine, from 0 to 3, got 4; `nvidia"):
        home.gpu_groups(GenerationConfig(devices=devices))


@pytest.mark.usefixtures("_gpus_e0_to_e3")
def test_gpus_that_are_cut_into_slices_are_told_of(monkeypatch, caplog) -> None:
    def mode(handle: int) -> list[int]:
        if handle == 3:
            raise OSError("Not Supported")
        return [int(handle > 0), 0]

    pynvml = sys.modules["pynvml"]
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMigMode", mode)
    home.gpu_groups(GenerationConfig())
    assert "2 GPUs are cut into slices (MIG), and a worker takes only the first slice" in caplog.text
    caplog.clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1,MIG-2")
    assert home.gpu_groups(GenerationConfig()) == [["MIG-1"], ["MIG-2"]]
    assert caplog.text == ""
