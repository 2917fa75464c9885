"""The record of a driver is renewed while the driver is at work, and not after its end."""

from __future__ import annotations

import json
import threading
import time
from types import SimpleNamespace

from builders import cache_dir

from dask_logits import generate, load_config, read_status
from dask_logits.cache.reader import CacheReader
from dask_logits.files.atomic import replace_json
from dask_logits.job import reporter as module
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


def test_the_record_counts_all_failures_and_names_the_first_ones(tmp_path) -> None:
    made = Reporter(SimpleNamespace(run=RunFolder(tmp_path), share=Share()))
    made.failed |= {index: "a row " * 1_000 + "\nand more" for index in range(50_000, 0, -1)}
    made.report("running")
    record = json.loads((tmp_path / "status.json").read_text())
    assert record["failures"] == 50_000
    assert list(record["failed"]) == [str(index) for index in range(50_000, 49_980, -1)]
    assert set(record["failed"].values()) == {("a row " * 1_000)[:200]}
