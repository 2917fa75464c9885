"""Workers of a joined scheduler: who gets work, by the GPUs that they see and use. The GPUs are pretended."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest
from distributed import Client, LocalCluster

from dask_logits.config.groups import ClusterConfig, GenerationConfig, JobConfig
from dask_logits.errors import ClusterError
from dask_logits.job.cluster import _seconds_since_arrival, open_cluster
from dask_logits.job.dask_executor import DaskExecutor
from dask_logits.job.gpus import WorkerFacts
from dask_logits.job.window import Window

_PACKAGES = {"dask_logits": "1"}


def facts_of(*gpus: str | None):
    """Return what replaces `worker_facts`. The GPUs are those of the workers, by name: given>used. None: no GPU."""

    def facts(dask_worker) -> WorkerFacts:
        name = gpus[dask_worker.name]
        if name is None:
            return WorkerFacts(f"node{dask_worker.name}", 8, (), {"cpu": _PACKAGES})
        given, used = name.split(">")
        both = {"cpu": _PACKAGES, "cuda": {**_PACKAGES, "gpu": "NVIDIA H200"}}
        return WorkerFacts("node", 8, (given,), both, (f"NVIDIA H200 {used}",))

    return facts


@contextlib.contextmanager
def workers(n_workers: int) -> Iterator[LocalCluster]:
    """Start a cluster whose workers are threads of this process, with a port each."""
    with LocalCluster(
        n_workers=n_workers, threads_per_worker=1, processes=False, protocol="tcp://", host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
    ) as cluster:  # fmt: skip
        yield cluster


@contextlib.contextmanager
def joined(
    cluster: LocalCluster, monkeypatch, *gpus: str | None, device: str = "auto", gpus_per_worker: int = 1
) -> Iterator[DaskExecutor]:
    monkeypatch.setattr("dask_logits.job.newcomers.worker_facts", facts_of(*gpus))
    config = ClusterConfig(scheduler=cluster.scheduler_address, wait_seconds=30)
    with open_cluster(GenerationConfig(device=device, gpus_per_worker=gpus_per_worker), config) as executor:
        yield executor


@pytest.mark.parametrize(
    ("gpus", "device", "says"),
    [
        (("GPU-e0>GPU-e0", "GPU-e1>GPU-e1"), "cuda", None),
        (("GPU-e0>GPU-e0", None), "cuda", " on node1: it sees no GPU; start it where nvidia-smi shows one"),
        (
            ("GPU-e0>GPU-e0", "1>GPU-e0"),
            "cuda",
            " on node (NVIDIA H200 GPU-e0): it computes on NVIDIA H200 GPU-e0, as tcp://",
        ),
        (
            ("GPU-e0>GPU-e0", "GPU-e1>GPU-e2"),
            "cuda",
            " on node (NVIDIA H200 GPU-e2): it was given GPU-e1, and computes on NVIDIA H200 GPU-e2",
        ),
    ],
)
def test_auto_takes_the_workers_with_a_gpu_of_their_own_and_names_the_others(
    monkeypatch, caplog, gpus, device, says
) -> None:
    with workers(2) as cluster, joined(cluster, monkeypatch, *gpus) as executor:
        first, second = (cluster.workers[name].address for name in (0, 1))
        assert executor.device == device
        # Of two workers on one GPU, the one with the lower port keeps it.
        left_out = list(executor.roster.left_out)
        assert len(left_out) == (says is not None)
        assert executor.environments.keys() == {first, second} - set(left_out)
        assert executor.roster.usable([first, second]) == {first, second} - set(left_out)
    if says is None:
        assert "get no work" not in caplog.text
    else:
        assert f"these workers get no work:\n  {left_out[0]}{says}" in caplog.text


def test_a_gpu_that_no_worker_has_is_refused_and_each_worker_is_named(monkeypatch) -> None:
    with workers(2) as cluster:
        with (
            pytest.raises(ClusterError, match=r"device: expected workers with a GPU, got none:") as caught,
            joined(cluster, monkeypatch, None, None, device="cuda"),
        ):
            pass
        for name in (0, 1):
            assert f"{cluster.workers[name].address} on node{name}: it sees no GPU" in str(caught.value)
        with joined(cluster, monkeypatch, None, None, device="cpu") as executor:
            assert (executor.device, executor.roster.left_out) == ("cpu", {})
        # Asked for, the CPU is used, also by workers that share a GPU.
        with joined(cluster, monkeypatch, "0>GPU-e0", "1>GPU-e0", device="cpu") as executor:
            assert (executor.device, executor.roster.left_out) == ("cpu", {})
            assert len(executor.environments) == 2


@pytest.mark.parametrize("gpus", [(None, None), ("GPU-e0>GPU-e0", None)], ids=["without GPUs", "with one GPU"])
def test_workers_with_fewer_gpus_than_a_teacher_needs_do_not_score_it(monkeypatch, gpus) -> None:
    with (
        workers(2) as cluster,
        pytest.raises(ClusterError, match=r"gpus_per_worker: expected workers with 2 GPUs each, got none:") as caught,
        joined(cluster, monkeypatch, *gpus, gpus_per_worker=2),
    ):
        pass
    n_blind = gpus.count(None)
    assert str(caught.value).count("it sees no GPU") == n_blind
    assert str(caught.value).count("it has 1 of the 2 GPUs that a worker takes") == 2 - n_blind


def test_workers_that_join_later_are_compared_and_named(monkeypatch, caplog, tmp_path) -> None:
    gpus = ("GPU-e0>GPU-e0", "GPU-e1>GPU-e1", None, "1>GPU-e0", "GPU-e4>GPU-e3")
    with workers(1) as cluster, joined(cluster, monkeypatch, *gpus) as executor:
        facts, marker = facts_of(*gpus), tmp_path / "asked"

        def late(dask_worker) -> WorkerFacts:
            if dask_worker.name == 1 and not marker.exists():
                marker.touch()
                raise TimeoutError("busy")
            return facts(dask_worker)

        monkeypatch.setattr("dask_logits.job.newcomers.worker_facts", late)
        monkeypatch.setattr("dask_logits.job.newcomers._AGAIN_SECONDS", 0.0)
        window = Window(executor.client, iter(()), JobConfig(), executor.roster, executor.newcomers)
        cluster.scale(len(gpus))
        deadline = time.monotonic() + 60
        while len(executor.newcomers.facts) + len(executor.roster.left_out) < len(gpus):
            assert time.monotonic() < deadline, (executor.newcomers.facts, executor.roster.left_out)
            window.fill()
            time.sleep(0.05)
        assert marker.exists()
        address = {name: cluster.workers[name].address for name in range(len(gpus))}
        assert executor.roster.usable(address.values()) == {address[0], address[1]}
        for name, says in {
            2: " on node2 joined and gets no work: it sees no GPU",
            3: " on node (NVIDIA H200 GPU-e0) joined and gets no work: it computes on NVIDIA H200 GPU-e0, as tcp://",
            4: " on node (NVIDIA H200 GPU-e3) joined and gets no work: it was given GPU-e4, and computes on NVIDIA",
        }.items():
            assert f"worker {address[name]}{says}" in caplog.text
        window.release()


class Arrivals:
    """A clock of the job. While it waits, workers arrive one after another, each after some seconds."""

    def __init__(self, cluster: LocalCluster, n_workers: int, every_seconds: float) -> None:
        self.seconds = self.arrived = 0.0
        self._cluster, self._n_workers, self._every_seconds = cluster, n_workers, every_seconds

    def since_arrival(self, client: Client) -> float:
        return self.seconds - self.arrived

    def monotonic(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        n_workers = min(self._n_workers, 1 + int(self.seconds / self._every_seconds))
        if n_workers > len(self._cluster.workers):
            self._cluster.scale(n_workers)
            self.arrived = self.seconds
            with Client(self._cluster) as client:
                client.wait_for_workers(n_workers, timeout=30)


@pytest.mark.parametrize("n_before", [0, 1])
def test_auto_waits_a_moment_for_a_gpu_where_workers_are_just_arriving(monkeypatch, n_before) -> None:
    with workers(n_before) as cluster:
        clock = Arrivals(cluster, 2, every_seconds=3)
        monkeypatch.setattr("dask_logits.job.cluster.time", clock)
        monkeypatch.setattr("dask_logits.job.cluster._seconds_since_arrival", clock.since_arrival)
        # The one without a GPU comes first.
        first = threading.Timer(0.5, cluster.scale, (1,))
        first.start()
        with joined(cluster, monkeypatch, None, "GPU-e0>GPU-e0") as executor:
            assert executor.device == "cuda"
            assert len(executor.roster.left_out) == 1
        first.join()
        assert clock.seconds == 3 + 5


def test_workers_that_came_long_ago_are_not_waited_for(monkeypatch) -> None:
    with workers(1) as cluster, Client(cluster) as client:
        assert 0 <= _seconds_since_arrival(client) < 60
        time.sleep(0.5)
        clock = Arrivals(cluster, 2, every_seconds=3)
        monkeypatch.setattr("dask_logits.job.cluster.time", clock)
        monkeypatch.setattr("dask_logits.job.cluster._SETTLE_SECONDS", 0.2)
        with joined(cluster, monkeypatch, None, "GPU-e0>GPU-e0") as executor:
            assert executor.device == "cpu"
        assert clock.seconds == 0


@pytest.mark.parametrize(
    ("every_seconds", "threads", "seconds"),
    [(4, 8 // 3, 2 * 4 + 5), (5.5, 8, 5), (1, 1, 30)],
    ids=["three soon", "others too late", "more and more"],
)
def test_cores_are_shared_with_workers_that_arrive_soon_after_the_first(
    monkeypatch, every_seconds, threads, seconds
) -> None:
    n_workers = 40 if every_seconds == 1 else 3
    with workers(0) as cluster:
        clock = Arrivals(cluster, n_workers, every_seconds)
        monkeypatch.setattr("dask_logits.job.cluster.time", clock)
        monkeypatch.setattr("dask_logits.job.cluster._seconds_since_arrival", clock.since_arrival)
        first = threading.Timer(0.5, cluster.scale, (1,))
        first.start()
        gpus = (f"GPU-e{name}>GPU-e{name}" for name in range(n_workers))
        with joined(cluster, monkeypatch, *gpus) as executor:
            # A host has 8 cores.
            assert executor.torch_threads == threads
        first.join()
        assert clock.seconds == seconds
