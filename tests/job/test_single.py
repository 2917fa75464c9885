"""One task, such as the calibration, when its worker fails it, falls silent or ends."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import Client, LocalCluster, Worker

from dask_logits import ClusterError
from dask_logits.config.groups import JobConfig
from dask_logits.job import single
from dask_logits.job.roster import Roster
from dask_logits.job.single import run_one


@pytest.fixture(scope="module")
def _client() -> Iterator[Client]:
    cluster = LocalCluster(
        n_workers=2, threads_per_worker=1, memory_limit=None, dashboard_address="127.0.0.1:0", host="127.0.0.1"
    )
    with Client(cluster) as client:
        # On a loaded machine, what a task imports takes longer than a step may.
        client.run(_loads_slowly, 0.0, print)
        yield client
    # distributed 2026.7.1 may hang in closing a cluster whose worker has died.
    with contextlib.suppress(TimeoutError):
        cluster.close(timeout=10)


@pytest.fixture
def client(_client: Client) -> Client:
    """A client of two idle workers, also if a task of an earlier test has just ended one, or is about to."""
    for _ in range(300):
        _client.wait_for_workers(2, timeout=120)
        # A worker that was killed is listed for a moment, and a task that nobody wants any more runs to its end.
        if list(_client.run(_running_tasks, on_error="return").values()) == [0, 0]:
            return _client
        time.sleep(0.2)
    raise TimeoutError("the workers are still busy")


def _running_tasks(dask_worker: Worker) -> int:
    return dask_worker.state.executing_count


def _calls(folder: Path) -> int:
    """Count a call in a folder; return its number."""
    (folder / f"{len(list(folder.iterdir()))}-{os.getpid()}").touch()
    return len(list(folder.iterdir()))


def _unreadable_at_first(folder: Path, on_step) -> dict:
    if _calls(folder) == 1:
        raise FileNotFoundError(2, "no such file", "/teacher")
    return {"pid": os.getpid()}


def _sick_at_first(folder: Path, on_step) -> dict:
    if _calls(folder) == 1:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
    return {"pid": os.getpid()}


def _sick(folder: Path, on_step) -> dict:
    _calls(folder)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def _silent_at_first(folder: Path, on_step) -> dict:
    if _calls(folder) == 1:
        time.sleep(300)
    return {"pid": os.getpid()}


def _hangs(seconds: float, on_step) -> None:
    on_step("loading")
    time.sleep(seconds)


def _loads_slowly(seconds: float, on_step) -> str:
    for _ in range(round(seconds / 0.5)):
        on_step("loading")
        time.sleep(0.5)
    return "loaded"


def _deadly(folder: Path, on_step) -> dict:
    _calls(folder)
    # Longer than the scheduler is looked at.
    time.sleep(4)
    os._exit(1)


def test_what_one_worker_cannot_read_is_done_by_another(client, tmp_path, caplog) -> None:
    pid = run_one(client, _unreadable_at_first, tmp_path, JobConfig(), Roster())["pid"]
    callers = {int(path.name.partition("-")[2]) for path in tmp_path.iterdir()}
    assert len(callers) == 2
    assert pid in callers
    assert "again on another worker" in caplog.text
    for path in tmp_path.iterdir():
        path.unlink()
    only = sorted(client.scheduler_info(n_workers=-1)["workers"])[0]
    with pytest.raises(ClusterError, match=r"got \[Errno 2\] no such file") as caught:
        run_one(client, _unreadable_at_first, tmp_path, JobConfig(), Roster(left_out={only: "other release"}))
    assert caught.value.ran


def test_what_one_workers_gpu_cannot_do_is_done_by_another(client, tmp_path, caplog) -> None:
    pid = run_one(client, _sick_at_first, tmp_path, JobConfig(), Roster())["pid"]
    callers = [int(path.name.partition("-")[2]) for path in sorted(tmp_path.iterdir())]
    assert callers[1:] == [pid] != callers[:1]
    assert "uncorrectable ECC error encountered; again on another worker" in caplog.text


def test_what_no_gpu_can_do_is_raised(client, tmp_path) -> None:
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        run_one(client, _sick, tmp_path, JobConfig(), Roster())
    assert len(list(tmp_path.iterdir())) == 2


def test_steps_arrive_after_the_scheduler_was_restarted(client, monkeypatch) -> None:
    def forget(topic: str, name: str, dask_scheduler) -> None:
        # As a scheduler that has just started.
        dask_scheduler.unsubscribe_topic(topic, name)
        dask_scheduler.client_comms[name].abort()

    subscribe, topics, steps = client.subscribe_topic, [], []

    def subscribed(topic: str, handler) -> None:
        topics.append(topic)
        subscribe(topic, handler)

    def on_step(step: str) -> None:
        steps.append(step)
        if len(steps) == 2:
            client.run_on_scheduler(forget, topics[0], client.id)

    monkeypatch.setattr(client, "subscribe_topic", subscribed)
    assert run_one(client, _loads_slowly, 8.0, JobConfig(stall_seconds=6), Roster(), on_step=on_step) == "loaded"
    # Each attempt takes 16.
    assert len(steps) > 10


def test_a_step_that_is_repeated_is_a_sign_of_life(client) -> None:
    steps = []
    assert run_one(client, _loads_slowly, 6.0, JobConfig(stall_seconds=3), Roster(), on_step=steps.append) == "loaded"
    assert len(steps) > 6
    with pytest.raises(ClusterError, match="to end or take a step within 2 s"):
        run_one(client, _hangs, 8.0, JobConfig(stall_seconds=2), Roster())


def test_a_worker_that_falls_silent_is_not_waited_for(client, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(single, "_SILENT_SECONDS", 5.0)
    stopped: list[int] = []

    def stop() -> None:
        while not (calls := list(tmp_path.iterdir())):
            time.sleep(0.1)
        stopped.append(int(calls[0].name.partition("-")[2]))
        os.kill(stopped[0], signal.SIGSTOP)

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        assert run_one(client, _silent_at_first, tmp_path, JobConfig(), Roster())["pid"] not in stopped
    finally:
        thread.join()
        # Its nanny starts another.
        os.kill(stopped[0], signal.SIGKILL)


def test_workers_that_end_during_it_again_and_again_end_it(client, tmp_path) -> None:
    with pytest.raises(
        ClusterError, match=r"got 2 that ended during it: tcp://.* after .* s\. .*longer --lifetime"
    ) as e:
        run_one(client, _deadly, tmp_path, JobConfig(retries=1), Roster())
    assert e.value.ran


def test_an_interrupt_before_its_first_attempt_arrives_as_it_is(client, tmp_path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_one(client, _deadly, tmp_path, JobConfig(), Roster(), on_turn=interrupt)
    assert not list(tmp_path.iterdir())
