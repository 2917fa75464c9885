"""100,000 pretended partitions: driver and scheduler hold little more than Dask's own record of each."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

import psutil
import pytest
from distributed import Client, LocalCluster, WorkerPlugin

from dask_logits.config.groups import JobConfig
from dask_logits.job.dask_executor import DaskExecutor
from dask_logits.job.executor import Committed, Progress, Waiting
from dask_logits.job.roster import Roster
from dask_logits.run.plan import Partition
from dask_logits.run.records import Receipt

PARTITIONS = 100_000
WARM = 5_000
# distributed keeps an entry of each submission in a span's metadata: 0.8 KB, measured with 2026.7.1.
MOST_BYTES_EACH = 1500


class Pretender(WorkerPlugin):
    """Has workers return receipts at once."""

    def setup(self, worker) -> None:
        from dask_logits.job import remote

        remote.process_partition = lambda task, on_tokens, stages: Receipt.model_construct(
            partition=task.partition.index
        )


class Task:
    """The part of a task that the driver looks at."""

    run_id = "r"
    trial = None

    def __init__(self, index: int) -> None:
        self.partition = Partition(index=index, first_row=index, n_rows=1)


@contextlib.contextmanager
def pretending() -> Iterator[Client]:
    """Connect to a scheduler in this process, whose worker takes two partitions at a time."""
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=2, memory_limit=None, dashboard_address="127.0.0.1:0", host="127.0.0.1"
        ) as cluster,
        Client(cluster) as client,
    ):
        client.register_plugin(Pretender())
        yield client


@pytest.mark.slow
def test_memory_hardly_grows_with_partitions() -> None:
    process = psutil.Process(os.getpid())
    seen: list[int] = []
    rss: dict[int, int] = {}

    def tasks() -> Iterator[Task]:
        for index in range(PARTITIONS):
            yield Task(index)

    # The scheduler runs in this process, too.
    started = time.monotonic()
    with pretending() as client:
        executor = DaskExecutor(
            client=client, job=JobConfig(), device="cpu", torch_threads=1, dashboard=None, environments={},
            roster=Roster(),
        )  # fmt: skip
        for event in executor.run(tasks(), "r"):
            assert isinstance(event, Committed | Progress | Waiting)
            if isinstance(event, Committed):
                seen.append(event.receipt.partition)
                if len(seen) % WARM == 0:
                    rss[len(seen)] = process.memory_info().rss >> 20
    print(f"{PARTITIONS / (time.monotonic() - started):.0f} partitions/s, RSS in MiB {rss}")
    assert sorted(seen) == list(range(PARTITIONS))
    assert (max(rss.values()) - rss[WARM] << 20) < MOST_BYTES_EACH * PARTITIONS
