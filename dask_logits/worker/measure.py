"""Measure what a plan only estimates: a worker's speed, and what k entries keep and cost.

Dimension letters: N positions, V vocabulary, K kept entries.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dask_logits.cache.chunks import compress
from dask_logits.cache.profile import Compact, Profile, encode_all, id_table
from dask_logits.data.items import Item, plain_items
from dask_logits.records import Array, Extras, Records, bytes_per_token
from dask_logits.teacher.checkpoint import load_teacher
from dask_logits.teacher.model import ScoringPath
from dask_logits.teacher.positions import highest_entropy
from dask_logits.teacher.scoring import Scored, score_items
from dask_logits.worker.calibrate import CalibrationTask, calibrate, first_documents, sample_tokens

_KS = (8, 16, 32, 64, 128, 256)
_DRAWS = (25, 50, 100)
# Shares of the positions that get targets.
_SHARES = (0.1, 0.2, 0.5, 1.0)
# Rounds of the sample that are timed.
_ROUNDS = 3
# Time in seconds after which no further round begins.
_MOST_SECONDS = 20.0
# Positions whose whole distribution is looked at, and tokens of each document among them.
_DENSE_TOKENS, _DENSE_DOCUMENT = 512, 64


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What one way to choose the targets means for them.

    Parameters
    ----------
    size
        The number of kept entries, of draws, or the share of the positions that get targets.
    kept
        Mean probability of the kept entries, or mean number of distinct ids among the draws of a position. None: draws
        at a share of the positions.
    lost_nats
        Mean KL divergence in nats of the teacher from itself with its tail spread evenly. 0 for draws, because their
        loss is unbiased: nothing is truncated.
    bytes_per_token
        Size in the cache.
    """

    size: float
    kept: float | None
    lost_nats: float
    bytes_per_token: float


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured on a sample.

    Parameters
    ----------
    tokens_per_second
        Speeds of one worker in some rounds.
    by_k, by_draws
        Figures by K and by the number of draws, with targets at all positions.
    by_share
        Figures by the share of the positions that get targets, those of the highest entropy, with the job's K.
    peak_bytes
        Peak memory of the process, or of its GPU.
    """

    tokens_per_second: tuple[float, ...]
    by_k: tuple[Choice, ...]
    by_draws: tuple[Choice, ...]
    by_share: tuple[Choice, ...]
    peak_bytes: int


def measure(task: CalibrationTask, on_step: Callable[[str], None] = lambda step: None) -> Measurement:
    """Calibrate as a run would, then time its sample and compare numbers of kept entries.

    Parameters
    ----------
    task
        Input of the calibration.
    on_step
        Called with a description of each step when it begins.

    Raises
    ------
    TeacherError, CapacityError
        As by :func:`~dask_logits.worker.calibrate.calibrate`.
    """
    calibration, _ = calibrate(task, on_step)
    numerics = calibration.numerics
    path = ScoringPath(**numerics.path.model_dump())
    settings = replace(task.scoring, path=path, batch_tokens=numerics.batch_tokens, head_rows=numerics.head_rows)
    teacher = load_teacher(task.teacher, task.scoring.vocab_size)
    documents = first_documents(task.documents, sample_tokens(task.plan_tokens))
    items = plain_items(documents)
    rates: list[float] = []
    started = time.perf_counter()
    for number in range(_ROUNDS):
        if rates and time.perf_counter() - started > _MOST_SECONDS:
            break
        on_step(f"timing the sample, round {number + 1} of {_ROUNDS}")
        scored = score_items(teacher, items, settings)
        rates.append(scored.records.n_tokens / max(scored.seconds["score"], 1e-9))
    on_step("comparing numbers of kept entries")
    ks = tuple(sorted({k for k in _KS if k <= task.scoring.vocab_size} | {task.scoring.top_k}))
    widest = score_items(teacher, items, replace(settings, top_k=ks[-1], positions="entropy", draws=0))
    job = score_items(teacher, items, replace(settings, positions="entropy")) if task.scoring.draws else widest
    shares = sorted({*_SHARES, round(task.target_share, 2) or _SHARES[0]})
    few = plain_items([document[:_DENSE_DOCUMENT] for document in documents[: _DENSE_TOKENS // _DENSE_DOCUMENT]])
    dense = replace(settings, top_k=task.scoring.vocab_size, temperatures=(), positions="entropy", draws=0)
    whole = score_items(teacher, few, dense)
    return Measurement(
        tokens_per_second=tuple(rates),
        by_k=tuple(_choice(k, widest.records, whole.records, k, task) for k in ks),
        by_draws=tuple(
            _draw_choice(whole.records, draws, task)
            for draws in sorted({*_DRAWS, *([task.scoring.draws] if task.scoring.draws else [])})
        ),
        by_share=tuple(
            _choice(share, _chosen(items, job, share), _chosen(few, whole, share), task.scoring.top_k, task)
            for share in shares
        ),
        peak_bytes=calibration.peak_device_bytes or calibration.peak_rss_bytes or 0,
    )


def _chosen(items: Sequence[Item], scored: Scored, share: float) -> Records:
    """Return the targets at a share of the positions."""
    assert scored.entropy_M is not None
    return scored.records.at(highest_entropy(items, np.arange(len(scored.entropy_M)), scored.entropy_M, share))


def _choice(size: float, records: Records, whole: Records, k: int, task: CalibrationTask) -> Choice:
    """Return the figures of targets that keep k entries, with the whole distributions at some of their positions."""
    is_drawn = records.topk_counts is not None
    return Choice(
        size=size,
        kept=None if is_drawn else float(np.exp(records.logprobs[:, :k].astype(np.float32)).sum(1).mean()),
        lost_nats=0.0 if is_drawn else float(np.mean(truncation_nats(whole.logprobs, k))),
        bytes_per_token=_size(records, k, task),
    )


def _draw_choice(whole: Records, draws: int, task: CalibrationTask) -> Choice:
    """Draw from the whole distributions of a sample."""
    width = min(draws, task.scoring.vocab_size)
    random = np.random.default_rng(0)
    ids_NK = np.zeros((whole.n_targets, width), whole.topk_ids.dtype)
    counts_NK = np.zeros((whole.n_targets, width), np.uint8)
    for row, (ids_V, logp_V) in enumerate(zip(whole.topk_ids, whole.logprobs, strict=True)):
        p_V = np.exp(logp_V.astype(np.float64))
        counts_V = random.multinomial(draws, p_V / p_V.sum())
        drawn_K = np.flatnonzero(counts_V)
        # Equal counts in the order of the ids.
        drawn_K = drawn_K[np.lexsort((ids_V[drawn_K], -counts_V[drawn_K]))]
        counts_NK[row, : len(drawn_K)] = counts_V[drawn_K]
        ids_NK[row, : len(drawn_K)] = ids_V[drawn_K]
    drawn = replace(whole, topk_ids=ids_NK, topk_counts=counts_NK, topk_logprobs=None, tail_logmass=None)
    return Choice(
        size=draws,
        kept=float(np.count_nonzero(counts_NK, axis=1).mean()),
        lost_nats=0.0,
        bytes_per_token=_size(drawn, width, replace(task, scoring=replace(task.scoring, draws=draws, temperatures=()))),
    )


def _size(records: Records, k: int, task: CalibrationTask) -> float:
    """Return the bytes per token of a sample that keeps k entries, or as many as its draws need."""
    share = records.n_targets / max(1, records.n_tokens)
    draws = 0 if records.topk_counts is None else task.scoring.draws
    extras = Extras(draws=draws, temperatures=task.scoring.temperatures, has_target_pos=share < 1)
    if not task.compact:
        return bytes_per_token(k, task.scoring.vocab_size, extras, share)
    tokens = {name: array for name, array in records.tokens().items() if name in extras.token_arrays}
    of_entries = ("topk_ids", "topk_counts" if draws else "topk_logprobs")
    cut = {**tokens, **{name: tokens[name][:, :k] for name in of_entries}}
    profile: Profile = Compact(
        top_k=k,
        vocab_size=task.scoring.vocab_size,
        precision=8,
        id_table=id_table(records.present_ids if draws else cut["topk_ids"], task.scoring.vocab_size),
        extras=extras,
    )
    n_bytes = 0
    for name, array in profile.pack(encode_all(cut, profile)).items():
        step = profile.alignment if profile.arrays[name].chunked else 0
        pieces: list[Any] = [array[at : at + step] for at in range(0, len(array), step)] if step else []
        n_bytes += sum(len(compress(piece)) for piece in pieces) if step else array.nbytes
    return n_bytes / max(1, len(cut["input_ids"]))


def truncation_nats(logprobs_NV: Array, top_k: int) -> list[float]:
    """Return KL(p ‖ q) of each position, where q spreads the tail's mass evenly.

    Parameters
    ----------
    logprobs_NV
        Log-probs of the whole vocabulary, most probable first.
    top_k
        Entries that q keeps.

    Returns
    -------
    list
        N values in nats: the sum over the tail of ``p log(p / (tail mass / (V − K)))``.
    """
    tail_NT = logprobs_NV[:, top_k:].astype(np.float64)
    if not tail_NT.shape[1]:
        return [0.0] * len(tail_NT)
    p_NT = np.exp(tail_NT)
    spread_N1 = np.log(np.maximum(p_NT.sum(1, keepdims=True), np.finfo(np.float64).tiny) / tail_NT.shape[1])
    terms_NT = np.where(p_NT > 0, p_NT * (np.where(p_NT > 0, tail_NT, 0.0) - spread_N1), 0.0)
    return [float(nats) for nats in np.maximum(terms_NT.sum(1), 0.0)]
