"""What a page or a notebook shows of a run while it works, and the same figures for programs.

The charts are those of the report. A page replaces only the sections that changed.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from dask_logits.observe import charts, sections
from dask_logits.observe.charts import number
from dask_logits.observe.history import Clock, rates
from dask_logits.observe.live import STATES, Snapshot
from dask_logits.observe.page import STYLE, Html, asset, badge, policy, section, table, text, tiles
from dask_logits.observe.page import document as whole_page
from dask_logits.records import Array
from dask_logits.run.timings import duration, plural

# More partitions than this share squares of the map.
_MOST_CELLS = 2_000
# Workers whose memory is listed.
_MOST_WORKERS = 100

_SCRIPT = asset("live.js")
POLICY = f"{policy(_SCRIPT)}; img-src data:"
# Colours of whatever surrounds an output cell: JupyterLab, Colab and VS Code choose light or dark themselves.
_CELL_STYLE = Template(asset("cell.css").rstrip()).substitute(page=STYLE)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of a worker at its last heartbeat.

    Parameters
    ----------
    worker
        Its address and host.
    process_bytes
        Resident memory of its process.
    limit_bytes
        Limit of this memory. None: none.
    device_bytes, device_total_bytes
        Memory in use on its first GPU, by all processes, and the size of this memory. None on a CPU.
    """

    worker: str
    process_bytes: int
    limit_bytes: int | None = None
    device_bytes: int | None = None
    device_total_bytes: int | None = None


def memory(workers: Sequence[Memory]) -> Html:
    """Return the section of the workers' memory, those with the fullest first. Empty without workers."""
    if not workers:
        return Html("")
    has_devices = any(each.device_bytes is not None for each in workers)
    order = sorted(workers, key=lambda each: (-(each.device_bytes or 0), -each.process_bytes))
    rows = [
        (each.worker, _amount(each.process_bytes, each.limit_bytes),
         *([_amount(each.device_bytes, each.device_total_bytes)] if has_devices else []))
        for each in order[:_MOST_WORKERS]
    ]  # fmt: skip
    head = ("worker", "process", *(["GPU"] if has_devices else []))
    more = len(order) - _MOST_WORKERS
    rest = Html(f'<p class="soft">{plural(more, "more worker")} with less.</p>') if more > 0 else Html("")
    said = "The workers of this scheduler at their last heartbeat. On a GPU, the memory of all processes counts."
    said = said if has_devices else "The resident memory of the workers of this scheduler at their last heartbeat."
    numbers = range(1, len(head))
    return section("memory", "Memory now", said, table(head, rows, numbers=numbers, label="Memory now"), rest)


def _amount(used: int | None, total: int | None) -> str:
    if used is None:
        return "–"
    return f"{used / 2**30:.1f}{f' of {total / 2**30:.1f}' if total else ''} GiB"


def page(body: str) -> str:
    """Return the page around its sections, which refreshes itself."""
    shell = f'<div id="live">{body}</div><p id="note" class="soft" role="status"></p>'
    icon = '<link rel="icon" href="data:,">'
    return whole_page("dask_logits", shell, head=icon, end=f"<script>{_SCRIPT}</script>")


def body(snapshot: Snapshot) -> str:
    """Return the sections of a page."""
    status, history = snapshot.status, snapshot.history
    parts: list[Html | None] = [_header(snapshot), _figures(snapshot), _partitions(snapshot)]
    parts += sections.work(history, Clock.of(history), status.seconds, snapshot.failures)
    return "".join(part for part in parts if part is not None)


def cell(snapshot: Snapshot) -> str:
    """Return the figures and charts for an output cell of a notebook. Its style leaves the notebook alone."""
    history, clock = snapshot.history, Clock.of(snapshot.history)
    parts = [_figures(snapshot), _partitions(snapshot)]
    if clock is not None:
        parts += [sections.speed(history, clock, rates(history, clock), workers=False),
                  sections.time_shares(snapshot.status.seconds)]  # fmt: skip
    # Several cells may show a run, and an id has to be unique in their page.
    inner = re.sub(r' id="[a-z]+"', "", "".join(part for part in parts if part is not None))
    return f'<style>{_CELL_STYLE}</style><div class="dask-logits">{inner}</div>'


def problem(run: str, message: str) -> str:
    """Return the section of a run that cannot be read."""
    return f"<header><h1>{text(Path(run).name or run)}</h1><p>{text(run)}</p><p>{text(message)}</p></header>"


def values(snapshot: Snapshot) -> dict[str, Any]:
    """Return the figures as JSON values: the status, and partitions by state."""
    indices = {name: np.flatnonzero(snapshot.states_P == i).tolist() for i, name in enumerate(STATES)}
    return {
        **json.loads(snapshot.status.to_json()),
        "partitions_by_state": snapshot.counts(),
        "running_partitions": indices["running"],
        "failed_partitions": indices["failed"],
        "workers": [
            {"host": worker.host, "process": worker.process, "gpus": list(worker.gpus), "tokens": worker.tokens,
             "partitions": worker.partitions, "peak_rss_bytes": worker.peak_rss_bytes}
            for worker in snapshot.history.workers
        ],
    }  # fmt: skip


def metrics(snapshots: Sequence[Snapshot], workers: Sequence[Memory] = ()) -> str:
    """Return the figures of several runs, and the memory of workers, in the text format of Prometheus."""
    samples: dict[str, list[tuple[dict[str, str], float]]] = {}
    for snapshot in snapshots:
        for name, labels, value in _samples(snapshot):
            samples.setdefault(name, []).append(({"run": snapshot.status.run, **labels}, value))
    for each in workers:
        for name, used in (("worker_memory_bytes", each.process_bytes), ("worker_device_bytes", each.device_bytes)):
            if used is not None:
                samples.setdefault(name, []).append(({"worker": each.worker}, float(used)))
    lines = []
    for name, found in samples.items():
        kind = "counter" if name.endswith("_total") else "gauge"
        lines += [f"# HELP dask_logits_{name} {_HELP[name]}", f"# TYPE dask_logits_{name} {kind}"]
        for labels, value in found:
            shown = ",".join(f'{label}="{_label(said)}"' for label, said in labels.items())
            lines.append(f"dask_logits_{name}{{{shown}}} {value!r}")
    return "".join(f"{line}\n" for line in lines)


_HELP = {
    "partitions": "Planned partitions by state.",
    "tokens_total": "Tokens of committed partitions.",
    "tokens_per_second": "Speed of all active drivers, in wall-clock time.",
    "seconds_left": "Time until the run is scored.",
    "mfu": "FLOPs of the tokens relative to those of a large matrix product.",
    "kept_mass": "Mean probability of the kept tokens.",
    "distinct_draws": "Mean number of distinct ids among the draws of a position.",
    "stage_seconds_total": "Time of all workers by stage.",
    "failed_attempts_total": "Attempts that failed before their partition was committed.",
    "worker_memory_bytes": "Resident memory of a worker at its last heartbeat.",
    "worker_device_bytes": "Memory in use on a worker's first GPU at its last heartbeat, by all processes.",
    "worker_peak_bytes": "Peak memory of a worker.",
}


def _samples(snapshot: Snapshot) -> Iterator[tuple[str, dict[str, str], float]]:
    status = snapshot.status
    for state, count in snapshot.counts().items():
        yield "partitions", {"state": state}, float(count)
    yield "tokens_total", {}, float(status.statistics.tokens)
    yield "tokens_per_second", {}, status.running_tokens_per_second
    if status.seconds_left is not None:
        yield "seconds_left", {}, status.seconds_left
    if status.mfu == status.mfu:
        yield "mfu", {}, status.mfu
    if status.statistics.distinct:
        yield "distinct_draws", {}, status.statistics.mean_distinct
    elif status.statistics.tokens:
        yield "kept_mass", {}, status.statistics.mean_kept_mass
    for stage, seconds in status.seconds.items():
        yield "stage_seconds_total", {"stage": stage}, seconds
    for kind, count in status.failed_attempts.items():
        yield "failed_attempts_total", {"kind": kind}, float(count)
    for worker in snapshot.history.workers:
        yield "worker_peak_bytes", {"worker": worker.name}, float(worker.peak_rss_bytes)


def _label(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _header(snapshot: Snapshot) -> Html:
    status = snapshot.status
    step = f" {text(status.step)}" if status.step else ""
    at = f"{datetime.datetime.fromtimestamp(snapshot.at):%H:%M:%S}"
    why = f"<p>{text(status.reason)}</p>" if status.reason else ""
    idle = "" if status.running else f"<p>Next:</p><pre>{text(status.next_command)}</pre>"
    left_out = "".join(f"<p>No work for {text(worker)}: {text(said)}</p>" for worker, said in status.left_out.items())
    state = f'<p>{badge(status.state)}{step} <span class="soft">{at}</span></p>'
    return Html(
        f"<header><h1>{text(Path(status.run).name or status.run)}</h1><p>{text(status.run)}</p>"
        f"{state}{why}{idle}{left_out}</header>"
    )


def _figures(snapshot: Snapshot) -> Html:
    status = snapshot.status
    sums, is_growing = status.statistics, "" if status.planned_all else "+"
    rows: list[tuple[str, object]] = []
    if status.running_tokens_per_second:
        rows.append(("tokens/s", number(status.running_tokens_per_second)))
    if status.running and status.seconds_left is not None:
        rows.append(("time left", duration(status.seconds_left)))
    rows.append(("partitions", f"{number(status.committed)} of {number(status.partitions)}{is_growing}"))
    if sums.tokens:
        rows += [("tokens", number(sums.tokens)), (status.items_noun, number(sums.documents))]
    return tiles(rows + sections.figures(sums, status.mfu))


def _partitions(snapshot: Snapshot) -> Html | None:
    states_P, counts = snapshot.states_P, snapshot.counts()
    if not len(states_P):
        return None
    each, kinds_C = grouped(states_P)
    legend = "".join(
        f'<span><span class="key kind{i}"></span>{counts[name]:,} {name}</span>' for i, name in enumerate(STATES)
    )
    said = ", ".join(f"{counts[name]:,} {name}" for name in STATES)
    shared = f"A square is {each} partitions, in the last of these states that one of them has." if each > 1 else ""
    drawn = charts.cells("Partitions by state", kinds_C, len(STATES),
                         description=f"{plural(len(states_P), 'partition')}: {said}.")  # fmt: skip
    return section("partitions", "Partitions", shared, Html(f'<div class="legend">{legend}</div>{drawn}'))


def grouped(states_P: Array) -> tuple[int, Array]:
    """Return how many partitions share a square of the map, and the state of each square.

    >>> grouped(np.array([0, 3, 1], np.uint8))
    (1, array([0, 3, 1], dtype=uint8))
    """
    each = -(-len(states_P) // _MOST_CELLS)
    if each == 1:
        return each, states_P
    return each, np.maximum.reduceat(states_P, np.arange(0, len(states_P), each))
