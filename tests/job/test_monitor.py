"""A real job watched from notebooks with real kernels, by folder and by scheduler; and what a monitor refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from builders import cache_dir, dask_processes, finish, sentences, wait_for, write_json_lines
from distributed import Client, LocalCluster
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

from dask_logits import ClusterError, ConfigError, RunConflictError, generate, load_config
from dask_logits.files.atomic import replace_json
from dask_logits.job import monitor as module
from dask_logits.job.monitor import Monitor
from dask_logits.run.failures import Failure, note_failure
from dask_logits.run.folder import RUNS_TOPIC, RunFolder, Share, lock_name
from dask_logits.run.records import FORMAT, VERSION

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "monitor.ipynb"
FACTS = {
    "state": "running", "dashboard": "http://10.0.0.1:8787/status", "partitions": 9, "committed": 4, "tokens": 1234,
    "tokens_per_second": 56.5, "seconds_left": 78.0, "failed": {},
}  # fmt: skip


def run_folder(path: Path, **facts) -> Path:
    """Make a run that has only begun, with what its driver last wrote and its lock."""
    path.mkdir()
    run = RunFolder(path)
    begun = {"run_id": "r", "fingerprint": "f", "what": {}, "how": {}, "total_workers": 1}
    replace_json(run.manifest_path, {"format": FORMAT, "version": VERSION, **begun})
    replace_json(run.status_path(Share()), {**FACTS, "at": time.time(), **facts})
    (path / lock_name(Share())).touch()
    return path


@pytest.fixture
def empty() -> Iterator[LocalCluster]:
    """A scheduler without workers that nobody has announced anything at."""
    with LocalCluster(n_workers=0, dashboard_address=":0", host="127.0.0.1") as cluster:
        yield cluster


def announce(cluster: LocalCluster, run: Path | str, **facts) -> None:
    with Client(cluster, set_as_default=False) as client:
        client.log_event(RUNS_TOPIC, {"run": str(run), **FACTS, "at": time.time(), **facts})


@pytest.fixture
def jupyter(tmp_path: Path, monkeypatch) -> None:
    """Keep kernels to this environment and out of the home folder."""
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    monkeypatch.delenv("JUPYTER_PATH", raising=False)


def execute() -> dict[str, str]:
    """Execute the notebook as it is; return cell → what it shows."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, kernel_name="python3", timeout=300, resources=where).execute()
    shown = {}
    for cell in notebook.cells:
        outputs = [output["data"] for output in cell.get("outputs", [])]
        shown[cell.id] = "".join(
            data.get("text/html") or data.get("text/markdown") or data["text/plain"] for data in outputs
        )
    return shown


def figures(table: str) -> dict[str, str]:
    return dict(re.findall(r"<tr><th[^>]*>(.*?)</th><td[^>]*>(.*?)</td></tr>", table))


def committed(table: str) -> int:
    return int(figures(table)["partitions"].split()[0])


def interrupt_and_kill_a_kernel_that_watches(scheduler_file: Path) -> None:
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel()
    client = manager.client()
    client.start_channels()

    def watch() -> str:
        request = client.execute(f"Monitor(scheduler_file={str(scheduler_file)!r}).watch(seconds=0.1); None")
        while client.get_iopub_msg(timeout=300)["msg_type"] != "update_display_data":
            pass
        return request

    try:
        client.wait_for_ready(timeout=300)
        client.execute("from dask_logits.job.monitor import Monitor")
        request = watch()
        manager.interrupt_kernel()
        while (reply := client.get_shell_msg(timeout=300))["parent_header"]["msg_id"] != request:
            pass
        assert reply["content"]["status"] == "ok"
        watch()
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()


@pytest.mark.slow
def test_notebooks_watch_a_running_job_and_leave_it_alone(overrides, tmp_path, jupyter, monkeypatch) -> None:
    data = write_json_lines(tmp_path / "many.jsonl", sentences(3000))
    many = [f"distillation.dataset.data_files={data}", "distillation.partition.rows=1"]
    run = cache_dir(overrides)
    monkeypatch.setenv("DASK_LOGITS_WATCH_SECONDS", "5")
    with dask_processes(tmp_path) as (file, _):
        scheduler = json.loads(file.read_text())["address"]
        command = [sys.executable, "-m", "dask_logits", "generate"]
        job = [*overrides, *many, f"distillation.cluster.scheduler_file={file}"]
        driver = subprocess.Popen([*command, *job], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for(lambda: list(run.glob("receipts/*/*.json")), driver)

        monkeypatch.setenv("DASK_LOGITS_RUN", str(run))
        by_folder = execute()
        monkeypatch.setenv("DASK_LOGITS_RUN", "no/such/run")
        monkeypatch.setenv("DASK_LOGITS_SCHEDULER", scheduler)
        by_scheduler = execute()
        interrupt_and_kill_a_kernel_that_watches(file)
        assert driver.poll() is None
        driver.send_signal(signal.SIGTERM)
        log = finish(driver)
    assert driver.returncode == 130, log
    assert "again in" not in log

    for shown in (by_folder, by_scheduler):
        assert figures(shown["attach"])["run"] == str(run)
        last = figures(shown["watch"])
        assert last["state"].startswith("running since ")
        assert re.fullmatch(r"1 driver, [1-9][\d,]* tokens/s, .* left", last["running"])
        assert float(last["kept mass"]) > 0
        assert 0 < committed(shown["attach"]) < committed(shown["watch"]) < 3000
        assert last["dashboard"].startswith('<a href="http://127.0.0.1:')
        assert shown["dashboard"] in last["dashboard"].replace('"', "'")
        assert shown["failures"] == "{}"
        assert re.search(r"^\| 8 \| 0\.\d{4} \|$", shown["kept-mass"], re.MULTILINE)
    assert committed(by_folder["watch"]) < committed(by_scheduler["attach"])


def test_watching_a_complete_run_ends_at_once(joined) -> None:
    generate(load_config(joined))
    run = cache_dir(joined)
    started = time.monotonic()
    status = Monitor(run).watch(seconds=600)
    assert status is not None
    assert (status.state, status.committed, status.failed) == ("complete", 4, {})
    assert time.monotonic() - started < 300
    shown = Monitor(run)._repr_html_()
    assert figures(shown)["cache"] == str(run / "teacher_logits.h5")
    assert ">4 committed<" in shown
    assert shown.count("<svg") == 3


def test_all_cells_can_be_executed_while_a_run_calibrates(tmp_path, jupyter, monkeypatch) -> None:
    record = {**FACTS, "at": time.time(), "since": time.time(), "state": "calibrating", "step": "loading the teacher"}
    (tmp_path / "run").mkdir()
    replace_json(tmp_path / "run" / "status.json", record)
    (tmp_path / "run" / lock_name(Share())).touch()
    monkeypatch.setenv("DASK_LOGITS_RUN", str(tmp_path / "run"))
    shown = execute()
    assert figures(shown["attach"])["state"].startswith("calibrating since ")
    assert shown["failures"] == "{}"


def test_watching_in_the_background_ends_with_the_run_or_when_it_is_stopped(tmp_path, monkeypatch) -> None:
    monitor = Monitor(run_folder(tmp_path / "run"))
    thread = monitor.watch_in_background(seconds=0.01)
    assert thread.is_alive()
    again = monitor.watch_in_background(seconds=0.01)
    thread.join(60)
    assert not thread.is_alive()
    monitor.stop()
    again.join(60)
    assert not again.is_alive()


def test_the_notebook_is_saved_clean() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [(cell.outputs, cell.execution_count) for cell in code] == [([], None)] * len(code)
    assert not re.search(r"""["'](/|~|[A-Z]:)""", "".join(cell.source for cell in code))


@pytest.mark.parametrize(
    ("places", "got"),
    [({}, "none"), ({"run": "here", "scheduler": "tcp://a:1"}, "run and scheduler"),
     ({"scheduler": "tcp://a:1", "scheduler_file": "s.json"}, "scheduler and scheduler_file")],
)  # fmt: skip
def test_exactly_one_place_is_asked_for(places, got) -> None:
    with pytest.raises(ConfigError, match=f"expected exactly one of run, .*, got {got}$"):
        Monitor(**places)


def test_a_folder_without_a_run_is_refused(tmp_path) -> None:
    with pytest.raises(RunConflictError, match=r"expected a run folder with run\.json"):
        Monitor(tmp_path)


def test_a_scheduler_that_does_not_answer_is_refused_in_time(tmp_path) -> None:
    started = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"expected a scheduler at '{address}'"):
            Monitor(scheduler=address, wait_seconds=0.5)
    with pytest.raises(ClusterError, match=f"expected a scheduler at '{address}'"):
        Monitor(scheduler=address, wait_seconds=0.5)
    with pytest.raises(ClusterError, match="expected a scheduler at 'nowhere:x'"):
        Monitor(scheduler="nowhere:x", wait_seconds=0.5)
    with pytest.raises(ClusterError, match=r"Monitor: expected a scheduler's address in .*none\.json"):
        Monitor(scheduler_file=tmp_path / "none.json", wait_seconds=0.5)
    (tmp_path / "empty.json").touch()
    with pytest.raises(ClusterError, match=r"Monitor: expected a scheduler's address in .*empty\.json"):
        Monitor(scheduler_file=tmp_path / "empty.json", wait_seconds=0.5)
    assert time.monotonic() - started < 60


def test_a_scheduler_where_no_run_was_announced_is_refused(empty) -> None:
    with pytest.raises(ClusterError, match="expected a run to be announced at this scheduler, got none"):
        Monitor(scheduler=empty.scheduler_address)


def test_the_run_at_work_is_chosen_and_nothing_stays_connected(empty, tmp_path) -> None:
    ended, working, other = (run_folder(tmp_path / name) for name in ("ended", "working", "other"))
    announce(empty, ended)
    announce(empty, working)
    announce(empty, ended, state="stopped")
    assert Monitor(scheduler=empty.scheduler_address).run == str(working)
    announce(empty, working, state="running", at=time.time() - 999)
    announce(empty, ended, state="stopped")
    assert Monitor(scheduler=empty.scheduler_address).run == str(ended)
    announce(empty, other)
    announce(empty, working)
    with pytest.raises(RunConflictError, match=f"got 2; give the folder of one: {other}, {working}"):
        Monitor(scheduler=empty.scheduler_address)
    assert set(empty.scheduler.clients) == {"fire-and-forget"}
    assert not empty.scheduler.tasks


def test_a_folder_that_is_not_visible_here_is_shown_by_its_announcements(empty, capsys) -> None:
    announce(empty, "/far/away", failed={"3": "a <b> row"})
    watcher = Monitor(scheduler=empty.scheduler_address)
    announce(empty, "/far/away", committed=5, failed={"3": "a <b> row", "x": "no number"})
    announce(empty, "/far/away", state=["no", "state"])
    for malformed in (3, ["x"]):
        with Client(empty, set_as_default=False) as client:
            client.log_event(RUNS_TOPIC, malformed)
            client.log_event(RUNS_TOPIC, {"run": malformed, **FACTS, "at": time.time()})
    shown = figures(watcher._repr_html_())
    assert shown["run"] == "/far/away (not visible on this machine)"
    assert (shown["committed"], shown["partitions"], shown["tokens per second"]) == ("5", "9", "56.5")
    assert (shown["seconds left"], shown["failed 000003"]) == ("78.0", "a &lt;b&gt; row")
    assert shown["failed 00000x"] == "no number"
    assert FACTS["dashboard"] in shown["dashboard"]
    assert watcher.watch(until=0) is None
    assert re.search(r"^tokens\s+1234$", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(RunConflictError, match="/far/away: expected a run folder"):
        watcher.status()


def test_failures_are_shown_and_escaped(tmp_path) -> None:
    reason = "row 7: <script>alert('x')</script> & more"
    run = run_folder(tmp_path / "run", dashboard='javascript:alert("x")')
    note_failure(RunFolder(Path(run)), Failure(index=3, kind="data", reason=reason))
    table = Monitor(run)._repr_html_()
    assert "partition 000003: data: row 7: &lt;script&gt;" in figures(table)["failed"]
    assert "<script" not in table
    assert "<a " not in table
    assert Monitor(run).status().failed == {3: f"data: {reason}"}


def test_watching_ends_in_time_on_an_interrupt_or_without_a_driver(tmp_path, monkeypatch, capsys) -> None:
    run = run_folder(tmp_path / "run")
    started = time.monotonic()
    status = Monitor(run).watch(seconds=60, until=0.3)
    assert status is not None
    assert status.running == 1
    assert capsys.readouterr().out.count("running       1 driver, 56 tokens/s, 1 min 18 s left") == 2

    monitor = Monitor(run)
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
    status = monitor.watch(seconds=600)
    assert status is not None

    monkeypatch.setattr(module, "_GRACE_SECONDS", 0.3)
    run_folder(tmp_path / "stopped", state="stopped")
    status = Monitor(tmp_path / "stopped").watch(seconds=0.1)
    assert status is not None
    assert status.running == 0
    assert time.monotonic() - started < 60
