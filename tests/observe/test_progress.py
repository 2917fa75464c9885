from __future__ import annotations

import io

from rich.console import Console

from dask_logits.observe.progress import JobProgress
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
