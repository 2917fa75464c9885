"""Calibration: one task on a worker, before partition 0, that settles what the run then keeps.

It takes the first tokens of the plan, finds the path that reproduces the teacher's forward, scores them, and reports
how much probability each k keeps, how fast it went, how far that is from the limit and how much memory it took. Where
the plan is long enough to pay for it, it tries a larger token budget and compiled layers, and keeps what is faster. The
driver writes the result to ``calibration.json`` once; every later start of the run reads it.
"""

from __future__ import annotations

import dataclasses
import logging
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

import numpy as np
import torch

from dask_logits.capture import kernels
from dask_logits.capture.checkpoint import TeacherSpec, load_teacher
from dask_logits.capture.environment import environment
from dask_logits.capture.items import Item, plain_items
from dask_logits.capture.meter import Cost, measure_cost
from dask_logits.capture.scoring import Scored, ScoringSettings, score_items
from dask_logits.capture.selfcheck import choose_path, try_compiled
from dask_logits.capture.task import peak_rss_bytes
from dask_logits.capture.teacher import ScoringPath, Teacher
from dask_logits.capture.topk import kernels_agree, padded_width
from dask_logits.errors import TeacherError, first_line
from dask_logits.records import Array, Statistics, kept_mass_by_k
from dask_logits.store.durable import Json
from dask_logits.store.profile import id_table

logger = logging.getLogger(__name__)

# Of the whole plan, or all of it if it has fewer.
TOKENS = 10_000
# Of these, what a trial of a variant scores, at least.
_TRIAL_TOKENS = 3_000
_TRIAL_ROUNDS = 3
_KERNEL_ROWS = 64
_WARM_TOKENS = 200
_AUTO_BATCH_TOKENS = {"cpu": 4_096, "cuda": 16_384}
_MOST_BATCH_TOKENS = {"cpu": 8_192, "cuda": 131_072}
_AUTO_HEAD_ROWS = {"cpu": 256, "cuda": 4_096}
# A variant must be so much faster to be taken: less is noise.
_FASTER = 1.03
# Share of a device's memory that a larger budget may fill.
_MEMORY_SHARE = 0.85
# Share of a worker's scoring that one trial may take.
_TRIAL_SHARE = 0.05
# Seconds of scoring left per worker from which compiling, which takes half a minute, is tried.
_WORTH_COMPILING_SECONDS = 300.0
# What is taken to be left where nobody knows.
_UNKNOWN_SECONDS = 3_600.0
_VERSIONS = ("dask-logits", "torch", "transformers", "datasets", "numpy", "zarr", "h5py")


@dataclass(frozen=True, kw_only=True)
class CalibrationTask:
    """What the calibration needs.

    Parameters
    ----------
    teacher
        The teacher, its dtype and device resolved.
    documents
        Token ids of the first documents of the plan.
    plan_tokens
        Tokens each worker will score; None: nobody knows, taken for an hour's work.
    top_k, vocab_size, batch_size
        Settings.
    batch_tokens, head_rows
        Settings; ``auto`` resolved by :func:`auto_budgets`.
    batch_tokens_fixed
        Whether the token budget was set by the user.
    logits, compile
        Settings of ``distillation.scoring``.
    compact
        Whether the compact profile will be stored, which needs an id table.
    most_trial_seconds
        Bound of one trial's time.
    """

    teacher: TeacherSpec
    documents: tuple[Array, ...]
    plan_tokens: int | None
    top_k: int
    vocab_size: int
    batch_size: int | None
    batch_tokens: int
    batch_tokens_fixed: bool
    head_rows: int
    logits: Literal["exact", "model"]
    compile: Literal["auto", "always", "never"]
    compact: bool = False
    most_trial_seconds: float = float("inf")


def auto_budgets(device: str, batch_tokens: int | str, head_rows: int | str) -> tuple[int, int]:
    """Resolve ``auto`` for the token budget and the head chunk.

    >>> auto_budgets("cpu", "auto", 100)
    (4096, 100)
    """
    return (
        _AUTO_BATCH_TOKENS[device] if batch_tokens == "auto" else int(batch_tokens),
        _AUTO_HEAD_ROWS[device] if head_rows == "auto" else int(head_rows),
    )


def first_documents(documents: Sequence[Array], tokens: int = TOKENS) -> tuple[Array, ...]:
    """Return as many leading documents as it takes to reach a number of tokens.

    >>> len(first_documents([np.zeros(6), np.zeros(6), np.zeros(6)], tokens=10))
    2
    """
    reached = np.cumsum([len(document) for document in documents])
    return tuple(documents[: int(np.searchsorted(reached, tokens)) + 1])


def calibrate(task: CalibrationTask, on_step: Callable[[str], None] = lambda step: None) -> Json:
    """Settle the numerics of a run on a worker.

    Parameters
    ----------
    task
        What to calibrate.
    on_step
        Called with a description of each step when it begins.

    Returns
    -------
    dict
        What ``calibration.json`` will hold, and the id table where one is needed.

    Raises
    ------
    TeacherError
        If the teacher cannot be loaded, is not causal, its logits are not finite, or it has to be compiled and cannot.
    """
    on_step("loading the teacher")
    teacher = load_teacher(task.teacher, task.vocab_size)
    on_step("measuring the device's speed")
    cost = measure_cost(teacher)
    on_step("comparing fast scoring paths with the teacher's own forward")
    path, errors = choose_path(teacher, exact=task.logits == "exact")
    path = _with_kernels(teacher, path, task)
    if task.logits == "exact" and not path.exact and teacher.dtype != torch.float32:
        logger.warning("this family's head can only be run as it is: its logits are rounded to %s", task.teacher.dtype)
    first = settings = ScoringSettings(
        top_k=task.top_k,
        vocab_size=task.vocab_size,
        batch_tokens=task.batch_tokens,
        batch_size=task.batch_size,
        head_rows=task.head_rows,
        path=path,
    )
    score_items(teacher, plain_items(first_documents(task.documents, _WARM_TOKENS)), settings)
    items = plain_items(task.documents)
    on_step(f"scoring the first {sum(len(item.tokens) for item in items):,} tokens")
    scored = score_items(teacher, items, settings)
    trials = _Trials(teacher, items, scored, task, on_step)
    if not task.batch_tokens_fixed:
        settings = trials.larger_batches(settings)
    if task.compile != "never":
        settings = trials.compiled(settings, task, errors)
    if settings != first:
        on_step("scoring them again with the faster settings")
        scored = score_items(teacher, items, settings)
    return _report(task, settings, scored, cost, errors, trials)


def _with_kernels(teacher: Teacher, path: ScoringPath, task: CalibrationTask) -> ScoringPath:
    """Take the Triton kernels where there is a GPU and they find what torch finds."""
    if teacher.device.type != "cuda" or not kernels.available():
        return path
    generator = torch.Generator(teacher.device).manual_seed(20_260_103)
    shape = (_KERNEL_ROWS, padded_width(task.vocab_size))
    logits_RV = 4 * torch.randn(shape, generator=generator, device=teacher.device)
    logits_RV[:, task.vocab_size :] = -torch.inf
    try:
        # Rounded, so that values tie.
        if kernels_agree(logits_RV.bfloat16().to(teacher.logits_dtype), task.top_k, path):
            return dataclasses.replace(path, kernels=True)
        logger.warning("Triton's kernels differ from torch here; torch is used")
    except Exception as error:  # noqa: BLE001 - Triton and its compilers raise whatever they like
        logger.warning("Triton's kernels do not run here (%s); torch is used", error)
    return path


def _report(
    task: CalibrationTask,
    settings: ScoringSettings,
    scored: Scored,
    cost: Cost,
    errors: dict[str, float],
    trials: _Trials,
) -> Json:
    statistics_of = Statistics.of(scored.records)
    cuda = task.teacher.device == "cuda"
    seconds = max(scored.seconds["score"], 1e-9)
    return {
        "numerics": {
            "dtype": task.teacher.dtype,
            "device": task.teacher.device,
            "torch_threads": task.teacher.torch_threads,
            "path": dataclasses.asdict(settings.path),
            "batch_tokens": settings.batch_tokens,
            "batch_size": task.batch_size,
            "head_rows": task.head_rows,
        },
        # JSON has no infinity, which stands for a way that does not apply.
        "errors_nats": {way: error if error < float("inf") else None for way, error in errors.items()},
        "cost": dataclasses.asdict(cost),
        **({"id_table": id_table(scored.records.topk_ids, task.vocab_size).tolist()} if task.compact else {}),
        "trials_tokens_per_second": trials.rates,
        "compile_seconds": trials.compile_seconds,
        "kept_mass_by_k": kept_mass_by_k(scored.records.topk_logprobs),
        "tokens": scored.records.n_tokens,
        "perplexity": statistics_of.perplexity if statistics_of.labels else None,
        "tokens_per_second": round(scored.records.n_tokens / seconds, 1),
        "mfu": cost.mfu(cost.flops(len(document) for document in task.documents), seconds),
        "seconds": scored.seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": max(map(torch.cuda.max_memory_allocated, range(task.teacher.n_gpus))) if cuda else None,
        "device_name": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in _VERSIONS},
        "environment": environment(task.teacher.device),
    }


class _Trials:
    """Variants timed against each other on the same documents, alternating; medians count."""

    def __init__(
        self,
        teacher: Teacher,
        items: Sequence[Item],
        scored: Scored,
        task: CalibrationTask,
        on_step: Callable[[str], None],
    ) -> None:
        self.teacher = teacher
        self.on_step = on_step
        self.items = items
        self.token_seconds = scored.seconds["score"] / max(1, scored.records.n_tokens)
        self.seconds_left = _UNKNOWN_SECONDS if task.plan_tokens is None else task.plan_tokens * self.token_seconds
        self.most_seconds = min(_TRIAL_SHARE * self.seconds_left, task.most_trial_seconds)
        self.rates: dict[str, float] = {}
        self.compile_seconds: float | None = None

    def larger_batches(self, settings: ScoringSettings) -> ScoringSettings:
        """Double the token budget as long as that is faster and fits."""
        device = self.teacher.device.type
        while settings.batch_tokens < _MOST_BATCH_TOKENS[device]:
            double = dataclasses.replace(settings, batch_tokens=2 * settings.batch_tokens)
            if not self._is_worth(2 * double.batch_tokens):
                break
            self.on_step(f"timing batches of {settings.batch_tokens:,} and {double.batch_tokens:,} tokens")
            single_rate, double_rate = self._race(settings, double, 2 * double.batch_tokens)
            self.rates[f"batch_tokens={settings.batch_tokens}"] = single_rate
            self.rates[f"batch_tokens={double.batch_tokens}"] = double_rate
            if double_rate < _FASTER * single_rate or any(map(_is_nearly_full, self.teacher.devices)):
                break
            settings = double
        return settings

    def compiled(self, settings: ScoringSettings, task: CalibrationTask, errors: dict[str, float]) -> ScoringSettings:
        """Compile, if the plan is long enough, and keep it if it pays for itself on what is left."""
        is_long = self.seconds_left >= _WORTH_COMPILING_SECONDS and self._is_worth(_TRIAL_TOKENS)
        if task.compile == "auto" and not is_long:
            return settings
        started = time.perf_counter()
        self.on_step("compiling the teacher's layers")
        try:
            errors["compiled"] = try_compiled(self.teacher)
            fast = dataclasses.replace(settings, path=self.teacher.path)
            score_items(self.teacher, self.items[:2], fast)
        except RuntimeError as error:
            self.teacher.take(settings.path)
            if task.compile == "always":
                raise TeacherError(
                    f"distillation.scoring.compile: expected to compile the teacher's layers, got {first_line(error)}; "
                    "install a C++ compiler on the workers, or set distillation.scoring.compile=auto"
                ) from error
            logger.warning("not compiled: %s", first_line(error))
            return settings
        self.compile_seconds = round(time.perf_counter() - started, 1)
        self.on_step("timing compiled layers")
        self.rates["eager"], self.rates["compiled"] = self._race(settings, fast, _TRIAL_TOKENS)
        saved = self.seconds_left * (1 - self.rates["eager"] / self.rates["compiled"])
        if task.compile == "always" or saved > self.compile_seconds:
            return fast
        return settings

    def _is_worth(self, tokens: int) -> bool:
        """Whether a race over so many tokens takes a small part of the time that is left."""
        return 2 * _TRIAL_ROUNDS * tokens * self.token_seconds <= self.most_seconds

    def _race(self, a: ScoringSettings, b: ScoringSettings, tokens: int) -> tuple[float, float]:
        """Return the tokens/s of two variants on the same items, repeated until there are enough tokens."""
        per_pass = sum(len(item.tokens) for item in self.items)
        if per_pass >= tokens:
            lengths = np.cumsum([len(item.tokens) for item in self.items])
            items = list(self.items[: int(np.searchsorted(lengths, tokens)) + 1])
        else:
            items = list(self.items) * -(-tokens // max(1, per_pass))
        total = sum(len(item.tokens) for item in items)
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(_TRIAL_ROUNDS):
            for settings, found in zip((a, b), seconds, strict=True):
                found.append(score_items(self.teacher, items, settings).seconds["score"])
        rates = [round(total / max(1e-9, statistics.median(found)), 1) for found in seconds]
        return rates[0], rates[1]


def _is_nearly_full(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    return (
        torch.cuda.max_memory_allocated(device) > _MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory
    )
