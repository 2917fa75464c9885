"""Jobs on clusters of their own: local workers, killed workers, pretended GPUs, joined schedulers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warm
from builders import cache_dir, dask_processes, digest, finish, sentences, start_worker, wait_for, write_json_lines

from dask_logits import ClusterError, generate, load_config, read_status
from dask_logits.cache.reader import CacheReader
from dask_logits.config.groups import ClusterConfig, GenerationConfig, JobConfig
from dask_logits.job import remote
from dask_logits.job.cluster import open_cluster
from dask_logits.job.gpus import WorkerFacts, gpu_groups, unfit, visible_gpus
from dask_logits.job.roster import Roster
from dask_logits.job.single import run_one
from dask_logits.job.workers import local_workers

COMMAND = [sys.executable, "-m", "dask_logits", "generate"]


def test_one_and_two_workers_give_the_same_cache(overrides, joined, tmp_path) -> None:
    # The id table of this profile is computed by one worker and used by all.
    compact = "distillation.cache.profile=compact"
    two = generate(
        load_config(
            [*overrides, compact, "cluster=local_cpu", "distillation.teacher.generation.num_workers=2",
             f"distillation.teacher.cache_dir={tmp_path / 'two'}"]
        )
    )  # fmt: skip
    workers = {json.loads(path.read_text())["process"] for path in (tmp_path / "two" / "receipts").rglob("*.json")}
    assert len(workers) == 2
    assert digest(two) == digest(generate(load_config([*joined, compact])))


def test_other_workers_load_the_teacher_while_one_calibrates(overrides, monkeypatch, llama) -> None:
    from dask_logits.teacher import checkpoint

    facts = checkpoint.inspect_teacher(load_config(overrides).teacher)
    spec = checkpoint.TeacherSpec(
        path=str(llama), revision=None, identity=facts.identity, dtype="float32", device="cpu", torch_threads=1,
        trust_remote_code=False,
    )  # fmt: skip
    two = GenerationConfig(num_workers=2, device="cpu")
    with open_cluster(two, ClusterConfig(kind="local_cpu", dashboard_address=None)) as executor:
        monkeypatch.setattr("dask_logits.job.dask_executor.load_on_worker", pytest.fail)
        with executor.preload(spec, 104):
            # On CPUs nothing is loaded.
            pass
        monkeypatch.undo()
        with dataclasses.replace(executor, device="cuda").preload(spec, 104):
            deadline = time.monotonic() + 120
            while executor.client.run(_loaded) != dict.fromkeys(executor.environments, 1):
                assert time.monotonic() < deadline
                time.sleep(0.2)


def test_a_partition_that_waits_for_its_workers_teacher_gives_signs_of_life(monkeypatch) -> None:
    begun, alive = threading.Event(), threading.Event()

    def load(spec, vocab_size, on_life) -> None:
        begun.set()
        deadline = time.monotonic() + 60
        while not alive.is_set() and time.monotonic() < deadline:
            on_life()
            time.sleep(0.01)

    monkeypatch.setattr(remote, "load_teacher", load)
    with ThreadPoolExecutor() as pool:
        loaded = pool.submit(remote.load_on_worker, None, 104)
        assert begun.wait(60)
        remote.STAGES.run(lambda: None, alive.set)
        assert alive.is_set()
        loaded.result()
    alive.clear()
    # A partition that has left gives none.
    remote.STAGES.beat()
    assert not alive.is_set()


def _loaded() -> int:
    from dask_logits.teacher import checkpoint

    return len(checkpoint._LOADED)


def test_a_job_killed_in_the_middle_and_resumed_equals_an_undisturbed_one(overrides, joined, tmp_path) -> None:
    data = write_json_lines(tmp_path / "many.jsonl", sentences(70, seed=5))
    many = [f"distillation.dataset.data_files={data}", "distillation.partition.rows=2"]
    whole = digest(generate(load_config([*joined, *many])))

    run_folder = tmp_path / "killed"
    mine = [*overrides, *many, f"distillation.teacher.cache_dir={run_folder}", "cluster=local_cpu"]
    receipts = run_folder / "receipts"
    driver = warm.Popen([*COMMAND, *mine], start_new_session=True, stderr=subprocess.PIPE)
    first = wait_for(lambda: sorted(receipts.rglob("*.json")), driver)
    os.kill(json.loads(first[0].read_text())["process"], signal.SIGKILL)
    before = len(first)
    # The nanny starts another worker, and the job goes on.
    wait_for(lambda: len(list(receipts.rglob("*.json"))) > before + 8, driver)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()
    assert read_status(run_folder).state == "stopped"
    untouched = {path: path.read_text() for path in receipts.rglob("*.json")}

    done = warm.run([*COMMAND, *mine])
    assert done.returncode == 0, done.stderr
    assert digest(run_folder / "teacher_logits.h5") == whole
    assert {path: path.read_text() for path in untouched} == untouched


def test_a_real_local_cuda_cluster_with_pretended_devices(overrides, joined, monkeypatch) -> None:
    # A test hook of dask-cuda, not an API; each worker logs that it found no CUDA context.
    monkeypatch.setenv("DASK_CUDA_TEST_DISABLE_DEVICE_SPECIFIC", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    config = load_config(
        [*overrides, "cluster=local_cuda", "distillation.teacher.generation.device=cpu",
         "distillation.teacher.generation.num_workers=2"]
    )  # fmt: skip
    with open_cluster(config.teacher.generation, config.cluster) as cluster:
        assert any(base.__name__ == "LocalCUDACluster" for base in type(cluster.client.cluster).mro())
        cluster.client.wait_for_workers(2)
        seen = cluster.client.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"])
        # dask-cuda's own workers would see both.
        assert sorted(seen.values()) == ["0", "1"]
    cuda = digest(generate(config))
    elsewhere = f"distillation.teacher.cache_dir={Path(config.teacher.cache_dir).with_name('cpu')}"
    assert cuda == digest(generate(load_config([*joined, elsewhere])))


@pytest.mark.parametrize(
    ("dead", "reason"),
    [
        (("1",), "it sees no GPU"),
        (("1",), "it cannot tell its environment (RuntimeError('CUDA error: uncorrectable ECC"),
        (("0", "1"), "it sees no GPU"),
    ],
)
def test_a_local_worker_whose_gpu_torch_cannot_use_gets_no_work(dead, reason, overrides, monkeypatch, caplog) -> None:
    def facts() -> WorkerFacts:
        """What a worker reports whose driver is too old, or whose GPU has failed, and one that works."""
        gpu = os.environ["CUDA_VISIBLE_DEVICES"]
        if gpu in dead and "RuntimeError" in reason:
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
        if gpu in dead:
            return WorkerFacts("a", 8, (), {"cpu": {}})
        return WorkerFacts("a", 8, (gpu,), {"cpu": {}, "cuda": {}}, (f"NVIDIA H200 GPU-e{gpu}",))

    monkeypatch.setenv("DASK_CUDA_TEST_DISABLE_DEVICE_SPECIFIC", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr("dask_logits.job.workers.visible_gpus", lambda: 2)
    monkeypatch.setattr("dask_logits.job.newcomers.worker_facts", facts)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    cluster_config = load_config([*overrides, "cluster=local_cuda"]).cluster
    if len(dead) == 2:
        refused = pytest.raises(
            ClusterError, match=r"(?s)expected workers with a GPU, got none:.*: it sees no GPU; .*580 or newer"
        )
        with refused, open_cluster(GenerationConfig(), cluster_config):
            pass
        return
    with open_cluster(GenerationConfig(), cluster_config) as cluster:
        (other,) = cluster.roster.left_out
        assert set(cluster.client.ncores()) == {other, *cluster.environments}
        assert other not in cluster.environments
        assert re.search(rf"these workers get no work:\n  {re.escape(other)}.*: {re.escape(reason)}", caplog.text)


def test_gpus_and_slices_named_by_uuid_start_where_they_are_near_no_cores(overrides, monkeypatch) -> None:
    import pynvml
    from dask_cuda import worker_common
    from distributed.diagnostics import nvml

    def unsupported(*_) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    # What the driver of a virtual machine answers.
    monkeypatch.setattr(nvml, "NVML_STATE", nvml.NVMLState.DISABLED_LIBRARY_NOT_FOUND)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", bytes.decode)
    monkeypatch.setattr(pynvml, "nvmlDeviceIsMigDeviceHandle", lambda handle: handle.startswith("MIG-"))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetDeviceHandleFromMigDeviceHandle", lambda handle: "GPU-e1")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: SimpleNamespace(total=2**37))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCpuAffinity", unsupported)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-e0,MIG-e2")
    known = worker_common.get_cpu_affinity
    cluster_config = load_config([*overrides, "cluster=local_cuda"]).cluster
    with open_cluster(GenerationConfig(device="cpu", num_workers=2), cluster_config) as cluster:
        assert worker_common.get_cpu_affinity is known
        cluster.client.wait_for_workers(2)
        seen = cluster.client.run(lambda: (os.environ["CUDA_VISIBLE_DEVICES"], os.sched_getaffinity(0)))
        cores = os.sched_getaffinity(0)
        assert sorted(seen.values()) == [("GPU-e0", cores), ("MIG-e2", cores)]


def _forbidden(argument: None, on_step) -> dict:
    raise PermissionError(13, "weights")


def test_each_worker_of_several_gpus_sees_its_own_and_no_others(overrides, monkeypatch) -> None:
    monkeypatch.setenv("DASK_CUDA_TEST_DISABLE_DEVICE_SPECIFIC", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,8")
    cluster_config = load_config([*overrides, "cluster=local_cuda"]).cluster
    generation = GenerationConfig(device="cpu", num_workers=2, gpus_per_worker=2)
    with open_cluster(generation, cluster_config) as cluster:
        cluster.client.wait_for_workers(2)
        seen = cluster.client.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"])
        assert sorted(seen.values()) == ["4,5", "6,7"]
        # A cluster that lost its workers must not fail what waits, partition by partition.
        assert cluster.client.cluster.scheduler.no_workers_timeout is None
        with pytest.raises(ClusterError, match=r"the _forbidden task, got \[Errno 13\] weights from its"):
            run_one(cluster.client, _forbidden, None, JobConfig(), Roster())


def test_a_static_worker_of_several_dask_workers_starts_one_on_each_gpu_of_its_share(overrides, monkeypatch) -> None:
    monkeypatch.setenv("DASK_CUDA_TEST_DISABLE_DEVICE_SPECIFIC", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    cluster_config = load_config([*overrides, "cluster=local_cuda"]).cluster
    generation = GenerationConfig(device="cpu", num_workers=2, worker_id=1, total_workers=2)
    with open_cluster(generation, cluster_config) as cluster:
        cluster.client.wait_for_workers(2)
        seen = cluster.client.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"])
        assert sorted(seen.values()) == ["6", "7"]


def test_gpus_are_grouped_and_static_workers_take_turns(monkeypatch, caplog) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    assert gpu_groups(GenerationConfig(gpus_per_worker=2)) == [["0", "1"], ["2", "3"]]
    assert "1 of 5 GPUs are not used: workers take 2 each" in caplog.text
    assert local_workers(GenerationConfig(gpus_per_worker=2), ClusterConfig(), "cuda") == 2
    assert gpu_groups(GenerationConfig(gpus_per_worker=2, worker_id=3, total_workers=4)) == [["2", "3"]]
    share = GenerationConfig(num_workers=2, worker_id=2, total_workers=4)
    assert gpu_groups(share) == [["4"], ["0"]]
    assert gpu_groups(GenerationConfig(devices="3")) == [["3"]]
    for more in (GenerationConfig(num_workers=6), GenerationConfig(num_workers=6, worker_id=1, total_workers=4)):
        with pytest.raises(ClusterError, match=r"num_workers: expected at most 5 .* 0,1,2,3,4 and .*=1, got 6; leave"):
            gpu_groups(more)
    with pytest.raises(ClusterError, match=r"gpus_per_worker: expected at least 2 GPUs for a worker, got 1 \(3\)"):
        gpu_groups(GenerationConfig(devices="3", gpus_per_worker=2))


@pytest.mark.parametrize("setting", ["CUDA_VISIBLE_DEVICES", "distillation.teacher.generation.devices"])
def test_gpus_named_by_index_and_uuid_at_once_are_refused(monkeypatch, setting: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-e1,2")
    generation = GenerationConfig(devices="0,GPU-e1" if "devices" in setting else None)
    with pytest.raises(ClusterError, match=rf"^{setting}: expected GPUs .* all by their UUID, got '0,GPU-e1"):
        gpu_groups(generation)


def test_joined_workers_that_lack_gpus_get_no_work() -> None:
    facts = {"cpu": {}, "cuda": {}}
    workers = {"tcp://a:1": WorkerFacts("a", 8, ("0",), facts), "tcp://b:1": WorkerFacts("b", 8, (), {"cpu": {}})}
    assert list(unfit(workers, "cuda", 1)) == ["tcp://b:1"]
    assert unfit(workers, "cpu", 2) == {}
    reasons = unfit(workers, "cuda", 2)
    assert reasons["tcp://a:1"].startswith("it has 1 of the 2 GPUs that a worker takes (distillation.")
    assert "start each group's worker by itself" in reasons["tcp://a:1"]
    assert reasons["tcp://b:1"].startswith("it sees no GPU")
    # Each Slurm task counts the GPUs of its control group from 0.
    assert unfit({f"tcp://a:{port}": WorkerFacts("a", 8, ("0", "1"), facts) for port in (1, 2)}, "cuda", 2) == {}
    # A worker that is left out leaves its GPU to one that can use it.
    used = ("GPU-e0", "GPU-e1")
    mine = {f"tcp://a:{n}": WorkerFacts("a", 8, ("0", "1")[:n], facts, gpus_in_use=used[:n]) for n in (1, 2)}
    assert list(unfit(mine, "cuda", 2)) == ["tcp://a:1"]


def test_more_gpus_for_a_worker_than_there_are_names_the_cure(overrides) -> None:
    config = load_config([*overrides, "distillation.teacher.generation.device=auto",
                          "distillation.teacher.generation.gpus_per_worker=2"])  # fmt: skip
    with pytest.raises(ClusterError, match="gpus_per_worker: expected 2 visible GPUs, got 0"):
        generate(config)
    assert not Path(config.teacher.cache_dir).exists()


def test_a_scheduler_file_and_the_command_line_tools(overrides, joined, tmp_path) -> None:
    # A scheduler opens its file first and fills it then.
    late = tmp_path / "late.json"
    late.touch()
    waits = [*overrides, f"distillation.cluster.scheduler_file={late}"]
    with pytest.raises(
        ClusterError, match=r"expected a scheduler's address in .*late\.json.* within 0\.3 s, got .*late\.json: "
    ):
        generate(load_config([*waits, "distillation.cluster.wait_seconds=0.3"]))
    with dask_processes(tmp_path) as (file, scheduler):
        filled = threading.Timer(1, lambda: late.write_text(wait_for(file.read_text, scheduler)))
        filled.start()
        one = generate(load_config(waits))
    elsewhere = f"distillation.teacher.cache_dir={tmp_path / 'other'}"
    assert digest(one) == digest(generate(load_config([*joined, elsewhere])))


def test_a_scheduler_without_workers_is_refused_in_time(overrides, tmp_path) -> None:
    from distributed import LocalCluster

    with LocalCluster(n_workers=0, dashboard_address=":0", host="127.0.0.1") as empty:
        config = load_config(
            [*overrides, f"distillation.cluster.scheduler={empty.scheduler_address}",
             "distillation.cluster.wait_seconds=1"]
        )  # fmt: skip
        with pytest.raises(ClusterError, match="expected a worker within 1 s, got none"):
            generate(config)
    assert not Path(config.teacher.cache_dir).exists()


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a driver")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distillation.teacher.generation.device=cuda", r"device: expected a visible GPU .* set .*device=cpu"),
        ("cluster=local_cuda", r"kind: expected an NVIDIA driver for local_cuda"),
    ],
)
def test_a_gpu_that_is_not_there_names_the_cure(overrides, override, message) -> None:
    config = load_config([*overrides, override])
    with pytest.raises(ClusterError, match=message):
        generate(config)
    assert not Path(config.teacher.cache_dir).exists()


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_hidden_gpus_are_not_counted(monkeypatch, hidden: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert visible_gpus() == 0


@pytest.mark.parametrize(("visible", "device"), [("-1", "auto"), ("NoDevFiles", "auto"), (None, "cpu")])
def test_a_job_on_cpus_starts_where_gpus_are_hidden_or_the_driver_is_broken(visible, device, monkeypatch) -> None:
    import pynvml
    from distributed.diagnostics import nvml

    code = pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH if visible is None else pynvml.NVML_ERROR_INVALID_ARGUMENT

    def fail(*_) -> None:
        raise pynvml.NVMLError(code)

    # A machine with two GPUs, in a process that has not looked for them.
    monkeypatch.setattr(nvml, "NVML_STATE", nvml.NVMLState.UNINITIALIZED)
    monkeypatch.setattr(pynvml, "nvmlInit", fail if visible is None else lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", fail)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    generation = GenerationConfig(device=device, num_workers=1)
    with open_cluster(generation, ClusterConfig(dashboard_address=None)) as cluster:
        assert cluster.device == "cpu"
        states = cluster.client.run(lambda: __import__("distributed").diagnostics.nvml.NVML_STATE.name)
        assert list(states.values()) == ["DISABLED_CONFIG"]


def test_a_cluster_leaves_the_environment_and_threads_as_they_were(overrides, new_interpreters) -> None:
    before = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    config = load_config([*overrides, "cluster=local_cpu", "distillation.teacher.generation.torch_threads=auto"])
    with open_cluster(config.teacher.generation, config.cluster) as cluster:
        cores = len(os.sched_getaffinity(0))
        assert cluster.torch_threads == max(1, cores // local_workers(config.teacher.generation, config.cluster, "cpu"))
        assert list(cluster.client.run(lambda: os.environ["OMP_NUM_THREADS"]).values()) == [str(cluster.torch_threads)]
    assert {name: os.environ.get(name) for name in before} == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_whole_job_on_a_gpu_equals_the_cpu_within_tolerance(overrides, joined, tmp_path) -> None:
    import numpy as np

    exact = ["distillation.teacher.dtype=float32"]
    gpu = generate(load_config([*overrides, *exact, f"distillation.teacher.cache_dir={tmp_path / 'gpu'}"]))
    cpu = generate(load_config([*joined, *exact, "distillation.teacher.generation.device=cpu"]))
    receipts = [json.loads(path.read_text()) for path in (cache_dir(overrides) / "receipts").rglob("*.json")]
    assert {len(receipt["gpus"]) for receipt in receipts} == {1}
    assert all("GPU-" in receipt["gpus"][0] for receipt in receipts)
    one, two = CacheReader(gpu), CacheReader(cpu)
    np.testing.assert_allclose(one.arrays["logsumexp"], two.arrays["logsumexp"], atol=1e-3)
    np.testing.assert_allclose(one.arrays["tail_logmass"], two.arrays["tail_logmass"], atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_rounded_teacher_with_grouped_heads_uses_the_kernels_and_gives_the_same_bytes_twice(
    overrides, teacher_folder, tmp_path
) -> None:
    rounded = [f"distillation.teacher.model_path={teacher_folder('qwen3')}", "distillation.teacher.dtype=bfloat16"]
    caches = [
        generate(load_config([*overrides, *rounded, f"distillation.teacher.cache_dir={tmp_path / name}"]))
        for name in ("one", "two")
    ]
    numerics = json.loads((tmp_path / "one" / "calibration.json").read_text())["numerics"]
    assert (numerics["device"], numerics["dtype"]) == ("cuda", "bfloat16")
    assert numerics["path"]["kernels"]
    assert digest(caches[0]) == digest(caches[1])


@pytest.mark.slow
def test_workers_may_leave_and_join_in_the_middle(overrides, joined, tmp_path) -> None:
    data = write_json_lines(tmp_path / "many.jsonl", sentences(600, seed=5))
    many = [f"distillation.dataset.data_files={data}", "distillation.partition.rows=2"]
    whole = digest(generate(load_config([*joined, *many, f"distillation.teacher.cache_dir={tmp_path / 'whole'}"])))

    receipts = cache_dir(overrides) / "receipts"

    def processes() -> set[int]:
        return {json.loads(path.read_text())["process"] for path in receipts.rglob("*.json")}

    with dask_processes(tmp_path) as (file, _):
        driver = subprocess.Popen(
            [*COMMAND, *overrides, *many, f"distillation.cluster.scheduler_file={file}"],
            stderr=subprocess.PIPE,
            text=True,
        )
        (first,) = wait_for(processes, driver)
        second = start_worker(file, cuda=True)
        try:
            wait_for(lambda: len(processes()) == 2, driver)
            os.kill(first, signal.SIGTERM)
            log = finish(driver)
        finally:
            second.terminate()
            finish(second)
    assert driver.returncode == 0, log
    assert digest(cache_dir(overrides) / "teacher_logits.h5") == whole


@pytest.mark.parametrize(
    "banner", [b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["ssh", "http"]
)
def test_a_server_of_another_protocol_is_refused(banner) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            peer, _ = server.accept()
            with peer:
                peer.sendall(banner)
                while peer.recv(1024):
                    pass

        threading.Thread(target=greet, daemon=True).start()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with (
            pytest.raises(ClusterError, match=r"got an answer that is not a Dask scheduler's; start `dask scheduler`"),
            open_cluster(GenerationConfig(), ClusterConfig(scheduler=address)),
        ):
            pass


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "localhost",
            "got missing port number in address 'localhost'; .* such as tcp://host:8786, not that of the dash",
        ),
        ("http://localhost:8787", "got unknown address scheme 'http' .*; start `dask scheduler`"),
    ],
)
def test_an_address_of_another_form_is_refused(address, message) -> None:
    with (
        pytest.raises(ClusterError, match=message),
        open_cluster(GenerationConfig(), ClusterConfig(scheduler=address)),
    ):
        pass
