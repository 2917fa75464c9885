"""Four hosts as network namespaces: links are cut and hosts go away; every run ends with the undisturbed digest.

The namespaces have no route to anything but each other.
"""

from __future__ import annotations

import contextlib
import os
import shutil
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
from dask_logits.worker import calibrate, task
write = task.write_partition
def dask_setup(worker):
    def slow(*given):
        time.sleep(0.4)
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
            process.communicate()
        for space in spaces:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", space)


def disturbed(hosts: Hosts, overrides: list[str], folder: Path) -> subprocess.Popen:
    """Start a scheduler, two workers and a driver, each on a host of its own."""
    (folder / "slow.py").write_text(_SLOW)
    address = f"tcp://{_address(SCHEDULER)}:8786"
    dask = [sys.executable, "-m", "dask"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    hosts.start(SCHEDULER, *dask, "scheduler", "--host", _address(SCHEDULER), "--port", "8786", "--no-dashboard",
                **quiet)  # fmt: skip
    for host in WORKERS:
        hosts.start(
            host, *dask, "worker", address, "--host", _address(host), "--nthreads", "1", "--memory-limit", "0",
            "--no-dashboard", "--no-nanny", "--preload", str(folder / "slow.py"), "--local-directory", str(folder),
            **quiet,
        )  # fmt: skip
    mine = [*overrides, f"distillation.cluster.scheduler={address}"]
    return hosts.start(DRIVER, *COMMAND, *mine, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "act",
    [
        pytest.param("driver", marks=pytest.mark.slow),
        pytest.param("worker", marks=pytest.mark.slow),
        pytest.param("host", marks=pytest.mark.slow),
    ],
)
def test_cut_links_and_lost_hosts_change_nothing(hosts, overrides, joined, tmp_path, act) -> None:
    data = write_json_lines(tmp_path / "many.jsonl", sentences(80, seed=5))
    many = ["distillation.partition.rows=2", f"distillation.dataset.data_files={data}"]
    whole = digest(run(joined, *many, f"distillation.teacher.cache_dir={tmp_path / 'whole'}"))
    driver = disturbed(hosts, [*overrides, *many], tmp_path)
    receipts = cache_dir(overrides) / "receipts"
    wait_for(lambda: len(list(receipts.rglob("0*.json"))) > 3, driver, 240)
    cut = {"driver": DRIVER, "worker": WORKERS[0], "host": WORKERS[0]}[act]
    hosts.link(cut, "down")
    if act == "host":
        hosts.processes[1].kill()
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
def test_a_driver_that_stays_cut_off_ends_after_its_patience(hosts, overrides, tmp_path) -> None:
    patience = "distillation.job.stall_seconds=30"
    driver = disturbed(hosts, [*overrides, "distillation.partition.rows=1", patience], tmp_path)
    wait_for(lambda: list((cache_dir(overrides) / "receipts").rglob("0*.json")), driver, 240)
    hosts.link(DRIVER, "down")
    _, log = driver.communicate(timeout=240)
    assert driver.returncode == 1, log
    assert "to answer within 30 s, got no answer; check the network" in log
