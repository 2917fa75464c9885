"""Up to 100,000 pretended partitions: what driver and scheduler hold does not grow with them."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

import psutil
import pytest
from dask.utils import key_split
from distributed import Client, LocalCluster, WorkerPlugin

from dask_logits.config import JobConfig
from dask_logits.job import dispatch
from dask_logits.job.dispatch import run_partitions
from dask_logits.run.plan import Partition

PARTITIONS = 100_000
WARM = 5_000
MOST_MIB = 64


class Pretender(WorkerPlugin):
    """Has workers return receipts at once."""

    def setup(self, worker) -> None:
        from dask_logits.job import dispatch

        dispatch.process_partition = lambda task, on_tokens, stages: {"partition": task.partition.index}


class Task:
    """The part of a task that the driver looks at."""

    run_id = "r"

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


def kept(dask_scheduler) -> int:
    """How much the scheduler knows of submissions that it has forgotten."""
    spans = dask_scheduler.extensions["spans"].spans_search_by_name["default",]
    return sum(len(span.metadata["collections"]) for span in spans)


def test_the_scheduler_forgets_partitions(monkeypatch) -> None:
    with pretending() as client:
        for every, least, most in ((1000, 20, 100), (10, 1, 25)):
            monkeypatch.setattr(dispatch, "_FORGET_EVERY", every)
            run_partitions(client, map(Task, range(100)), JobConfig(), run_id="r", on_receipt=lambda receipt: None)
            assert least <= client.run_on_scheduler(kept) <= most
        # The scheduler's process is this one.
        assert key_split.cache_info().currsize <= most


@pytest.mark.slow
def test_memory_does_not_grow_with_partitions() -> None:
    process = psutil.Process(os.getpid())
    seen: list[int] = []
    rss: dict[int, int] = {}

    def tasks() -> Iterator[Task]:
        for index in range(PARTITIONS):
            yield Task(index)

    def note(receipt: dict) -> None:
        seen.append(receipt["partition"])
        if len(seen) % WARM == 0:
            rss[len(seen)] = process.memory_info().rss >> 20

    # The scheduler runs in this process, too.
    started = time.monotonic()
    with pretending() as client:
        failed = run_partitions(client, tasks(), JobConfig(), run_id="r", on_receipt=note)
    print(f"{PARTITIONS / (time.monotonic() - started):.0f} partitions/s, RSS in MiB {rss}")
    assert failed == {}
    assert sorted(seen) == list(range(PARTITIONS))
    assert max(rss.values()) - rss[WARM] < MOST_MIB
