"""A run that is followed to its end: on a terminal, in a log, and by a reader that leaves early."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import warm
from test_monitor import FACTS, run_folder

from dask_logits import RunConflictError
from dask_logits.files.atomic import replace_json
from dask_logits.observe.watch import EXIT_STATUS, follow
from dask_logits.run.drivers import State
from dask_logits.run.folder import WORKING_STATES, RunFolder, Share


def report(folder: Path, **facts) -> None:
    replace_json(RunFolder(folder).status_path(Share()), {**FACTS, "at": time.time(), **facts})


def command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "dask_logits", "status", "--watch", str(folder)]


def test_following_ends_with_the_run(tmp_path) -> None:
    folder = run_folder(tmp_path / "run")
    states = []
    for status in follow(folder, seconds=0.0):
        states.append(status.state)
        if len(states) == 3:
            report(folder, state="failed", reason="no space left")
    assert states == ["running", "running", "running", "failed"]
    with pytest.raises(RunConflictError, match="expected a run folder"):
        next(follow(tmp_path / "none"))


def test_every_end_has_an_exit_status() -> None:
    assert set(EXIT_STATUS) | set(WORKING_STATES) == set(State.__args__)


@pytest.mark.parametrize(("state", "expected"), [("failed", 1), ("stopped", 130)])
def test_a_log_gets_a_line_for_each_change_and_the_exit_status(tmp_path, state: str, expected: int) -> None:
    folder = run_folder(tmp_path / "run")
    with subprocess.Popen(command(folder), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().endswith(" running · 56 tokens/s · 1 min 18 s left\n")
        report(folder, state="consolidating", seconds_left=None)
        assert process.stdout.readline().endswith(" consolidating · 56 tokens/s\n")
        report(folder, state=state, reason="the disk" if state == "failed" else None)
        rest = process.stdout.read().splitlines()
    assert rest[0].endswith(f" {state}")
    assert rest[1:3] == [f"run           {folder}", f"state         {state}"]
    assert process.wait(60) == expected


def test_a_terminal_shows_the_state_in_place(tmp_path) -> None:
    folder = run_folder(tmp_path / "run")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command(folder), stdout=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "200"})
    os.close(theirs)
    ended = threading.Timer(0.0, lambda: None)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:
            break
        if b"running" in shown and not ended.ident:
            ended.start()
            report(folder, state="stopped")
    assert process.wait(60) == 130
    os.close(ours)
    assert b"\x1b[" in shown, "earlier lines are written over"
    assert b"state         stopped" in shown


def test_a_reader_that_leaves_ends_the_watching(tmp_path) -> None:
    folder = run_folder(tmp_path / "run")
    with subprocess.Popen(command(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        report(folder, state="consolidating")
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_json_is_for_one_reading(tmp_path) -> None:
    done = warm.run([*command(tmp_path), "--json"])
    assert done.returncode == 2
    assert "expected --json or --watch, got both" in done.stderr
