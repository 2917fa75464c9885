"""The record of a driver is renewed while the driver is at work, and not after its end."""

from __future__ import annotations

import json
import threading
import time
from types import SimpleNamespace

import pytest
from builders import cache_dir

from dask_logits import CapacityError, RunConflictError, TeacherError, generate, load_config, read_status
from dask_logits.cache.reader import CacheReader
from dask_logits.files.atomic import replace_json
from dask_logits.job import reporter as module
from dask_logits.job.executor import too_slow
from dask_logits.job.reporter import Reporter
from dask_logits.run.folder import RunFolder, Share


def test_the_record_is_renewed_while_a_new_cache_is_read_back(here, monkeypatch) -> None:
    path, seen = cache_dir(here) / "status.json", []
    verify = CacheReader.verify_checksums

    def slow(self: CacheReader, **settings: bool) -> None:
        before, deadline = json.loads(path.read_text()), time.monotonic() + 30
        while not seen and time.monotonic() < deadline:
            time.sleep(0.02)
            if json.loads(path.read_text())["at"] > before["at"]:
                seen.append(read_status(path.parent).state)
        verify(self, **settings)

    monkeypatch.setattr(module, "_RENEW_SECONDS", 0.1)
    monkeypatch.setattr(CacheReader, "verify_checksums", slow)
    generate(load_config(here))
    assert seen == ["consolidating"]
    assert json.loads(path.read_text())["state"] == "done"


def test_nothing_is_written_after_the_last_record(tmp_path, monkeypatch) -> None:
    writes, is_released = threading.Event(), threading.Event()

    def slow(*given: object) -> None:
        if threading.current_thread().name == "dask_logits-record":
            writes.set()
            is_released.wait(300)
        replace_json(*given)

    monkeypatch.setattr(module, "_RENEW_SECONDS", 0.02)
    monkeypatch.setattr(module, "replace_json", slow)
    made = Reporter(SimpleNamespace(run=RunFolder(tmp_path), share=Share()))
    made.report("running")
    with made.renewed():
        (thread,) = [each for each in threading.enumerate() if each.name == "dask_logits-record"]
        assert writes.wait(300)
        threading.Timer(0.2, is_released.set).start()
    made.report("done")
    thread.join(300)
    assert not thread.is_alive()
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "done"


def test_a_driver_whose_run_was_taken_over_leaves_the_record_to_its_successor(here, tmp_path, monkeypatch) -> None:
    folder, out = cache_dir(here), tmp_path / "message.json"

    def wake_up(*_: object, **__: object) -> None:
        (folder / "status.json").write_text("its successor's")
        lock = tmp_path / "lock"
        lock.write_text("filelock/2\npid=7\nhost=elsewhere\nmode=lease\ntoken=t\nduration=30.0\n")
        lock.replace(folder / ".driver.lock")
        time.sleep(60)

    monkeypatch.setattr("dask_logits.files.lock.BEAT_SECONDS", 0.1)
    monkeypatch.setattr("dask_logits.job.run.consolidate_run", wake_up)
    with pytest.raises(RunConflictError, match="process 7 on elsewhere may be at work"):
        generate(load_config([*here, f"distillation.job.notify_command=[/usr/bin/tee,{out}]"]))
    assert (folder / "status.json").read_text() == "its successor's"
    assert not (folder / "report.html").exists()
    assert not out.exists()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (too_slow("calibrate", 1.0), "expected the calibrate task to end or take a step within 1 s"),
        (RuntimeError("a kernel failed"), "a kernel failed"),
    ],
    ids=["stall", "error"],
)
def test_a_calibration_that_fails_leaves_its_reason_and_tells_it(here, tmp_path, monkeypatch, error, reason) -> None:
    def fail(*_: object) -> None:
        raise error

    out, folder = tmp_path / "message.json", cache_dir(here)
    told = [*here, f"distillation.job.notify_command=[/usr/bin/tee,{out}]"]
    with monkeypatch.context() as patched:
        patched.setattr("dask_logits.job.run.run_calibration", fail)
        with pytest.raises(type(error), match=reason):
            generate(load_config(told))
    message, status = json.loads(out.read_text()), read_status(folder)
    assert (message["state"], status.state, status.committed) == ("failed", "failed", 0)
    assert reason in status.reason
    assert message["reason"] == status.reason
    assert status.next_command == "start the job again with the same command"
    assert [path.name for path in folder.iterdir()] == ["status.json"]
    generate(load_config(here))
    assert read_status(folder).state == "complete"


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(28, "No space left on device"), TeacherError("odd")], ids=repr
)
def test_a_start_that_is_stopped_or_refused_before_the_manifest_leaves_no_trace(
    here, tmp_path, monkeypatch, error
) -> None:
    def fail(*_: object) -> None:
        raise error

    out = tmp_path / "message.json"
    monkeypatch.setattr("dask_logits.job.run.run_calibration", fail)
    with pytest.raises((type(error), CapacityError)):
        generate(load_config([*here, f"distillation.job.notify_command=[/usr/bin/tee,{out}]"]))
    assert not out.exists()
    assert not cache_dir(here).exists()


def test_the_record_counts_all_failures_and_names_the_first_ones(tmp_path) -> None:
    made = Reporter(SimpleNamespace(run=RunFolder(tmp_path), share=Share()))
    made.failed |= {index: "a row " * 1_000 + "\nand more" for index in range(50_000, 0, -1)}
    made.report("running")
    record = json.loads((tmp_path / "status.json").read_text())
    assert record["failures"] == 50_000
    assert list(record["failed"]) == [str(index) for index in range(50_000, 49_980, -1)]
    assert set(record["failed"].values()) == {("a row " * 1_000)[:200]}
