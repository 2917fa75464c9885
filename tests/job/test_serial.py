"""Jobs in this process: the same content as in a cluster, failures, retries, hangs and interruptions."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import warm
from builders import cache_dir, digest, run, wait_for
from test_cluster import COMMAND
from test_report import Page

import dask_logits
from dask_logits import CapacityError, ClusterError, DatasetError, PartitionsFailedError, load_config, read_status
from dask_logits.config.groups import JobConfig
from dask_logits.files.atomic import create_json
from dask_logits.job import retry_policy, serial_executor
from dask_logits.job.bisect import bisect
from dask_logits.job.executor import Committed, Failed, Progress, Waiting
from dask_logits.job.serial_executor import SerialExecutor
from dask_logits.run.failures import Failure, read_failures
from dask_logits.run.folder import RunFolder
from dask_logits.run.plan import Partition
from dask_logits.run.records import Receipt
from dask_logits.teacher.scoring import Scored
from dask_logits.worker import task as task_module
from dask_logits.worker.task import PartitionTask, Stages


def task(index: int) -> PartitionTask:
    """The part of a task that an executor looks at."""
    fields = dict.fromkeys(field.name for field in dataclasses.fields(PartitionTask))
    partition = Partition(index=index, first_row=index, n_rows=1)
    return PartitionTask(**{**fields, "partition": partition, "failed_attempts": ()})


def receipt(index: int) -> Receipt:
    return Receipt.model_construct(partition=index)


@pytest.fixture
def executor():
    with contextlib.closing(SerialExecutor(device="cpu", torch_threads=1, job=JobConfig(retries=1))) as made:
        yield made


def pretend(monkeypatch, act) -> None:
    """Replace the partition task."""
    monkeypatch.setattr(serial_executor, "process_partition", lambda task, on_tokens, stages: act(task, on_tokens))


def test_this_process_and_a_cluster_give_the_same_cache(here, joined, tmp_path) -> None:
    cache = run(here)
    assert digest(cache) == digest(run(joined, f"distillation.teacher.cache_dir={tmp_path / 'cluster'}"))
    by = {json.loads(path.read_text())["process"] for path in (cache_dir(here) / "receipts").rglob("*.json")}
    assert by == {os.getpid()}
    assert read_status(cache_dir(here)).dashboard is None


def test_a_partition_is_started_before_the_last_results_of_the_one_before_arrive(here, monkeypatch) -> None:
    started = [threading.Event() for _ in range(4)]
    numbers = itertools.count()
    start = task_module.start_scoring

    def counted(*given, **named):
        finish, number = start(*given, **named), next(numbers)
        started[number].set()

        def late() -> Scored:
            # The last partition has no next one.
            assert all(event.wait(60) for event in started[number + 1 : number + 2])
            return finish()

        return late

    monkeypatch.setattr(task_module, "start_scoring", counted)
    cache = run(here)
    monkeypatch.undo()
    assert next(numbers) == 4
    assert digest(cache) == digest(run(here, f"distillation.teacher.cache_dir={cache_dir(here)}-again"))


@pytest.mark.parametrize(("device", "most"), [("cpu", 2), ("cuda", 3)])
def test_a_gpu_has_a_partition_before_and_one_after_the_one_that_is_scored(device, most, monkeypatch) -> None:
    monkeypatch.setattr(serial_executor, "environment", lambda device: None)
    together, lock, most_together = [0], threading.Lock(), [0]
    full = threading.Barrier(most)

    def act(task, on_tokens):
        with lock:
            together[0] += 1
            most_together[0] = max(most_together[0], together[0])
        if task.partition.index < most:
            full.wait(60)
        with lock:
            together[0] -= 1
        return receipt(task.partition.index)

    pretend(monkeypatch, act)
    with contextlib.closing(SerialExecutor(device=device, torch_threads=1, job=JobConfig())) as executor:
        events = list(executor.run(map(task, range(2 * most)), "r"))
    assert sum(isinstance(event, Committed) for event in events) == 2 * most
    assert most_together == [most]


def test_events_tell_what_happens(executor, monkeypatch) -> None:
    def act(task, on_tokens):
        on_tokens(3)
        on_tokens(4)
        return receipt(task.partition.index)

    pretend(monkeypatch, act)
    events = list(executor.run(iter([None, task(0), None, task(1), task(2)]), "r"))
    assert sorted(e.receipt.partition for e in events if isinstance(e, Committed)) == [0, 1, 2]
    for index in range(3):
        assert [e.tokens for e in events if isinstance(e, Progress) and e.index == index] == [3, 4]
        of_partition = [e for e in events if e in (Progress(index, 4), Committed(receipt(index)))]
        assert isinstance(of_partition[-1], Committed)
    assert all(isinstance(e, Committed | Progress | Waiting) for e in events)


def test_an_io_error_is_retried_and_bad_data_is_not(executor, monkeypatch) -> None:
    attempts = []

    def act(task, on_tokens):
        attempts.append(task.partition.index)
        if task.partition.index == 0:
            raise ValueError("odd text")
        if attempts.count(1) == 1:
            raise ConnectionResetError("peer")
        return receipt(1)

    pretend(monkeypatch, act)
    events = list(executor.run(iter([task(0), task(1)]), "r"))
    (failed,) = [e.failure for e in events if isinstance(e, Failed)]
    assert (failed.index, failed.kind, failed.reason, failed.attempts) == (0, "data", "odd text", 1)
    assert "ValueError: odd text" in failed.evidence
    assert [e for e in events if isinstance(e, Committed)] == [Committed(receipt(1))]
    assert sorted(attempts) == [0, 1, 1]


def test_a_receipt_lists_the_attempts_that_failed_before(here, monkeypatch) -> None:
    monkeypatch.setattr(retry_policy, "_FIRST_REST_SECONDS", 0.01)
    read_rows, failing, letters = task_module.read_rows, ["peer", "x" * 999], []

    def read(files, column):
        # The third partition, twice.
        if files[0].first == 24 and failing:
            letters.append(failing[0])
            raise ConnectionResetError(failing.pop(0))
        return read_rows(files, column)

    monkeypatch.setattr(task_module, "read_rows", read)
    began = time.time()
    run(here)
    folder = RunFolder(cache_dir(here))
    receipts = [folder.receipt(index) for index in range(4)]
    assert [len(receipt.failed_attempts) for receipt in receipts if receipt] == [0, 0, 2, 0]
    assert "failed_attempts" not in json.loads(folder.receipt_path(0).read_text())
    first, second = receipts[2].failed_attempts
    assert (first.kind, first.reason, second.reason) == ("transient", "peer", "x" * 200)
    assert first.worker is not None
    assert first.worker.startswith("this process on ")
    assert began <= first.at <= second.at <= receipts[2].finished
    status = read_status(folder.path)
    assert (status.retried, status.failed_attempts) == (1, {"transient": 2})
    assert "retried       1 partition committed after failed attempts (transient 2)" in status.lines()
    shown = Page(folder.report_path.read_text()).text
    assert "An orange cross is an attempt that failed before its partition was committed." in shown
    assert "partition 2: transient: peer" in shown


def test_a_late_receipt_of_a_replaced_plan_does_not_count(here, cache, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(retry_policy, "_FIRST_REST_SECONDS", 0.01)
    mine = [*here, f"distillation.teacher.cache_dir={tmp_path / 'late'}"]
    folder, write = RunFolder(tmp_path / "late"), task_module.write_partition
    of_this_plan = RunFolder(cache_dir(here)).receipt(2)
    late = []

    def written(attempt, *given):
        files = write(attempt, *given)
        if attempt.name.startswith("000002") and not late:
            run_id = folder.manifest().run_id
            late.append(of_this_plan.model_copy(update={"run_id": run_id, "n_rows": 3}))
            assert create_json(folder.receipt_path(2), late[0].to_json())
        return files

    monkeypatch.setattr(task_module, "write_partition", written)
    assert digest(run(mine)) == digest(cache)
    receipt = folder.receipt(2)
    assert (receipt.first_row, receipt.n_rows) == (24, 12)
    (failed,) = receipt.failed_attempts
    assert failed.kind == "transient"
    assert "expected rows 24 to 35" in failed.reason


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(28, "No space left on device"), CapacityError, "expected room to write partition 000000"),
        (ClusterError("another release"), ClusterError, "another release"),
    ],
)
def test_what_stops_every_partition_stops_the_job(executor, monkeypatch, error, raised, message) -> None:
    def act(task, on_tokens):
        raise error

    pretend(monkeypatch, act)
    with pytest.raises(raised, match=message):
        list(executor.run(iter([task(0)]), "r"))


def test_a_hang_ends_in_a_diagnosis(monkeypatch) -> None:
    release = threading.Event()
    pretend(monkeypatch, lambda task, on_tokens: release.wait(60) and {})
    executor = SerialExecutor(device="cpu", torch_threads=1, job=JobConfig(stall_seconds=1))
    with pytest.raises(ClusterError, match="expected progress within 1 s, got none for 1 s with partitions 000000 in"):
        list(executor.run(iter([task(0)]), "r"))

    def slow(argument, on_step):
        release.wait(60)
        return {}

    with pytest.raises(ClusterError, match="expected the slow task to end or take a step within 1 s, got nothing"):
        executor.call(slow, None)
    release.set()
    executor.close()


def test_a_step_that_is_repeated_is_a_sign_of_life() -> None:
    def slow(argument, on_step):
        for _ in range(8):
            on_step("loading")
            time.sleep(0.25)
        return "loaded"

    with contextlib.closing(SerialExecutor(device="cpu", torch_threads=1, job=JobConfig(stall_seconds=1))) as executor:
        assert executor.call(slow, None) == "loaded"


def test_closing_ends_a_partition_at_its_next_batch(executor, monkeypatch) -> None:
    batches = []

    def act(task, on_tokens):
        for batch in range(600):
            on_tokens(1)
            batches.append(batch)
            time.sleep(0.1)
        return receipt(0)

    pretend(monkeypatch, act)
    events = executor.run(iter([task(0)]), "r")
    assert next(event for event in events if isinstance(event, Progress))
    executor.close()
    scored = len(batches)
    time.sleep(0.5)
    assert len(batches) == scored < 50


def test_steps_of_a_call_are_shown_and_an_unreadable_file_is_named(executor) -> None:
    def measure(argument, on_step):
        on_step("first")
        on_step("second")
        return {"argument": argument}

    steps: list[str] = []
    assert executor.call(measure, 7, on_step=steps.append) == {"argument": 7}
    assert steps == ["first", "second"]

    def unreadable(argument, on_step):
        raise PermissionError(13, "Permission denied", "weights")

    with pytest.raises(ClusterError, match=r"expected a result of the unreadable task, got \[Errno 13\]"):
        executor.call(unreadable, None)


def test_a_row_that_fails_is_found(here, tmp_path, monkeypatch) -> None:
    def refused(read):
        def refuse(rows, spec, *, first_row=0):
            if first_row <= 17 < first_row + len(rows):
                raise ValueError("odd text")
            return read(rows, spec, first_row=first_row)

        return refuse

    monkeypatch.setattr(task_module, "read_documents", refused(task_module.read_documents))
    with pytest.raises(PartitionsFailedError, match="odd text"):
        run(here)
    with pytest.raises(PartitionsFailedError, match="because of dataset rows 17"):
        dask_logits.retry(cache_dir(here), bisect=True)
    monkeypatch.undo()
    assert dask_logits.retry(cache_dir(here)).exists()
    assert read_status(cache_dir(here)).failed_attempts == {"data": 1}


def test_a_search_for_bad_rows_reads_and_tokenizes_in_one_thread_at_a_time(monkeypatch) -> None:
    text, held = threading.Lock(), []

    def read(*given, **named):
        held.append(text.locked())
        return SimpleNamespace(tokens=[], masks=None)

    monkeypatch.setattr(task_module, "read_rows", lambda files, column: held.append(text.locked()) or [])
    monkeypatch.setattr(task_module, "read_documents", read)
    monkeypatch.setattr(task_module, "load_teacher", lambda *given, on_life: None)
    spec = dataclasses.replace(task(0), scoring=SimpleNamespace(vocab_size=1), trial=(0, 0))
    task_module.try_rows(spec, print, Stages(text=text))
    assert held == [True, True]
    assert not text.locked()


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file", "a.parquet"), DatasetError("a.parquet: expected readable Parquet")]
)
def test_no_row_is_blamed_for_a_file_that_cannot_be_read(here, monkeypatch, error) -> None:
    monkeypatch.setattr(retry_policy, "_FIRST_REST_SECONDS", 0.01)
    read_rows, tries = task_module.read_rows, []

    def read(files, column):
        if files[0].first == 12:
            raise error
        return read_rows(files, column)

    def counted(*given):
        tries.append(given)
        return task_module.try_rows(*given)

    monkeypatch.setattr(task_module, "read_rows", read)
    monkeypatch.setattr(serial_executor, "try_rows", counted)
    with pytest.raises(PartitionsFailedError):
        run(here)
    with pytest.raises(PartitionsFailedError) as caught:
        dask_logits.retry(cache_dir(here), bisect=True)
    assert caught.value.reasons == {1: str(error)}
    assert read_failures(RunFolder(cache_dir(here)), lambda indices: ())[1].rows == ()
    assert len(tries) <= 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionResetError("peer"), "some of its rows to pass or fail, got peer, which no row can cause"),
        (RuntimeError("CUDA error: unspecified launch failure"), "expected a device that can score, got CUDA error"),
    ],
)
def test_a_search_for_bad_rows_ends_with_an_error_that_no_row_can_cause(executor, monkeypatch, error, message) -> None:
    def fail(*given):
        raise error

    monkeypatch.setattr(retry_policy, "_FIRST_REST_SECONDS", 0.01)
    monkeypatch.setattr(serial_executor, "try_rows", fail)
    with pytest.raises(ClusterError, match=message):
        bisect(Failure(index=3, kind="data", reason="odd text", task=task(3)), executor)


def test_ctrl_c_ends_the_job_soon_and_the_next_start_goes_on(here, tmp_path) -> None:
    whole = digest(run(here, f"distillation.teacher.cache_dir={tmp_path / 'whole'}", "distillation.partition.rows=1"))
    command = [*COMMAND, *here, "distillation.partition.rows=1"]
    driver = warm.Popen(command, stderr=subprocess.PIPE)
    wait_for(lambda: list((cache_dir(here) / "receipts").rglob("*.json")), driver)
    driver.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, log = driver.communicate(timeout=60)
    assert driver.returncode == 130, log
    assert time.monotonic() - started < 10
    assert "stopped; run the same command again to go on" in log
    assert 1 <= read_status(cache_dir(here)).committed < 40
    assert digest(run(here, "distillation.partition.rows=1")) == whole


def test_the_log_is_in_words(here) -> None:
    done = warm.run([*COMMAND, *here])
    assert done.returncode == 0, done.stderr
    assert "INFO scoring path: eager layers, attention " in done.stderr
    dumps = re.compile(r"[{\[(]['\"]|ScoringPath\(|\b[A-Z]\w+\([a-z_]+=")
    assert not [line for line in done.stderr.splitlines() if dumps.search(line)]


def test_a_serial_job_has_one_worker_and_no_scheduler(here) -> None:
    with pytest.raises(dask_logits.ConfigError) as caught:
        load_config(
            [*here, "distillation.teacher.generation.num_workers=2", "distillation.cluster.scheduler=tcp://a:1"]
        )
    assert "num_workers: expected 1 with cluster serial, got 2" in str(caught.value)
    assert "cluster.scheduler: expected null with cluster serial, got 'tcp://a:1'" in str(caught.value)


def test_a_job_runs_in_a_process_that_cannot_start_others(here, tmp_path) -> None:
    code = """
import multiprocessing, sys
from dask_logits import generate, load_config

def job(overrides):
    print(generate(load_config(overrides)))

if __name__ == "__main__":
    process = multiprocessing.get_context("forkserver").Process(target=job, args=(sys.argv[1:],), daemon=True)
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""
    script = tmp_path / "job.py"
    script.write_text(code)
    done = warm.run([sys.executable, str(script), *here])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("teacher_logits.h5")
