"""Workers that die, hang or lose their scheduler."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator

import dask
import pytest
from builders import cache_dir, dask_processes, wait_for
from distributed import Client, LocalCluster, WorkerPlugin
from test_cluster import COMMAND

from dask_logits import ClusterError, PartitionsFailedError, generate, load_config, read_status


class Saboteur(WorkerPlugin):
    """Replaces the partition task in every worker, restarted ones too."""

    def __init__(self, index: int, act: str) -> None:
        self.index, self.act = index, act

    def setup(self, worker) -> None:
        from dask_logits.job import window

        original, index, act = window.process_partition, self.index, self.act

        def sabotaged(task, on_tokens, stages):
            if task.partition.index == index:
                import os
                import time

                if act == "die":
                    os._exit(1)
                time.sleep(60)
            return original(task, on_tokens, stages)

        window.process_partition = sabotaged


@contextlib.contextmanager
def sabotaged(index: int, act: str, threads: int = 1) -> Iterator[str]:
    with dask.config.set({"distributed.scheduler.allowed-failures": 1, "distributed.scheduler.worker-saturation": 1.0}):
        cluster = LocalCluster(
            n_workers=1,
            threads_per_worker=threads,
            memory_limit=None,
            dashboard_address="127.0.0.1:0",
            host="127.0.0.1",
        )
    try:
        with Client(cluster) as client:
            client.register_plugin(Saboteur(index, act))
            yield cluster.scheduler_address
    finally:
        # distributed 2026.7.1 may hang in closing a cluster whose worker has died.
        with contextlib.suppress(TimeoutError):
            cluster.close(timeout=10)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_partition_that_kills_its_worker_fails_alone(overrides, threads: int) -> None:
    # With two threads every death takes a neighbour along, which must not fail for it.
    with sabotaged(1, "die", threads) as address:
        config = load_config([*overrides, f"distillation.cluster.scheduler={address}"])
        with pytest.raises(PartitionsFailedError, match=r"partition 000001: its worker died 2 times") as caught:
            generate(config)
    assert list(caught.value.reasons) == [1]
    assert read_status(config.teacher.cache_dir).committed == 3


def test_a_partition_that_hangs_ends_in_a_diagnosis(overrides) -> None:
    with sabotaged(2, "hang") as address:
        config = load_config(
            [*overrides, f"distillation.cluster.scheduler={address}", "distillation.job.stall_seconds=15"]
        )
        with pytest.raises(ClusterError, match=r"expected progress within 15 s, .* 1 workers and partitions 000002 in"):
            generate(config)
    assert read_status(config.teacher.cache_dir).committed == 2


def test_a_lost_scheduler_ends_the_job_and_keeps_what_is_committed(overrides, tmp_path) -> None:
    with dask_processes(tmp_path) as (file, scheduler):
        mine = [*overrides, "distillation.partition.rows=1", f"distillation.cluster.scheduler_file={file}"]
        driver = subprocess.Popen([*COMMAND, *mine], stderr=subprocess.PIPE, text=True)
        try:
            wait_for(lambda: list((cache_dir(overrides) / "receipts").rglob("*.json")), driver)
            scheduler.kill()
            _, log = driver.communicate(timeout=60)
        finally:
            driver.kill()
            driver.communicate()
    assert driver.returncode == 1
    assert "expected a running scheduler, got none" in log
    assert read_status(cache_dir(overrides)).committed >= 1
