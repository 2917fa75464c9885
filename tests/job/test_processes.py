"""Workers start without the caller's main module: scripts without a guard, notebooks, standard input, restarts."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing import spawn
from pathlib import Path

import pytest
import warm
from builders import finish, sentences, wait_for, write_json_lines

from dask_logits import ClusterError, read_status
from dask_logits.job.processes import WORKER_NAME, check_can_start_processes, without_main_module

# No main guard: a process that imported it would start the job again.
JOB = """
from dask_logits import generate, load_config
print("the main module runs", flush=True)
print(generate(load_config({overrides!r})), flush=True)
"""
GENERATOR = """
import sys
from dask_logits import generate, load_config

class Text(str):
    pass

def rows():
    for text in {texts!r}:
        yield {{"text": Text(text)}}

config = load_config({overrides!r}, dataset_given=True)
print(generate(config, rows()), flush=True)
"""


@pytest.fixture
def local(overrides: list[str]) -> list[str]:
    """The overrides of a small job on one worker of its own."""
    return [*overrides, "cluster=local_cpu", "distillation.teacher.generation.num_workers=1"]


def _worker_of(receipts: Path) -> dict[int, Path]:
    """Return process → a receipt it wrote."""
    return {json.loads(path.read_text())["process"]: path for path in receipts.rglob("*.json")}


def test_a_script_without_a_guard_may_be_edited_and_deleted_while_it_runs(local, tmp_path) -> None:
    data = write_json_lines(tmp_path / "many.jsonl", sentences(100, seed=5))
    mine = [*local, f"distillation.dataset.data_files={data}", "distillation.partition.rows=2"]
    script = tmp_path / "job.py"
    script.write_text(JOB.format(overrides=mine))
    receipts = tmp_path / "run" / "receipts"
    answer = tmp_path / "answer"
    with answer.open("w") as stdout:
        job = warm.Popen([sys.executable, str(script)], stdout=stdout, stderr=subprocess.PIPE)
    (first,) = wait_for(lambda: _worker_of(receipts), job)
    script.write_text("this is no longer Python")
    os.kill(first, signal.SIGKILL)
    (second,) = wait_for(lambda: set(_worker_of(receipts)) - {first}, job)
    script.unlink()
    os.kill(second, signal.SIGKILL)
    wait_for(lambda: set(_worker_of(receipts)) - {first, second}, job)
    log = finish(job)
    assert job.returncode == 0, log
    assert answer.read_text().count("the main module runs") == 1
    assert read_status(tmp_path / "run").state == "complete"


@pytest.mark.slow
def test_a_generator_in_a_script_on_standard_input(local, tmp_path) -> None:
    script = GENERATOR.format(
        texts=sentences(20),
        overrides=[o for o in local if ".dataset.name" not in o and "data_files" not in o]
        + ["distillation.dataset.max_samples=all"],
    )
    done = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "run" / "teacher_logits.h5")


@pytest.mark.slow
def test_a_notebook_cell_without_a_guard(local, tmp_path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(JOB.format(overrides=local))])
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    answer = "".join(output.get("text", "") for output in notebook.cells[0].outputs if output.get("name") == "stdout")
    assert answer.split("\n")[:2] == ["the main module runs", str(tmp_path / "run" / "teacher_logits.h5")]


CUDA = """
import os, signal, time
from dask_logits import load_config
from dask_logits.job.cluster import open_cluster
config = load_config({overrides!r})
with open_cluster(config.teacher.generation, config.cluster) as cluster:
    (first,) = cluster.client.run(os.getpid).values()
    open(__file__, "w").write("this is no longer Python")
    os.kill(first, signal.SIGKILL)
    deadline = time.monotonic() + 240
    while set(cluster.client.run(os.getpid, on_error="return").values()) in (set(), {{first}}):
        assert time.monotonic() < deadline, "no other worker came"
        time.sleep(0.1)
"""


def test_a_worker_of_a_cuda_cluster_is_replaced_though_the_script_has_changed(overrides, tmp_path) -> None:
    mine = [*overrides, "cluster=local_cuda", "distillation.teacher.generation.device=cpu",
            "distillation.teacher.generation.num_workers=1"]  # fmt: skip
    script = tmp_path / "job.py"
    script.write_text(CUDA.format(overrides=mine))
    # A test hook of dask-cuda, not an API.
    pretended = {**os.environ, "DASK_CUDA_TEST_DISABLE_DEVICE_SPECIFIC": "1", "CUDA_VISIBLE_DEVICES": "0"}
    done = warm.run([sys.executable, str(script)], env=pretended)
    assert done.returncode == 0, done.stderr
    assert script.read_text() == "this is no longer Python"


def test_only_workers_start_without_the_main_module_and_only_while_a_job_runs() -> None:
    original, before = spawn.get_preparation_data, spawn.get_preparation_data("another")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with without_main_module():
        with without_main_module():
            assert spawn.get_preparation_data("another") == before
        worker = spawn.get_preparation_data(WORKER_NAME)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
        assert not any(key.startswith("init_main") for key in worker)
        assert worker.keys() >= {"sys_path", "dir", "authkey"}
    assert spawn.get_preparation_data is original


def test_distributed_still_gives_its_workers_that_name(scheduler) -> None:
    from distributed import Client

    with Client(scheduler) as client:
        (name,) = client.run(lambda: multiprocessing.current_process().name).values()
    assert name == WORKER_NAME


def test_a_daemon_process_cannot_start_workers_and_is_refused_at_once() -> None:
    with (
        multiprocessing.get_context("spawn").Pool(1) as pool,
        pytest.raises(
            ClusterError, match=r"cannot start worker processes, because this process \(SpawnPoolWorker.*main process"
        ),
    ):
        pool.apply(check_can_start_processes)
