"""Calibration: one task on a worker, before partition 0, that determines the numerics of a run.

It finds the path that reproduces the teacher's forward, scores the first documents of the plan, and reports the kept
mass by k, the speed, the ratio to the peak rate, and the memory. If the plan is long enough to justify the cost, it
tries a larger token budget and compiled layers, and keeps the faster variant. The driver writes the result to
``calibration.json`` once. Every later start of the run reads it.

On a CPU scoring costs at most a tenth of the plan: the sample is 2 % of its tokens (at most 10,000), scored again if a
variant is kept, and all trials together take 6 %. A GPU scores the sample once more before each time that counts. At
230 tokens/s (two AVX2 cores), 60 documents (19,000 tokens, 83 s) are calibrated on 384 tokens, 1.7 s. On a CPU compiled
layers need only 300 tokens a round to show whether they are worthwhile, so a plan of nine minutes can use them.
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

from dask_logits import __version__
from dask_logits.cache.profile import id_table
from dask_logits.data.items import Item, plain_items
from dask_logits.errors import CapacityError, TeacherError, first_line, is_poisoned
from dask_logits.records import Array, Statistics, kept_mass_by_k
from dask_logits.run.records import Calibration, Numerics, PathNumerics
from dask_logits.run.timings import plural
from dask_logits.teacher.checkpoint import TeacherSpec, load_teacher
from dask_logits.teacher.cuda import kernels
from dask_logits.teacher.memory import is_out_of_memory, must_fit
from dask_logits.teacher.meter import Cost, measure_cost
from dask_logits.teacher.model import ScoringPath, Teacher
from dask_logits.teacher.scoring import Scored, ScoringSettings, score_items
from dask_logits.teacher.selfcheck import Choice, check, try_compiled
from dask_logits.teacher.topk import kernels_agree, padded_width
from dask_logits.worker.environment import environment
from dask_logits.worker.task import peak_rss_bytes

logger = logging.getLogger(__name__)

LOADING = "loading the teacher"
# The sample: a bounded share of the tokens that a worker will score.
TOKENS = 10_000
_SAMPLE_SHARE = 0.02
_FEWEST_TOKENS = 256
# Used if the plan's length is unknown.
_UNKNOWN_TOKENS = 1_000
# Tokens of a round that compares compiled with eager layers, within these limits as time allows. With fewer than a full
# batch or two, a GPU waits for the host, and the speed of its code does not show.
_TRIAL_TOKENS = {"cpu": (300, 3_000), "cuda": (32_768, 131_072)}
_TRIAL_ROUNDS = 3
_KERNEL_ROWS = 64
_WARM_TOKENS = 200
_AUTO_BATCH_TOKENS = {"cpu": 4_096, "cuda": 16_384}
_MOST_BATCH_TOKENS = {"cpu": 8_192, "cuda": 131_072}
_AUTO_HEAD_ROWS = {"cpu": 256, "cuda": 4_096}
# Minimum speedup of an accepted variant. Smaller differences are noise.
_FEWEST_HEAD_ROWS = 16
_FASTER = 1.03
# Maximum share of a device's memory for a larger budget.
_MEMORY_SHARE = 0.85
# Maximum share of a worker's scoring time for all trials. A trial of larger batches may use half of the remainder.
_TRIALS_SHARE = 0.06
# Minimum remaining scoring time per worker, in seconds, to try compilation, which takes half a minute.
_WORTH_COMPILING_SECONDS = 300.0
# Assumed scoring time if the plan's length is unknown.
_UNKNOWN_SECONDS = 900.0
_VERSIONS = ("torch", "transformers", "datasets", "numpy", "zarr", "h5py")


@dataclass(frozen=True, kw_only=True)
class CalibrationTask:
    """Input of the calibration.

    Parameters
    ----------
    teacher
        The teacher, with resolved dtype and device.
    documents
        Token ids of the first documents of the plan.
    plan_tokens
        Tokens that each worker will score. None: unknown, assumed to be a quarter of an hour's work.
    scoring
        Settings of the run for all positions, with budgets resolved by :func:`auto_budgets`. Its path is not yet known.
    batch_tokens_fixed
        Whether the token budget was set by the user.
    head_rows_fixed
        Whether the chunk of the head was set by the user. Otherwise it is halved while memory is short.
    logits, compile
        Settings of ``distillation.scoring``.
    compact
        Whether the compact profile will be used, which requires an id table.
    target_share
        Expected share of the positions that get targets, for the sizes of a plan. The sample is scored at all.
    most_trial_seconds
        Maximum time of one trial.
    """

    teacher: TeacherSpec
    documents: tuple[Array, ...]
    plan_tokens: int | None
    scoring: ScoringSettings
    batch_tokens_fixed: bool
    head_rows_fixed: bool
    logits: Literal["exact", "model"]
    compile: Literal["auto", "always", "never"]
    compact: bool = False
    target_share: float = 1.0
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
    """Return the fewest leading documents with the given number of tokens.

    >>> len(first_documents([np.zeros(6), np.zeros(6), np.zeros(6)], tokens=10))
    2
    """
    reached = np.cumsum([len(document) for document in documents])
    return tuple(documents[: int(np.searchsorted(reached, tokens)) + 1])


def sample_tokens(plan_tokens: int | None) -> int:
    """Return the number of tokens of a calibration. It depends on the plan only, so equal runs take equal samples.

    >>> sample_tokens(19_200), sample_tokens(1_000), sample_tokens(10**9), sample_tokens(None)
    (384, 256, 10000, 1000)
    """
    if plan_tokens is None:
        return _UNKNOWN_TOKENS
    return min(TOKENS, max(_FEWEST_TOKENS, round(_SAMPLE_SHARE * plan_tokens)))


def calibrate(
    task: CalibrationTask, on_step: Callable[[str], None] = lambda step: None
) -> tuple[Calibration, Array | None]:
    """Determine the numerics of a run on a worker.

    Parameters
    ----------
    task
        Input of the calibration.
    on_step
        Called with a description of each step when it begins, and again while the teacher is loaded.

    Returns
    -------
    Calibration
        Content of ``calibration.json``, except for the storage of the run.
    Array or None
        The id table [V] of the compact profile. None for plain.

    Raises
    ------
    TeacherError
        If the teacher cannot be loaded, is not causal, has non-finite logits, or fails a required compilation.
    CapacityError
        If it does not fit into memory with one row of logits.
    """
    on_step(LOADING)
    teacher = load_teacher(task.teacher, task.scoring.vocab_size, on_life=lambda: on_step(LOADING))
    with must_fit("calibration", "stop other processes on this device, or use one with more memory"):
        on_step("measuring the device's speed")
        cost = measure_cost(teacher)
        on_step("comparing fast scoring paths with the teacher's own forward")
        choice = check(teacher, exact=task.logits == "exact", may_compile=task.compile != "never")
        path, errors = _with_kernels(teacher, choice, task), choice.errors
    for device in teacher.devices:
        if device.type == "cuda":
            # The self-check's copy of the teacher is not needed for scoring.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
    if task.logits == "exact" and not path.exact and teacher.dtype != torch.float32:
        logger.warning("this family's head can only be run as it is: its logits are rounded to %s", task.teacher.dtype)
    settings = dataclasses.replace(task.scoring, path=path)
    first = settings = _warmed(teacher, settings, task)
    documents = first_documents(task.documents, sample_tokens(task.plan_tokens))
    scored = _timed(teacher, documents, settings, on_step, f"scoring the first {sum(map(len, documents)):,} tokens")
    trials = _Trials(teacher, plain_items(task.documents), scored, task, on_step)
    if not task.batch_tokens_fixed:
        settings = trials.larger_batches(settings)
    if task.compile != "never":
        settings = trials.compiled(settings, task, errors)
    if settings != first:
        scored = _timed(teacher, documents, settings, on_step, "scoring them again with the faster settings")
    table = id_table(scored.records.present_ids, task.scoring.vocab_size) if task.compact else None
    return _report(task, settings, scored, cost, choice, trials), table


def _with_kernels(teacher: Teacher, choice: Choice, task: CalibrationTask) -> ScoringPath:
    """Use the Triton kernels if there is a GPU and they agree with torch. Otherwise note why not."""
    path = choice.path
    if teacher.device.type != "cuda":
        return path
    if not kernels.available():
        choice.refusals["kernels"] = "Triton is not installed"
        return path
    generator = torch.Generator(teacher.device).manual_seed(20_260_103)
    shape = (_KERNEL_ROWS, padded_width(task.scoring.vocab_size))
    logits_RV = 4 * torch.randn(shape, generator=generator, device=teacher.device)
    logits_RV[:, task.scoring.vocab_size :] = -torch.inf
    try:
        # Rounded, so that there are ties.
        if kernels_agree(logits_RV.bfloat16().to(teacher.logits_dtype), task.scoring.top_k, path):
            return dataclasses.replace(path, kernels=True)
        choice.refusals["kernels"] = "they differ from torch on this device"
    except Exception as error:
        # Triton and its compilers raise whatever they like.
        if is_out_of_memory(error) or is_poisoned(error):
            raise
        choice.refusals["kernels"] = f"they do not run: {first_line(error)}"
    return path


def _warmed(teacher: Teacher, settings: ScoringSettings, task: CalibrationTask) -> ScoringSettings:
    """Score a few tokens. Halve the head's chunk until its logits fit into memory, unless the user has set it."""
    items = plain_items(first_documents(task.documents, _WARM_TOKENS))
    while True:
        try:
            score_items(teacher, items, settings)
        except CapacityError:
            if task.head_rows_fixed or settings.head_rows <= _FEWEST_HEAD_ROWS:
                raise
            settings = dataclasses.replace(settings, head_rows=settings.head_rows // 2)
            logger.warning("memory is short: the head takes %s at once", plural(settings.head_rows, "row"))
        else:
            return settings


def _timed(
    teacher: Teacher, documents: Sequence[Array], settings: ScoringSettings, on_step: Callable[[str], None], step: str
) -> Scored:
    """Score the sample. A GPU does so once before, since the first batch of a shape loads kernels and takes memory."""
    items = plain_items(documents)
    if teacher.device.type == "cuda":
        on_step(f"{step}, not timed")
        score_items(teacher, items, settings)
    on_step(step)
    return score_items(teacher, items, settings)


def _report(
    task: CalibrationTask,
    settings: ScoringSettings,
    scored: Scored,
    cost: Cost,
    choice: Choice,
    trials: _Trials,
) -> Calibration:
    statistics_of = Statistics.of(scored.records)
    cuda = task.teacher.device == "cuda"
    seconds = max(scored.seconds["score"], 1e-9)
    return Calibration(
        numerics=Numerics(
            dtype=task.teacher.dtype,
            device=task.teacher.device,
            torch_threads=task.teacher.torch_threads,
            path=PathNumerics(**dataclasses.asdict(settings.path)),
            batch_tokens=settings.batch_tokens,
            batch_size=task.scoring.batch_size,
            head_rows=settings.head_rows,
        ),
        # JSON has no infinity, which marks a path that does not apply.
        errors_nats={way: error if error < float("inf") else None for way, error in choice.errors.items()},
        refused=choice.refusals,
        cost=dataclasses.asdict(cost),
        trials_tokens_per_second=trials.rates,
        compile_seconds=trials.compile_seconds,
        kept_mass_by_k=None if task.scoring.draws else kept_mass_by_k(scored.records.logprobs),
        distinct_draws=round(statistics_of.mean_distinct, 3) if task.scoring.draws else None,
        tokens=scored.records.n_tokens,
        perplexity=statistics_of.perplexity if statistics_of.labels else None,
        tokens_per_second=round(scored.records.n_tokens / seconds, 1),
        mfu=cost.mfu(cost.flops(scored.records.document_length.tolist()), seconds),
        seconds=scored.seconds,
        peak_rss_bytes=peak_rss_bytes(),
        peak_device_bytes=max(map(torch.cuda.max_memory_allocated, range(task.teacher.n_gpus))) if cuda else None,
        device_name=torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        versions={"dask-logits": __version__, **{name: version(name) for name in _VERSIONS}},
        environment=environment(task.teacher.device),
    )


class _Trials:
    """Variants timed against each other on the same documents, alternating. Medians are compared."""

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
        self.most_seconds = task.most_trial_seconds
        self.budget_seconds = _TRIALS_SHARE * self.seconds_left
        self.rates: dict[str, float] = {}
        self.compile_seconds: float | None = None

    def larger_batches(self, settings: ScoringSettings) -> ScoringSettings:
        """Double the token budget while that is faster and fits."""
        device = self.teacher.device.type
        while settings.batch_tokens < _MOST_BATCH_TOKENS[device]:
            double = dataclasses.replace(settings, batch_tokens=2 * settings.batch_tokens)
            if 2 * double.batch_tokens > self._affordable_tokens(self.budget_seconds / 2):
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
        """Compile if the plan is long enough, and keep the result if it saves time on the remaining work."""
        fewest, most = _TRIAL_TOKENS[self.teacher.device.type]
        affordable = self._affordable_tokens(self.budget_seconds)
        is_long = self.seconds_left >= _WORTH_COMPILING_SECONDS and affordable >= fewest
        if task.compile == "auto" and not is_long:
            return settings
        trial_tokens = max(fewest, min(most, affordable))
        started = time.perf_counter()
        self.on_step("compiling the teacher's layers")
        try:
            errors["compiled"] = try_compiled(self.teacher, max(map(len, task.documents)))
            fast = dataclasses.replace(settings, path=self.teacher.path)
            score_items(self.teacher, self.items[:2], fast)
        except RuntimeError as error:
            self.teacher.take(settings.path)
            if task.compile == "always":
                cure = (
                    "free memory of the device" if is_out_of_memory(error) else "install a C++ compiler on the workers"
                )
                raise TeacherError(
                    f"distillation.scoring.compile: expected to compile the teacher's layers, got {first_line(error)}; "
                    f"{cure}, or set distillation.scoring.compile=auto"
                ) from error
            logger.warning("not compiled: %s", first_line(error))
            return settings
        self.compile_seconds = round(time.perf_counter() - started, 1)
        self.on_step("timing compiled layers")
        self.rates["eager"], self.rates["compiled"] = self._race(settings, fast, trial_tokens)
        saved = self.seconds_left * (1 - self.rates["eager"] / self.rates["compiled"])
        if task.compile == "always" or saved > self.compile_seconds:
            return fast
        return settings

    def _affordable_tokens(self, seconds: float) -> int:
        """Return the tokens of a race within a time limit, and within the limit of one trial."""
        return int(min(seconds, self.most_seconds) / (2 * _TRIAL_ROUNDS * self.token_seconds))

    def _race(self, a: ScoringSettings, b: ScoringSettings, tokens: int) -> tuple[float, float]:
        """Return the tokens/s of two variants on the same documents, repeated or cut to a number of tokens."""
        documents = [item.tokens for item in self.items]
        per_pass = sum(map(len, documents))
        documents = list(first_documents(documents * -(-tokens // max(1, per_pass)), tokens))
        total = sum(map(len, documents))
        if total > tokens:
            documents[-1] = documents[-1][: len(documents[-1]) + tokens - total]
            total = tokens
        items = plain_items(documents)
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(_TRIAL_ROUNDS):
            for settings, found in zip((a, b), seconds, strict=True):
                found.append(score_items(self.teacher, items, settings).seconds["score"])
        self.budget_seconds -= sum(map(sum, seconds))
        rates = [round(total / max(1e-9, statistics.median(found)), 1) for found in seconds]
        return rates[0], rates[1]


def _is_nearly_full(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    return (
        torch.cuda.max_memory_allocated(device) > _MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory
    )
