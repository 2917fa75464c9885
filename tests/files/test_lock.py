from __future__ import annotations

import errno
import fcntl
import json
import subprocess
import sys
import threading
import time

import pytest

from dask_logits.errors import RunConflictError
from dask_logits.files import lock as module
from dask_logits.files.lock import lease

ELSEWHERE = {"host": "elsewhere", "process": 7, "token": "t", "beat": 3}


@pytest.fixture(autouse=True)
def _quick(monkeypatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".driver.lock"


def counting(path, stop: threading.Event) -> threading.Thread:
    """Be a holder on another machine that is alive."""

    def count() -> None:
        beat = 0
        while not stop.wait(0.02):
            beat += 1
            module._write(path, {**ELSEWHERE, "beat": beat})

    thread = threading.Thread(target=count)
    thread.start()
    return thread


def test_a_second_process_is_refused_until_the_first_is_gone(path) -> None:
    code = (
        "import sys, pathlib; from dask_logits.files.lock import lease\n"
        "with lease(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    other = subprocess.Popen([sys.executable, "-c", code, str(path)], **pipes)
    assert other.stdout.readline() == "held\n"
    for takeover in (False, True):
        with (
            pytest.raises(
                RunConflictError, match=rf"only driver of this run, but process {other.pid} on .* is at work"
            ),
            lease(path, takeover=takeover),
        ):
            pass
    other.kill()
    other.communicate()
    assert json.loads(path.read_text())["process"] == other.pid
    with lease(path):
        pass


def test_a_holder_that_is_frozen_is_not_waited_for_without_end(path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(module, "_FROZEN_SECONDS", 0.5)
    path.write_text(json.dumps(ELSEWHERE))
    with (
        caplog.at_level("INFO", "dask_logits"),
        path.open("ab") as frozen,
    ):
        fcntl.flock(frozen, fcntl.LOCK_EX)
        with (
            pytest.raises(RunConflictError, match="process 7 on elsewhere has given no sign of life for 0 s"),
            lease(path, wait=True),
        ):
            pass
    assert caplog.text.count("waiting for process 7 on elsewhere") == 1


def test_it_counts_while_it_is_held_and_is_cleared_in_the_end(path) -> None:
    with lease(path):
        before = json.loads(path.read_text())
        time.sleep(0.3)
        after = json.loads(path.read_text())
        assert after["beat"] > before["beat"]
        assert after["token"] == before["token"]
    assert path.read_bytes() == b""


def test_a_live_holder_elsewhere_is_never_taken_over(path, monkeypatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.5)
    path.write_text(json.dumps(ELSEWHERE))
    stop = threading.Event()
    thread = counting(path, stop)
    try:
        with (
            pytest.raises(RunConflictError, match="process 7 on elsewhere is at work"),
            lease(path, takeover=True),
        ):
            pass
    finally:
        stop.set()
        thread.join()


def test_a_lease_that_is_half_written_is_not_cleared(path, monkeypatch) -> None:
    path.write_text(json.dumps(ELSEWHERE))
    reads = iter([ELSEWHERE, None])
    monkeypatch.setattr(module, "_read", lambda _: next(reads))
    with pytest.raises(RunConflictError, match="process 7 on elsewhere is at work"), lease(path, takeover=True):
        pass


def test_a_lease_whose_file_is_taken_away_meanwhile_is_held_in_a_new_one(path, monkeypatch) -> None:
    path.write_text(json.dumps(ELSEWHERE))
    sleep = time.sleep

    def leave(seconds: float) -> None:
        # A start elsewhere that was refused before its manifest leaves no trace.
        path.unlink(missing_ok=True)
        sleep(seconds)

    monkeypatch.setattr(module.time, "sleep", leave)
    with lease(path):
        monkeypatch.undo()
        assert json.loads(path.read_text())["token"] != "t"
        with pytest.raises(RunConflictError, match="is at work"), lease(path):
            pass


def test_a_stale_lease_elsewhere_is_taken_only_if_that_is_allowed(path) -> None:
    path.write_text(json.dumps(ELSEWHERE))
    with (
        pytest.raises(RunConflictError, match=r"no sign of life; .* set distillation\.job\.takeover=true"),
        lease(path),
    ):
        pass
    assert json.loads(path.read_text()) == ELSEWHERE
    with lease(path, takeover=True):
        assert json.loads(path.read_text())["token"] != "t"


def test_waiting_outlasts_a_live_holder_and_a_stale_one(path, monkeypatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.5)
    path.write_text(json.dumps(ELSEWHERE))
    stop = threading.Event()
    thread = counting(path, stop)
    started = time.monotonic()
    threading.Timer(3, stop.set).start()
    with lease(path, wait=True):
        assert time.monotonic() - started >= 3
    thread.join()


def test_who_was_taken_over_is_stopped_and_leaves_the_lease_alone(path) -> None:
    stop = threading.Event()
    threads = []

    def hold() -> None:
        with lease(path):
            threads.append(counting(path, stop))
            time.sleep(60)

    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            hold()
    finally:
        stop.set()
        threads[0].join()
    assert time.monotonic() - started < 30
    assert json.loads(path.read_text())["host"] == "elsewhere"


def test_without_locks_the_lease_alone_keeps_others_out(path, monkeypatch, caplog) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    with (
        lease(path),
        pytest.raises(RunConflictError, match="is at work"),
        lease(path),
    ):
        pass
    assert "cannot be locked" in caplog.text
    assert path.read_bytes() == b""


@pytest.mark.parametrize("left", ["", "garbage", "[]", '{"host": 3}', "null"])
def test_a_lock_file_with_something_else_in_it_is_free(path, left) -> None:
    path.write_text(left)
    with lease(path):
        pass
