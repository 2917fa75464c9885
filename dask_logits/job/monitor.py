"""Watch a run from a notebook: figures and charts that refresh in place, next to the link to the Dask dashboard.

The source is the files of the run folder, so watching needs no cluster and cannot disturb one. A scheduler is only
asked for the announcements of drivers, over a connection that is closed immediately. Nothing is submitted, held or kept
alive. If the announced folder is not visible on this machine, the announcements themselves are shown.

This is the only module that imports IPython. The charts are HTML and SVG in an output that is replaced. They need no
script, no extension and no kernel, and stay in a saved notebook.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from dask_logits.errors import ClusterError, ConfigError, DaskLogitsError, RunConflictError
from dask_logits.files.atomic import expanded
from dask_logits.observe.live import LiveRun
from dask_logits.observe.live_page import cell
from dask_logits.observe.status import Status, read_status
from dask_logits.run.drivers import announcements
from dask_logits.run.folder import RUNS_TOPIC, WORKING_STATES, RunFolder
from dask_logits.run.records import DriverStatus

# A driver without announcements for this long is not counted as active.
_SILENT_SECONDS = 120.0
# Time for cluster start or consolidation of a small cache, during which no driver reports scoring.
_GRACE_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class _Look:
    """A run at one moment: its lines, the HTML of its charts, and whether a driver is active. No files: no status."""

    status: Status | None = None
    lines: list[str]
    charts: str = ""
    is_at_work: bool = False

    @property
    def html(self) -> str:
        return f"{self.charts}\n{_table(self.lines)}"


class Monitor:
    """A read-only view of a run. Closing it, or its notebook, does not affect the run.

    Parameters
    ----------
    run
        The run folder. Give exactly one of `run`, `scheduler` and `scheduler_file`.
    scheduler
        Address of the run's Dask scheduler.
    scheduler_file
        Scheduler file of this scheduler.
    wait_seconds
        Timeout for the scheduler's answer.

    Raises
    ------
    ConfigError
        Unless exactly one of the three is given.
    RunConflictError
        If the folder holds no run, or several runs are active at the scheduler.
    ClusterError
        If the scheduler does not answer, or no driver has announced a run there.
    CacheError
        If a file cannot be read.
    """

    def __init__(
        self,
        run: Path | str | None = None,
        *,
        scheduler: str | None = None,
        scheduler_file: Path | str | None = None,
        wait_seconds: float = 10.0,
    ) -> None:
        given = {"run": run, "scheduler": scheduler, "scheduler_file": scheduler_file}
        names = [name for name, value in given.items() if value]
        if len(names) != 1:
            expected = "expected exactly one of run, scheduler and scheduler_file"
            raise ConfigError(f"Monitor: {expected}, got {' and '.join(names) or 'none'}")
        self._wait_seconds = wait_seconds
        self._stop_background = threading.Event()
        # Only if the files cannot be read.
        self._scheduler: str | None = None
        if run:
            self.run = str(expanded(run))
            self._live = LiveRun(Path(self.run))
            self.status()
            return
        # Only here, because importing distributed takes half a second.
        from dask_logits.job.scheduler import address_in

        address = scheduler or address_in(Path(str(scheduler_file)), wait_seconds, "Monitor")
        self.run = _choose(_announced(address, wait_seconds), address)
        self._live = LiveRun(Path(self.run))
        folder = RunFolder(Path(self.run))
        if not folder.manifest_path.exists() and not folder.driver_statuses():
            self._scheduler = address

    def __repr__(self) -> str:
        return f"Monitor({self.run!r})"

    def _repr_html_(self) -> str:
        return self._look().html

    def status(self) -> Status:
        """Read the state of the run from its files.

        Raises
        ------
        RunConflictError
            If there is no run folder, or it is not visible on this machine.
        CacheError
            If its files cannot be read.
        """
        return read_status(self.run)

    def watch(self, seconds: float = 2.0, until: float | None = None) -> Status | None:
        """Display the run repeatedly until it is over. An interrupt ends the watching, not the run.

        Parameters
        ----------
        seconds
            Refresh interval.
        until
            Stop after this time in seconds, even if a driver is active and the run is incomplete.

        Returns
        -------
        Status
            The last displayed status. None if the run folder is not visible on this machine.
        """
        with contextlib.suppress(KeyboardInterrupt):
            return self._watch(_screen(), seconds, until, threading.Event())
        return None if self._scheduler else self.status()

    def watch_in_background(self, seconds: float = 2.0) -> threading.Thread:
        """Display the run repeatedly from a thread, so that the cell ends immediately and others can run.

        The next call, or :meth:`stop`, ends it.

        Parameters
        ----------
        seconds
            Refresh interval.

        Returns
        -------
        threading.Thread
            The thread, which ends when the run is over.
        """
        self.stop()
        self._stop_background = threading.Event()
        arguments = (_screen(), seconds, self._stop_background)
        thread = threading.Thread(target=self._in_background, args=arguments, daemon=True, name="dask_logits-monitor")
        thread.start()
        return thread

    def stop(self) -> None:
        """Stop watching in the background."""
        self._stop_background.set()

    def _in_background(self, show: Callable[[_Look], object], seconds: float, stop: threading.Event) -> None:
        try:
            self._watch(show, seconds, None, stop)
        except DaskLogitsError as error:
            show(_Look(lines=[f"error         {error.message}"]))

    def _watch(
        self, show: Callable[[_Look], object], seconds: float, until: float | None, stop: threading.Event
    ) -> Status | None:
        started = worked = time.monotonic()
        while True:
            look = self._look()
            show(look)
            now = time.monotonic()
            worked = now if look.is_at_work else worked
            left = float("inf") if until is None else started + until - now
            is_over = look.status is not None and look.status.state == "complete"
            if is_over or now - worked >= _GRACE_SECONDS or left <= 0 or stop.wait(min(seconds, left)):
                return look.status

    def _look(self) -> _Look:
        if self._scheduler is None:
            snapshot = self._live.read()
            status = snapshot.status
            dashboard = [f"dashboard     {status.dashboard}"] if status.dashboard else []
            return _Look(
                status=status,
                lines=status.lines() + dashboard,
                charts=cell(snapshot),
                is_at_work=status.running > 0,
            )
        event = _announced(self._scheduler, self._wait_seconds).get(self.run)
        if event is None:
            raise ClusterError(f"{self._scheduler}: expected news of {self.run}, got none: the scheduler was replaced")
        return _Look(lines=_lines(event), is_at_work=_at_work(event))


def _announced(address: str, wait_seconds: float) -> dict[str, DriverStatus]:
    """Return the latest announcement of every run known to the scheduler. No connection stays open."""
    # A notebook's thread already runs an event loop.
    with ThreadPoolExecutor(1) as thread:
        try:
            events = thread.submit(lambda: asyncio.run(_ask(address, wait_seconds))).result()
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"Monitor: expected a scheduler at {address!r}, got {error!r} within {wait_seconds:g} s; give the "
                "address of the one the job uses, or the run folder"
            ) from error
    return announcements(events)


async def _ask(address: str, wait_seconds: float) -> list[tuple[float, object]]:
    from distributed import Security, rpc

    # Not a Client: the scheduler would count it, and that of distributed 2026.7.1 waits forever for a handshake.
    security = Security().get_connection_args("client")
    async with asyncio.timeout(wait_seconds), rpc(address, timeout=wait_seconds, connection_args=security) as scheduler:
        return list(await scheduler.events(topic=RUNS_TOPIC))


def _choose(runs: dict[str, DriverStatus], address: str) -> str:
    """Return the only active run, else the one with the latest announcement."""
    if not runs:
        raise ClusterError(
            f"{address}: expected a run to be announced at this scheduler, got none; a driver announces its run as "
            "soon as it has joined: wait for it, or give the run folder"
        )
    working = sorted(run for run, event in runs.items() if _at_work(event))
    if len(working) > 1:
        raise RunConflictError(
            f"{address}: expected one run at work, got {len(working)}; give the folder of one: {', '.join(working)}"
        )
    return working[0] if working else max(runs, key=lambda run: runs[run].at)


def _at_work(event: DriverStatus) -> bool:
    return event.state in WORKING_STATES and time.time() - event.at < _SILENT_SECONDS


def _lines(event: DriverStatus) -> list[str]:
    """Format an announcement for display: the figures of one driver, as published."""
    facts = {name.replace("_", " "): value for name, value in event if name not in ("run", "at", "entered", "failed")}
    facts = {"run": f"{event.run} (not visible on this machine)", **facts}
    facts |= {f"failed {index.zfill(6)}": reason for index, reason in event.failed.items()}
    return [f"{label:<17}  {text}" for label, text in facts.items() if text not in (None, (), {})]


def _table(lines: list[str]) -> str:
    """Format lines of a label, two or more spaces and a text as a table.

    >>> _table(["state         <b>"]).count("&lt;b&gt;")
    1
    """
    left = 'style="text-align:left"'
    rows = ""
    for line in lines:
        label, text = (html.escape(part) for part in re.split(r"\s{2,}", line, maxsplit=1))
        # No other text becomes a link, because an address can contain a script.
        if label == "dashboard" and text.startswith(("http://", "https://")):
            text = f'<a href="{text}" target="_blank">{text}</a>'
        rows += f"<tr><th {left}>{label}</th><td {left}>{text}</td></tr>"
    return f"<table>{rows}</table>"


def _screen() -> Callable[[_Look], object]:
    """Return a function that shows a run: in place in a notebook, otherwise block after block on stdout."""
    try:
        from IPython import get_ipython
        from IPython.display import DisplayHandle
    except ImportError:
        return _print
    if get_ipython() is None:
        return _print
    handle: Any = DisplayHandle()  # type: ignore[no-untyped-call]
    handle.display({"text/plain": ""}, raw=True)
    return lambda look: handle.update({"text/html": look.html, "text/plain": "\n".join(look.lines)}, raw=True)


def _print(look: _Look) -> None:
    Console().print(*look.lines, "", sep="\n", markup=False, highlight=False, soft_wrap=True)
