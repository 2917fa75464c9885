from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from dask_logits.job.progress import JobProgress, live_steps, stderr_console
from dask_logits.records import Statistics


def part(tokens: int) -> Statistics:
    return Statistics(documents=2, tokens=tokens, kept_mass=0.9 * tokens, label_logprob=-1.0, labels=1)


def shown(terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=200)
    with JobProgress(partitions=None, committed=1, done=part(100), expected_tokens=300, console=console) as progress:
        assert progress.line().startswith("1/– partitions")
        progress.partitions = 3
        progress.tokens(60)
        assert progress.line().startswith("1/3 partitions · 2 documents · 160 tokens")
        progress.partition(part(100))
        progress.partition(part(90))
    return out.getvalue()


def test_plain_lines_where_there_is_no_terminal() -> None:
    lines = shown(terminal=False).splitlines()
    assert lines[0].startswith("1/– partitions · 2 documents · 100 tokens · 0 tokens/s")
    assert lines[-1].startswith("3/3 partitions · 6 documents · 290 tokens")
    assert lines[-1].endswith("kept mass 0.9000")
    assert len(lines) == 2
    assert "\x1b" not in "".join(lines)


def test_a_live_line_on_a_terminal() -> None:
    text = shown(terminal=True)
    assert "3/3 partitions" in text
    assert "\x1b" in text


def test_at_80_columns_there_is_a_bar_and_every_figure() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80)
    with JobProgress(partitions=40, committed=0, done=Statistics(), expected_tokens=400, console=console) as progress:
        progress.partition(part(200))
        progress._live.refresh() if progress._live else None
    frames = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert re.search(r"scoring ━{20,}.* 50 % · \d+ s left", frames)
    assert "1/40 partitions · 2 documents · 200 tokens · " in frames


def test_the_log_shares_the_console_so_that_no_copy_of_the_bar_stays() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80)
    with JobProgress(partitions=2, committed=0, done=Statistics(), expected_tokens=200, console=console) as progress:
        for _ in range(2):
            progress.partition(part(100))
            console.log("a line of the log")
    assert stderr_console() is stderr_console()
    # Each line of the log first takes back the two lines of the display.
    assert out.getvalue().count("\x1b[1A\x1b[2K") >= 2


@pytest.mark.parametrize("terminal", [False, True])
def test_steps_are_shown_when_they_begin(terminal) -> None:
    out = io.StringIO()
    with live_steps("calibrating", Console(file=out, force_terminal=terminal, width=80)) as show:
        show("loading the teacher")
    assert "calibrating: loading the teacher" in out.getvalue()
    assert ("\x1b" in out.getvalue()) == terminal
