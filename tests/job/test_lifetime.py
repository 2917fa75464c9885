"""Workers that leave on purpose: ``--lifetime``, ``retire_workers``, a cluster that shrinks."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm
from builders import cache_dir, dask_processes, digest, finish, start_worker, wait_for
from distributed import Client
from test_cluster import COMMAND

from dask_logits import generate, load_config
from dask_logits.config.groups import JobConfig
from dask_logits.job.flight import Submitted
from dask_logits.job.window import Window
from dask_logits.run.plan import Partition

SLOW = """
import time

def dask_setup(worker):
    from dask_logits.job import remote

    process = remote.process_partition

    def slow(task, on_tokens, stages):
        time.sleep(1)
        return process(task, on_tokens, stages)

    remote.process_partition = slow
"""


@pytest.fixture
def slow(tmp_path) -> tuple[str, str]:
    """Options of a worker that takes a second for each partition."""
    (tmp_path / "slow.py").write_text(SLOW)
    return "--preload", str(tmp_path / "slow.py")


def check_receipts(folder: Path, processes: int) -> None:
    receipts = [json.loads(path.read_text()) for path in (folder / "receipts").rglob("*.json")]
    assert len({receipt["process"] for receipt in receipts}) >= processes
    assert not any("failed_attempts" in receipt for receipt in receipts)


def test_a_worker_retired_during_a_partition_is_replaced_by_a_later_one(overrides, cache, tmp_path, slow) -> None:
    left = tmp_path / "left"
    mine = [*overrides, f"distillation.teacher.cache_dir={left}"]
    with dask_processes(tmp_path, *slow) as (file, _):
        driver = warm.Popen([*COMMAND, *mine, f"distillation.cluster.scheduler_file={file}"], stderr=subprocess.PIPE)
        with Client(scheduler_file=str(file)) as client:

            def held() -> list[tuple[str, str]]:
                return [(worker, key) for worker, keys in client.processing().items() for key in keys]

            wait_for(lambda: list((left / "receipts").rglob("*.json")), driver)
            before = held()
            # It has just begun.
            ((worker, key),) = wait_for(lambda: [] if (now := held()) == before else now, driver)
            assert list(client.retire_workers([worker])) == [worker]
            assert held() == []
        second = start_worker(file, *slow)
        try:
            log = finish(driver)
        finally:
            second.terminate()
            finish(second)
    assert driver.returncode == 0, log
    assert f"worker {worker} on " in log
    assert f" left on purpose; another one scores partition {key.split('-')[2]}\n" in log
    assert "ERROR" not in log
    check_receipts(left, 2)
    assert digest(left / "teacher_logits.h5") == digest(cache)


@pytest.mark.slow
def test_lifetimes_of_a_few_partitions_give_the_same_cache(overrides, joined, tmp_path, slow) -> None:
    many = "distillation.partition.rows=2"
    undisturbed = f"distillation.teacher.cache_dir={tmp_path / 'undisturbed'}"
    whole = digest(generate(load_config([*joined, many, undisturbed])))
    short = ("--lifetime", "5s", "--lifetime-stagger", "1s", "--lifetime-restart")
    # The worker without a lifetime is there for the calibration.
    with dask_processes(tmp_path, *slow) as (file, _):
        others = [start_worker(file, *slow, *short) for _ in range(2)]
        driver = warm.Popen(
            [*COMMAND, *overrides, many, f"distillation.cluster.scheduler_file={file}"], stderr=subprocess.PIPE
        )
        try:
            log = finish(driver)
        finally:
            for each in others:
                each.terminate()
                finish(each)
    assert driver.returncode == 0, log
    assert "left on purpose" in log
    assert "ERROR" not in log
    check_receipts(cache_dir(overrides), 3)
    assert digest(cache_dir(overrides) / "teacher_logits.h5") == whole


@pytest.mark.parametrize("left", [True, False])
def test_only_losses_that_are_not_departures_count(caplog, left: bool) -> None:
    caplog.set_level("INFO")
    window = Window(SimpleNamespace(), iter(()), JobConfig(retries=0))
    task = SimpleNamespace(partition=Partition(index=3, first_row=9, n_rows=3), trial=None)
    task.after = lambda *given: task
    window.attempts.begin(task)
    for turn in range(5):
        worker, key = f"tcp://10.0.0.1:{turn}", f"key-{turn}"
        future = SimpleNamespace(release=lambda: None)
        window.flight._submitted[key] = Submitted(task, future, workers=frozenset({worker}))
        window._take_back_orphans({worker})
        assert window.flight.tasks([key]) == [task]
        if left:
            window.note_departure(worker, {key, "of another client"})
        window._take_back_orphans(set())
        if not left and turn == 1:
            break
        assert window.attempts.take_due(math.inf) is task
    assert len(window.events()) == (0 if left else 1)
    lines = [record.getMessage() for record in caplog.records if "left on purpose" in record.getMessage()]
    assert len(lines) == (5 if left else 0)
    if left:
        assert lines[1].endswith("left on purpose; another one scores partition 000003")
        assert "as 2 others did during partition 000003; start workers with a longer --lifetime" in lines[2]
