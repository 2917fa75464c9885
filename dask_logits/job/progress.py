"""Progress of a job on stderr: a live display on a terminal, plain lines in a log file.

The log and the progress display share one console. With two, every log line would leave a stale copy of the bar.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from dask_logits.records import Statistics
from dask_logits.run.timings import duration, plural

_PLAIN_SECONDS = 10.0


@functools.cache
def stderr_console() -> Console:
    """Return the console shared by the log and the progress display of this process."""
    return Console(stderr=True)


def step_lines(title: str, console: Console | None = None) -> Callable[[str], None]:
    """Return a function that shows each step of a long operation as a line.

    Parameters
    ----------
    title
        Name of the operation.
    console
        Output console. None: stderr.
    """
    console = console or stderr_console()
    return lambda step: console.print(f"{title}: {step}", highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def live_steps(title: str, console: Console | None = None) -> Iterator[Callable[[str], None]]:
    """Show the steps of a long operation in a live line on a terminal, else as :func:`step_lines`.

    No other library writes to the terminal in the meantime.
    """
    console = console or stderr_console()
    if not console.is_terminal:
        yield step_lines(title, console)
        return
    text = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis"))
    time_column = TimeElapsedColumn(Column(no_wrap=True, min_width=7))
    with Progress(SpinnerColumn(), time_column, text, console=console, transient=True) as live:
        task = live.add_task(title, total=None)
        yield lambda step: live.update(task, description=f"{title}: {step}")


class _TwoLines(Progress):
    """A bar with a line of figures below it, so that both fit into 80 columns."""

    line = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self.line, no_wrap=True, overflow="ellipsis")


class JobProgress:
    """Shows partitions, documents, tokens, tokens/s, time left and kept mass.

    Parameters
    ----------
    partitions
        Number in the plan. None if unknown. The attribute may be set later.
    done
        Sums over partitions committed earlier.
    committed
        Number of partitions committed earlier.
    expected_tokens
        Estimate for the whole job. None if unknown.
    console
        Output console. None: stderr.
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
        self._console = console or stderr_console()
        self._live: _TwoLines | None = None
        self._task: Any = None

    def __enter__(self) -> JobProgress:
        self._started = self._printed = time.monotonic()
        if self._console.is_terminal:
            self._live = _TwoLines(
                TextColumn("scoring"), BarColumn(bar_width=None), TextColumn("{task.description}"),
                console=self._console, expand=True,
            )  # fmt: skip
            self._task = self._live.add_task("", total=self._expected)
            self._live.start()
        self._show()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def tokens(self, count: int) -> None:
        """Record tokens scored in a partition still running."""
        self._running += count
        self._show()

    def partition(self, statistics: Statistics) -> None:
        """Record a committed partition."""
        self._committed += 1
        self._sums += statistics
        self._running = max(0, self._running - statistics.tokens)
        self._show(force=self._committed == self.partitions)

    @property
    def tokens_per_second(self) -> float:
        """Tokens committed or scored since the start, per second of wall-clock time."""
        elapsed = time.monotonic() - self._started
        return (self._sums.tokens - self._before + self._running) / elapsed if elapsed > 0 else 0.0

    def facts(self) -> dict[str, Any]:
        """Return the figures for a file: counts, tokens/s in wall-clock time, seconds left (None: unknown)."""
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
        entries = f" · {' '.join(self._sums.entries)}" if self._sums.targets else ""
        return f"{self._counts()} · {self.tokens_per_second:,.0f} tokens/s · {self._left()}{entries}"

    def _counts(self) -> str:
        partitions = "–" if self.partitions is None else f"{self.partitions:,}"
        tokens = self._sums.tokens + self._running
        return (
            f"{self._committed:,}/{partitions} partitions · {plural(self._sums.documents, 'document')} · "
            f"{plural(tokens, 'token')}"
        )

    def _left(self) -> str:
        if self._committed == self.partitions:
            return "all scored"
        left = self.facts()["seconds_left"]
        return "time left unknown" if left is None else f"{duration(left)} left"

    def _show(self, force: bool = False) -> None:
        if self._live is not None:
            scored = self._sums.tokens + self._running
            self._live.line = f"{self._counts()} · {self.tokens_per_second:,.0f} tokens/s"
            percent = f"{min(100, 100 * scored // self._expected)} % · " if self._expected else ""
            self._live.update(self._task, completed=scored, description=f"{percent}{self._left()}")
        elif force or time.monotonic() - self._printed >= _PLAIN_SECONDS or self._printed == self._started:
            self._printed = time.monotonic()
            self._console.print(self.line(), highlight=False, soft_wrap=True)
