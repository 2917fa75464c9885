"""A driver that waits for a file system that does not answer says so and ends."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time

import pytest
from builders import cache_dir

from dask_logits import ClusterError, generate, load_config
from dask_logits.job import reporter, watchdog
from dask_logits.job import run as run_module
from dask_logits.run.folder import RunFolder

# Opening a pipe that nobody writes to waits as a file system does that is gone.
HANG = """
import os, signal, sys
from pathlib import Path
from dask_logits.job import watchdog
watchdog.LEAST_SECONDS = 1
path = Path(sys.argv[1])
# As in a call that the kernel does not let be interrupted.
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
with watchdog.watched(1):
    path.open()
"""


@pytest.fixture
def pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_a_job_whose_file_system_does_not_answer_ends_with_a_diagnosis(joined, pipe, monkeypatch) -> None:
    mine = [*joined, "distillation.job.keep_partitions=true"]
    config = load_config(mine)
    cache = generate(config)
    before = cache.read_bytes()
    cache.unlink()

    def consolidate_run(run, **settings):
        cache_path = pipe
        cache_path.open("rb").read()

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "consolidate_run", consolidate_run)
        where = rf"hangs in .*consolidate_run \(test_watchdog.py:\d+\).* with {pipe}"
        patch.setattr(watchdog, "LEAST_SECONDS", 1.0)
        # A record that is renewed is no sign of life.
        patch.setattr(reporter, "_RENEW_SECONDS", 0.1)
        with pytest.raises(ClusterError, match=where) as hung:
            generate(load_config([*mine, "distillation.job.stall_seconds=3"]))
    assert hung.value.ran
    # Not as though somebody had pressed Ctrl-C.
    (status,) = RunFolder(cache_dir(joined)).driver_statuses().values()
    assert status.state == "failed"
    assert "hangs in" in status.reason
    assert generate(config).read_bytes() == before


def test_what_cannot_be_interrupted_takes_the_process_with_it(pipe) -> None:
    done = subprocess.run([sys.executable, "-c", HANG, str(pipe)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "it cannot be interrupted: ending the process" in done.stderr


UNREAD = """
import logging, os, signal, sys
from dask_logits import ClusterError
from dask_logits.job import watchdog
watchdog.LEAST_SECONDS = 1
logging.basicConfig(level="INFO")
if sys.argv[1] == "fixed":
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
try:
    with watchdog.watched(1):
        while True:
            logging.info("x" * 1000)
except ClusterError as error:
    print(error, flush=True)
    # Whatever else is written to standard error waits as well.
    os._exit(3)
"""


@pytest.mark.parametrize(("kind", "status"), [("interruptible", 3), ("fixed", 1)])
def test_a_log_that_nobody_reads_does_not_stop_the_watchdog(kind: str, status: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", UNREAD, kind], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.wait(300) == status
        assert (b"hangs in" in process.stdout.read()) == (kind == "interruptible")
    finally:
        process.kill()
        process.communicate()


def test_work_and_waiting_in_pieces_are_not_hanging(monkeypatch) -> None:
    monkeypatch.setattr(watchdog, "LEAST_SECONDS", 1.0)
    with watchdog.watched(1):
        for _ in range(30):
            time.sleep(0.1)


def test_ctrl_c_stays_ctrl_c(monkeypatch) -> None:
    with pytest.raises(KeyboardInterrupt), watchdog.watched(60):
        raise KeyboardInterrupt


def test_of_another_thread_it_is_only_said(pipe, monkeypatch, caplog) -> None:
    monkeypatch.setattr(watchdog, "LEAST_SECONDS", 1.0)

    def hang() -> None:
        with watchdog.watched(1):
            pipe.open("rb").close()

    with caplog.at_level(logging.ERROR):
        thread = threading.Thread(target=hang, daemon=True)
        thread.start()
        deadline = time.monotonic() + 300
        while "hangs in open (" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
        pipe.open("wb").close()
        thread.join(300)
    assert not thread.is_alive()
    assert "hangs in open (" in caplog.text
