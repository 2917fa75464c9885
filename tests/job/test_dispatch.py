"""Workers that die, hang or lose their scheduler."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import dask
import pytest
import warm
from builders import cache_dir, dask_processes, finish, sentences, wait_for, write_json_lines
from distributed import Client, LocalCluster, WorkerPlugin
from test_cluster import COMMAND

from dask_logits import ClusterError, PartitionsFailedError, generate, load_config, read_status
from dask_logits.cache.reader import CacheReader
from dask_logits.config.groups import JobConfig
from dask_logits.job import flight, remote, retry_policy
from dask_logits.job import window as window_module
from dask_logits.job.bisect import bisect
from dask_logits.job.cluster import _facts
from dask_logits.job.dask_executor import DaskExecutor
from dask_logits.job.flight import Submitted
from dask_logits.job.roster import Roster
from dask_logits.job.scheduler import CALL_SECONDS, SchedulerLostError, scheduler_lost
from dask_logits.job.window import Window
from dask_logits.run.failures import Failure
from dask_logits.run.plan import Partition
from dask_logits.worker.task import PartitionTask


class Saboteur(WorkerPlugin):
    """Replaces the partition task in every worker, restarted ones too."""

    def __init__(self, act: str) -> None:
        self.act = act

    def setup(self, worker) -> None:
        from dask_logits.job import remote

        act = self.act

        def sabotaged(task, on_tokens, stages):
            import os
            import time

            if act == "die":
                os._exit(1)
            time.sleep(60)

        remote.process_partition = sabotaged


@contextlib.contextmanager
def mortal(n_workers: int, n_threads: int) -> Iterator[LocalCluster]:
    """Start a cluster whose workers may die."""
    cluster = LocalCluster(
        n_workers=n_workers, threads_per_worker=n_threads, memory_limit=None, dashboard_address="127.0.0.1:0",
        host="127.0.0.1",
    )  # fmt: skip
    try:
        yield cluster
    finally:
        # distributed 2026.7.1 may hang in closing a cluster whose worker has died.
        with contextlib.suppress(TimeoutError):
            cluster.close(timeout=10)


@contextlib.contextmanager
def sabotaged(act: str) -> Iterator[str]:
    settings = {"distributed.scheduler.allowed-failures": 0, "distributed.scheduler.worker-saturation": 1.0}
    with dask.config.set(settings), mortal(2, 1) as cluster, Client(cluster) as client:
        client.register_plugin(Saboteur(act))
        yield cluster.scheduler_address


def test_what_kills_every_worker_stops_early(overrides) -> None:
    with sabotaged("die") as address:
        more = [f"distillation.cluster.scheduler={address}", "distillation.job.max_failures=2"]
        with pytest.raises(
            PartitionsFailedError, match="2 partitions failed and none succeeded, so the job was stopped"
        ):
            generate(load_config([*overrides, *more]))
    assert read_status(cache_dir(overrides)).committed == 0


def test_what_hangs_everywhere_ends_in_a_diagnosis(overrides, joined) -> None:
    # Calibrated in peace.
    generate(load_config(joined)).unlink()
    shutil.rmtree(cache_dir(overrides) / "receipts")
    with sabotaged("hang") as address:
        more = [f"distillation.cluster.scheduler={address}", "distillation.job.stall_seconds=5"]
        with pytest.raises(
            ClusterError, match=r"expected progress within 5 s, got none for .* workers? and partitions 00000\d"
        ):
            generate(load_config([*overrides, *more]))


def test_waiting_for_the_next_try_is_no_stall(monkeypatch) -> None:
    held = SimpleNamespace(status="running")
    monkeypatch.setattr(window_module, "present_workers", lambda client: {})
    for waits, is_stalled in [((math.inf,), False), ((), True), ((0.0,), True), ((math.inf, 0.0), True)]:
        window = Window(held, iter(()), JobConfig(stall_seconds=1), last_progress=-1e9)
        for seconds in waits:
            window.attempts.again(None, seconds)
        with (
            pytest.raises(ClusterError, match="expected progress within 1 s")
            if is_stalled
            else contextlib.nullcontext()
        ):
            window.check_stall()


def test_a_partition_that_waits_for_another_of_its_worker_is_not_hung(monkeypatch) -> None:
    held = SimpleNamespace(status="running", scheduler=None)
    window = Window(held, iter(()), JobConfig(stall_seconds=1))
    given_up = []
    workers = {"loads": "one", "waits": "one", "hangs": "two", "also": "two"}
    monkeypatch.setattr(flight, "holders", lambda client: workers)
    monkeypatch.setattr(window, "_take_from_hung", lambda keys, worker: given_up.append((keys, worker)))
    for index, key in enumerate([*workers, "queued"]):
        _in_flight(window, key, index=index)
    window.note_tokens(0, 0)
    window.check_hung()
    assert given_up == [(["hangs", "also"], "two")]


def _lost(*given: object) -> None:
    raise scheduler_lost()


def _in_flight(window: Window, key: str, future: object = None, index: int = 5) -> PartitionTask:
    """Put a partition into a window. Return its task."""
    fields = dict.fromkeys(field.name for field in dataclasses.fields(PartitionTask))
    partition = Partition(index=index, first_row=index, n_rows=1)
    task = PartitionTask(**{**fields, "partition": partition, "failed_attempts": ()})
    window.attempts.begin(task)
    future = future or SimpleNamespace(release=lambda: None)
    window.flight._submitted[key] = Submitted(task, future, alive=-1e9)
    return task


@pytest.mark.parametrize("was_alone", [False, True])
def test_no_partition_of_a_hung_worker_is_dropped_when_the_scheduler_is_lost(monkeypatch, was_alone) -> None:
    window = Window(SimpleNamespace(), iter(()), JobConfig(stall_seconds=1))
    task = _in_flight(window, "hangs")
    monkeypatch.setattr(flight, "holders", lambda client: {"hangs": "one"})
    monkeypatch.setattr(window_module, "restart_worker", _lost)
    if was_alone:
        assert window.attempts.retry(task, "hang", "no sign of life", "one") is not None
        window.attempts.take_suspect()
    with pytest.raises(SchedulerLostError):
        window.check_hung()
    suspect = window.attempts.take_suspect()
    assert (suspect is None) if was_alone else (suspect.partition == task.partition)
    assert [event.failure.index for event in window.events()] == [5] * was_alone


@pytest.mark.parametrize("lost_in", ["holders", "restart_worker"])
def test_a_partition_is_retried_once_when_the_scheduler_is_lost_during_a_restart(monkeypatch, lost_in) -> None:
    def fail() -> BaseException:
        return RuntimeError("CUDA error: unspecified launch failure")

    window = Window(SimpleNamespace(), iter(()), JobConfig())
    window._present = {"one": {"nthreads": 2}}
    future = SimpleNamespace(key="fails", status="error", exception=fail, release=lambda: None)
    _in_flight(window, "fails", future)
    _in_flight(window, "other", index=6)
    window.flight._ended.put(future)
    monkeypatch.setattr(window_module, "erred_on", lambda client, future: "one")
    monkeypatch.setattr(flight, "holders", lambda client: {"other": "one"})
    monkeypatch.setattr(flight if lost_in == "holders" else window_module, lost_in, _lost)
    with pytest.raises(SchedulerLostError):
        window.wait(1)
    # The worker that was not restarted is restarted after its next failure.
    assert window._restarted == {}
    retried = iter(lambda: window.attempts.take_due(math.inf), None)
    tasks = [*retried, *window.flight.tasks()]
    assert sorted(task.partition.index for task in tasks) == [5, 6]


def test_a_worker_that_keeps_its_address_is_restarted_for_each_failure_of_its_device(monkeypatch) -> None:
    def fail() -> BaseException:
        return RuntimeError("CUDA error: unspecified launch failure")

    def fails(key: str, index: int) -> None:
        future = SimpleNamespace(key=key, status="error", exception=fail, traceback=lambda seconds: None)
        future.release = lambda: None
        _in_flight(window, key, future, index)
        window.flight._ended.put(future)

    restarts = []
    window = Window(SimpleNamespace(), iter(()), JobConfig())
    window._present = {"one": {"nthreads": 2}}
    monkeypatch.setattr(window_module, "erred_on", lambda client, future: "one")
    monkeypatch.setattr(window_module, "restart_worker", lambda client, worker: restarts.append(worker))
    monkeypatch.setattr(flight, "holders", lambda client: {})
    fails("first", 0)
    fails("together", 1)
    assert window.wait(1)
    assert window.wait(1)
    # Both failed for the same reason.
    assert len(restarts) == 1
    fails("second", 2)
    assert window.wait(1)
    assert len(restarts) == 2
    fails("third", 3)
    with pytest.raises(ClusterError, match=r"expected a worker that can score, got none:\n.*failed 3 times in a row"):
        window.wait(1)


def _bisected(client: Client, folder: Path = Path(), **settings: object) -> Failure:
    """Search for the bad rows of a partition of four rows, from row 0 on, on the workers of a client."""
    fields = dict.fromkeys(field.name for field in dataclasses.fields(PartitionTask))
    partition = Partition(index=0, first_row=0, n_rows=4)
    task = PartitionTask(**{**fields, "run": str(folder), "run_id": "r", "partition": partition, "failed_attempts": ()})
    executor = DaskExecutor(
        client=client,
        job=JobConfig(**settings),
        device="cpu",
        torch_threads=1,
        dashboard=None,
        environments={},
        roster=Roster(),
    )
    return bisect(Failure(index=0, kind="data", reason="odd text", task=task), executor)


def test_bisecting_without_a_scheduler_ends_in_one_message() -> None:
    with LocalCluster(n_workers=0, processes=False, dashboard_address="127.0.0.1:0") as cluster:
        client = Client(cluster)
        client.close()
        with pytest.raises(ClusterError, match="expected a running scheduler, got none"):
            _bisected(client)


def _odd(task: PartitionTask, on_tokens, stages) -> None:
    first, n_rows = task.trial
    if first <= 2 < first + n_rows:
        raise ValueError("odd text")


def _refused(task: PartitionTask, on_tokens, stages) -> None:
    raise ConnectionResetError("peer")


def test_bisecting_ends_with_an_error_that_no_row_can_cause(monkeypatch) -> None:
    monkeypatch.setattr(retry_policy, "_FIRST_REST_SECONDS", 0.01)
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        monkeypatch.setattr(remote, "try_rows", _odd)
        assert _bisected(client).rows == (2,)
        monkeypatch.setattr(remote, "try_rows", _refused)
        with pytest.raises(ClusterError, match="rows to pass or fail, got peer, which no row can cause") as caught:
            _bisected(client)
        assert caught.value.ran


class Deadly(WorkerPlugin):
    """Makes the third of four rows end every worker, restarted ones too, and notes the process."""

    def setup(self, worker) -> None:
        def die(task, on_tokens, stages):
            first, n_rows = task.trial
            if first <= 2 < first + n_rows:
                (Path(task.run) / str(os.getpid())).touch()
                os._exit(1)

        remote.try_rows = die


def test_rows_that_kill_workers_are_found(tmp_path) -> None:
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        mortal(1, 2) as cluster,
        Client(cluster) as client,
    ):
        client.register_plugin(Deadly())
        assert _bisected(client, tmp_path).rows == (2,)
    # All rows, the second half and the third row, which are not tried again alone: there is nothing else to blame.
    assert len(list(tmp_path.iterdir())) == 6


def _of_another_environment() -> None:
    raise ModuleNotFoundError("No module named 'gone'")


@pytest.mark.slow
def test_a_worker_that_does_not_answer_is_gone_on_without(caplog, monkeypatch) -> None:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", host="127.0.0.1") as cluster,
        Client(cluster) as client,
    ):
        stopped, _ = client.run(os.getpid).values()
        os.kill(stopped, signal.SIGSTOP)
        try:
            assert len(_facts(client, 15)[0]) == 1
        finally:
            os.kill(stopped, signal.SIGCONT)
        assert "no answer from tcp://" in caplog.text
        assert len(_facts(client, 30)[0]) == 2
        monkeypatch.setattr("dask_logits.job.newcomers.worker_facts", _of_another_environment)
        with pytest.raises(
            ClusterError, match=r"(?s)expected workers with this environment, got none:.*No module named 'gone'"
        ):
            _facts(client, 30)


@pytest.mark.slow
def test_a_scheduler_that_is_stopped_for_a_while_is_waited_for(overrides, joined, tmp_path) -> None:
    # Many, so that some are left when the first is found.
    data = write_json_lines(tmp_path / "many.jsonl", sentences(400, seed=5))
    many = [f"distillation.dataset.data_files={data}", "distillation.partition.rows=2"]
    expected = CacheReader(generate(load_config([*joined, *many]))).attributes["content_digest"]
    again = [*overrides, *many, f"distillation.teacher.cache_dir={tmp_path / 'again'}"]
    with dask_processes(tmp_path) as (file, scheduler):
        driver = subprocess.Popen(
            [*COMMAND, *again, f"distillation.cluster.scheduler_file={file}"], stderr=subprocess.PIPE, text=True
        )
        wait_for(lambda: list((tmp_path / "again" / "receipts").rglob("*.json")), driver)
        os.kill(scheduler.pid, signal.SIGSTOP)
        try:
            # Longer than a call to it may take.
            time.sleep(2 * CALL_SECONDS)
        finally:
            os.kill(scheduler.pid, signal.SIGCONT)
        log = finish(driver)
    assert driver.returncode == 0, log
    assert CacheReader(tmp_path / "again" / "teacher_logits.h5").attributes["content_digest"] == expected


def test_a_lost_scheduler_ends_the_job_and_keeps_what_is_committed(overrides, tmp_path) -> None:
    with dask_processes(tmp_path) as (file, scheduler):
        mine = [*overrides, "distillation.partition.rows=1", f"distillation.cluster.scheduler_file={file}"]
        driver = warm.Popen([*COMMAND, *mine], stderr=subprocess.PIPE)
        wait_for(lambda: list((cache_dir(overrides) / "receipts").rglob("*.json")), driver)
        scheduler.kill()
        log = finish(driver)
    assert driver.returncode == 1
    assert "expected a running scheduler, got none" in log
    assert read_status(cache_dir(overrides)).committed >= 1
