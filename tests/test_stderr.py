"""Standard error that nobody reads, or whose reader goes away, neither blocks a process nor ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from dask_logits.stderr import unblocked_stderr

# Seconds for what takes a moment on an idle machine.
BOUND_SECONDS = 300
LOG = """
import logging, subprocess, sys
from dask_logits.stderr import unblocked_stderr
with unblocked_stderr():
    logging.basicConfig(level="INFO", format="%(message)s")
    {body}
    print("done", flush=True)
    sys.stdin.readline()
    logging.info("the last line")
"""
# More than the pipe and the queue hold.
FLOOD = "for _ in range(6000): logging.info('x' * 4000)"
# Another process with the same standard error, as workers have.
CHILD = "subprocess.run([sys.executable, '-c', 'import sys; sys.stderr.write(\\'y\\' * 400_000)'], check=True)"
FOREVER = """
import logging
from dask_logits.cli import run
def job():
    logging.basicConfig(level="INFO")
    print("begun", flush=True)
    while True:
        logging.info("x" * 1000)
run(job)
"""


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """Start a script with pipes to it; what still runs at the end of the test is killed."""
    started: list[subprocess.Popen] = []

    def _start(script: str, stderr: int = subprocess.PIPE) -> subprocess.Popen:
        pipe = subprocess.PIPE
        process = subprocess.Popen([sys.executable, "-c", script], stdin=pipe, stdout=pipe, stderr=stderr, bufsize=0)
        started.append(process)
        return process

    yield _start
    for process in started:
        process.kill()
        process.wait()
        for opened in (process.stdin, process.stdout, process.stderr):
            if opened is not None:
                opened.close()


@pytest.mark.parametrize("body", [FLOOD, CHILD], ids=["itself", "child"])
def test_output_that_nobody_reads_blocks_neither_a_process_nor_its_children(start, body: str) -> None:
    process = start(LOG.format(body=body))
    assert process.stdout.readline() == b"done\n"
    process.stdin.close()
    assert process.wait(BOUND_SECONDS) == 0


def test_a_reader_that_goes_on_is_told_how_much_was_dropped(start) -> None:
    process = start(LOG.format(body=FLOOD))
    assert process.stdout.readline() == b"done\n"
    seen = b""
    while seen.count(b"x") < 4_000_000:
        seen += os.read(process.stderr.fileno(), 1 << 16)
    _, rest = process.communicate(b"\n", timeout=BOUND_SECONDS)
    assert b"bytes of the log, because nobody read it]\n" in seen + rest
    assert rest.endswith(b"the last line\n")
    assert process.returncode == 0


def test_the_job_goes_on_when_the_reader_goes_away(start) -> None:
    process = start(LOG.format(body="logging.info('first')\n    sys.stdin.readline()\n    " + FLOOD))
    assert os.read(process.stderr.fileno(), 100) == b"first\n"
    process.stderr.close()
    process.stdin.write(b"\n")
    assert process.stdout.readline() == b"done\n"
    process.stdin.close()
    assert process.wait(BOUND_SECONDS) == 0


def test_a_job_whose_output_nobody_reads_ends_at_a_signal(start) -> None:
    process = start(FOREVER)
    assert process.stdout.readline() == b"begun\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(BOUND_SECONDS) == 130


TERMINAL = """
import os, sys
from rich.console import Console
from dask_logits.stderr import unblocked_stderr
with unblocked_stderr():
    console = Console(stderr=True)
    console.print("[bold]bold[/]")
    print(sys.stderr.isatty(), console.is_terminal, os.isatty(sys.stderr.fileno()), os.isatty(2), flush=True)
    sys.stderr.write("x" * 400_000)
"""


def test_a_terminal_stays_one_and_may_be_stopped(start, monkeypatch) -> None:
    master, terminal = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    process = start(TERMINAL, terminal)
    os.close(terminal)
    # Nothing is read here until it has ended, as after Ctrl-S.
    answer, _ = process.communicate(timeout=BOUND_SECONDS)
    assert answer == b"True True True False\n"
    assert process.returncode == 0
    assert b"\x1b[1mbold" in os.read(master, 1000)
    os.close(master)


def test_standard_error_that_was_replaced_is_left_alone(capsys) -> None:
    before = sys.stderr
    with unblocked_stderr():
        assert sys.stderr is before
        print("kept", file=sys.stderr)
    assert capsys.readouterr().err == "kept\n"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_is_ignored_stays_ignored(start, number: int) -> None:
    process = start(IGNORES.format(number=int(number)))
    assert process.stdout.readline() == b"begun\n"
    process.send_signal(number)
    answer, _ = process.communicate(b"\n", timeout=BOUND_SECONDS)
    assert (process.returncode, answer) == (0, b"went on\n")


IGNORES = """
import signal, sys
signal.signal({number}, signal.SIG_IGN)
from dask_logits.cli import run
def job():
    print("begun", flush=True)
    sys.stdin.readline()
    print("went on")
run(job)
"""


def test_a_second_signal_ends_a_job_that_does_not_stop(start) -> None:
    script = """
import time
from dask_logits.cli import run
def job():
    try:
        print("begun", flush=True)
        time.sleep(600)
    finally:
        print("stopping", flush=True)
        time.sleep(600)
run(job)
"""
    process = start(script)
    assert process.stdout.readline() == b"begun\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == b"stopping\n"
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(0.5)
        except subprocess.TimeoutExpired:
            continue
    _, log = process.communicate()
    assert process.returncode == 130
    assert log == b"dask-logits: ended at once; run the same command again to go on\n"


def test_signals_are_as_before_once_a_command_has_ended() -> None:
    from dask_logits.cli import run

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    run(lambda: None)
    assert [signal.getsignal(number) for number in numbers] == before
