"""Verify a cache or run: checksums and invariants, with optional re-scoring of random rows.

Dimension letters: M positions with targets, K kept entries, V vocabulary, T = V − K.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dask_logits.cache.find import find_caches
from dask_logits.cache.profile import as_kept, load_profile
from dask_logits.cache.reader import CacheReader
from dask_logits.config.compose import override
from dask_logits.config.groups import GenerationConfig
from dask_logits.data.items import make_items, plain_items
from dask_logits.data.source import read_rows
from dask_logits.data.tokens import read_documents
from dask_logits.errors import ConfigError, RunConflictError
from dask_logits.files.atomic import expanded
from dask_logits.job.driver import tasks
from dask_logits.job.gpus import visible_gpus
from dask_logits.job.prepare import Job, check_folder, prepare
from dask_logits.job.workers import own_device
from dask_logits.ops.check import Check, Report, check_files
from dask_logits.records import EVERY_TOKEN, Array, Records, digest_of
from dask_logits.run.folder import RunFolder
from dask_logits.run.plan_log import PlanLog
from dask_logits.run.records import Calibration
from dask_logits.run.settings import check_named, settings_of
from dask_logits.run.state import RunState
from dask_logits.teacher.checkpoint import load_teacher
from dask_logits.teacher.positions import highest_entropy
from dask_logits.teacher.scoring import Scored, score_items
from dask_logits.worker.environment import describe, differences, environment
from dask_logits.worker.measure import truncation_nats
from dask_logits.worker.task import PartitionTask

# Positions of a row for which the whole distribution is computed.
_DENSE_TOKENS = 64
# Maximum root mean square difference for equal targets of another environment. The same text in another batch changes
# log-probs by 0.03 nats in bfloat16. Codes of the compact profile jump by a step if a value is near its edge.
_NEAR_NATS = {"float32": 0.01, "float16": 0.02, "bfloat16": 0.1}


# Draws whose log-probs are this improbable, e^−30, are not those of the teacher.
_DOUBT_NATS = 30.0
# Log-probs below −16 count as −16. A distribution that is scored again has other log-probs, by this mean at most.
_LEAST_NATS, _FIT_NATS = 16.0, 0.02


def verify(path: str | Path, *, recompute: int = 0, seed: int = 0) -> Report:
    """Verify a cache, an index over several, or a run folder.

    Parameters
    ----------
    path
        The cache, index or run folder.
    recompute
        Number of random dataset rows to re-score with the teacher. Only for a run folder.
    seed
        Seed of the random selection.

    Returns
    -------
    Report
        ``ok`` is True if all checks passed.

    Raises
    ------
    DaskLogitsError
        If there is nothing to verify, or the rows cannot be scored here.
    """
    if recompute < 0:
        raise ConfigError(f"recompute: expected a number of rows from 0, got {recompute}")
    path = expanded(path)
    report = check_files(path)
    if recompute and report.ok:
        with tempfile.TemporaryDirectory(prefix="dask-logits-") as scratch:
            _recompute(report, RunFolder(path), recompute, seed, Path(scratch))
    return report


def _recompute(report: Report, run: RunFolder, n_rows: int, seed: int, scratch: Path) -> None:
    """Re-score random rows with the run's teacher and frozen numerics, and add what comes out to a report.

    It checks whether the cache equals the recomputed targets exactly, or approximately for partitions scored in another
    environment than this process's, and whether its positions are those of the highest entropy. Partitions that are
    equal only approximately are noted, with the differences between the environments.

    The rows' whole partitions are scored in their original batches. "Live" is the result before storage. It is compared
    with the cache, and with the same rows scored one by one, which gives the noise floor: the same text in another
    batch changes the last bits. The cost of keeping K entries is KL(p ‖ q) in nats, where p is the teacher's
    distribution and q its kept entries with the rest of the mass spread evenly over the other ids, at the first
    positions of each row.

    Targets at chosen positions are compared with new scores of all positions that compete. The stored ones must have
    the highest entropy, up to the rounding of another environment.

    Parameters
    ----------
    report
        The report.
    run
        A complete run whose dataset and teacher can be read here.
    n_rows
        Number of rows, drawn without replacement.
    seed
        Seed of the random selection.
    scratch
        A folder for rows of a stream. The run's own is not changed.

    Draws are the same if the logits are, because their uniform numbers are. Of draws the log-probs of the next tokens
    are compared, and the share of the draws that are other tokens now is reported, because a last bit of the logits
    moves some draws to neighbouring ids. Whether the stored ones are draws from the teacher's distribution is checked
    at the first positions of each row.

    Raises
    ------
    RunConflictError
        If the run has no cache, was scored on another device, or no longer matches its settings.
    ClusterError
        If this process uses other GPUs than the run's.
    """
    log = PlanLog(dataclasses.replace(run, scratch=scratch))
    state, calibration = RunState.find(run, log), run.calibration()
    if state is None or calibration is None or not state.is_complete:
        raise RunConflictError(f"{run.path}: expected a complete run to recompute rows of, got none; finish it")
    check_named(run, None, "verify it without --recompute")
    job = prepare(override(settings_of(run, log), []))
    check_folder(job, writes=False)
    with own_device(_on_gpus_here(job.config.teacher.generation), calibration.numerics.device):
        _compare(report, log, job, calibration, n_rows, seed)


def _on_gpus_here(generation: GenerationConfig) -> GenerationConfig:
    """Return the settings without the GPUs of the run if this machine has others, because the run may be a copy."""
    if generation.devices is None:
        return generation
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    known = visible.replace(" ", "").split(",") if visible else list(map(str, range(visible_gpus())))
    names = generation.devices.split(",")
    is_here = all(name in known or not (visible or name.isdigit()) for name in names)
    return generation if is_here else generation.model_copy(update={"devices": None})


def _compare(report: Report, log: PlanLog, job: Job, calibration: Calibration, n_rows: int, seed: int) -> None:
    """Score random rows again and compare them with the cache, as :func:`_recompute` describes."""
    draw = np.random.default_rng(seed)
    chosen = sorted(draw.choice(log.n_rows, min(n_rows, log.n_rows), replace=False).tolist())
    rows_of = {
        partition.index: [row for row in chosen if 0 <= row - partition.first_row < partition.n_rows]
        for partition in log.partitions()
    }
    planned = job.source.plan(log, job.partition_rows, lambda index: bool(rows_of.get(index)))
    readers = [CacheReader(file) for file in find_caches(job.run.path)]
    check, ranks = (
        Check("partitions that come out the same now"),
        Check("positions of the highest entropy have targets"),
    )
    here = environment(calibration.numerics.device)
    near: Counter[str] = Counter()
    cached, noise, truncation = _Differences(), _Differences(), []
    fit, moved = _Fit(), _Moved()
    for task in tasks(job, calibration, planned, lambda failure: None):
        if task is None:
            continue
        scored, chosen_M, alone, dense = _score(task, rows_of[task.partition.index])
        live = scored.records
        kept = as_kept(live, load_profile(task.profile))
        digest = digest_of([kept if chosen_M is None else kept.at(chosen_M)])
        near_nats = _NEAR_NATS.get(calibration.numerics.dtype, 0.01)
        check.looked_at += 1
        receipt = job.run.receipt(task.partition.index)
        if receipt is None or digest != receipt.content_digest:
            made_in = (receipt.environment if receipt else None) or calibration.environment or here
            differing = describe(differences(made_in, here))
            off = _Differences()
            for row in rows_of[task.partition.index]:
                off.add(_cached_document(readers, row), _document(kept, row))
            if differing and off.is_near(near_nats):
                near[differing] += 1
            else:
                cause = f"; the environment differs, which is the likely cause: {differing}" if differing else ""
                check.found(
                    [f"partition {task.partition.name}: expected the content of its receipt, got another{cause}"]
                )
        for row in rows_of[task.partition.index]:
            now, stored = _document(live, row), _cached_document(readers, row)
            cached.add(stored, now)
            if scored.entropy_M is not None:
                _check_ranks(ranks, scored, row, stored.positions, near_nats)
            if task.items.packing == "none":
                noise.add(alone[row], now)
            if not task.scoring.draws:
                truncation += truncation_nats(dense[row].logprobs, task.scoring.top_k)
                continue
            moved.add(stored, now)
            if task.items.packing == "none":
                fit.add(stored, dense[row])
    figures = {
        "rows_scored_again": len(chosen),
        "positions": cached.positions,
        **cached.figures("cached_against_live"),
        **noise.figures("live_against_live"),
    }
    if moved.draws:
        # The next tokens are compared, not the first of an order.
        figures = {name: value for name, value in figures.items() if not name.endswith("_same_top_1")}
        figures["draws_moved"] = moved.share
    else:
        figures["nats_lost_by_keeping_k"] = float(np.mean(truncation)) if truncation else 0.0
    report.recomputed = figures
    report.notes += [
        f"{count} of {check.looked_at} partitions come out within the rounding of another environment, not bit for bit "
        f"({differing}); for an exact comparison run verify where they were scored"
        for differing, count in near.items()
    ]
    report.checks += [check, *(one for one in (ranks, fit.check()) if one.looked_at)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Document:
    """Positions in the row [M] and the logical arrays of the targets of a row's documents."""

    positions: Array
    arrays: dict[str, Array]

    @property
    def entries(self) -> tuple[Array, Array]:
        """Ids and log-probs [M, K] to compare, of draws those of the next tokens, whose ids need no comparison."""
        if "topk_counts" in self.arrays:
            label_M1 = self.arrays["label_logprob"][:, None]
            return np.zeros(label_M1.shape, np.int64), label_M1
        return self.arrays["topk_ids"], self.arrays["topk_logprobs"]


class _Moved:
    """Share of draws that are other tokens among the draws of the same positions scored again."""

    def __init__(self) -> None:
        self.draws = self._moved = 0

    @property
    def share(self) -> float:
        """The share: the mean total variation between the counts."""
        return self._moved / self.draws

    def add(self, one: _Document, other: _Document) -> None:
        """Compare the draws of the positions that both have."""
        _, here, there = np.intersect1d(one.positions, other.positions, assume_unique=True, return_indices=True)
        for i, j in zip(here, there, strict=True):
            ours, theirs = (np.repeat(each.arrays["topk_ids"][at], each.arrays["topk_counts"][at])
                            for each, at in ((one, i), (other, j)))  # fmt: skip
            self.draws += len(ours)
            self._moved += (Counter(ours.tolist()) - Counter(theirs.tolist())).total()


class _Fit:
    """Stored draws against the teacher's whole distribution, by the sum of the log-probs of the drawn tokens.

    The difference of that sum from its expectation is bounded by Bernstein's inequality.
    """

    def __init__(self) -> None:
        self.positions = 0
        self._off = self._variance = self._rounding = self._most = 0.0

    def add(self, stored: _Document, whole: Records) -> None:
        """Add the positions of a row that have a whole distribution."""
        _, at, whole_at = np.intersect1d(
            stored.positions, np.arange(whole.n_targets), assume_unique=True, return_indices=True
        )
        for i, t in zip(at, whole_at, strict=True):
            logp_V = np.zeros(whole.top_k)
            logp_V[whole.topk_ids[t]] = np.maximum(whole.logprobs[t].astype(np.float64), -_LEAST_NATS)
            p_V = np.exp(logp_V) / np.exp(logp_V).sum()
            counts = stored.arrays["topk_counts"][i].astype(np.float64)
            mean = float(p_V @ logp_V)
            self._off += float(counts @ logp_V[stored.arrays["topk_ids"][i]]) / counts.sum() - mean
            self._variance += float(p_V @ (logp_V - mean) ** 2) / counts.sum()
            self._most = max(self._most, _LEAST_NATS / counts.sum())
            self._rounding += _FIT_NATS
            self.positions += 1

    def check(self) -> Check:
        """Return the check."""
        check = Check("draws fit the teacher's distribution")
        check.looked_at = self.positions
        allowed = (2 * _DOUBT_NATS * self._variance) ** 0.5 + 2 / 3 * _DOUBT_NATS * self._most + self._rounding
        if abs(self._off) > allowed:
            check.found(
                [f"expected a mean log-prob of the drawn tokens within {allowed / self.positions:.4g} nats of the "
                 f"teacher's negative entropy, got a difference of {self._off / self.positions:.4g}"]
            )  # fmt: skip
        return check


class _Differences:
    """Differences between two sets of targets for the same positions, at the ids kept by both."""

    def __init__(self) -> None:
        self.positions = self.same_top1 = self.n_pairs = self.n_unmatched = 0
        self.most = self.squares = 0.0

    def add(self, one: _Document, other: _Document) -> None:
        """Compare targets with those of the same positions among others."""
        common, here, there = np.intersect1d(one.positions, other.positions, assume_unique=True, return_indices=True)
        self.n_unmatched += len(one.positions) - len(common)
        ids_MK, logprobs_MK = (array[here] for array in one.entries)
        others_MK, other_logprobs_MK = (array[there] for array in other.entries)
        # An entry of a position as one number, so that all positions are compared at once.
        keys_MK, other_keys_MK = (common[:, None].astype(np.int64) << 32 | ids for ids in (ids_MK, others_MK))
        _, at, other_at = np.intersect1d(keys_MK, other_keys_MK, assume_unique=True, return_indices=True)
        off = np.abs(logprobs_MK.ravel()[at].astype(np.float64) - other_logprobs_MK.ravel()[other_at])
        off = off[np.isfinite(off)]
        self.positions += len(common)
        self.same_top1 += int(np.count_nonzero(ids_MK[:, 0] == others_MK[:, 0]))
        self.n_pairs += len(off)
        self.most = max(self.most, float(off.max(initial=0.0)))
        self.squares += float((off**2).sum())

    def is_near(self, nats: float) -> bool:
        """Whether all positions are compared, and the root mean square difference is at most `nats`."""
        return not self.n_unmatched and (self.n_pairs == 0 or (self.squares / self.n_pairs) ** 0.5 <= nats)

    def figures(self, name: str) -> dict[str, float]:
        """Return the largest and the root mean square difference in nats, and the share of equal first ids."""
        if not self.positions:
            return {}
        return {
            f"{name}_max": self.most,
            f"{name}_rms": (self.squares / max(1, self.n_pairs)) ** 0.5,
            f"{name}_same_top_1": self.same_top1 / self.positions,
        }


def _score(
    task: PartitionTask, rows: list[int]
) -> tuple[Scored, Array | None, dict[int, _Document], dict[int, Records]]:
    """Score a partition in its original batches, and some of its rows alone, both normally and in full.

    Of a choice by entropy, all positions that compete are returned, and those that it keeps. None: it keeps all.
    """
    texts = read_rows(task.files, task.column)
    read = read_documents(texts, task.tokenizer, first_row=task.partition.first_row)
    documents = read.tokens
    teacher = load_teacher(task.teacher, task.scoring.vocab_size)
    items = make_items(documents, task.items, first_row=task.partition.first_row, masks=read.masks)
    settings = dataclasses.replace(task.scoring, position_share=1.0)
    scored = score_items(teacher, items, settings, packed=task.items.packing == "concat")
    chosen_M: Array | None = None
    if scored.entropy_M is not None and scored.records.target_pos is not None:
        competing_M = scored.records.target_pos.astype(np.int64)
        chosen_M = highest_entropy(items, competing_M, scored.entropy_M, task.scoring.position_share)
    all_positions = dataclasses.replace(task.scoring, positions="all")
    whole = dataclasses.replace(all_positions, top_k=task.scoring.vocab_size, draws=0)
    alone: dict[int, _Document] = {}
    dense: dict[int, Records] = {}
    for row in rows:
        tokens = documents[row - task.partition.first_row]
        if task.items.packing == "none":
            found = score_items(teacher, make_items([tokens], task.items, first_row=row), all_positions).records
            alone[row] = _document(found, row)
        # A later window has less context than the row's tokens before it.
        few = plain_items([tokens[: min(_DENSE_TOKENS, task.items.max_length)]], row)
        dense[row] = score_items(teacher, few, whole).records
    return scored, chosen_M, alone, dense


def _parts(records: Records, row: int) -> Iterator[tuple[Array, Array]]:
    """Yield the positions in the row [M] and the places on the target axis [M] of each document of a row."""
    ends = np.cumsum(records.document_length, dtype=np.int64)
    for i in np.flatnonzero(records.document_row == row):
        start = int(ends[i]) - int(records.document_length[i])
        at_M = np.arange(*records.targets_of(np.array([start, ends[i]])))
        tokens_M = at_M if records.target_pos is None else records.target_pos[at_M].astype(np.int64)
        yield tokens_M - start + int(records.document_offset[i]), at_M


def _document(records: Records, row: int) -> _Document:
    """Return the targets of a row."""
    positions, places = (np.concatenate(each) for each in zip(*_parts(records, row), strict=True))
    arrays = {name: array[places] for name, array in records.tokens().items() if name not in EVERY_TOKEN}
    return _Document(positions=positions, arrays=arrays)


def _check_ranks(check: Check, scored: Scored, row: int, stored: Array, allowed_nats: float) -> None:
    """Check that no position of a row without targets has a higher entropy than one with targets in its document."""
    assert scored.entropy_M is not None
    for positions, places in _parts(scored.records, row):
        has_targets, entropy = np.isin(positions, stored), scored.entropy_M[places]
        least, most = entropy[has_targets].min(initial=np.inf), entropy[~has_targets].max(initial=0.0)
        check.looked_at += len(positions)
        if least < most - allowed_nats and has_targets.any():
            check.found(
                [f"row {row}: expected entropies of at least {most:.4g} nats at stored positions, got {least:.4g}"]
            )


def _cached_document(readers: list[CacheReader], row: int) -> _Document:
    """Return the targets of a row from the cache."""
    positions, parts = [], []
    for reader in readers:
        for i in np.flatnonzero(np.asarray(reader.arrays["document_row"]) == row):
            start = int(reader.arrays["document_start"][i])
            tokens = reader.tokens(start, start + int(reader.arrays["document_length"][i]))
            at = tokens.get("target_pos", np.arange(len(tokens["topk_ids"]))).astype(np.int64)
            positions.append(at + int(reader.arrays["document_offset"][i]))
            parts.append({name: array for name, array in tokens.items() if name not in EVERY_TOKEN})
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return _Document(positions=np.concatenate(positions), arrays=arrays)
