"""A job that is told to stop stops soon, leaves nothing half, and goes on where it was."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time

import psutil
import pytest
from builders import cache_dir, sentences, wait_for, write_json_lines
from test_cluster import COMMAND

from dask_logits import generate, load_config, read_status
from dask_logits.store.cache import CacheReader

# Seconds on an idle machine; two other tests may run beside this one.
BOUND_SECONDS = 60


def _left(group: int) -> list[str]:
    """Return what still runs of a process group."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_the_job_soon_and_it_resumes(overrides, joined, tmp_path, number) -> None:
    data = write_json_lines(tmp_path / "many.jsonl", sentences(120, seed=5))
    many = [f"distillation.dataset.data_files={data}", "distillation.partition.rows=2"]
    mine = [*overrides, *many, "cluster=local_cpu", "distillation.teacher.generation.num_workers=1"]
    run = cache_dir(overrides)
    driver = subprocess.Popen([*COMMAND, *mine], start_new_session=True, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list((run / "receipts").rglob("0*.json")), driver)
    os.kill(driver.pid, number)
    started = time.monotonic()
    _, log = driver.communicate(timeout=BOUND_SECONDS)
    assert driver.returncode == 130, log
    assert "stopped; run the same command again to go on" in log
    while (left := _left(driver.pid)) and time.monotonic() - started < BOUND_SECONDS:
        time.sleep(0.1)
    assert left == []
    assert (run / ".driver.lock").read_bytes() == b""
    before = read_status(run)
    assert before.state == "stopped"
    kept = {path: path.read_text() for path in (run / "receipts").rglob("*.json")}
    assert 1 <= before.committed == len(kept) < 60
    resumed = generate(load_config([*joined, *many]))
    assert {path: path.read_text() for path in kept} == kept
    whole = generate(load_config([*joined, *many, f"distillation.teacher.cache_dir={tmp_path / 'whole'}"]))
    found, wanted = (CacheReader(path).attributes["content_digest"] for path in (resumed, whole))
    assert found == wanted
