"""The explorer: what it says of a cache, its server for several viewers, and its self-contained file."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import warm
from builders import records, run, save_tokenizer, sentences, small_job, tiny_model, write_cache, write_json_lines
from test_report import HOSTILE, Page

from dask_logits import CacheError, ClusterError, ConfigError, merge
from dask_logits.observe import explore, sample
from dask_logits.observe.explore import Explorer, ExploreServer, write_explorer
from dask_logits.vocabulary import map_digest

LENGTHS = (30, 0, 700, 5)


def named_tokenizer(folder: Path, words: list[str]) -> dict:
    """Save a tokenizer with further words; return the attributes of a cache that names it."""
    from transformers import AutoTokenizer

    save_tokenizer(folder, 40)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(words)
    tokenizer.save_pretrained(folder)
    return {"teacher_path": str(folder), "tokenizer_map_digest": map_digest(tokenizer.get_vocab())}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Two files of documents that serve as one cache, whose tokenizer is at hand."""
    said = named_tokenizer(tmp_path, [f"{HOSTILE}{i}" for i in range(10)])
    for i in range(2):
        write_cache(tmp_path / f"part{i}.h5", records(LENGTHS, k=20, seed=i), **said)
    return tmp_path


def test_a_token_stands_beside_what_the_teacher_expected_in_its_place(cache) -> None:
    explorer = Explorer(cache)
    assert explorer.about()["items"] == 8
    whole = explorer.cache.readers[1].item(2)
    for first in (0, 512, 699, 5000):
        found = explorer.document(6, first)
        begin = min(first, 699)
        expected = whole["input_ids"][begin : begin + 512]
        assert (found["first"], found["ids"], found["n_tokens"]) == (begin, expected.tolist(), 700)
        for i in range(len(expected)):
            if begin + i == 0:
                assert found["surprise"][0] is found["best"][0] is found["tail"][0] is None
                continue
            before = begin + i - 1
            assert found["surprise"][i] == pytest.approx(-float(whole["label_logprob"][before]), abs=1e-3)
            assert [each[0] for each in found["best"][i]] == whole["topk_ids"][before, :16].tolist()
            total = sum(each[2] for each in found["best"][i]) + found["others"][i] + found["tail"][i]
            assert total == pytest.approx(1.0, abs=2e-3)
    assert explorer.document(1)["ids"] == []
    for number in (-1, 8):
        with pytest.raises(ConfigError, match="document: expected a number from 0 to 7, got"):
            explorer.document(number)


def test_tokens_that_a_student_learns_are_marked(tmp_path) -> None:
    made = records((5, 4), k=3, masked=True)
    write_cache(tmp_path / "c.h5", made)
    explorer = Explorer(tmp_path / "c.h5")
    mask = made.loss_mask.astype(bool).tolist()
    assert explorer.document(0)["learned"] == [None, *mask[:4]]
    assert explorer.document(1, first=2)["learned"] == mask[6:8]
    assert "Underlined tokens" in write_explorer(tmp_path / "c.h5", tmp_path / "e.html", [0]).read_text()
    write_cache(tmp_path / "d.h5", records((5, 4), k=3))
    assert Explorer(tmp_path / "d.h5").document(0)["learned"] is None
    assert "Underlined" not in write_explorer(tmp_path / "d.h5", tmp_path / "e.html", [0]).read_text()


def test_bytes_of_one_character_are_joined(tmp_path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    write_cache(tmp_path / "cache.h5", records((3,)))
    explorer = Explorer(tmp_path / "cache.h5")
    explorer.tokenizer = tokenizer
    text = "a 日本 🎉!"
    pieces = explorer._pieces(tokenizer.encode(text))
    assert "".join(pieces) == text
    assert pieces == ["a", " ", "", "", "日", "", "", "本", " ", "", "", "", "🎉", "!"]


def test_a_tokenizer_beside_the_teacher_is_known_from_the_cache(tmp_path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "teacher")
    save_tokenizer(tmp_path / "tokenizer")
    corpus = write_json_lines(tmp_path / "corpus.jsonl", sentences(3))
    job = small_job(tmp_path / "teacher", corpus, tmp_path / "run")
    cache = run(job, f"distillation.teacher.tokenizer_path={tmp_path / 'tokenizer'}", "cluster=serial")
    assert Explorer(cache).tokenizer is not None
    assert Explorer(merge([tmp_path / "run"], output=tmp_path / "merged.h5")).tokenizer is not None


def test_a_search_finds_every_match_however_often_it_stops(cache, monkeypatch) -> None:
    explorer = Explorer(cache)
    token = int(explorer.cache.readers[0].item(2)["input_ids"][650])
    expected = [
        (file * 4 + item, position)
        for file, reader in enumerate(explorer.cache.readers)
        for item in range(4)
        for position in np.flatnonzero(reader.item(item)["input_ids"] == token).tolist()
    ]
    monkeypatch.setattr(explore, "_MOST_MATCHES", 7)
    monkeypatch.setattr(explore, "_SEARCH_TOKENS", 100)
    monkeypatch.setattr(explore, "_SEARCH_BLOCK", 33)
    found, place, read = [], [0, 0], 0
    while place is not None:
        answer = explorer.search(f"#{token}", *place)
        assert len(answer["found"]) <= 7
        found += [(each["number"], each["position"]) for each in answer["found"]]
        place, read = answer["next"], read + answer["read"]
    assert found == expected
    assert read == sum(reader.n_entries for reader in explorer.cache.readers)


def test_a_text_is_found_within_one_document_only(tmp_path) -> None:
    said = named_tokenizer(tmp_path, [])
    made = records((4, 4), k=2)
    made.input_ids[:] = [5, 1, 2, 1, 2, 1, 2, 9]
    write_cache(tmp_path / "cache.h5", made, **said)
    explorer = Explorer(tmp_path / "cache.h5")
    found = explorer.search("red green")["found"]
    assert [(each["number"], each["position"]) for each in found] == [(0, 1), (1, 1)]
    assert "red green" in found[0]["text"]
    with pytest.raises(ConfigError, match="expected a text, or a token id such as #42, got ''"):
        explorer.search("")
    explorer.tokenizer = None
    with pytest.raises(ConfigError, match="search: expected a token id such as #42, got 'red'"):
        explorer.search("red")


def test_matches_that_reach_into_the_next_of_many_short_documents_are_dropped_at_once(tmp_path, monkeypatch) -> None:
    made = records((2,) * 5000, k=2)
    made.input_ids[:] = [1, 2] * 5000
    made.input_ids[-2:] = [2, 1]
    write_cache(tmp_path / "cache.h5", made, **named_tokenizer(tmp_path, []))
    explorer, looked_up = Explorer(tmp_path / "cache.h5"), []
    match = explorer._match
    monkeypatch.setattr(explorer, "_match", lambda *place: looked_up.append(place) or match(*place))
    red, green = explorer.tokenizer.convert_ids_to_tokens([1, 2])
    answer = explorer.search(f"{green} {red}")
    assert [(each["number"], each["position"]) for each in answer["found"]] == [(4999, 0)]
    assert (answer["next"], answer["read"], len(looked_up)) == (None, 10_000, 1)
    several = explorer.search(f"{red} {green}")
    assert [each["number"] for each in several["found"]] == list(range(30))
    assert several["next"] == [0, 59]


def test_the_most_surprising_documents_are_those_of_a_bounded_sample(cache, monkeypatch) -> None:
    monkeypatch.setattr(sample, "_MOST_DOCUMENTS", 3)
    answer = Explorer(cache).surprising
    assert (answer["sampled"], answer["items"]) == (3, 8)
    surprises = [each["surprise"] for each in answer["found"]]
    assert surprises == sorted(surprises, reverse=True)
    assert [each["number"] for each in answer["found"]] != []


@pytest.fixture
def server(cache) -> Iterator[ExploreServer]:
    with ExploreServer(Explorer(cache)) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def get(server: ExploreServer, path: str, host: str | None = None) -> tuple[int, str, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{server.server_port}"})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body, answer.headers


def test_two_viewers_are_served_at_once(server) -> None:
    paths = ["/", "/document?number=2", "/document?number=6&first=512", "/surprising", "/search?query=%2342"] * 6
    with ThreadPoolExecutor(2) as viewers:
        answers = list(viewers.map(lambda path: get(server, path)[:2], paths))
    assert {status for status, _ in answers} == {200}
    assert answers[:5] * 6 == answers
    assert json.loads(answers[1][1])["n_tokens"] == 700


def test_other_host_names_are_refused(server) -> None:
    for host in ("evil.example", f"evil.example:{server.server_port}", "127.0.0.1:1", "localhost"):
        status, body, _ = get(server, "/document?number=0", host)
        assert status == 403
        assert "texts" not in body
    assert get(server, "/document?number=0", f"localhost:{server.server_port}")[0] == 200


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        ("/document?number=8", 400, "expected a number from 0 to 7, got 8"),
        ("/document?number=x", 400, "expected whole numbers"),
        ("/document", 400, "expected whole numbers"),
        ("/search?query=", 400, "search: expected a text, or a token id"),
        ("/search?query=%231&file=-1", 400, "expected a place in the cache"),
        ("/../run.json", 404, "not found"),
    ],
)
def test_bad_requests_are_answered_with_the_reason(server, path: str, status: int, reason: str) -> None:
    found, body, _ = get(server, path)
    assert found == status
    assert reason in json.loads(body)["error"]


def test_the_page_admits_its_own_script_only(server, cache, tmp_path) -> None:
    _, live, headers = get(server, "/")
    saved = write_explorer(cache, tmp_path / "page.html", [0, 2]).read_text()
    for html in (live, saved):
        page = Page(html)
        assert not page.open
        assert [script.get("type") for script in page.all("script")] == ["application/json", None]
        assert page.all("img") == page.all("link") == []
        assert not [attributes for _, attributes in page.elements if "src" in attributes]
        (script,) = re.findall(r"<script>(.*?)</script>", html, re.S)
        allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"script-src 'sha256-{allowed}'" in html.replace("&#x27;", "'")
        labels = {label["for"] for label in page.all("label")}
        assert {field["id"] for field in page.all("input")} == labels
        assert "innerHTML" not in script
    assert "frame-ancestors 'none'" in str(headers["Content-Security-Policy"])
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', saved, re.S)
    assert [each["number"] for each in json.loads(data)["documents"]] == [0, 2]
    assert HOSTILE in json.dumps(json.loads(data)["documents"])


def test_what_cannot_be_shown_is_refused(cache, tmp_path, server) -> None:
    with pytest.raises(ConfigError, match="documents: expected at least one number, got none"):
        write_explorer(cache, tmp_path / "page.html", [])
    with pytest.raises(ConfigError, match="expected a number from 0 to 7, got 99"):
        write_explorer(cache, tmp_path / "page.html", [0, 99])
    with pytest.raises(CacheError, match="expected"):
        Explorer(tmp_path / "nothing.h5")
    with pytest.raises(ClusterError, match="--port: expected a free port, got"):
        ExploreServer(Explorer(cache), server.server_port)
    assert not (tmp_path / "page.html").exists()


def test_the_command_serves_until_ctrl_c_and_writes_a_file(cache, tmp_path) -> None:
    command = [sys.executable, "-m", "dask_logits", "explore", str(cache)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = re.match(r"http://127\.0\.0\.1:(\d+)/  \(Ctrl-C ends it\)", process.stdout.readline())
    assert found is not None
    connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
    connection.request("GET", "/")
    assert connection.getresponse().status == 200
    connection.close()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0
    target = str(tmp_path / "page.html")
    done = warm.run([*command, "--html", target, "--documents", "0,5"])
    assert (done.returncode, done.stdout) == (0, f"{target}\n")
    for options, reason in (
        (["--html", target], "expected --html and --documents together, got one"),
        (["--html", target, "--documents", "a"], "--documents: expected numbers such as 0,5,7, got 'a'"),
    ):
        done = warm.run([*command, *options])
        assert done.returncode == 2
        assert reason in done.stderr
