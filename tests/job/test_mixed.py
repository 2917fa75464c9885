"""Workers of other releases or instruction sets, and workers that fail what others complete: one real scheduler."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm
from builders import cache_dir, digest, run, sentences, write_json_lines
from distributed import Client, LocalCluster, WorkerPlugin

import dask_logits
from dask_logits import CapacityError, ClusterError, RunConflictError, generate, load_config, read_status, verify
from dask_logits.job.calibration import check_environment
from dask_logits.run.folder import RunFolder

MANY = "distillation.partition.rows=2"
PACKAGE = Path(dask_logits.__file__).parent


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Address of a scheduler without workers."""
    with LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0", host="127.0.0.1") as cluster:
        yield cluster.scheduler_address


@contextlib.contextmanager
def workers(address: str, folder: Path, **environments: dict[str, str]) -> Iterator[None]:
    """Start ``dask worker`` processes: name → what is added to the environment."""
    command = [sys.executable, "-m", "dask", "worker", address, "--nthreads", "1", "--memory-limit", "0", "--no-nanny",
               "--host", "127.0.0.1", "--no-dashboard", "--local-directory", str(folder)]  # fmt: skip
    started = [
        # What a library reads when it is imported takes a new interpreter.
        (subprocess if more else warm).Popen(
            # ``python -m`` looks into the working directory first.
            [*command, "--name", name],
            cwd=more.get("PYTHONPATH"),
            env={**os.environ, **more},
            stderr=subprocess.DEVNULL,
        )
        for name, more in environments.items()
    ]
    try:
        with Client(address) as client:
            deadline = time.monotonic() + 120
            while environments.keys() - {
                each["name"] for each in client.scheduler_info(n_workers=-1)["workers"].values()
            }:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(30)


@pytest.fixture(scope="module")
def patched(tmp_path_factory) -> dict[str, str]:
    """Environment of a worker with another release: the same version number, other scoring sources."""
    folder = tmp_path_factory.mktemp("release")
    shutil.copytree(PACKAGE, folder / "dask_logits", ignore=shutil.ignore_patterns("__pycache__"))
    source = folder / "dask_logits" / "teacher" / "scoring.py"
    source.write_text(source.read_text() + "\n_OTHER = True\n")
    return {"PYTHONPATH": str(folder)}


def test_workers_that_differ_get_no_work_and_are_named(address, patched, overrides, joined, tmp_path, caplog) -> None:
    whole = digest(run(joined, MANY, f"distillation.teacher.cache_dir={tmp_path / 'whole'}"))
    mine = [*overrides, MANY, f"distillation.cluster.scheduler={address}"]
    with workers(address, tmp_path, other=patched):
        with workers(address, tmp_path, good={}, lesser={"ATEN_CPU_CAPABILITY": "default"}):
            assert digest(run(mine)) == whole
        elsewhere = [*mine, f"distillation.teacher.cache_dir={tmp_path / 'none'}"]
        with pytest.raises(ClusterError, match=r"(?s)expected workers with this release .*install the same release"):
            generate(load_config(elsewhere))
        assert not (tmp_path / "none").exists()
    receipts = [json.loads(path.read_text()) for path in (cache_dir(mine) / "receipts").rglob("0*.json")]
    assert len({receipt["process"] for receipt in receipts}) == 1
    assert not any("environment" in receipt for receipt in receipts)
    reasons = " ".join(read_status(cache_dir(mine)).left_out.values())
    for expected in ("cpu: expected x86_64", "got x86_64 DEFAULT; use machines with one", "dask_logits: expected"):
        assert expected in reasons
        assert expected in caplog.text


def test_a_run_of_another_environment_is_refused_or_recorded_and_known_to_verify(joined, caplog) -> None:
    run(joined, "distillation.job.keep_partitions=true")
    folder = cache_dir(joined)
    recorded = folder / "calibration.json"
    calibration = json.loads(recorded.read_text())
    assert calibration["environment"]["cpu"]
    recorded.write_text(json.dumps({**calibration, "environment": {**calibration["environment"], "torch": "2.0.0"}}))
    (folder / "teacher_logits.h5").unlink()
    (folder / "receipts" / "000" / "000001.json").unlink()
    left = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(RunConflictError, match=r"(?s)torch: expected 2\.0\.0, got .*allow_mixed_workers=true.*force_"):
        run(joined)
    assert sorted(path.name for path in folder.rglob("*")) == left
    run(joined, "distillation.cluster.allow_mixed_workers=true")
    receipt = json.loads((folder / "receipts" / "000" / "000001.json").read_text())
    assert receipt["environment"] == calibration["environment"]
    report = verify(folder)
    assert report.ok
    assert "1 of 4 partitions were scored in another environment" in report.notes[0]


def test_a_run_is_not_taken_up_on_another_device(here) -> None:
    run(here)
    folder = RunFolder(cache_dir(here))
    executor = SimpleNamespace(device="cuda", environments={"tcp://a:1": {"dask_logits": "1", "gpu": "NVIDIA H200"}})
    with pytest.raises(
        RunConflictError, match="was calibrated on 'cpu', the workers now are 'cuda', and the bits would"
    ):
        check_environment(SimpleNamespace(run=folder), folder.calibration(), executor)


def test_verify_names_the_environment_where_targets_come_out_otherwise(joined) -> None:
    run(joined)
    lesser = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    command = [sys.executable, "-m", "dask_logits", "verify", str(cache_dir(joined)), "--recompute", "6"]
    result = subprocess.run(command, env=lesser, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "come out within the rounding of another environment, not bit for bit" in result.stdout
    assert "got x86_64 DEFAULT" in result.stdout


class Hole(WorkerPlugin):
    """Makes one worker fail: at once with an I/O error, or as on a machine with a read-only mount; or all of them."""

    def __init__(self, act: str) -> None:
        self.act = act

    def setup(self, worker) -> None:
        import socket

        from dask_logits.job import remote
        from dask_logits.teacher import checkpoint

        act = self.act
        if worker.name != 0 and act != "read-only everywhere":
            return

        def fail(*_, **__):
            if act.startswith("read-only"):
                raise OSError(30, "Read-only file system")
            raise FileNotFoundError(2, "no such file", "/data/corpus.jsonl")

        remote.process_partition = fail
        if act == "hole":
            # The calibration fails there, too.
            checkpoint._load = fail
        socket.gethostname = lambda: f"node{7 + worker.name}"


@pytest.mark.slow
@pytest.mark.parametrize("act", ["hole", "read-only"])
def test_a_worker_that_fails_costs_a_few_attempts_and_no_partition(overrides, joined, tmp_path, act, caplog) -> None:
    data = write_json_lines(tmp_path / "many.jsonl", sentences(60, seed=5))
    many = [MANY, f"distillation.dataset.data_files={data}"]
    whole = digest(run(joined, *many, f"distillation.teacher.cache_dir={tmp_path / 'whole'}"))
    with LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", host="127.0.0.1", memory_limit=None
    ) as cluster:
        with Client(cluster) as client:
            client.register_plugin(Hole(act))
        assert digest(run(overrides, *many, f"distillation.cluster.scheduler={cluster.scheduler_address}")) == whole
    assert not list((cache_dir(overrides) / "failures").glob("*"))
    assert len([record for record in caplog.records if " failed on tcp://" in record.getMessage()]) < 12
    if act == "read-only":
        (named,) = read_status(cache_dir(overrides)).left_out.items()
        assert named[0].endswith(" on node7")
        assert "cannot write to the run folder (Read-only file system)" in named[1]
    else:
        failed = [text for text in caplog.messages if " failed on tcp://" in text]
        assert failed
        assert all(" on node7: " in text for text in failed)
        receipts = [json.loads(path.read_text()) for path in (cache_dir(overrides) / "receipts").rglob("0*.json")]
        attempts = [each for receipt in receipts for each in receipt.get("failed_attempts", ())]
        assert attempts
        assert all(each["worker"].endswith(" on node7") for each in attempts)


def test_the_job_stops_if_all_hosts_see_the_run_folder_read_only(overrides) -> None:
    with LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", host="127.0.0.1", memory_limit=None
    ) as cluster:
        with Client(cluster) as client:
            client.register_plugin(Hole("read-only everywhere"))
        with pytest.raises(CapacityError, match="expected a worker that can score, got none:") as caught:
            run(overrides, MANY, f"distillation.cluster.scheduler={cluster.scheduler_address}")
    assert caught.value.ran
    for host in ("node7", "node8"):
        assert f" on {host}: it cannot write to the run folder (Read-only file system)" in str(caught.value)
    assert not list((cache_dir(overrides) / "failures").glob("*"))


def test_an_adaptive_cluster_without_workers_starts(overrides) -> None:
    with LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address="127.0.0.1:0", host="127.0.0.1",
                      memory_limit=None) as cluster:  # fmt: skip
        cluster.adapt(minimum=0, maximum=1, interval="100ms")
        run(overrides, f"distillation.cluster.scheduler={cluster.scheduler_address}")
    assert read_status(cache_dir(overrides)).state == "complete"
