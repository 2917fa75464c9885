"""Progress of a job on the terminal: a live line where there is one, plain lines in a log file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from dask_logits.records import Statistics

_PLAIN_SECONDS = 10.0
# Stages inside of `score`.
_SCORING = ("trunk", "head", "tail", "refine", "transfer")


def add_seconds(so_far: Mapping[str, float], more: Mapping[str, float]) -> dict[str, float]:
    """Add the seconds of a partition's stages to those of others."""
    return {stage: so_far.get(stage, 0.0) + more.get(stage, 0.0) for stage in {**so_far, **more}}


def shares(seconds: Mapping[str, float]) -> str:
    """Write where a worker's time goes, largest share first; waiting for the teacher is not work.

    >>> shares({"score": 9.0, "trunk": 7.0, "head": 1.5, "tail": 0.4, "write": 1.0, "wait": 3.0})
    'trunk 70 %, head 15 %, write 10 %, tail 4 %, rest 1 %'
    """
    inner = {stage: seconds.get(stage, 0.0) for stage in _SCORING}
    outer = {stage: value for stage, value in seconds.items() if stage not in (*_SCORING, "score", "wait")}
    parts = {**inner, **outer}
    rest = seconds.get("score", 0.0) - sum(inner.values())
    total = sum(outer.values()) + seconds.get("score", 0.0)
    ranked = sorted(parts.items(), key=lambda part: -part[1])
    shown = [(stage, value) for stage, value in ranked if value >= 0.005 * total] + [("rest", rest)]
    return ", ".join(f"{stage} {100 * value / max(total, 1e-9):.0f} %" for stage, value in shown)


class JobProgress:
    """Shows partitions, documents, tokens, tokens/s, time left and kept mass.

    Parameters
    ----------
    partitions
        In the plan; None while nobody knows, as the attribute may be set later.
    done
        Sums over what was committed before.
    committed
        Partitions committed before.
    expected_tokens
        Estimate for the whole job; None: nobody knows.
    console
        Where to; None: stderr.
    """

    def __init__(
        self,
        *,
        partitions: int | None,
        committed: int,
        done: Statistics,
        expected_tokens: int | None,
        console: Console | None = None,
    ) -> None:
        self.partitions = partitions
        self._committed = committed
        self._sums = done
        self._before = done.tokens
        self._running = 0
        self._expected = None if expected_tokens is None else max(expected_tokens, done.tokens)
        self._started = time.monotonic()
        self._printed = self._started
        self._console = console or Console(stderr=True)
        self._live: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> JobProgress:
        self._started = self._printed = time.monotonic()
        if self._console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[text]}"),
                console=self._console,
            )  # fmt: skip
            self._task = self._live.add_task("scoring", total=self._expected, text="")
            self._live.start()
        self._show()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def tokens(self, count: int) -> None:
        """Note tokens scored in a partition that is still running."""
        self._running += count
        self._show()

    def partition(self, statistics: Statistics) -> None:
        """Note a committed partition."""
        self._committed += 1
        self._sums += statistics
        self._running = max(0, self._running - statistics.tokens)
        self._show(force=self._committed == self.partitions)

    @property
    def tokens_per_second(self) -> float:
        """Tokens committed or scored since the start, by the clock."""
        elapsed = time.monotonic() - self._started
        return (self._sums.tokens - self._before + self._running) / elapsed if elapsed > 0 else 0.0

    def facts(self) -> dict[str, Any]:
        """Return the figures for a file: counts, tokens/s by the clock, seconds left (None: nobody knows)."""
        scored = self._sums.tokens + self._running
        rate = self.tokens_per_second
        known = self._expected is not None and rate > 0
        return {
            "partitions": self.partitions,
            "committed": self._committed,
            "tokens": scored,
            "tokens_per_second": round(rate, 1),
            "seconds_left": round(max(0, (self._expected or 0) - scored) / rate, 1) if known else None,
        }

    def line(self) -> str:
        """Return the figures as one line."""
        facts = self.facts()
        left = "–" if facts["seconds_left"] is None else _duration(facts["seconds_left"])
        mass = "–" if not self._sums.tokens else f"{self._sums.mean_kept_mass:.4f}"
        partitions = "–" if self.partitions is None else self.partitions
        return (
            f"{self._committed}/{partitions} partitions · {self._sums.documents:,} documents · "
            f"{facts['tokens']:,} tokens · {facts['tokens_per_second']:,.0f} tokens/s · {left} left · kept mass {mass}"
        )

    def _show(self, force: bool = False) -> None:
        if self._live is not None:
            self._live.update(self._task, completed=self._sums.tokens + self._running, text=self.line())
        elif force or time.monotonic() - self._printed >= _PLAIN_SECONDS or self._printed == self._started:
            self._printed = time.monotonic()
            self._console.print(self.line(), highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
