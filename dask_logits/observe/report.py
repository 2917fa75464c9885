"""``report.html``: what a run computed, how fast, on which workers, and what its targets look like, in one file.

All of it is computed from the run folder: also for a run in progress, one that failed, or one whose cluster is long
gone. It is written at the end of every run. A cache without its run folder has a report, too, without the times.

The charts are inline SVG. A library such as Bokeh would need 1.3 MB of script in every file, and a page without script
also prints, and opens where scripts are forbidden. A report of 10,000 partitions has about 0.3 MB.
"""

from __future__ import annotations

import datetime
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dask_logits.cache.find import CacheFiles
from dask_logits.data.tokens import local_tokenizer
from dask_logits.errors import CacheError
from dask_logits.files.atomic import expanded, replace_text, room
from dask_logits.observe import sections
from dask_logits.observe.charts import number
from dask_logits.observe.history import Clock, History
from dask_logits.observe.page import Html, badge, document, folded, pairs, section, text, tiles
from dask_logits.observe.sample import Sample, sample_cache, sample_partitions, tokenizer_of
from dask_logits.observe.status import Status, reading_of
from dask_logits.records import Statistics
from dask_logits.run.folder import REPORT_NAME, RunFolder
from dask_logits.run.records import Calibration, FailureEntry, Manifest
from dask_logits.run.state import open_run_cache, read_consistently
from dask_logits.run.timings import duration, plural

logger = logging.getLogger(__name__)

_DATASET_FACTS = ("name", "config_name", "split", "revision", "data_files", "text_column", "max_length", "max_samples",
                  "long_documents", "packing", "streaming")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything that a report shows.

    Parameters
    ----------
    path
        The run folder or cache.
    teacher, dataset, settings, identity
        What was computed: name of the teacher, settings that name the data, all settings, facts about the teacher.
    calibration
        The numerics and the environment.
    statistics
        Sums over all targets that exist.
    status
        State of the run. None for a cache alone.
    history
        Its receipts.
    failures
        Partition → its failure.
    cache
        The cache. None if there is none.
    sample
        Some of its documents. None if there are none yet, or if they cannot be read.
    problem
        Why the targets cannot be read.
    """

    path: Path
    teacher: str
    dataset: Mapping[str, Any]
    settings: Mapping[str, Any]
    identity: Mapping[str, Any]
    calibration: Calibration | None
    statistics: Statistics
    status: Status | None = None
    history: History = field(default_factory=History)
    failures: Mapping[int, FailureEntry] = field(default_factory=dict)
    cache: CacheFiles | None = None
    sample: Sample | None = None
    problem: str | None = None


def write_report(path: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a run or a cache.

    Parameters
    ----------
    path
        A run folder in any state, a cache, or an index over several.
    output
        The file to write. None: ``report.html`` in the run folder, or beside the cache.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    CacheError
        If there is neither a run nor a cache, or if the manifest or the plan cannot be read.
    CapacityError
        If the file cannot be written.
    """
    source = expanded(path)
    beside = RunFolder(source).report_path if source.is_dir() else source.with_suffix(".report.html")
    target = beside if output is None else expanded(output)
    page = report_html(source)
    with room(target.parent):
        # Surrogates stand for bytes of file names that are not UTF-8.
        replace_text(target, page.encode("utf-8", "replace").decode())
    return target


def leave_report(run: RunFolder) -> None:
    """Write the report at the end of a run. A failure to do so is logged and does not fail the run."""
    # All receipts are read again, because other static workers write some of them.
    try:
        write_report(run.path)
    except Exception as error:  # noqa: BLE001 - the targets are what counts
        logger.warning("%s was not written: %s; try `dask-logits report %s`", REPORT_NAME, error, run.path)


def report_html(path: Path) -> str:
    """Return the report of a run or a cache as HTML."""
    run = RunFolder(path)
    is_run = path.is_dir() and (run.manifest_path.exists() or bool(run.driver_statuses()))
    return render(_of_run(run) if is_run else _of_cache(path))


def _of_run(run: RunFolder) -> Facts:
    reading = read_consistently(run, lambda: reading_of(run))
    manifest, calibration = run.manifest(), run.calibration()
    cache, sample, problem = None, None, None
    try:
        cache = open_run_cache(run, manifest)
        sample = _sample(run, cache, manifest, reading.history)
    except CacheError as error:
        problem = error.message
    how = manifest.how if manifest else {}
    sums = reading.status.statistics
    if cache is not None and not sums.tokens:
        sums = cache.statistics or sums
    return Facts(
        path=run.path,
        teacher=str(manifest.setting("teacher.model_path")) if manifest else "",
        dataset=how.get("dataset") or {},
        settings=how,
        identity=manifest.teacher if manifest else {},
        calibration=calibration,
        statistics=sums,
        status=reading.status,
        history=reading.history,
        failures=reading.failures,
        cache=cache,
        sample=sample,
        problem=problem,
    )


def _sample(run: RunFolder, cache: CacheFiles | None, manifest: Manifest | None, history: History) -> Sample | None:
    if manifest is None:
        return None
    path = manifest.setting("teacher.tokenizer_path") or manifest.setting("teacher.model_path")
    digest = manifest.tokenizer_map_digest
    tokenizer = local_tokenizer(str(path), digest) if path and digest else None
    if cache is not None:
        return sample_cache(cache, tokenizer)
    return sample_partitions(run, history.column("index").astype(int).tolist(), tokenizer)


def _of_cache(path: Path) -> Facts:
    cache = CacheFiles.open(path)
    header, said = cache.readers[0].header, cache.readers[0].attributes
    copied = header.calibration
    sample, problem = None, None
    try:
        sample = sample_cache(cache, tokenizer_of(cache))
    except CacheError as error:
        problem = error.message
    named, teacher = said.get("dataset"), said.get("teacher")
    return Facts(
        path=path,
        teacher=str(said.get("teacher_path") or "unknown teacher"),
        dataset=named if isinstance(named, dict) else {},
        settings=header.what or {},
        identity=teacher if isinstance(teacher, dict) else {},
        calibration=None if copied is None else Calibration.parse(cache.readers[0].path, copied),
        statistics=cache.statistics or Statistics(),
        cache=cache,
        sample=sample,
        problem=problem,
    )


def render(facts: Facts) -> str:
    """Return the page of these facts."""
    clock, sample = Clock.of(facts.history), facts.sample
    noun = facts.status.items_noun if facts.status else "documents"
    if facts.cache is not None and facts.cache.readers[0].is_packed:
        noun = "blocks"
    seconds = facts.status.seconds if facts.status else {}
    parts = sections.work(facts.history, clock, seconds, facts.failures)
    parts.append(sections.left_out(facts.status.left_out if facts.status else {}))
    if facts.problem is not None:
        parts.append(section("targets", "Targets", f"The targets cannot be read: {facts.problem}"))
    elif sample is None or not sample.documents:
        parts.append(section("targets", "Targets", "There are no targets yet."))
    else:
        parts += [sections.targets(sample, noun), sections.extremes(sample, noun)]
    parts.append(_computed(facts))
    if facts.cache is not None:
        reader = facts.cache.readers[0]
        parts.append(sections.loading(str(facts.path), reader.top_k, reader.profile.extras.draws))
    shown = [part for part in parts if part is not None]
    name = _dataset_name(facts.dataset)
    title = f"{Path(facts.teacher).name or 'A teacher'}{f' on {name}' if name else ''}"
    return document(title, "\n".join([_header(facts, clock, title, shown), "<main>", *shown, "</main>"]))


def _dataset_name(dataset: Mapping[str, Any]) -> str:
    files = dataset.get("data_files") or ()
    known = [str(dataset[key]) for key in ("name", "config_name") if dataset.get(key)]
    if files and known[:1] in (["json"], ["text"], ["csv"], ["parquet"], []):
        more = f" and {plural(len(files) - 1, 'more file')}" if len(files) > 1 else ""
        return Path(str(files[0])).name + more
    return " ".join([Path(known[0]).name, *known[1:]]) if known else ""


def _header(facts: Facts, clock: Clock | None, title: str, parts: Sequence[Html]) -> str:
    status, sums = facts.status, facts.statistics
    figures: list[tuple[str, object]] = []
    counts = (facts.cache.n_tokens, facts.cache.n_documents) if facts.cache else (sums.tokens, sums.documents)
    n_tokens, n_documents = counts
    if n_tokens:
        figures += [("tokens", number(n_tokens)), (status.items_noun if status else "documents", number(n_documents))]
    if clock is not None:
        tokens = float(facts.history.column("tokens").sum())
        figures += [("tokens/s in total", number(tokens / clock.seconds)), ("time at work", duration(clock.seconds))]
    figures += sections.figures(sums, status.mfu if status else math.nan)
    if facts.cache is not None:
        figures.append(("bytes per token", f"{facts.cache.n_bytes / max(1, n_tokens):.0f}"))
    state = ""
    if status is not None:
        of = f", {status.committed:,} of {plural(status.partitions, 'partition')}" if status.state != "complete" else ""
        why = f"<p>{text(status.reason)}</p>" if status.reason else ""
        state = f"<p>{badge(status.state)}{of}</p>{why}"
        if status.state != "complete":
            state += f"<p>Next:</p><pre>{text(status.next_command)}</pre>"
    links = "".join(
        f'<a href="#{part.split(chr(34))[1]}">{part.partition("<h2>")[2].partition("</h2>")[0]}</a>' for part in parts
    )
    written = f"{datetime.datetime.now():%Y-%m-%d at %H:%M:%S}"
    return (
        f"<header><h1>{text(title)}</h1><p>{text(facts.path)} · report written on {written}</p>{state}"
        f'{tiles(figures) if figures else ""}<nav aria-label="Sections">{links}</nav></header>'
    )


def _computed(facts: Facts) -> Html:
    """What was computed: teacher, data, settings, environment."""
    named = {name: facts.dataset.get(name) for name in _DATASET_FACTS}
    rows: list[tuple[str, object]] = [("teacher", facts.teacher)]
    rows += [(name.replace("_", " "), number(value) if isinstance(value, int) else value)
             for name, value in facts.identity.items() if value is not None]  # fmt: skip
    rows += [(f"dataset {name}", value) for name, value in sections.leaves(named)]
    parts: list[object] = ["The teacher, the data, and the settings that fix every number in the cache.", pairs(rows)]
    calibration = facts.calibration
    if calibration is not None:
        known: list[tuple[str, object]] = [("device", calibration.device_name or calibration.numerics.device)]
        known += sections.leaves({"numerics": calibration.numerics.to_json()})
        known += list(calibration.versions.items())
        known += [(f"worker {name}", value) for name, value in (calibration.environment or {}).items()]
        if facts.cache is not None:
            known.append(("content digest", facts.cache.content_digest))
        parts.append(folded("Environment and numerics", pairs(known)))
    if facts.settings:
        parts.append(folded("All settings", pairs(sections.leaves(facts.settings))))
    return section("computed", "What was computed", *parts)
