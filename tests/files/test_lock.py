from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dask_logits.errors import RunConflictError
from dask_logits.files import lock as module
from dask_logits.files.lock import is_abandoned, lease

ELSEWHERE = "filelock/2\npid=7\nhost=elsewhere\nmode=lease\ntoken=t\nduration=1.0\n"


@pytest.fixture(autouse=True)
def _quick(monkeypatch) -> None:
    monkeypatch.setattr(module, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.05)


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".driver.lock"


@contextlib.contextmanager
def renewed(path) -> Iterator[None]:
    """Be a holder on another machine that is alive."""
    path.write_text(ELSEWHERE)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.1):
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def other(path) -> Iterator[subprocess.Popen]:
    """Another process on this machine that holds the lease."""
    code = (
        "import sys, pathlib; from dask_logits.files.lock import lease\n"
        "with lease(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, str(path)], **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def without_exchange(monkeypatch) -> None:
    """Be a file system that cannot exchange two files, such as NFS."""
    import filelock._soft._exclusive._recovery as recovery

    monkeypatch.setattr(recovery, "exchange_names", lambda *_: False)


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_second_process_is_refused_at_once_until_the_first_is_killed(path, other, exchanges, monkeypatch) -> None:
    if not exchanges:
        without_exchange(monkeypatch)
    monkeypatch.setattr(module, "LEASE_SECONDS", 30.0)
    started = time.monotonic()
    problem = rf"only driver of this run, but process {other.pid} on {os.uname().nodename} is at work, or suspended;"
    with pytest.raises(RunConflictError, match=problem), lease(path):
        pass
    assert not is_abandoned(path)
    other.kill()
    other.wait()
    assert is_abandoned(path)
    with lease(path):
        assert f"pid={os.getpid()}\n" in path.read_text()
    assert time.monotonic() - started < 25
    assert list(path.parent.iterdir()) == []
    assert is_abandoned(path)


def test_waiting_lasts_until_the_holder_is_done(path, other, monkeypatch, caplog) -> None:
    monkeypatch.setattr(module, "LEASE_SECONDS", 30.0)
    started = time.monotonic()
    threading.Timer(3, other.stdin.close).start()
    with caplog.at_level("INFO", "dask_logits"), lease(path, wait=True):
        assert time.monotonic() - started >= 3
    assert caplog.text.count(f"is held by process {other.pid} on ") == 1
    assert "took over" not in caplog.text


def test_a_lease_elsewhere_that_is_renewed_is_refused_within_the_watch(path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(module, "LEASE_SECONDS", 30.0)
    with renewed(path):
        with (
            caplog.at_level("INFO", "dask_logits"),
            pytest.raises(RunConflictError, match="process 7 on elsewhere is at work;"),
            lease(path),
        ):
            pass
        assert path.read_text() == ELSEWHERE
        assert not is_abandoned(path)
    assert "is held by process 7 on elsewhere; watching whether it is renewed" in caplog.text


# The last one is what a crash of the machine leaves.
@pytest.mark.parametrize("left", [ELSEWHERE, ELSEWHERE.replace("1.0", "9.0"), ""])
@pytest.mark.parametrize("exchanges", [True, False])
def test_a_lease_that_is_not_renewed_is_taken_over(path, left, exchanges, monkeypatch, caplog) -> None:
    if not exchanges:
        without_exchange(monkeypatch)
    path.write_text(left)
    started = time.monotonic()
    with lease(path):
        assert time.monotonic() - started >= 1
        with pytest.raises(RunConflictError, match=f"process {os.getpid()} on .* is at work"), lease(path):
            pass
    holder = "process 7 on elsewhere" if left else "another process"
    assert f"took over {path}, which {holder} did not renew for 1 s" in caplog.text


def test_a_process_of_the_same_number_in_another_container_is_not_the_holder(path) -> None:
    path.write_text(ELSEWHERE.replace("7", str(os.getpid())).replace("elsewhere", f"{module.host_name()}?pidns-f1"))
    assert not is_abandoned(path)
    with lease(path):
        pass


def test_whose_lease_was_taken_over_is_interrupted_and_leaves_it_alone(path) -> None:
    def hold() -> None:
        with lease(path):
            successor = path.with_name("successor")
            successor.write_text(ELSEWHERE)
            successor.replace(path)
            time.sleep(60)

    started = time.monotonic()
    with pytest.raises(RunConflictError, match=r"suspended, .* and process 7 on elsewhere may be at work") as caught:
        hold()
    assert caught.value.ran
    assert time.monotonic() - started < 30
    assert path.read_text() == ELSEWHERE


def test_a_stop_signal_is_not_mistaken_for_a_takeover(path) -> None:
    def hold() -> None:
        with lease(path):
            module.interrupt_main_thread()
            time.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        hold()
    assert not path.exists()


@pytest.fixture
def cannot_be_renewed(monkeypatch, caplog) -> Callable[[], None]:
    """Let the disk fail until a holder gives up; return a function that waits for this."""
    import filelock._soft._lease as home

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    def wait() -> None:
        deadline = time.monotonic() + 30
        while "cannot be renewed (no space left on device), so another driver may start" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    monkeypatch.setattr(home, "touch", fail)
    return wait


def test_a_disk_that_fails_for_a_while_does_not_stop_the_holder_and_the_lease_is_renewed_again(
    path, cannot_be_renewed
) -> None:
    with lease(path):
        cannot_be_renewed()
        before = path.lstat().st_mtime_ns
        time.sleep(1)
        assert path.lstat().st_mtime_ns > before
    assert not path.exists()


@pytest.mark.parametrize("left", [ELSEWHERE, None])
def test_a_takeover_is_noticed_after_a_disk_has_failed(path, cannot_be_renewed, left) -> None:
    def hold() -> None:
        with lease(path):
            cannot_be_renewed()
            if left is None:
                path.unlink()
            else:
                successor = path.with_name("successor")
                successor.write_text(left)
                successor.replace(path)
            time.sleep(30)

    holder = "process 7 on elsewhere" if left else "another process"
    with pytest.raises(RunConflictError, match=rf"or out of reach, and {holder} may be at work") as caught:
        hold()
    assert caught.value.ran
    assert path.exists() == (left is not None)


def test_a_link_in_the_place_of_the_lock_is_not_followed(path, tmp_path) -> None:
    target = tmp_path / "precious"
    target.write_text("kept")
    path.symlink_to(target)
    with lease(path):
        assert not path.is_symlink()
    assert target.read_text() == "kept"


@pytest.mark.parametrize("left", [ELSEWHERE, None])
def test_a_folder_that_cannot_be_written_is_an_error(left) -> None:
    # Root writes to every folder, and others cannot enter the folders of root's tests.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, ".driver.lock")
        if left:
            path.write_text(left)
        Path(folder).chmod(0o555)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        try:
            with pytest.raises(PermissionError, match=re.escape(str(path))), lease(path):
                pass
        finally:
            if is_root:
                os.seteuid(0)
            Path(folder).chmod(0o755)


def test_slots_are_few_and_end_with_their_process(tmp_path) -> None:
    code = (
        "import sys, pathlib, time; from dask_logits.files.lock import slot\n"
        "with slot(pathlib.Path(sys.argv[1]), 1, lambda: None) as progress:\n"
        "    print('held', flush=True)\n"
        "    while True: progress(); time.sleep(0.01)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "slots")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    waits = []

    def on_wait() -> None:
        waits.append(1)
        if len(waits) == 3:
            holder.kill()

    with module.slot(tmp_path / "slots", 1, on_wait):
        assert len(waits) >= 3
    holder.communicate()
    with module.slot(tmp_path / "slots", 2, pytest.fail), module.slot(tmp_path / "slots", 2, pytest.fail):
        pass


def test_waiting_is_a_sign_of_life_only_while_a_holder_makes_progress(tmp_path) -> None:
    waits = []

    def wait() -> None:
        with module.slot(tmp_path, 1, lambda: waits.append(1)):
            pass

    def wait_for(count: int) -> None:
        deadline = time.monotonic() + 30
        while len(waits) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(waits) == count

    waiting = threading.Thread(target=wait)
    with module.slot(tmp_path, 1, pytest.fail) as progress:
        waiting.start()
        for count in (1, 2, 3):
            wait_for(count)
            time.sleep(0.5)
            assert len(waits) == count
            progress()
        wait_for(4)
    # Its turn is one, too.
    waiting.join(30)
    assert len(waits) == 5


def test_an_error_while_a_slot_is_awaited_is_not_hidden(tmp_path) -> None:
    def fails() -> None:
        raise OSError("the driver is gone")

    expected = pytest.raises(OSError, match="the driver is gone")
    with module.slot(tmp_path, 1, pytest.fail), expected, module.slot(tmp_path, 1, fails):
        pass


def test_a_file_system_without_locks_has_no_limit(tmp_path, monkeypatch) -> None:
    def refuse(lock: object, timeout: float) -> None:
        raise NotImplementedError

    monkeypatch.setattr(module.FileLock, "acquire", refuse)
    with module.slot(tmp_path, 1, pytest.fail), module.slot(tmp_path, 1, pytest.fail):
        pass


def test_without_a_folder_of_this_user_there_is_no_limit(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    with module.slot(tmp_path / "file" / "slots", 0, pytest.fail):
        pass
    monkeypatch.setattr(os, "getuid", lambda: -1)
    with module.slot(tmp_path, 0, pytest.fail):
        pass
