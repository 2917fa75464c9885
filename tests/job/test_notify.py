from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from builders import run, sentences, tree, write_json_lines

from dask_logits import ConfigError, PartitionsFailedError
from dask_logits.config.groups import JobConfig
from dask_logits.config.root import Config
from dask_logits.job.notify import WEBHOOK, notify

KEEP = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.stdin.read())"


@pytest.fixture
def webhook(monkeypatch) -> Iterator[list[dict]]:
    """Serve a webhook; yield what it is sent."""
    received: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(404 if "refused" in self.path else 204)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv(WEBHOOK, f"http://127.0.0.1:{server.server_port}/hook?token=s3cret")
    yield received
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_finished_job_tells_command_and_webhook_and_keeps_the_address_to_itself(
    here, tmp_path, webhook, caplog
) -> None:
    out = tmp_path / "message.json"
    command = json.dumps([sys.executable, "-c", KEEP, str(out)]).replace('"', "'")
    run(here, f"distillation.job.notify_command={command}")
    (sent,) = webhook
    assert json.loads(out.read_text()) == {**sent, "at": pytest.approx(sent["at"])}
    assert (sent["state"], sent["reason"], sent["run"]) == ("done", None, str(tmp_path / "run"))
    assert sent["text"].endswith(f"{tmp_path / 'run'} done")
    assert "s3cret" not in caplog.text
    assert not any(b"s3cret" in data for data in tree(tmp_path / "run").values())
    # Nothing is done, so nothing is told.
    run(here, f"distillation.job.notify_command={command}")
    assert len(webhook) == 1


@pytest.mark.parametrize(
    ("good", "reason"), [(30, r"1 of \d+ partitions failed; the others are committed"), (5, "1 of 1 partition failed")]
)
def test_a_failed_job_tells_why(good, reason, here, tmp_path, webhook) -> None:
    file = write_json_lines(tmp_path / "odd.jsonl", [*sentences(good), {"text": 3}])
    with pytest.raises(PartitionsFailedError):
        run(here, f"distillation.dataset.data_files={file}")
    (sent,) = webhook
    assert sent["state"] == "failed"
    assert re.fullmatch(reason, sent["reason"])


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("/nowhere/command",), "notify_command: expected it to run, got"),
        ((sys.executable, "-c", "import sys; sys.exit('no such user')"), "to exit with 0, got 1: no such user"),
    ],
)
def test_a_command_that_fails_is_a_warning(command, expected, caplog) -> None:
    notify(JobConfig(notify_command=command), Path("run"), "done")
    assert expected in caplog.text


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("http://127.0.0.1:9/s3cret", "expected an answer, got ConnectionRefusedError"),
        ("ftp://s3cret", "expected an address that begins with https:// or http://"),
        ("https://[s3cret", "expected an address that begins with https:// or http://"),
    ],
)
def test_a_webhook_that_fails_is_a_warning_without_its_address(address, expected, caplog, monkeypatch) -> None:
    monkeypatch.setenv(WEBHOOK, address)
    notify(JobConfig(), Path("run"), "failed", "a reason")
    assert expected in caplog.text
    assert "s3cret" not in caplog.text


def test_a_webhook_that_refuses_is_a_warning(webhook, caplog, monkeypatch) -> None:
    monkeypatch.setenv(WEBHOOK, os.environ[WEBHOOK].replace("hook", "refused"))
    notify(JobConfig(), Path("run"), "done")
    assert "expected the message to be taken, got HTTP status 404" in caplog.text


@pytest.mark.parametrize("value", [[1], [], "mail"])
def test_a_command_is_a_list_of_words(value) -> None:
    tree = {"teacher": {"model_path": "x"}, "job": {"notify_command": value}}
    with pytest.raises(ConfigError, match=r"notify_command: expected list of str or null"):
        Config.from_mapping(tree, dataset_given=True)
