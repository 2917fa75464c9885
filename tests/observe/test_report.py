"""The report of real runs in every state, of caches alone, and of 10,000 pretended partitions."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import warm
from builders import cache_dir, records, save_tokenizer, write_cache
from test_monitor import run_folder

from dask_logits import CachedLogitsDataset, CacheError, collate, generate, load_config, read_status, write_report
from dask_logits.observe import sample as sampling
from dask_logits.observe.history import Clock, History, rates
from dask_logits.observe.report import Facts, render, report_html
from dask_logits.records import Statistics
from dask_logits.run.failures import Failure, note_failure
from dask_logits.run.plan import Partition
from dask_logits.run.records import Receipt
from dask_logits.run.state import PartitionState
from dask_logits.vocabulary import map_digest

GOLDEN = Path(__file__).parents[1] / "cache" / "golden" / "v1.0-plain.h5"
HOSTILE = "</script><img/src=x/onerror=alert(1)>"
VOID = {"meta", "br", "img", "input", "link"}


class Page(HTMLParser):
    """A parsed page: its elements with attributes, its text, and whether every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def checked(html: str) -> Page:
    """Parse a page. Refuse one that needs the network, repeats an id, or hides what its charts show."""
    page = Page(html)
    assert not page.open
    assert not [attributes for _, attributes in page.elements if "src" in attributes or "data" in attributes]
    assert page.all("link") == page.all("script") == []
    assert not re.search(r"@import|url\(", html)
    assert not re.search(r'class="(?:top|unit)"></div>', html), "an axis without its unit"
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for svg in page.all("svg"):
        assert svg["role"] == "img"
        title, _, description = str(svg["aria-label"]).partition(": ")
        assert title
        assert description
    assert all(str(link["href"]).removeprefix("#") in ids for link in page.all("a"))
    assert len(html) < 2 << 20
    return page


def test_every_finished_run_leaves_a_report(here, caplog) -> None:
    cache = generate(load_config(here))
    file = cache_dir(here) / "report.html"
    page = checked(file.read_text())
    assert [attributes["id"] for attributes in page.all("section")] == [
        "speed", "time", "timeline", "targets", "documents", "computed", "loading",
    ]  # fmt: skip
    n_tokens = read_status(cache_dir(here)).statistics.tokens
    assert f"1 worker scored {n_tokens:,} tokens in " in page.text
    assert f"These figures are those of all {n_tokens} tokens." in page.text
    assert "on corpus.jsonl" in page.text
    assert "complete" in page.text
    assert re.search(r"all 8 hold \d+\.\d %\.", page.text)
    boxes = [words for words in page.words if re.fullmatch(r"partition \d: \d+ tokens in \d+ s", words)]
    assert len(boxes) == 4
    words = CachedLogitsDataset(cache)[0]["input_ids"]
    assert len(words)
    assert re.search(r"\b(red|green|blue|cat|dog) (red|green|blue|cat|dog|sun|moon)\b", page.text), "text is decoded"
    assert f"report        {file}" in read_status(cache_dir(here)).lines()
    assert "report.html" not in caplog.text


def test_the_code_that_a_report_shows_loads_the_cache(here) -> None:
    generate(load_config(here))
    page = Page((cache_dir(here) / "report.html").read_text())
    code = next("".join(page.words[i:]) for i, words in enumerate(page.words) if words.startswith("from torch"))
    found: dict = {}
    exec(code.partition("Its checksums")[0], found)
    expected = collate([CachedLogitsDataset(cache_dir(here))[i] for i in range(8)])
    assert found["batch"].keys() == expected.keys()


def test_a_report_can_be_had_of_a_run_that_stopped_or_failed(scored) -> None:
    run = scored
    assert not run.report_path.exists(), "whoever stops a run does not wait for its report"
    assert "Where the time went" in checked(report_html(run.path)).text
    run.receipt_path(1).unlink()
    run.receipt_path(2).write_text("{")
    note_failure(run, Failure(index=1, kind="data", reason=f"row 13: {HOSTILE}", attempts=3, rows=(13,)))
    page = checked(write_report(run.path).read_text())
    assert "failed, 2 of 4 partitions" in page.text
    assert "1 partition failed for good. `dask-logits retry`" in page.text
    assert f"000001 data 3 row 13: {HOSTILE} 13 –" in " ".join(" ".join(page.words).split())
    assert "1 receipt cannot be used" in page.text
    assert "expected a JSON object" in page.text
    assert "By mean entropy, among" in page.text, "the documents of committed partitions are shown"
    assert page.all("img") == []


def test_a_run_without_receipts_says_so(tmp_path) -> None:
    page = checked(report_html(run_folder(tmp_path / "run")))
    assert "running, 0 of 0 partitions" in page.text
    assert "There are no targets yet." in page.text


def test_a_damaged_cache_is_named_and_its_run_still_shown(here) -> None:
    cache = generate(load_config(here))
    cache.write_bytes(cache.read_bytes()[:2000])
    page = checked(report_html(cache_dir(here)))
    assert "damaged" in page.text
    assert "The targets cannot be read: " in page.text
    assert "1 worker scored" in page.text


def test_what_is_no_run_is_refused(tmp_path) -> None:
    with pytest.raises(CacheError, match=r"expected teacher_logits\.h5 in it, or caches"):
        write_report(tmp_path)
    with pytest.raises(CacheError, match=r"nothing\.h5: expected"):
        write_report(tmp_path / "nothing.h5")
    folder = run_folder(tmp_path / "run")
    manifest = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(CacheError, match=r"expected dask_logits\.run version \d+, got .* version 99; use the release"):
        write_report(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_report_that_cannot_be_written_fails_no_run(here, caplog, monkeypatch) -> None:
    def fail(path: Path) -> str:
        raise ValueError(path)

    monkeypatch.setattr("dask_logits.observe.report.report_html", fail)
    assert generate(load_config(here)).exists()
    (line,) = [each for each in caplog.messages if "report.html was not written" in each]
    assert line.endswith(f"try `dask-logits report {cache_dir(here)}`")
    assert read_status(cache_dir(here)).state == "complete"


def test_the_command_writes_the_report_of_a_cache_alone(tmp_path) -> None:
    target = tmp_path / "page.html"
    command = [sys.executable, "-m", "dask_logits", "report", str(GOLDEN), "--output", str(target)]
    done = warm.run(command)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{target}\n", "")
    page = checked(target.read_text())
    assert [attributes["id"] for attributes in page.all("section")] == ["targets", "documents", "computed", "loading"]
    assert "so token ids are shown" in page.text


def test_text_of_documents_is_never_html(tmp_path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    save_tokenizer(tmp_path, 50)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.add_tokens([f"{HOSTILE}{i}" for i in range(50)])
    tokenizer.save_pretrained(tmp_path)
    made = records((30, 20, 0, 10), vocab_size=100)
    write_cache(tmp_path / "cache.h5", made, vocab_size=100, teacher_path=str(tmp_path),
                tokenizer_map_digest=map_digest(tokenizer.get_vocab()), dataset={"name": HOSTILE})  # fmt: skip
    page = checked(report_html(tmp_path / "cache.h5"))
    assert page.text.count(HOSTILE) > 3
    assert page.all("img") == page.all("script") == []


def test_a_large_cache_is_sampled_evenly_and_the_page_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sampling, "_MOST_DOCUMENTS", 5)
    write_cache(tmp_path / "cache.h5", records((3,) * 101))
    page = checked(report_html(tmp_path / "cache.h5"))
    assert "These figures are those of 15 tokens in 5 of 101 documents, evenly spread." in page.text
    assert re.findall(r"<td class=n>(\d+)</td><td class=n>3</td>", report_html(tmp_path / "cache.h5"))
    rows = {int(row) for row in re.findall(r"<tr><td class=n>(\d+)</td><td class=n>3</td>",
                                           report_html(tmp_path / "cache.h5"))}  # fmt: skip
    assert rows == {0, 25, 50, 75, 100}


def test_long_documents_and_many_tokens_stay_within_bounds(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sampling, "_MOST_TOKENS", 100)
    monkeypatch.setattr(sampling, "_MOST_TOKENS_EACH", 20)
    write_cache(tmp_path / "cache.h5", records((200, 1, 200, 5)))
    page = checked(report_html(tmp_path / "cache.h5"))
    found = re.search(r"those of (\d+) tokens in", page.text)
    assert found is not None
    assert 20 <= int(found[1]) <= 100


def receipt(index: int, finished: float, *, process: int, seconds: float = 9.0) -> PartitionState:
    made = Receipt(
        partition=index, first_row=index, n_rows=1, run_id="r", attempt="a", statistics=Statistics(tokens=1000),
        content_digest="0" * 64, files={}, seconds={"score": seconds, "write": 1.0}, flops=0.0, splits={},
        finished=finished, host="host", process=process,
    )  # fmt: skip
    return PartitionState(partition=Partition(index=index, first_row=index, n_rows=1), is_cached=False, receipt=made)


def history(times: list[tuple[float, int]]) -> History:
    made = History()
    for index, (finished, process) in enumerate(times):
        made.add(receipt(index, finished, process=process))
    return made


def test_every_token_is_in_one_bin_and_no_worker_is_more_than_busy() -> None:
    made = history([(10.0 * (i // 3 + 1) + i % 3, i % 3) for i in range(30)])
    clock = Clock.of(made)
    assert clock is not None
    found = rates(made, clock, 17)
    tokens = found.tokens_per_second.sum(0) * clock.seconds / 17
    np.testing.assert_allclose(tokens, [10_000] * 3)
    assert found.busy.max() <= 1.0
    np.testing.assert_allclose(found.busy.sum(0) * clock.seconds / 17, [100.0] * 3)


def test_the_pause_of_a_resumed_run_is_left_out() -> None:
    clock = Clock.of(history([(10.0, 1), (20.0, 1), (90_010.0, 2), (90_020.0, 2)]))
    assert clock is not None
    assert clock.pauses == ((20.0, 90_000.0),)
    assert clock.seconds == 40.0
    assert clock.shown([20.0, 50_000.0, 90_010.0]).tolist() == [20.0, 20.0, 30.0]
    assert Clock.of(History()) is None


def test_ten_thousand_partitions_are_drawn_within_two_seconds() -> None:
    made = history([(1.0 * (i + 10), i % 64) for i in range(10_000)])
    status = read_status_of_nothing()
    facts = Facts(
        path=Path("/run"), teacher="t", dataset={}, settings={}, identity={}, calibration=None,
        statistics=Statistics(), status=status, history=made,
    )  # fmt: skip
    began = time.process_time()
    html = render(facts)
    assert time.process_time() - began < 2.0
    page = checked(html)
    assert "64 workers scored 10,000,000 tokens" in page.text
    assert "Not drawn: 24 workers with fewer tokens." in page.text
    assert html.count("<rect") < 100


def test_workers_without_work_are_listed_with_their_reasons() -> None:
    def page(n_workers: int) -> Page:
        reasons = {f"tcp://n:{i} on n (NVIDIA H200 GPU-e{i})": f"its device failed {HOSTILE}" for i in range(n_workers)}
        status = dataclasses.replace(read_status_of_nothing(), left_out=reasons)
        facts = Facts(path=Path("/run"), teacher="t", dataset={}, settings={}, identity={}, calibration=None,
                      statistics=Statistics(), status=status)  # fmt: skip
        return checked(render(facts))

    assert "Workers without work" not in page(0).text
    assert "1 worker got no work, or no more work after failures, since the last start." in page(1).text
    assert "tcp://n:0 on n (NVIDIA H200 GPU-e0)" in page(1).words
    assert f"its device failed {HOSTILE}" in page(1).text
    assert "2 more are listed by `dask-logits status`." in page(42).text


def read_status_of_nothing():
    from dask_logits.observe.status import Status

    return Status(
        run="/run", state="complete", since=None, step=None, reason=None, next_command="", running=0, left_out={},
        dashboard=None, partitions=10_000, committed=10_000, rows=10_000, committed_rows=10_000,
        seconds={"score": 9e4, "write": 1e4},
    )  # fmt: skip
