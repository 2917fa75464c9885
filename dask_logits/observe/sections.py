"""The sections of a report: speed, workers, time, failures, targets, documents. Each opens with what one sees in it."""

from __future__ import annotations

import datetime
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dask_logits.config.setting import flat
from dask_logits.observe import charts
from dask_logits.observe.charts import Ticks, axis, nice_top, number
from dask_logits.observe.history import Clock, History, Rates, rates
from dask_logits.observe.page import Html, folded, section, shortened, table, text
from dask_logits.observe.sample import Document, Sample
from dask_logits.records import Array, Statistics
from dask_logits.run.records import FailureEntry
from dask_logits.run.timings import breakdown, duration, plural

# More partitions than this are drawn as shades.
_MOST_BOXES = 400
_MOST_WORKERS = 40
_MOST_FAILURES = 50
_EXTREME_DOCUMENTS = 10
# Documents shorter than this are left out of the lists if enough longer ones remain.
_LEAST_TOKENS = 8
_HISTOGRAM_BINS = 40
# Largest share of values that the last column of a histogram gathers.
_CUT_SHARE = 0.005
_UNITS = ((2 * 86_400, 86_400, "days"), (2 * 3_600, 3_600, "hours"), (120, 60, "minutes"), (0, 1, "seconds"))


def time_axis(clock: Clock) -> tuple[Ticks, str]:
    """Return the labels of the time at work, and their unit."""
    _, size, unit = next(each for each in _UNITS if clock.seconds >= each[0])
    return axis(0.0, clock.seconds / size, 6), f"{unit} at work"


def figures(sums: Statistics, mfu: float) -> list[tuple[str, object]]:
    """Return the figures of targets that are known."""
    known: list[tuple[bool, tuple[str, object]]] = [
        (not math.isnan(mfu), ("MFU", f"{mfu:.2f}")),
        (sums.targets not in (0, sums.tokens), ("targets", number(sums.targets))),
        (sums.targets > 0, sums.entries),
        (sums.labels > 0, ("perplexity", f"{sums.perplexity:.2f}")),
    ]
    return [figure for is_known, figure in known if is_known]


def work(
    history: History,
    clock: Clock | None,
    seconds: Mapping[str, float],
    failures: Mapping[int, FailureEntry],
) -> list[Html | None]:
    """Show how fast, where and with which failures partitions were scored. Without a clock none has been."""
    parts: list[Html | None] = []
    if clock is not None:
        found = rates(history, clock)
        parts = [
            speed(history, clock, found),
            time_shares(seconds),
            timeline(history, clock, found, failures),
        ]
    return [*parts, failed(failures, history)]


def speed(history: History, clock: Clock, found: Rates, *, workers: bool = True) -> Html:
    """Tokens per second over time, in total and, if asked for, of each worker."""
    total = found.tokens_per_second.sum(1)
    tokens = int(history.column("tokens").sum())
    x, unit = time_axis(clock)
    began = datetime.datetime.fromtimestamp(clock.begin)
    left_out = f" {_pause_text(clock)}" if clock.pauses else ""
    sentence = (
        f"{plural(len(history.workers), 'worker')} scored {plural(tokens, 'token')} in {duration(clock.seconds)}: "
        f"{number(tokens / clock.seconds)} tokens/s on average, {number(float(total.max()))} at the fastest. The first "
        f"partition began on {began:%Y-%m-%d at %H:%M:%S}.{left_out}"
    )
    chart = charts.area("Tokens per second over time", total, x, unit=unit, y_unit="tokens/s",
                        description=sentence, marks=_pauses(clock))  # fmt: skip
    return section("speed", "Speed", sentence, Html(chart), _workers(history, found) if workers else None)


def _workers(history: History, found: Rates) -> Html:
    order = _busiest(history)
    top = nice_top(float(found.tokens_per_second.max(initial=0)))
    rows: list[list[object]] = []
    for i in order:
        worker = history.workers[i]
        rate = worker.tokens / worker.score_seconds if worker.score_seconds else 0.0
        spark = charts.sparkline(f"Speed of {worker.name}", found.tokens_per_second[:, i], top,
                                 description=f"{number(rate)} tokens/s while scoring")  # fmt: skip
        name = worker.name + (f" ({', '.join(worker.gpus)})" if worker.gpus else "")
        memory = f"{worker.peak_rss_bytes / 2**30:.1f} GiB" if worker.peak_rss_bytes else "–"
        rows.append([name, f"{worker.partitions:,}", f"{worker.tokens:,}", number(rate), f"{worker.splits:,}", memory,
                     Html(spark)])  # fmt: skip
    head = ("worker", "partitions", "tokens", "tokens/s", "batches split", "peak memory", "tokens/s over time")
    more = len(history.workers) - len(order)
    rest = Html(f"<p class=soft>{plural(more, 'more worker')} with fewer tokens.</p>") if more > 0 else Html("")
    said = "Each worker while it scores. The small charts share one scale, and a batch is split if it lacks memory."
    return Html(f"<h3>Workers</h3><p>{said}</p>{table(head, rows, numbers=(1, 2, 3, 4, 5), label='Workers')}{rest}")


def time_shares(seconds: Mapping[str, float]) -> Html:
    """Where the time of the workers went."""
    found = breakdown(seconds)
    small = sum(value for stage, value in found.items() if stage not in _MEANING)
    known = {**found, "rest": max(0.0, found["rest"]) + small}
    parts = [(stage, known.get(stage, 0.0)) for stage in _MEANING]
    total = sum(value for _, value in parts) or 1.0
    name, most = max(parts, key=lambda part: part[1])
    sentence = f"The workers were busy for {duration(total)} in all, {100 * most / total:.0f} % of it in {name}."
    rows = [
        (Html(f'<span class="key part{i}"></span>{text(stage)}'), _MEANING[stage], f"{100 * value / total:.1f} %",
         duration(value))
        for i, (stage, value) in enumerate(parts)
    ]  # fmt: skip
    waited = seconds.get("wait", 0.0)
    note = f"Besides, partitions waited {duration(waited)} for the teacher while it scored others." if waited else ""
    chart = charts.shares("Shares of the workers' time", parts, description=sentence)
    return section("time", "Where the time went", sentence, Html(chart),
                   table(("stage", "", "share", "time"), rows, numbers=(2, 3), label="Stages"), note)  # fmt: skip


_MEANING = {
    "read": "rows from the dataset",
    "tokenize": "text to token ids",
    "load": "the teacher, once per worker",
    "trunk": "all layers of the teacher",
    "head": "hidden states to logits",
    "tail": "logits to top-k and tail",
    "rest": "everything else while scoring",
    "write": "encoding, files and receipt",
}


def timeline(history: History, clock: Clock, found: Rates, failures: Mapping[int, FailureEntry]) -> Html:
    """Show the partitions of each worker, those that failed, and failed attempts at others."""
    x, unit = time_axis(clock)
    order = _busiest(history)
    lanes = [(history.workers[i].name, _lane(history, clock, found, i)) for i in order]
    sentences = [
        "One line per worker.",
        "A box is a partition, from its loading to its receipt."
        if len(history) <= _MOST_BOXES
        else "The darker, the larger the share of the time in which the worker was busy.",
    ]
    if failures:
        places = [
            (clock.share(entry.at or clock.end), f"partition {index}: {entry.reason}")
            for index, entry in sorted(failures.items())[:_MOST_BOXES]
        ]
        lanes.append(("failed", charts.crosses("Failed partitions", places, description="Failures")))
        sentences.append("A cross is a partition that failed for good, at the time of its last attempt.")
    if history.retried:
        places = [
            (clock.share(attempt.at or clock.begin), f"partition {index}: {attempt.kind}: {attempt.reason}")
            for index, attempt in history.retried
        ]
        crosses = charts.crosses("Failed attempts", places, description="Attempts", css="cross mild")
        lanes.append(("retried", crosses))
        sentences.append("An orange cross is an attempt that failed before its partition was committed.")
    if (more := len(history.workers) - len(order)) > 0:
        sentences.append(f"Not drawn: {plural(more, 'worker')} with fewer tokens.")
    drawn = "".join(f"<div>{text(name)}</div>{lane}" for name, lane in lanes)
    below = "".join(f'<span style="left:{100 * at:.2f}%">{text(label)}</span>' for at, label in x)
    return section(
        "timeline", "Timeline", " ".join(sentences),
        Html(f'<div class="lanes">{drawn}<div class="x" aria-hidden="true">{below}</div></div>'
             f'<p class="soft" style="text-align:right;max-width:none;font-size:.75rem">{unit}</p>'),
    )  # fmt: skip


def _busiest(history: History) -> list[int]:
    """Return the workers that are shown, by their tokens."""
    return sorted(range(len(history.workers)), key=lambda i: -history.workers[i].tokens)[:_MOST_WORKERS]


def _lane(history: History, clock: Clock, found: Rates, i: int) -> str:
    """Draw the time of a worker: boxes of its partitions, or shades of its busy share."""
    worker, marks = history.workers[i], _pauses(clock, 20)
    title, description = f"Timeline of {worker.name}", plural(worker.partitions, "partition")
    if len(history) > _MOST_BOXES:
        return charts.shades(title, found.busy[:, i], description=description, marks=marks)
    is_its = history.column("worker") == i
    columns = (history.column(name)[is_its] for name in ("index", "tokens", "begin", "end"))
    spans = [
        (
            clock.share(begin),
            clock.share(end),
            f"partition {index:.0f}: {tokens:,.0f} tokens in {duration(end - begin)}",
        )
        for index, tokens, begin, end in zip(*columns, strict=True)
    ]
    return charts.spans(title, spans, description=description, marks=marks)


def failed(failures: Mapping[int, FailureEntry], history: History) -> Html | None:
    """List the partitions that failed, and receipts that cannot be used. None if there are none."""
    if not failures and not history.n_problems:
        return None
    rows = [
        (f"{index:06d}", entry.kind, f"{entry.attempts}", entry.reason, ", ".join(map(str, entry.rows[:10])) or "–",
         ", ".join(entry.workers[:4]) or "–")
        for index, entry in sorted(failures.items())[:_MOST_FAILURES]
    ]  # fmt: skip
    parts: list[object] = []
    if failures:
        parts += [
            f"{plural(len(failures), 'partition')} failed for good. `dask-logits retry` scores them again once the "
            "cause is fixed.",
            table(("partition", "kind", "attempts", "reason", "rows", "workers"), rows, numbers=(2,), label="Failures"),
        ]
    if len(failures) > _MOST_FAILURES:
        parts.append(f"{len(failures) - _MOST_FAILURES} more are in the folder failures/ of the run.")
    if history.n_problems:
        listed = table(("partition", "receipt"), [(f"{i:06d}", why) for i, why in history.problems.items()],
                       label="Damaged receipts")  # fmt: skip
        said = f"{plural(history.n_problems, 'receipt')} cannot be used or counted. The first:"
        parts += [said, listed]
    return section("failures", "Failures", *parts)


def left_out(workers: Mapping[str, str]) -> Html | None:
    """List the workers that got no work, with their hosts and GPUs. None if there are none."""
    if not workers:
        return None
    n_more = len(workers) - _MOST_WORKERS
    return section(
        "left-out",
        "Workers without work",
        f"{plural(len(workers), 'worker')} got no work, or no more work after failures, since the last start.",
        table(("worker", "reason"), sorted(workers.items())[:_MOST_WORKERS], label="Workers without work"),
        f"{n_more} more are listed by `dask-logits status`." if n_more > 0 else "",
    )


def targets(sample: Sample, noun: str) -> Html:
    """Show the histograms of the targets, and the kept mass by k unless they are draws."""
    n_tokens = sum(len(each.entropies) for each in sample.documents)
    whole = n_tokens >= sample.lengths.sum()
    said = (
        f"These figures are those of all {plural(n_tokens, 'token')}."
        if whole
        else f"These figures are those of {plural(n_tokens, 'token')} in {len(sample.documents):,} of "
        f"{sample.n_documents:,} {noun}, evenly spread."
    )
    long = sample.lengths
    mass = sample.mass_by_k
    kept = (
        _histogram("Kept mass", sample.joined("kept"), "probability", "tokens",
                   "How much of the teacher's probability the kept tokens hold.", span=(0.0, 1.0))
        if mass
        else _histogram("Distinct ids", sample.joined("kept"), "ids of a position", "tokens",
                        "How many different tokens the draws of a position gave: few if the teacher is certain.")
    )  # fmt: skip
    charted = [
        _histogram(f"Length of {noun}", long, "tokens", noun, f"The longest has {long.max():,} tokens."),
        _histogram(f"Entropy of the {'kept distribution' if mass else 'draws'}", sample.joined("entropies"),
                   "nats", "tokens",
                   "How undecided the teacher is between the tokens that are kept: 0 if it is certain."),
        kept,
        _histogram("Surprise", sample.joined("surprises"), "nats", "tokens",
                   "How little the teacher expected the token that really comes next: −log of its probability."),
    ]  # fmt: skip
    if not mass:
        return section("targets", "Targets", said, Html(f'<div class="pair">{"".join(charted)}</div>'))
    top = max(mass)
    sentence = (
        f"The most probable token holds {100 * mass[1]:.1f} % of the probability on average, all {top} hold "
        f"{100 * mass[top]:.1f} %."
    )
    by_k = {f"{k:,}": value for k, value in mass.items()}
    line = charts.line("Kept mass by k", by_k, unit="k, the number of tokens kept",
                       y_unit="share of the probability", description=sentence)  # fmt: skip
    values = table(("k", "kept mass"), [(k, f"{value:.4f}") for k, value in by_k.items()], numbers=(1,), label="By k")
    curve = f"<div><h3>Kept mass by k</h3><p>{sentence}</p>{line}{folded('Values', values)}</div>"
    return section("targets", "Targets", said, Html(f'<div class="pair">{"".join(charted)}{curve}</div>'))


def _histogram(
    title: str,
    values: Array,
    unit: str,
    counted: str,
    sentence: str,
    span: tuple[float, float] | None = None,
) -> str:
    finite = values[np.isfinite(values)].astype(np.float64)
    if not len(finite):
        return f"<div><h3>{text(title)}</h3><p>There are no values.</p></div>"
    high = float(finite.max())
    usual = float(np.quantile(finite, 1 - _CUT_SHARE))
    cut = 2 * usual < high
    low, high = span or (0.0, nice_top(usual if cut else high))
    counts, edges = np.histogram(np.clip(finite, low, high), _HISTOGRAM_BINS, (low, high))
    noted = f" The last column holds all above {number(high)}, up to {number(float(finite.max()))}." if cut else ""
    infinite = len(values) - len(finite)
    noted += f" {infinite:,} infinite values are not drawn." if infinite else ""
    at = np.quantile(finite, (0.05, 0.5, 0.95))
    middle = f" 5 % lie below {number(at[0])}, half below {number(at[1])}, 95 % below {number(at[2])}."
    drawn = charts.histogram(title, counts, low, high, unit=unit, y_unit=counted, description=sentence + middle)
    rows = [
        (f"{number(a)} to {number(b)}", f"{n:,}")
        for a, b, n in zip(edges[:-1], edges[1:], counts.tolist(), strict=True)
    ]
    values_table = folded("Values", table((unit, counted), rows, numbers=(1,), label=title))
    return f"<div><h3>{text(title)}</h3><p>{text(sentence + middle + noted)}</p>{drawn}{values_table}</div>"


def extremes(sample: Sample, noun: str) -> Html:
    """List the documents of which the teacher is most and least certain."""
    long = [each for each in sample.documents if len(each.entropies) >= _LEAST_TOKENS]
    chosen = long if len(long) >= 2 * _EXTREME_DOCUMENTS else list(sample.documents)
    ranked = sorted(chosen, key=lambda each: each.entropy)
    limit = f" of at least {_LEAST_TOKENS} tokens" if chosen is long else ""
    said = f"By mean entropy, among {len(chosen):,} sampled {noun}{limit}."
    tokens = "" if sample.tokenizer is not None else (
        " The tokenizer of the teacher is not on this machine, so token ids are shown."
    )  # fmt: skip
    parts = [
        Html(f"<h3>{title}</h3>{_documents(sample, some, title)}")
        for title, some in (
            ("Most certain", ranked[:_EXTREME_DOCUMENTS]),
            ("Least certain", ranked[::-1][:_EXTREME_DOCUMENTS]),
        )
    ]
    return section("documents", noun.capitalize(), said + tokens, *parts)


def _documents(sample: Sample, documents: Sequence[Document], label: str) -> Html:
    rows = [
        (f"{each.row:,}" + (f" from {each.offset:,}" if each.offset else ""), f"{each.n_tokens:,}",
         f"{each.entropy:.2f}", "–" if math.isnan(each.surprise) else f"{each.surprise:.2f}",
         Html(f'<div class="text">{shortened(sample.text(each.opening_ids))}</div>'))
        for each in documents
    ]  # fmt: skip
    head = ("row", "tokens", "entropy", "surprise", "beginning")
    return table(head, rows, numbers=(0, 1, 2, 3), label=label)


def loading(path: str, top_k: int, draws: int) -> Html:
    """Show how to load the cache."""
    code = (
        "from torch.utils.data import DataLoader\n\n"
        "from dask_logits import CachedLogitsDataset, collate\n\n"
        f"dataset = CachedLogitsDataset({path!r})\n"
        "loader = DataLoader(dataset, batch_size=8, shuffle=True, collate_fn=collate)\n"
        'batch = next(iter(loader))  # batch["input_ids"], batch["targets"]\n'
    )
    entries = f"{draws} draws" if draws else f"{top_k} token ids with log-probs, the mass of the rest,"
    said = f"Each position has {entries} and the log-prob of the true token."
    commands = f"dask-logits verify {shlex.quote(path)}"
    return section("loading", "Load the cache", said, Html(f"<pre>{text(code)}</pre>"),
                   "Its checksums are checked with", Html(f"<pre>{text(commands)}</pre>"))  # fmt: skip


def leaves(tree: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the dotted names and values of nested objects, except for null ones, and lists as text."""

    def shown(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return ", ".join([*map(str, value[:10]), *([f"{len(value) - 10} more"] if len(value) > 10 else [])])
        return str(value).lower() if isinstance(value, bool) else value

    return [(path.removeprefix("."), shown(value)) for path, value in flat(tree, "").items() if value is not None]


def _pauses(clock: Clock, height: int = charts.HEIGHT) -> str:
    places = [(clock.share(begin), f"paused for {duration(end - begin)}") for begin, end in clock.pauses]
    return charts.pauses(places, height)


def _pause_text(clock: Clock) -> str:
    total = sum(end - begin for begin, end in clock.pauses)
    count = len(clock.pauses)
    return (
        f"{plural(count, 'pause')} of {duration(total)} in all {'is' if count == 1 else 'are'} left out: dashed lines."
    )
