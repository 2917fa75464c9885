"""Forked processes behave as new interpreters do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import warm
from builders import SuiteWorker

SEES = """
import os, sys
print(os.environ["SEEN"], os.getcwd(), sys.argv[1:], "torch" in sys.modules)
print("bad", file=sys.stderr)
sys.exit(3)
"""


@pytest.mark.parametrize("start", [warm.run, subprocess.run])
def test_a_command_has_its_environment_folder_arguments_output_and_status(start, tmp_path) -> None:
    command = [sys.executable, "-c", SEES, "a", "b"]
    captured = {} if start is warm.run else {"capture_output": True, "text": True}
    done = start(command, env={**os.environ, "SEEN": "this"}, cwd=tmp_path, **captured)
    is_fork = start is warm.run
    assert (done.returncode, done.stderr) == (3, "bad\n")
    assert done.stdout == f"this {tmp_path} ['a', 'b'] {is_fork}\n"


def test_a_command_leads_its_session_and_ends_by_a_signal() -> None:
    process = warm.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    assert os.getsid(process.pid) == process.pid
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM


def workers_have_transformers() -> bool:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None, host="127.0.0.1") as cluster,
        Client(cluster) as client,
    ):
        (found,) = client.run(lambda: "transformers" in sys.modules).values()
    return found


def test_workers_are_forks(fork_server) -> None:
    assert workers_have_transformers()


def test_workers_are_new_interpreters_where_a_test_asks_for_them(new_interpreters) -> None:
    assert not workers_have_transformers()


def test_the_suites_worker_is_started_anew_when_it_was_lost(suite_worker: SuiteWorker) -> None:
    from distributed import Client

    address = suite_worker.address()
    assert suite_worker.address() == address
    with Client(address, set_as_default=False) as client:
        client.retire_workers()
    with Client(suite_worker.address(), set_as_default=False) as client:
        assert client.run(int)
