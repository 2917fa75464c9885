"""Four hosts as network namespaces: links are cut, hosts go away, processes are stopped, drivers compete.

Every run ends with the undisturbed digest.

The namespaces have no route to anything but each other.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from builders import cache_dir, digest, run, sentences, wait_for, write_json_lines
from test_cluster import COMMAND

SCHEDULER, WORKERS, DRIVER = 0, (1, 2), 3
_SLOW = """
import time
from pathlib import Path
from dask_logits.worker import calibrate, task
write = task.write_partition
def dask_setup(worker):
    def slow(*given):
        time.sleep(SECONDS)
        while Path("HOLD").exists():
            time.sleep(0.1)
        return write(*given)
    task.write_partition = slow
"""


@dataclass
class Hosts:
    """Machines 10.77.0.1 to .4, each a namespace, on a switch that is one more."""

    name: str
    processes: list[subprocess.Popen] = field(default_factory=list)

    def command(self, host: int, *words: str) -> list[str]:
        named = ["unshare", "--uts", "sh", "-c", f'hostname host{host}; exec "$@"', "sh"]
        return ["ip", "netns", "exec", f"{self.name}h{host}", *named, *words]

    def start(self, host: int, *words: str, **settings) -> subprocess.Popen:
        # A peer that does not answer for 12 s is gone. By default it takes 30 s, and less than 11 s is refused.
        environment = {**os.environ, "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "12s"}
        process = subprocess.Popen(self.command(host, *words), env=environment, **settings)
        self.processes.append(process)
        return process

    def link(self, host: int, state: str) -> None:
        _ip("-n", f"{self.name}s", "link", "set", f"p{host}", state)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def _address(host: int) -> str:
    return f"10.77.0.{host + 1}"


_SCHEDULER_ADDRESS = f"tcp://{_address(SCHEDULER)}:8786"


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("needs iproute2 and util-linux")
    made = Hosts(f"dl{uuid.uuid4().hex[:6]}")
    switch = f"{made.name}s"
    spaces = [switch, *(f"{made.name}h{host}" for host in range(4))]
    try:
        try:
            for space in spaces:
                _ip("netns", "add", space)
                _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", switch, "link", "add", "br0", "type", "bridge")
            _ip("-n", switch, "link", "set", "br0", "up")
            for host in range(4):
                mine = f"{made.name}h{host}"
                _ip("-n", switch, "link", "add", f"p{host}", "type", "veth", "peer", "name", "eth0", "netns", mine)
                _ip("-n", switch, "link", "set", f"p{host}", "master", "br0", "up")
                _ip("-n", mine, "addr", "add", f"{_address(host)}/24", "dev", "eth0")
                _ip("-n", mine, "link", "set", "eth0", "up")
            subprocess.run(made.command(0, "true"), check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        yield made
    finally:
        for process in made.processes:
            process.kill()
            # Its pipe is closed if a test has read it to the end.
            with contextlib.suppress(ValueError):
                process.communicate()
        for space in spaces:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", space)


def disturbed(hosts: Hosts, overrides: list[str], folder: Path, seconds: float = 0.4) -> subprocess.Popen:
    """Start a scheduler, two workers that take some seconds per partition, and a driver, each on a host of its own.

    No partition ends while the folder has a file "hold".
    """
    (folder / "slow.py").write_text(_SLOW.replace("SECONDS", str(seconds)).replace("HOLD", str(folder / "hold")))
    dask = [sys.executable, "-m", "dask"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    hosts.start(SCHEDULER, *dask, "scheduler", "--host", _address(SCHEDULER), "--port", "8786", "--no-dashboard",
                **quiet)  # fmt: skip
    for host in WORKERS:
        hosts.start(
            host, *dask, "worker", _SCHEDULER_ADDRESS, "--host", _address(host), "--nthreads", "1",
            "--memory-limit", "0", "--no-dashboard", "--no-nanny", "--preload", str(folder / "slow.py"),
            "--local-directory", str(folder), **quiet,
        )  # fmt: skip
    return start_driver(hosts, DRIVER, overrides)


def start_driver(hosts: Hosts, host: int, overrides: list[str]) -> subprocess.Popen:
    mine = [*overrides, f"distillation.cluster.scheduler={_SCHEDULER_ADDRESS}"]
    return hosts.start(host, *COMMAND, *mine, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def many(tmp_path) -> list[str]:
    """Settings of a job that takes some time."""
    data = write_json_lines(tmp_path / "many.jsonl", sentences(80, seed=5))
    return ["distillation.partition.rows=2", f"distillation.dataset.data_files={data}"]


@pytest.fixture
def whole(many, joined, tmp_path) -> str:
    """The digest of the undisturbed run."""
    return digest(run(joined, *many, f"distillation.teacher.cache_dir={tmp_path / 'whole'}"))


def after_some_partitions(overrides: list[str], driver: subprocess.Popen) -> None:
    receipts = cache_dir(overrides) / "receipts"
    wait_for(lambda: len(list(receipts.rglob("0*.json"))) > 3, driver, 240)


@pytest.mark.slow
@pytest.mark.parametrize("act", ["driver", "worker", "host"])
def test_cut_links_and_lost_hosts_change_nothing(hosts, overrides, many, whole, tmp_path, act) -> None:
    driver = disturbed(hosts, [*overrides, *many], tmp_path)
    after_some_partitions(overrides, driver)
    cut = {"driver": DRIVER, "worker": WORKERS[0], "host": WORKERS[0]}[act]
    hosts.link(cut, "down")
    if act == "host":
        hosts.processes[cut].kill()
    else:
        # The link is down for as long as it takes to lose every connection over it.
        time.sleep(25)
        hosts.link(cut, "up")
    _, log = driver.communicate(timeout=240)
    assert driver.returncode == 0, log
    if act == "driver":
        assert "answers again after" in log
    assert digest(cache_dir(overrides) / "teacher_logits.h5") == whole


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [SCHEDULER, WORKERS[0], DRIVER])
def test_stopped_processes_change_nothing(hosts, overrides, many, whole, tmp_path, stopped) -> None:
    driver = disturbed(hosts, [*overrides, *many], tmp_path)
    after_some_partitions(overrides, driver)
    hosts.processes[stopped].send_signal(signal.SIGSTOP)
    time.sleep(25)
    hosts.processes[stopped].send_signal(signal.SIGCONT)
    _, log = driver.communicate(timeout=240)
    assert driver.returncode == 0, log
    assert digest(cache_dir(overrides) / "teacher_logits.h5") == whole


@pytest.mark.slow
def test_a_second_driver_is_refused_and_takes_over_from_a_stopped_one(hosts, overrides, many, whole, tmp_path) -> None:
    first = disturbed(hosts, [*overrides, *many], tmp_path, seconds=2)
    after_some_partitions(overrides, first)
    (tmp_path / "hold").touch()
    refused = start_driver(hosts, SCHEDULER, [*overrides, *many])
    _, log = refused.communicate(timeout=240)
    assert refused.returncode == 2, log
    assert f"host{DRIVER}" in log
    first.send_signal(signal.SIGSTOP)
    (tmp_path / "hold").unlink()
    second = start_driver(hosts, SCHEDULER, [*overrides, *many])
    lines = iter(second.stderr.readline, "")
    assert any("took over" in line for line in lines)
    first.send_signal(signal.SIGCONT)
    _, log = first.communicate(timeout=240)
    assert first.returncode == 1, log
    assert "this process was suspended" in log
    _, log = second.communicate(timeout=240)
    assert second.returncode == 0, log
    assert digest(cache_dir(overrides) / "teacher_logits.h5") == whole


@pytest.mark.slow
def test_a_driver_that_stays_cut_off_ends_after_its_patience(hosts, overrides, tmp_path) -> None:
    patience = "distillation.job.stall_seconds=90"
    driver = disturbed(hosts, [*overrides, "distillation.partition.rows=1", patience], tmp_path)
    wait_for(lambda: list((cache_dir(overrides) / "receipts").rglob("0*.json")), driver, 240)
    hosts.link(DRIVER, "down")
    _, log = driver.communicate(timeout=300)
    assert driver.returncode == 1, log
    assert "to answer within 90 s, got no answer; check the network" in log
