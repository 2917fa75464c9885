"""The page of the runs in a real scheduler's dashboard, over HTTP and, with report and explorer, in a browser."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import dask
import pytest
from browser import CHROMIUM, browser
from builders import records, write_cache
from distributed import Client, LocalCluster
from test_explore import named_tokenizer
from test_monitor import FACTS
from test_report import HOSTILE, Page

from dask_logits import write_report
from dask_logits.config.groups import ClusterConfig, GenerationConfig
from dask_logits.job import dashboard
from dask_logits.job.cluster import open_cluster
from dask_logits.observe.explore import Explorer, ExploreServer
from dask_logits.observe.live import LiveRun
from dask_logits.run.failures import Failure, note_failure
from dask_logits.run.folder import RUNS_TOPIC, RunFolder
from dask_logits.run.records import DriverStatus


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    """A scheduler without workers that loads the page as `dask scheduler --preload` does."""
    with (
        dask.config.set({"distributed.scheduler.preload": ["dask_logits.job.dashboard"]}),
        LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0", host="127.0.0.1") as made,
    ):
        yield made


def announce(cluster: LocalCluster, run: object, **facts) -> None:
    with Client(cluster, set_as_default=False) as client:
        client.log_event(RUNS_TOPIC, {"run": run, **FACTS, "at": time.time(), **facts})


def get(cluster: LocalCluster, path: str) -> str:
    address = f"http://127.0.0.1:{cluster.scheduler.http_server.port}/{path}"
    with urllib.request.urlopen(address, timeout=60) as answer:
        return answer.read().decode()


def test_the_page_shows_the_runs_of_a_scheduler(cluster, scored, tmp_path, monkeypatch) -> None:
    assert "No run was announced" in Page(get(cluster, "dask-logits")).text
    assert json.loads(get(cluster, "dask-logits.json")) == {"runs": [], "workers": []}
    assert '<a href="dask-logits">' in get(cluster, "status"), "distributed has another way to extend its navigation"
    panels = json.loads(get(cluster, "individual-plots.json"))
    assert panels["dask-logits"] == "/dask-logits"
    assert panels["Individual Task Stream"] == "/individual-task-stream"

    far = f"/far/{HOSTILE}"
    announce(cluster, far, failed={"3": HOSTILE}, state="stopped")
    announce(cluster, str(scored.path))
    for malformed in (None, 3, ["x"]):
        announce(cluster, malformed)
    announce(cluster, str(tmp_path), state=["no", "state"])

    monkeypatch.setattr(dashboard, "_REFRESH_SECONDS", 0.0)
    monkeypatch.setattr(dashboard, "_REST", 0.0)
    page = Page(get(cluster, "dask-logits"))
    assert str(scored.path) in page.text
    assert "4 of 4" in page.text
    assert [link["href"] for link in page.all("a")] == [f"?run={quote(far)}"]
    assert "Where the time went" in Page(get(cluster, f"dask-logits/body?run={quote(str(scored.path))}")).text

    there = Page(get(cluster, f"dask-logits?run={quote(far)}"))
    assert f"{far}: expected a run folder with run.json" in there.text
    assert HOSTILE in there.text.partition("What its driver announced last:")[2]
    assert there.all("img") == []
    assert len(there.all("script")) == 1

    known, lost = json.loads(get(cluster, "dask-logits.json"))["runs"]
    assert (known["run"], known["partitions_by_state"]["committed"]) == (str(scored.path), 4)
    assert (lost["run"], lost["error"][:5]) == (far, "/far/")
    metrics = get(cluster, "dask-logits/metrics")
    assert f'dask_logits_partitions{{run="{scored.path}",state="committed"}} 4.0' in metrics

    # Only announced folders are read.
    assert str(scored.path) in get(cluster, f"dask-logits/body?run={quote(str(tmp_path))}")
    with ThreadPoolExecutor(2) as viewers:
        assert len(set(viewers.map(lambda _: "4 of 4" in get(cluster, "dask-logits/body"), range(6)))) == 1

    shutil.rmtree(scored.path)
    assert "expected a run folder" in get(cluster, "dask-logits/body")
    monkeypatch.setattr(LiveRun, "read", lambda _: 1 / 0)
    assert "ZeroDivisionError" in get(cluster, "dask-logits/body")
    assert "dask_logits" not in get(cluster, "dask-logits/metrics")


def test_a_slow_file_system_keeps_nobody_waiting(cluster, tmp_path, monkeypatch) -> None:
    reads = []

    def slow(self: LiveRun) -> None:
        reads.append(self)
        time.sleep(1.0)

    monkeypatch.setattr(LiveRun, "read", slow)
    monkeypatch.setattr(dashboard, "_WAIT_SECONDS", 0.05)
    announce(cluster, str(tmp_path))
    for _ in range(3):
        assert "Its files are being read." in get(cluster, "dask-logits/body")
    assert len(reads) == 1


def test_many_viewers_of_a_run_that_is_read_all_the_time_all_get_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(dashboard, "_REFRESH_SECONDS", 0.0)
    monkeypatch.setattr(dashboard, "_REST", 0.0)
    run, event = dashboard._Run(str(tmp_path)), DriverStatus(run=str(tmp_path), at=0.0, **FACTS)

    async def look() -> list[str]:
        return [(await run.view(event)).run for _ in range(20)]

    async def look_together() -> list[list[str]]:
        return await asyncio.gather(*(look() for _ in range(20)))

    assert asyncio.run(look_together()) == [[str(tmp_path)] * 20] * 20


def test_a_single_long_reading_does_not_make_the_page_stand_still(tmp_path, monkeypatch) -> None:
    run, event = dashboard._Run(str(tmp_path)), DriverStatus(run=str(tmp_path), at=0.0, **FACTS)
    rests = []
    for seconds in (5.0, 0.001, 5.0, 0.05, 5.0):
        with monkeypatch.context() as clocks:
            clocks.setattr(time, "thread_time", iter((0.0, seconds)).__next__)
            clocks.setattr(time, "monotonic", lambda: 0.0)
            run._renew(event)
        rests.append(run._due)
    assert rests == [2.0, 2.0, 2.0, 5.0, 5.0]


def test_a_cluster_of_a_job_has_the_page_where_it_has_a_dashboard(fork_server) -> None:
    generation = GenerationConfig(device="cpu", num_workers=1)
    config = ClusterConfig(kind="local_cpu", dashboard_address="127.0.0.1:0", wait_seconds=300)
    with open_cluster(generation, config) as executor:
        address = str(executor.dashboard).replace("/status", "/dask-logits.json")
        with urllib.request.urlopen(address, timeout=60) as answer:
            found = json.loads(answer.read())
            assert "script-src 'sha256-" in answer.headers["Content-Security-Policy"]
        (worker,) = found["workers"]
        assert found["runs"] == []
        assert re.fullmatch(r"tcp://127\.0\.0\.1:\d+ on 127\.0\.0\.1", worker["worker"])
        assert 10 << 20 < worker["process_bytes"] < 100 << 30
        assert worker["device_bytes"] is worker["device_total_bytes"] is None
        with urllib.request.urlopen(address.replace(".json", "/metrics"), timeout=60) as answer:
            name = re.escape(worker["worker"])
            assert re.search(
                rf'^dask_logits_worker_memory_bytes\{{worker="{name}"\}} \d+\.0$', answer.read().decode(), re.M
            )


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_pages_work_in_a_browser_by_keyboard_and_on_a_narrow_screen(cluster, scored, tmp_path, monkeypatch) -> None:
    run = RunFolder(scored.path)
    note_failure(run, Failure(index=2, kind="data", reason=f"row 30: {HOSTILE}", workers=(HOSTILE,)))
    receipt = run.receipt_path(2)
    receipt.rename(receipt.with_suffix(".away"))
    report = write_report(run.path, tmp_path / "report.html").as_uri()
    announce(cluster, str(run.path))
    monkeypatch.setattr(dashboard, "_REFRESH_SECONDS", 0.0)
    monkeypatch.setattr(dashboard, "_REST", 0.0)
    page = f"http://127.0.0.1:{cluster.scheduler.http_server.port}/dask-logits"
    said = named_tokenizer(tmp_path, [f"{HOSTILE}{i}" for i in range(10)])
    write_cache(tmp_path / "cache.h5", records((30, 0, 700, 5), k=20), **said)

    async def visit(explorer: str) -> None:
        async with browser(tmp_path / "profile") as tab:
            for address in (report, page, explorer):
                for width in (960, 360):
                    await tab.open(address, width)
                    await tab.until("document.querySelector('h1, h2') !== null")
                    await tab.until(f"document.body.innerText.includes({json.dumps(HOSTILE)})")
                    assert await tab.value("document.documentElement.scrollWidth") <= width, (address, width)
                    assert await tab.value("document.images.length") == 0
                # Whatever can be used by mouse is reached by keyboard, and shows that it is.
                reached = set()
                for _ in range(12):
                    await tab.press("Tab")
                    reached.add(await tab.value("document.activeElement.outerHTML.slice(0, 60)"))
                    assert await tab.value(
                        "document.activeElement === document.body || "
                        "getComputedStyle(document.activeElement).outlineStyle !== 'none'"
                    )
                assert len(reached) > 1, address
            await tab.until("document.getElementById('previous').disabled")
            assert not await tab.value("document.getElementById('next').disabled")
            await tab.open(page)
            assert "3 committed" in await tab.value("document.body.innerText")
            receipt.with_suffix(".away").rename(receipt)
            await tab.until("document.body.innerText.includes('4 committed')")
            assert await tab.value("document.getElementById('note').textContent") == ""
            assert tab.errors == []
            # They would have been noticed.
            await tab.value("setTimeout(() => { throw new Error('a') }), console.error('b')")
            await tab.until("new Promise(done => setTimeout(done, 50, true))")
            assert len(tab.errors) == 2

    with ExploreServer(Explorer(tmp_path / "cache.h5")) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            asyncio.run(visit(server.address))
        finally:
            server.shutdown()
            thread.join()
