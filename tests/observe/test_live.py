"""A run that is read again and again: what is read once, what is noticed, and what a page shows of it."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from builders import cache_dir
from test_monitor import run_folder
from test_report import HOSTILE, Page, checked, history, read_status_of_nothing

from dask_logits import CacheError, RunConflictError, generate, load_config, read_status
from dask_logits.files.atomic import replace_json
from dask_logits.observe import live_page
from dask_logits.observe.charts import cells
from dask_logits.observe.live import STATES, LiveRun, Snapshot
from dask_logits.run.failures import Failure, note_failure
from dask_logits.run.folder import RunFolder
from dask_logits.run.plan_log import PlanLog


def snapshot(n_partitions: int, n_workers: int = 3) -> Snapshot:
    states_P = np.zeros(n_partitions, np.uint8)
    states_P[-9:] = 1
    made = history([(float(i + 10), i % n_workers) for i in range(n_partitions)])
    return Snapshot(status=read_status_of_nothing(), history=made, failures={}, at=1e9, states_P=states_P)


def test_a_run_is_followed_from_its_calibration_to_its_cache_without_reading_a_receipt_twice(
    here, scored, monkeypatch
) -> None:
    live = LiveRun(scored.path)
    first = live.read()
    assert first.counts() == {"committed": 4, "waiting": 0, "running": 0, "failed": 0}
    assert first.status == read_status(scored.path)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "receipt", lambda *_: pytest.fail("a receipt was read again"))
        again = live.read()
    assert again.status.statistics == first.status.statistics
    assert len(again.history) == 4

    kept = scored.receipt_path(2).read_text()
    scored.receipt_path(2).unlink()
    scored.receipt_path(3).write_text("{")
    note_failure(scored, Failure(index=2, kind="data", reason="row 30 is bad"))
    for one in (live, LiveRun(scored.path)):
        assert one.read().states_P.tolist() == [0, 0, 3, 1]
    assert LiveRun(scored.path).read().history.n_problems == 1
    scored.receipt_path(2).write_text(kept)
    assert live.read().counts()["failed"] == 0

    generate(load_config(here))
    done = live.read()
    assert (done.status.state, done.counts()["committed"]) == ("complete", 4)


def test_a_reading_opens_each_receipt_once_and_asks_for_no_folder_of_targets_alone(scored, monkeypatch) -> None:
    asked: list[str] = []
    stat, read_bytes = Path.stat, Path.read_bytes
    monkeypatch.setattr(Path, "stat", lambda path, **named: asked.append(str(path)) or stat(path, **named))
    monkeypatch.setattr(Path, "read_bytes", lambda path: asked.append(str(path)) or read_bytes(path))

    def asked_by(read) -> list[str]:
        asked.clear()
        read()
        return sorted(Path(path).name for path in asked if "/receipts/0" in path or "/partitions/" in path)

    live = LiveRun(scored.path)
    once = sorted([f"{index:06d}.json" for index in range(4)] * 2)
    assert asked_by(lambda: read_status(scored.path)) == once, "one stat and one reading of each"
    assert asked_by(live.read) == once
    assert asked_by(live.read) == []
    scored.receipt_path(2).rename(scored.path / "aside")
    assert live.read().counts()["committed"] == 3
    (scored.path / "aside").rename(scored.receipt_path(2))
    assert asked_by(live.read) == ["000002.json"] * 2


def test_targets_that_vanish_while_a_run_is_followed_are_noticed(scored) -> None:
    live = LiveRun(scored.path)
    whole = live.read()
    receipt = scored.receipt(1)
    assert receipt is not None
    targets = scored.partitions_path / receipt.attempt
    shutil.move(targets, scored.path / "aside")
    lacking = live.read()
    assert lacking.states_P.tolist() == [0, 1, 0, 0]
    assert lacking.status.statistics.tokens == whole.status.statistics.tokens - receipt.statistics.tokens
    assert (len(lacking.history), lacking.history.n_problems) == (3, 1)
    shutil.move(scored.path / "aside", targets)
    again = live.read()
    assert (again.counts(), again.status.statistics.tokens) == (whole.counts(), whole.status.statistics.tokens)
    assert (len(again.history), len(lacking.history)) == (4, 3), "a snapshot does not change"


def test_a_plan_that_grows_is_read_on(scored, monkeypatch) -> None:
    live = LiveRun(scored.path)
    live.read()
    log, entries = PlanLog(scored), []
    log.append(((2, 5),), {"kind": "rows", "content": "more"})
    log.close("max_samples")
    monkeypatch.setattr(PlanLog, "_entry", lambda *given, was=PlanLog._entry: entries.append(given[1]) or was(*given))
    found = live.read()
    assert found.states_P.tolist() == [0, 0, 0, 0, 1, 1]
    assert (found.status.rows, found.status.planned_all) == (50, True)
    assert entries == [2, 3, 4]


@pytest.mark.parametrize(
    "planned",
    [
        pytest.param([((5, 8),)], id="elsewhere"),
        pytest.param([((2, 12),), ((1, 8),), ((1, 8),)], id="more entries"),
        pytest.param([((3, 12), (1, 4))], id="the same"),
    ],
)
def test_a_plan_that_a_driver_replaces_is_read_anew(scored, planned) -> None:
    live = LiveRun(scored.path)
    live.read()
    receipt = json.loads(scored.receipt_path(0).read_text())
    log = PlanLog(scored)
    (segment,) = log.segments()
    log.drop_from(segment, "a file")
    for cuts in planned:
        log.append(cuts, segment.source)
    log.close("exhausted")
    # Committed between two readings, under an index that was in use.
    statistics = {**receipt["statistics"], "tokens": 1}
    rows = {"n_rows": planned[0][0][1], "statistics": statistics}
    replace_json(scored.receipt_path(0), {**receipt, **rows})
    for _ in range(2):
        found, status = live.read(), read_status(scored.path)
        assert (found.status.partitions, found.status.rows) == (log.n_partitions, 40)
        assert found.states_P.tolist() == [0] + [1] * (log.n_partitions - 1)
        assert found.status.statistics.tokens == status.statistics.tokens == 1
        assert found.status.next_command == status.next_command


def test_partitions_at_work_are_told_by_the_drivers_record(scored) -> None:
    scored.receipt_path(1).unlink()
    scored.receipt_path(3).unlink()
    record = json.loads((scored.path / "status.json").read_text())
    replace_json(scored.path / "status.json", {**record, "state": "running", "at": time.time(), "running": [1, 2, 99]})
    (scored.path / ".driver.lock").touch()
    found = LiveRun(scored.path).read()
    assert [STATES[i] for i in found.states_P] == ["committed", "running", "committed", "waiting"]
    assert live_page.values(found)["running_partitions"] == [1]


def test_a_driver_names_the_partitions_that_are_running(here, monkeypatch) -> None:
    from dask_logits.job.reporter import Reporter

    seen: list[list[int]] = []
    report = Reporter.report

    def observed(self: Reporter, *arguments, **named) -> None:
        report(self, *arguments, **named)
        seen.append(json.loads((cache_dir(here) / "status.json").read_text())["running"])

    monkeypatch.setattr(Reporter, "report", observed)
    monkeypatch.setattr("dask_logits.job.reporter._REPORT_SECONDS", 0.0)
    generate(load_config(here))
    assert {index for each in seen for index in each} == {0, 1, 2, 3}
    assert max(len(each) for each in seen) <= 3, "one is read, one scored and one written"
    assert seen[-1] == []


def test_a_replaced_run_is_read_anew_and_a_folder_that_vanishes_is_refused(scored, tmp_path) -> None:
    live = LiveRun(scored.path)
    assert live.read().counts()["committed"] == 4
    manifest = json.loads(scored.manifest_path.read_text())
    replace_json(scored.manifest_path, {**manifest, "run_id": "another"})
    assert live.read().counts()["committed"] == 0
    replace_json(scored.manifest_path, {**manifest, "version": 99})
    with pytest.raises(CacheError, match=r"got .* version 99; use the release that wrote it"):
        live.read()
    shutil.rmtree(scored.path)
    with pytest.raises(RunConflictError, match="expected a run folder"):
        live.read()


def test_a_page_shows_a_run_and_escapes_what_others_wrote(scored, caplog) -> None:
    scored.receipt_path(1).unlink()
    scored.receipt_path(3).write_text("{")
    receipt = json.loads(scored.receipt_path(0).read_text())
    failed = [{"kind": HOSTILE, "reason": f"again {HOSTILE}", "worker": HOSTILE, "at": 1e9}]
    replace_json(scored.receipt_path(0), {**receipt, "host": HOSTILE, "failed_attempts": failed})
    note_failure(scored, Failure(index=1, kind="data", reason=f"row 13: {HOSTILE}", attempts=3, workers=(HOSTILE,)))
    hostile = scored.path.rename(scored.path.parent / "a<b>&\"'")
    found = LiveRun(hostile).read()
    inner = live_page.body(found)
    shown = checked(f"<div>{inner}</div>")
    assert shown.all("img") == shown.all("script") == []
    assert "2 committed 1 waiting 0 running 1 failed" in " ".join(" ".join(shown.words).split())
    assert f"row 13: {HOSTILE}" in shown.text
    assert "1 receipt cannot be used" in shown.text
    assert f"partition 0: {HOSTILE}: again {HOSTILE}" in shown.text
    assert live_page.values(found)["failed_attempts"] == {HOSTILE: 1}
    assert "a<b>&\"'" in shown.text
    assert [attributes["id"] for attributes in shown.all("section")] == [
        "partitions",
        "speed",
        "time",
        "timeline",
        "failures",
    ]
    whole = Page(live_page.page(inner))
    assert len(whole.all("script")) == 1
    assert caplog.text == "", "a damaged receipt is shown, and not logged at every reading"

    lines = live_page.metrics([found]).splitlines()
    assert f'dask_logits_partitions{{run="{hostile.parent}/a<b>&\\"\'",state="failed"}} 1.0' in lines
    assert len([line for line in lines if line.startswith("# TYPE")]) == len(
        {line for line in lines if "# TYPE" in line}
    )
    assert json.loads(json.dumps(live_page.values(found)))["partitions_by_state"]["committed"] == 2


def test_the_memory_of_workers_is_shown_where_they_report_it() -> None:
    assert live_page.memory([]) == ""
    cpu = live_page.Memory(worker=HOSTILE, process_bytes=3 << 29, limit_bytes=4 << 30)
    alone = checked(f"<div>{live_page.memory([cpu])}</div>")
    assert f"worker process {HOSTILE} 1.5 of 4.0 GiB" in " ".join(" ".join(alone.words).split())
    gpus = [live_page.Memory(worker=f"w{i}", process_bytes=1 << 30, device_bytes=i << 30, device_total_bytes=80 << 30)
            for i in range(150)]  # fmt: skip
    both = " ".join(" ".join(checked(f"<div>{live_page.memory([cpu, *gpus])}</div>").words).split())
    assert "worker process GPU w149 1.0 GiB 149.0 of 80.0 GiB w148" in both
    assert "51 more workers with less." in both
    lines = live_page.metrics([], [cpu, gpus[2]]).splitlines()
    assert 'dask_logits_worker_device_bytes{worker="w2"} 2147483648.0' in lines
    assert sum(line.startswith("dask_logits_worker_device_bytes{") for line in lines) == 1


def test_a_cell_of_a_notebook_keeps_its_style_to_itself() -> None:
    shown = Page(live_page.cell(snapshot(50)))
    assert not [attributes for name, attributes in shown.elements if name == "section" and "id" in attributes]
    assert shown.all("script") == []
    style = live_page.cell(snapshot(50)).partition("<style>")[2].partition("</style>")[0]
    assert style.count("{") == style.count("}")
    depth, outside = 0, ""
    for letter in style:
        outside += letter if not depth else ""
        depth += (letter == "{") - (letter == "}")
    assert outside == ".dask-logits{.dask-logits.dask-logits{"


def test_ten_thousand_partitions_make_a_small_map() -> None:
    began = time.process_time()
    made = snapshot(10_000, 64)
    inner = live_page.body(made)
    assert time.process_time() - began < 2.0
    assert len(inner) < 200_000
    each, kinds_C = live_page.grouped(made.states_P)
    assert (each, len(kinds_C), kinds_C[-2:].tolist()) == (5, 2000, [1, 1])
    assert "A square is 5 partitions" in inner


def test_squares_of_one_state_are_one_line() -> None:
    svg = cells("Map", np.array([0] * 30 + [2] * 20, np.uint8), 4, description="50 squares")
    assert 'viewBox="0 0 400 20"' in svg
    assert '<path d="M1 5h298" class="kind0"/><path d="M301 5h98M1 15h98" class="kind2"/>' in svg


def test_an_empty_record_of_a_driver_is_warned_of_once(tmp_path, caplog) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / "status.json").write_text("")
    live = LiveRun(folder)
    for _ in range(3):
        assert live.read().status.state == "stopped"
    assert caplog.text.count("ignored: ") == 1
    assert str(folder / "status.json") in caplog.text
    read_status(folder)
    assert caplog.text.count("ignored: ") == 2


def test_a_run_that_has_only_begun_is_shown(tmp_path) -> None:
    found = LiveRun(run_folder(tmp_path / "run")).read()
    assert len(found.states_P) == 0
    assert "56.5" in live_page.body(found)
