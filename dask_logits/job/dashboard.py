"""A page of the runs at a Dask scheduler, in its dashboard: ``dask scheduler --preload dask_logits.job.dashboard``.

Clusters that a job starts have it. Drivers announce the folders of their runs at the scheduler, and the figures come
from these folders. Where the scheduler does not see a folder, the announcements themselves are shown.

Routes, below the prefix of the dashboard:

- ``dask-logits``: the page
- ``dask-logits.json``: its figures
- ``dask-logits/metrics``: the same in the text format of Prometheus

The page is also among the plots that the dashboard lists for JupyterLab's extension.

Nothing is read while nobody asks. A run is read in a thread, once for everybody who asks, and not again for 100 times
the processor time that this took, at most a minute. Another reading of 10,000 partitions takes 0.04 s.

``http_application``, ``template_variables`` and ``IndividualPlots`` are no documented parts of distributed (2026.7.1,
distributed#3677), and only this module uses them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from distributed import Scheduler
from distributed.http.scheduler.info import IndividualPlots
from tornado.web import RequestHandler

from dask_logits.errors import DaskLogitsError
from dask_logits.observe import live_page
from dask_logits.observe.live import LiveRun, Snapshot
from dask_logits.observe.page import Html, pairs, text
from dask_logits.run.drivers import announcements
from dask_logits.run.folder import RUNS_TOPIC, WORKING_STATES
from dask_logits.run.records import DriverStatus

logger = logging.getLogger(__name__)

PAGE = "dask-logits"
_REFRESH_SECONDS = 2.0
_REST = 100.0
_MOST_REST_SECONDS = 60.0
# A request waits this long for a slow file system.
_WAIT_SECONDS = 5.0
_MOST_RUNS = 20


@dataclass(frozen=True, kw_only=True)
class View:
    """A run at one moment: its snapshot, or the reason why there is none, and the sections of its page."""

    run: str
    snapshot: Snapshot | None
    problem: str | None
    body: str


class _Run:
    """A run that is read when somebody asks, but not all the time."""

    def __init__(self, run: str) -> None:
        self.run = run
        self._live = LiveRun(Path(run))
        self._view: View | None = None
        self._due = 0.0
        self._took = 0.0
        self._reading: asyncio.Future[View] | None = None

    async def view(self, event: DriverStatus) -> View:
        """Return the last view, after it is renewed if that is due. Several callers wait for the same one."""
        if self._view is not None and time.monotonic() < self._due:
            return self._view
        if self._reading is None or self._reading.done():
            self._reading = asyncio.get_running_loop().run_in_executor(None, self._renew, event)
        # While this caller waits, another one may start the next reading.
        reading = self._reading
        done, _ = await asyncio.wait([reading], timeout=_WAIT_SECONDS)
        if done:
            return reading.result()
        return self._view or _without_snapshot(self.run, "Its files are being read.", event)

    def _renew(self, event: DriverStatus) -> View:
        # A slow file system takes nothing from the workers.
        started = time.thread_time()
        try:
            snapshot = self._live.read()
            self._view = View(run=self.run, snapshot=snapshot, problem=None, body=live_page.body(snapshot))
        except DaskLogitsError as error:
            self._view = _without_snapshot(self.run, error.message, event)
        except Exception as error:
            # Whatever is in the folder, the scheduler has other things to do.
            logger.debug("%s cannot be shown", self.run, exc_info=True)
            self._view = _without_snapshot(self.run, repr(error), event)
        # The first reading has all receipts to read, and is no measure of the next.
        before, self._took = self._took, time.thread_time() - started
        rest = min(_REST * min(before, self._took), _MOST_REST_SECONDS)
        self._due = time.monotonic() + max(_REFRESH_SECONDS, rest)
        return self._view


def _without_snapshot(run: str, problem: str, event: DriverStatus) -> View:
    facts = pairs((name.replace("_", " "), value) for name, value in event if value not in (None, {}, ()))
    said = Html(f"<p>What its driver announced last:</p>{facts}")
    return View(run=run, snapshot=None, problem=problem, body=live_page.problem(run, problem) + said)


class Runs:
    """The runs that were announced at a scheduler."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._runs: dict[str, _Run] = {}

    def announced(self) -> dict[str, DriverStatus]:
        """Return run folder → last announcement, the active and the latest first."""
        events = tuple(self._scheduler.get_events(RUNS_TOPIC))
        found = dict(itertools.islice(announcements(events).items(), _MOST_RUNS))
        self._runs = {run: self._runs.get(run) or _Run(run) for run in found}
        return dict(sorted(found.items(), key=lambda item: (item[1].state not in WORKING_STATES, -item[1].at)))

    async def view(self, run: str, event: DriverStatus) -> View:
        """Return the state of an announced run."""
        return await self._runs[run].view(event)

    async def views(self) -> list[View]:
        """Return the states of all announced runs."""
        return [await self.view(run, event) for run, event in self.announced().items()]

    def memory(self) -> list[live_page.Memory]:
        """Return the memory of the workers, from their last heartbeats."""
        return [
            live_page.Memory(
                worker=f"{worker.address} on {worker.host}",
                process_bytes=worker.metrics.get("memory", 0),
                limit_bytes=worker.memory_limit or None,
                device_bytes=worker.metrics.get("gpu", {}).get("memory-used"),
                device_total_bytes=worker.extra.get("gpu", {}).get("memory-total"),
            )
            for worker in self._scheduler.workers.values()
        ]


class _Handler(RequestHandler):
    def initialize(self, runs: Runs) -> None:
        self.runs = runs

    def set_default_headers(self) -> None:
        self.set_header("Content-Security-Policy", live_page.POLICY)
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Cache-Control", "no-store")


class _Body(_Handler):
    async def get(self) -> None:
        self.write(await self._body())

    async def _body(self) -> str:
        announced = self.runs.announced()
        if not announced:
            return "<header><h1>dask_logits</h1><p>No run was announced at this scheduler yet.</p></header>"
        chosen = self.get_argument("run", "")
        run = chosen if chosen in announced else next(iter(announced))
        others = "".join(f'<a href="?run={quote(other)}">{text(other)}</a>' for other in announced if other != run)
        links = f'<nav aria-label="Other runs">Other runs: {others}</nav>' if others else ""
        view = await self.runs.view(run, announced[run])
        return links + view.body + live_page.memory(self.runs.memory())


class _Page(_Body):
    async def get(self) -> None:
        self.write(live_page.page(await self._body()))


class _Json(_Handler):
    async def get(self) -> None:
        runs = [
            {"run": view.run, "error": view.problem} if view.snapshot is None else live_page.values(view.snapshot)
            for view in await self.runs.views()
        ]
        self.set_header("Content-Type", "application/json")
        workers = [dataclasses.asdict(worker) for worker in self.runs.memory()]
        self.write(json.dumps({"runs": runs, "workers": workers}, indent=1))


class _Metrics(_Handler):
    async def get(self) -> None:
        snapshots = [view.snapshot for view in await self.runs.views() if view.snapshot is not None]
        self.set_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.write(live_page.metrics(snapshots, self.runs.memory()))


class _Plots(IndividualPlots):  # type: ignore[misc]
    """The list of plots that dask-labextension offers as panels, with the page."""

    def write(self, chunk: dict[str, str]) -> None:
        super().write({**chunk, PAGE: f"/{PAGE}"})


_ROUTES = {"": _Page, "/body": _Body, ".json": _Json, "/metrics": _Metrics}


def dask_setup(scheduler: Scheduler) -> None:
    """Add the page to a scheduler. Dask calls it when the scheduler starts, and logs its errors."""
    runs = Runs(scheduler)
    routes: list[tuple[str, Any, dict[str, Runs]]] = [
        # Below any prefix of the dashboard, which the scheduler does not tell.
        (rf"(?:/.*)?/{PAGE}{path}", handler, {"runs": runs})
        for path, handler in _ROUTES.items()
    ]
    plots = (r"(?:/.*)?/individual-plots\.json", _Plots, {"dask_server": scheduler})
    scheduler.http_application.add_handlers(".*$", [*routes, plots])
    try:
        from distributed.dashboard.scheduler import template_variables
    except ImportError:
        # Without Bokeh, Dask has no dashboard to link the page from.
        return
    template_variables(scheduler)["pages"].append(PAGE)
