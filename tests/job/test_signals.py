"""A job that is told to stop stops soon, leaves nothing half, and goes on where it was."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import warm
from builders import cache_dir, finish, sentences, wait_for, write_json_lines
from test_cluster import COMMAND

from dask_logits import generate, load_config, read_status
from dask_logits.cache.reader import CacheReader

# For what takes seconds on an idle machine.
BOUND_SECONDS = 300
# What a calibration does, as far as a signal is concerned: a task on a worker that takes long.
LONG_TASK = """
import signal

# A test run in the background of a shell, or under nohup, would pass on that it ignores them.
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)

import sys
from dask_logits.cli import run
from dask_logits.config.groups import ClusterConfig, GenerationConfig, JobConfig
from dask_logits.job.roster import Roster
from dask_logits.job.single import run_one
from dask_logits.job.cluster import open_cluster

def task(seconds, on_step):
    import time
    if seconds:
        print("the task runs", flush=True)
        time.sleep(seconds)
    return {}

def job():
    print("the cluster starts", flush=True)
    cluster = ClusterConfig(kind="local_cpu", dashboard_address=None)
    with open_cluster(GenerationConfig(device="cpu", num_workers=1), cluster) as opened:
        run_one(opened.client, task, 600, JobConfig(), Roster())

run(job)
"""


def _left(group: int) -> list[str]:
    """Return what still runs of a process group."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found


@pytest.mark.slow
def test_a_signal_stops_the_job_soon_and_it_resumes(overrides, joined, tmp_path) -> None:
    data = write_json_lines(tmp_path / "many.jsonl", sentences(120, seed=5))
    many = [f"distillation.dataset.data_files={data}", "distillation.partition.rows=2"]
    mine = [*overrides, *many, "cluster=local_cpu", "distillation.teacher.generation.num_workers=1"]
    run = cache_dir(overrides)
    driver = subprocess.Popen([*COMMAND, *mine], start_new_session=True, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list((run / "receipts").rglob("0*.json")), driver)
    os.kill(driver.pid, signal.SIGTERM)
    started = time.monotonic()
    log = finish(driver)
    assert driver.returncode == 130, log
    assert "stopped; run the same command again to go on" in log
    while (left := _left(driver.pid)) and time.monotonic() - started < BOUND_SECONDS:
        time.sleep(0.1)
    assert left == []
    assert not (run / ".driver.lock").exists()
    before = read_status(run)
    assert before.state == "stopped"
    kept = {path: path.read_text() for path in (run / "receipts").rglob("*.json")}
    assert 1 <= before.committed == len(kept) < 60
    resumed = generate(load_config([*joined, *many]))
    assert {path: path.read_text() for path in kept} == kept
    whole = generate(load_config([*joined, *many, f"distillation.teacher.cache_dir={tmp_path / 'whole'}"]))
    found, wanted = (CacheReader(path).attributes["content_digest"] for path in (resumed, whole))
    assert found == wanted


@pytest.mark.parametrize(
    ("when", "number", "times"),
    [
        ("the cluster starts", signal.SIGINT, 1),
        ("the task runs", signal.SIGINT, 1),
        ("the task runs", signal.SIGINT, 2),
        ("the task runs", signal.SIGTERM, 1),
        pytest.param("the task runs", signal.SIGHUP, 1, marks=pytest.mark.slow),
        ("the task runs", signal.SIGUSR1, 1),
    ],
)
def test_a_signal_is_answered_with_one_line_and_leaves_no_process(
    when: str, number: int, times: int, tmp_path: Path
) -> None:
    # A fork's workers come from a server of forks, and do not inherit that only the driver acts on a signal to all.
    start = warm.Popen if number == signal.SIGTERM else subprocess.Popen
    output = tmp_path / "output"
    with output.open("w") as stdout:
        driver = start(
            [sys.executable, "-c", LONG_TASK], start_new_session=True, stdout=stdout, stderr=subprocess.PIPE, text=True
        )
    wait_for(lambda: when in output.read_text(), driver)
    for _ in range(times):
        # A terminal sends it to all processes of the job; SIGTERM is sent to the driver.
        (os.kill if number == signal.SIGTERM else os.killpg)(driver.pid, number)
    log = finish(driver)
    assert log == "dask-logits: stopped; run the same command again to go on\n"
    assert driver.returncode == 130
    started = time.monotonic()
    while (left := _left(driver.pid)) and time.monotonic() - started < BOUND_SECONDS:
        time.sleep(0.1)
    assert left == []
