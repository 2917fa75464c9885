"""Real worker processes with a pretended sick device: the job ends as if undisturbed, and names the worker."""

from __future__ import annotations

import contextlib
import re
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import dask
import pytest
import torch
from builders import cache_dir, digest, run, share_a_gpu
from distributed import Client, LocalCluster, WorkerPlugin

from dask_logits import ClusterError, PartitionsFailedError, read_status
from dask_logits.job.gpus import WorkerFacts, worker_facts
from dask_logits.run.failures import read_failures
from dask_logits.run.folder import RunFolder

SICK = 0
# The other worker waits until the sick one is retired.
HELD = ("sick", "none", "worn")
PARTITIONS = "distillation.partition.rows=2"


class Sickness(WorkerPlugin):
    """Has a worker's device fail, also after a restart, and notes each failure in a file."""

    def __init__(self, act: str, log: Path) -> None:
        self.act, self.log = act, log

    def setup(self, worker) -> None:
        import os
        import time

        import torch

        from dask_logits import TeacherError
        from dask_logits.job import remote

        held = self.act in HELD and worker.name != SICK
        process, act, log, mine = remote.process_partition, self.act, self.log, worker.name
        n_done = 0

        def rounds() -> int:
            # A process whose device is poisoned is restarted, and all that is in flight on it counts once.
            lines = log.read_text().splitlines()
            return len(lines) if act == "none" else len({line.split()[2] for line in lines})

        def computed(task, on_tokens, stages):
            nonlocal n_done
            index = task.partition.index
            error = None
            if act == "row" and index == 5:
                error = torch.AcceleratorError("CUDA error: device-side assert triggered")
            elif act == "all" or (act == "sick" and mine == SICK):
                error = RuntimeError("CUDA error: an illegal memory access was encountered")
            elif act == "none" and mine == SICK:
                error = TeacherError("device: expected a CUDA device in this worker, got none")
            elif act == "later" and mine == SICK and n_done >= 2:
                error = torch.AcceleratorError("CUDA error: unspecified launch failure")
            elif act == "worn" and mine == SICK and (n_done >= 2 or log.read_text()):
                error = RuntimeError("CUDA error: uncorrectable ECC error encountered")
            if held and n_done >= 2:
                # Otherwise the other worker may complete all partitions before the sick one is retired.
                deadline = time.monotonic() + 60
                while rounds() < 3 and time.monotonic() < deadline:
                    time.sleep(0.05)
            if act == "cuda" and mine == SICK and n_done == 1 and not log.read_text():
                try:
                    # Reading out of bounds makes every later call of this process fail.
                    torch.zeros(1, device="cuda").index_select(0, torch.full((1,), 9, device="cuda"))
                    torch.cuda.synchronize()
                except RuntimeError as real:
                    error = real
            if error is not None:
                with log.open("a") as file:
                    file.write(f"{mine} {index} {os.getpid()}\n")
                raise error
            n_done += 1
            return process(task, on_tokens, stages)

        remote.process_partition = computed


@contextlib.contextmanager
def sick_cluster(act: str, log: Path, workers: int = 2) -> Iterator[str]:
    settings = {
        "distributed.scheduler.worker-saturation": 1.0,
        "distributed.scheduler.allowed-failures": 2,
        # Read at each death, so it must hold until the end.
        "distributed.deploy.lost-worker-timeout": "1 day",
    }
    log.touch()
    with dask.config.set(settings):
        cluster = LocalCluster(
            n_workers=workers, threads_per_worker=2, memory_limit=None, dashboard_address="127.0.0.1:0",
            host="127.0.0.1",
        )  # fmt: skip
        try:
            with Client(cluster) as client:
                client.register_plugin(Sickness(act, log))
                yield f"distillation.cluster.scheduler={cluster.scheduler_address}"
        finally:
            # distributed 2026.7.1 may hang in closing a cluster whose worker was restarted.
            with contextlib.suppress(TimeoutError):
                cluster.close(timeout=10)


def failures(log: Path) -> list[tuple[str, int]]:
    return [(worker, int(index)) for worker, index, _ in (line.split() for line in log.read_text().splitlines())]


def _with_a_gpu(dask_worker) -> WorkerFacts:
    return worker_facts()._replace(gpus_in_use=(f"NVIDIA H200 GPU-e{dask_worker.name}",))


@pytest.mark.parametrize(
    ("act", "most"),
    [
        # One partition at a time, because it has completed none.
        ("sick", 3),
        pytest.param("none", 3, marks=pytest.mark.slow),
        # Two are in flight at its first failure.
        pytest.param("worn", 4, marks=pytest.mark.slow),
    ],
)
def test_a_sick_worker_costs_few_attempts_and_is_named(overrides, here, tmp_path, monkeypatch, act, most) -> None:
    monkeypatch.setattr("dask_logits.job.newcomers.worker_facts", _with_a_gpu)
    whole = digest(run(here, PARTITIONS, f"distillation.teacher.cache_dir={tmp_path / 'whole'}"))
    with sick_cluster(act, tmp_path / "log") as scheduler:
        assert digest(run(overrides, PARTITIONS, scheduler)) == whole
    lost = failures(tmp_path / "log")
    assert 3 <= len(lost) <= most
    status = read_status(cache_dir(overrides))
    assert (status.state, status.failed) == ("complete", {})
    ((worker, reason),) = status.left_out.items()
    # Its last process has another address than the one that told its GPU.
    assert re.fullmatch(rf"tcp://\S+ on {re.escape(socket.gethostname())} \(NVIDIA H200 GPU-e{SICK}\)", worker)
    assert reason.startswith("its device failed 3 times in a row, the last time with: ")
    assert worker in (cache_dir(overrides) / "report.html").read_text()


@pytest.mark.slow
def test_a_device_that_fails_after_some_partitions_is_restarted(overrides, here, tmp_path) -> None:
    whole = digest(run(here, PARTITIONS, f"distillation.teacher.cache_dir={tmp_path / 'whole'}"))
    with sick_cluster("later", tmp_path / "log", workers=1) as scheduler:
        assert digest(run(overrides, PARTITIONS, scheduler)) == whole
    # Each process scores two or three of the 20 partitions, and ends with at most two on it.
    assert 5 <= len(failures(tmp_path / "log")) <= 2 * 20 // 2
    assert read_status(cache_dir(overrides)).left_out == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_real_error_of_a_gpu_restarts_the_worker_and_costs_few_attempts(
    overrides, here, tmp_path, monkeypatch
) -> None:
    share_a_gpu(monkeypatch)
    whole = digest(run(here, PARTITIONS, f"distillation.teacher.cache_dir={tmp_path / 'whole'}"))
    with sick_cluster("cuda", tmp_path / "log") as scheduler:
        assert digest(run(overrides, PARTITIONS, scheduler)) == whole
    assert len(failures(tmp_path / "log")) == 1
    status = read_status(cache_dir(overrides))
    assert (status.state, status.failed, status.left_out) == ("complete", {}, {})


@pytest.mark.slow
def test_when_every_device_is_sick_the_job_ends_and_blames_no_partition(overrides, tmp_path) -> None:
    with (
        sick_cluster("all", tmp_path / "log") as scheduler,
        pytest.raises(ClusterError, match="expected a worker that can score, got none") as caught,
    ):
        run(overrides, PARTITIONS, scheduler, "distillation.job.stall_seconds=120")
    assert str(caught.value).count("its device failed 3 times in a row") == 2
    # While no worker is present, a partition waits at the scheduler, which may give it to a worker beside another.
    assert max(Counter(worker for worker, _ in failures(tmp_path / "log")).values()) <= 4
    assert read_failures(RunFolder(cache_dir(overrides)), lambda indices: ()) == {}


@pytest.mark.slow
def test_a_partition_that_breaks_good_devices_is_quarantined_and_no_row_is_blamed(overrides, here, tmp_path) -> None:
    with sick_cluster("row", tmp_path / "log") as scheduler:
        with pytest.raises(PartitionsFailedError, match="device-side assert") as caught:
            run(overrides, PARTITIONS, scheduler)
        assert list(caught.value.reasons) == [5]
        entry = read_failures(RunFolder(cache_dir(overrides)), lambda indices: ())[5]
        assert (entry.kind, entry.rows) == ("device", ())
        status = read_status(cache_dir(overrides))
        assert (status.committed, status.left_out) == (19, {})
    whole = digest(run(here, PARTITIONS, f"distillation.teacher.cache_dir={tmp_path / 'whole'}"))
    again = [o for o in here if "cache_dir" not in o]
    assert digest(run([*again, f"distillation.teacher.cache_dir={cache_dir(overrides)}"], PARTITIONS)) == whole
