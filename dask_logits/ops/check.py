"""Verify a cache or run: checksums, invariants of every row, and coverage of each dataset row exactly once.

Dimension letters: N tokens, M positions with targets, D documents, K kept entries.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dask_logits.cache.find import find_caches, is_index
from dask_logits.cache.pieces import PartitionPiece, cache_pieces
from dask_logits.cache.profile import Compact, Precision, Profile, gaps_of
from dask_logits.cache.reader import CacheReader
from dask_logits.errors import CacheError
from dask_logits.records import DOCUMENT_ARRAYS, Array, Records, digest_of, label_doubts, total_digest
from dask_logits.run.folder import RunFolder
from dask_logits.run.parts import RunPart
from dask_logits.run.records import Receipt
from dask_logits.run.state import open_run_cache, read_consistently
from dask_logits.run.timings import plural
from dask_logits.worker.environment import Environment, describe, differences

# Number of violations of one kind that are listed.
_NAMED = 5
# Half a unit in the last place of float16.
_FLOAT16 = 2.0**-11
# Tolerance for sums of many rounded terms, and for the teacher's own softmax.
_SLACK = 1e-4


@dataclass
class Check:
    """One invariant with its result.

    Parameters
    ----------
    name
        Name of the invariant.
    looked_at
        Number of comparisons.
    n_problems, problems
        Number of violations, and the first of them.
    """

    name: str
    looked_at: int = 0
    n_problems: int = 0
    problems: list[str] = field(default_factory=list)

    def found(self, problems: Iterable[str], n_problems: int | None = None) -> None:
        """Add violations."""
        named = list(problems)
        self.n_problems += len(named) if n_problems is None else n_problems
        self.problems = [*self.problems, *named][:_NAMED]


# Figure of re-scored rows → its label. Noise floor: the same text in another batch changes the last bits.
_LABELS = {
    "rows_scored_again": "rows scored again",
    "positions": "positions compared",
    "cached_against_live_max": "cache and new scores, largest difference (nats)",
    "cached_against_live_rms": "cache and new scores, root mean square difference (nats)",
    "cached_against_live_same_top_1": "cache and new scores, share with the same first token",
    "live_against_live_max": "noise floor, largest difference (nats)",
    "live_against_live_rms": "noise floor, root mean square difference (nats)",
    "live_against_live_same_top_1": "noise floor, share with the same first token",
    "draws_moved": "share of the draws that are other tokens in the new scores",
    "nats_lost_by_keeping_k": "KL of keeping k entries and the mass of the rest (nats)",
}


@dataclass
class Report:
    """Result of a verification.

    Parameters
    ----------
    path
        Path of the cache or run.
    checks
        Checks, in order.
    unfinished
        Remaining work of a run. None: nothing.
    notes
        Observations that are not errors.
    recomputed
        Figures of the re-scored rows. None: none were re-scored.
    """

    path: str
    checks: list[Check] = field(default_factory=list)
    unfinished: str | None = None
    notes: list[str] = field(default_factory=list)
    recomputed: dict[str, Any] | None = None

    @property
    def ok(self) -> bool:
        """Whether all checks of the existing data passed."""
        return not any(check.n_problems for check in self.checks)

    def lines(self) -> list[str]:
        """Format the report for display."""
        out = [f"verify        {self.path}"]
        for check in self.checks:
            verdict = f"{check.n_problems:,} WRONG" if check.n_problems else "good"
            out.append(f"{check.name:36} {check.looked_at:>14,}  {verdict}")
            out += [f"    {problem}" for problem in check.problems]
        if self.recomputed is not None:
            out += [f"{_LABELS[name]:60} {value:>12,.6g}" for name, value in self.recomputed.items()]
        out += [f"note          {note}" for note in self.notes]
        if self.unfinished is not None:
            out.append(f"unfinished    {self.unfinished}")
        out.append("everything that is there is good" if self.ok else "DAMAGED")
        return out

    def to_json(self) -> str:
        """Format the report as JSON."""
        checks = [vars(check) for check in self.checks]
        values = {"path": self.path, "ok": self.ok, "unfinished": self.unfinished, "recomputed": self.recomputed}
        return json.dumps({**values, "notes": self.notes, "checks": checks}, indent=1)


def check_files(path: Path) -> Report:
    """Verify a cache, an index over several, or a run folder, from its files.

    Raises
    ------
    DaskLogitsError
        If there is nothing to verify.
    """
    if not path.exists():
        raise CacheError(
            f"{path}: expected a cache, an index over several or a run folder, got nothing; check the path"
        )
    run = RunFolder(path)
    checker = _Checker()
    report = Report(str(path))
    if path.is_dir() and run.manifest() is not None:
        calibration = run.calibration()

        def read() -> tuple[_Checker, str | None]:
            checker = _Checker((calibration.environment if calibration else None) or {})
            return checker, _check_run(run, checker)

        checker, report.unfinished = read_consistently(run, read)
        report.notes += checker.notes()
    else:
        _check_caches(find_caches(path), checker, is_list=is_index(path))
    checks = [check for check in vars(checker).values() if isinstance(check, Check)]
    report.checks = [check for check in checks if check.looked_at or check.n_problems]
    return report


class _Checker:
    """All checks, grouped by their data."""

    def __init__(self, expected: Environment | None = None) -> None:
        self.expected: Environment = expected or {}
        # Environments other than the calibration's → partitions.
        self.others: Counter[str] = Counter()
        self.n_receipts = 0
        self.checksums = Check("files whole, with right checksums")
        self.receipts = Check("receipts that fit run and plan")
        self.digests = Check("content digests, computed again")
        self.ids = Check("token ids valid, kept ids distinct")
        self.order = Check("log-probs descending, at most 0")
        self.mass = Check("kept and tail mass sum to 1")
        self.labels = Check("labels' log-probs fit the kept ones")
        self.counts = Check("draws counted, most frequent first")
        self.drawn_labels = Check("labels drawn as often as they are probable")
        self.finite = Check("nothing NaN or infinite")
        self.documents = Check("documents, each row once and whole")

    def environment(self, receipt: Receipt) -> None:
        """Record a partition's environment, if known."""
        self.n_receipts += 1
        if receipt.environment is not None:
            self.others[describe(differences(self.expected, receipt.environment))] += 1

    def notes(self) -> list[str]:
        """List the partitions scored in another environment than the run's."""
        return [
            f"{count} of {self.n_receipts} partitions were scored in another environment than the run was calibrated "
            f"in, as distillation.cluster.allow_mixed_workers allowed; their last bits may differ: {what}"
            for what, count in self.others.items()
        ]

    def records(self, records: Records, profile: Profile, source_precision: Precision | None = None) -> None:
        """Check every position of some documents, which may have been stored in fewer bits before."""
        if not records.n_tokens:
            return
        places = _Places(records)
        label_M = records.label_logprob.astype(np.float64)
        if records.loss_mask is not None:
            wrong_N = records.loss_mask > 1
            wrong_N[places.targets_M] |= (records.loss_mask[places.targets_M] == 1) & np.isnan(label_M)
            self._add(self.finite, wrong_N, places, "expected a mask of 0 and 1, and a next token where it is 1")
        next_M = np.append(records.input_ids[1:], 0).astype(np.int64)[places.targets_M]
        inside_M = ~places.is_last[places.targets_M]
        lacking_M = inside_M & np.isnan(label_M)
        self._add(self.finite, lacking_M, places, "expected the log-prob of the next token, got none")
        inside_M &= ~lacking_M
        match_MK = records.topk_ids.astype(np.int64) == next_M[:, None]
        if records.topk_counts is not None:
            self._draws(records, records.topk_counts, profile, places)
            self._drawn_labels(records.topk_counts, match_MK, label_M, inside_M, profile.extras.draws, places)
            return
        assert records.topk_logprobs is not None
        assert records.tail_logmass is not None
        ids_MK, logprobs_MK = records.topk_ids, records.topk_logprobs.astype(np.float64)
        tail_M = records.tail_logmass.astype(np.float64)
        sorted_MK = np.sort(ids_MK, axis=1)
        bad_N = records.input_ids >= profile.vocab_size
        bad_N[places.targets_M] |= sorted_MK[:, -1] >= profile.vocab_size
        bad_N[places.targets_M] |= (sorted_MK[:, 1:] == sorted_MK[:, :-1]).any(1)
        self._add(self.ids, bad_N, places, f"expected distinct ids below {profile.vocab_size}")
        rising = (np.diff(logprobs_MK, axis=1) > 0).any(1) | (logprobs_MK[:, 0] > _SLACK)
        self._add(self.order, rising, places, "expected log-probs that descend from at most 0")
        # −inf is the log of probability 0, NaN a missing label.
        odd = np.isnan(logprobs_MK).any(1) | (logprobs_MK == np.inf).any(1) | ~np.isfinite(records.logsumexp)
        odd |= np.isnan(tail_M) | (tail_M > _SLACK) | (label_M > _SLACK)
        if records.tail_logmass_T is not None:
            odd |= ~(records.tail_logmass_T <= _SLACK).all(1)
        self._add(self.finite, odd, places, "expected numbers, and no log-prob above 0")
        error_MK = _rounding(logprobs_MK, profile, source_precision)
        p_MK, tail_p_M = np.exp(logprobs_MK), np.exp(tail_M)
        mass_M = p_MK.sum(1) + tail_p_M
        with np.errstate(invalid="ignore"):
            tail_error_M = np.nan_to_num(tail_p_M * np.abs(tail_M) * _FLOAT16)
        with np.errstate(over="ignore", invalid="ignore"):
            allowed_M = (p_MK * np.expm1(error_MK)).sum(1) + tail_error_M + _SLACK
        self._add(self.mass, ~(np.abs(mass_M - 1) <= allowed_M), places, "expected a mass of 1", mass_M)
        if records.tail_logmass_T is not None:
            self._tails(tail_M, records.tail_logmass_T.astype(np.float64), profile.extras.temperatures, places)
        kept_M = match_MK.any(1)
        at_M = match_MK.argmax(1)
        rows = np.arange(len(at_M))
        expected_M = np.where(kept_M, logprobs_MK[rows, at_M], logprobs_MK[:, -1])
        allowed_M = error_MK[rows, np.where(kept_M, at_M, -1)] + np.abs(label_M) * _FLOAT16 + _SLACK
        with np.errstate(invalid="ignore"):
            off_M = label_M - expected_M
        wrong_M = np.where(kept_M, np.abs(off_M) > allowed_M, off_M > allowed_M) & inside_M & np.isfinite(expected_M)
        self._add(self.labels, wrong_M, places, "expected the kept entry's log-prob, or less than the last's", label_M)

    def _tails(self, tail_M: Array, tail_MJ: Array, temperatures: tuple[float, ...], places: _Places) -> None:
        """Check that the mass outside the most probable entries grows with the temperature, 1 included."""
        at = int(np.searchsorted(temperatures, 1.0))
        tails = np.insert(tail_MJ, at, tail_M, axis=1)
        with np.errstate(invalid="ignore"):
            allowed = np.abs(tails[:, :-1]) * 2 * _FLOAT16 + _SLACK
            falls_M = np.asarray((tails[:, :-1] - tails[:, 1:] > allowed).any(1))
        self._add(self.mass, falls_M, places, "expected a tail mass that grows with the temperature")

    def _draws(self, records: Records, counts_MK: Array, profile: Profile, places: _Places) -> None:
        """Check the draws of every position."""
        ids_MK, is_present_MK = records.topk_ids.astype(np.int64), counts_MK > 0
        # Absent entries count as further ids.
        distinct_MK = np.sort(np.where(is_present_MK, ids_MK, -1 - np.arange(ids_MK.shape[1])), axis=1)
        bad_N = records.input_ids >= profile.vocab_size
        bad_M = (ids_MK >= profile.vocab_size).any(1) | (distinct_MK[:, 1:] == distinct_MK[:, :-1]).any(1)
        bad_N[places.targets_M] |= bad_M | ((ids_MK > 0) & ~is_present_MK).any(1)
        self._add(self.ids, bad_N, places, f"expected distinct ids below {profile.vocab_size}, 0 for absent ones")
        steps_MK, rises_MK = np.diff(counts_MK.astype(np.int64), axis=1), np.diff(ids_MK, axis=1) > 0
        is_tie_MK = (steps_MK == 0) & is_present_MK[:, 1:]
        unordered_M = ((steps_MK > 0) | (is_tie_MK & ~rises_MK)).any(1)
        self._add(self.counts, unordered_M, places, "expected counts that descend, equal ones by lower id")
        sums_M = counts_MK.sum(1, dtype=np.int64)
        wrong_M, text = sums_M != profile.extras.draws, f"expected counts that sum to {profile.extras.draws}"
        self._add(self.counts, wrong_M, places, text, sums_M)
        odd_M = ~np.isfinite(records.logsumexp) | (records.label_logprob > _SLACK)
        self._add(self.finite, odd_M, places, "expected numbers, and no log-prob above 0")

    def _drawn_labels(
        self, counts_MK: Array, match_MK: Array, label_M: Array, inside_M: Array, draws: int, places: _Places
    ) -> None:
        """Check that the next tokens were drawn as often as their probabilities say, over all positions together."""
        shares_M = (counts_MK * match_MK).sum(1)[inside_M] / draws
        self.drawn_labels.looked_at += len(shares_M)
        doubts = label_doubts(shares_M, label_M[inside_M], draws)
        if doubts is not None:
            self.drawn_labels.found(
                [f"{places.name(0)} and later: expected {doubts[0]:.6g} as the sum of the shares of the next tokens "
                 f"among the draws, got {doubts[1]:.6g}"]
            )  # fmt: skip

    def _add(self, check: Check, wrong: Array, places: _Places, text: str, values: Array | None = None) -> None:
        check.looked_at += len(wrong)
        # The axis is the one of this length. If both are, they are the same.
        name = places.name_of_target if len(wrong) == len(places.targets_M) else places.name
        bad = np.flatnonzero(wrong)
        got = ["" if values is None else f", got {values[at]:.6g}" for at in bad[:_NAMED].tolist()]
        check.found([f"{name(int(at))}: {text}{end}" for at, end in zip(bad, got, strict=False)], len(bad))


class _Places:
    """Locations of some documents' positions in the dataset."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._ends = np.cumsum(records.document_length, dtype=np.int64)
        everything = np.arange(records.n_tokens)
        self.targets_M = everything if records.target_pos is None else records.target_pos.astype(np.int64)
        self.is_last = np.zeros(records.n_tokens, bool)
        self.is_last[self._ends[records.document_length > 0] - 1] = True

    def name_of_target(self, target: int) -> str:
        """Describe the location of an entry of the target axis."""
        return self.name(int(self.targets_M[target]))

    def name(self, position: int) -> str:
        """Describe the location of a position."""
        document = int(np.searchsorted(self._ends, position, side="right"))
        start = int(self._ends[document]) - int(self._records.document_length[document])
        token = int(self._records.document_offset[document]) + position - start
        return f"row {int(self._records.document_row[document])}, token {token}"


def _rounding(logprobs_NK: Array, profile: Profile, source_precision: Precision | None) -> Array:
    """Return the rounding error of stored log-probs: float16, and half a step of each gap table they went through."""
    error_NK: Array = np.abs(np.where(np.isfinite(logprobs_NK), logprobs_NK, 0.0)) * _FLOAT16
    tables = [profile.gaps] if isinstance(profile, Compact) else []
    if source_precision is not None:
        tables.append(gaps_of(source_precision))
    for table in (each[:-1].astype(np.float64) for each in tables):
        steps = np.diff(table, append=table[-1] + (table[-1] - table[-2]))
        gaps_NK = logprobs_NK[:, :1] - np.where(np.isfinite(logprobs_NK), logprobs_NK, logprobs_NK[:, :1])
        error_NK = error_NK + np.interp(gaps_NK, table, steps) / 2
    return error_NK


def _check_caches(files: Sequence[Path], checker: _Checker, *, is_list: bool) -> None:
    """Check caches: their checksums, every position of those with valid ones, and that all rows are there.

    A file marked as a part may omit rows when it is checked alone, but not as an entry of an index.
    """
    readers = []
    for file in files:
        checker.checksums.looked_at += 1
        try:
            reader = CacheReader(file)
            pieces = list(cache_pieces(reader, trailers=True))
        except CacheError as error:
            checker.checksums.found([error.message])
            continue
        readers.append(reader)
        digests = []
        for piece in pieces:
            for records in piece.runs():
                checker.records(records, reader.profile, reader.header.source_precision)
                digests.append(digest_of([records]))
        _compare_digest(checker, str(reader.path), reader.header.content_digest, total_digest(digests))
    if readers:
        columns = {
            name: np.concatenate([np.asarray(reader.arrays[name]).astype(np.int64) for reader in readers])
            for name in DOCUMENT_ARRAYS
        }
        is_part = len(readers) == 1 and not is_list and bool(readers[0].attributes.get("partial"))
        _check_rows(checker.documents, columns, None if is_part else readers[0].header.n_rows)


def _compare_digest(checker: _Checker, where: str, said: str, found: str) -> None:
    checker.digests.looked_at += 1
    if said != found:
        checker.digests.found([f"{where}: expected {said}, got {found}"])


def _check_rows(check: Check, columns: dict[str, Array], n_rows: int | None) -> None:
    """Check that documents cover the dataset's rows, each once, and windows without gaps."""
    rows_D, offsets_D, lengths_D = (columns[name] for name in DOCUMENT_ARRAYS)
    order = np.lexsort((offsets_D, rows_D))
    rows_D, offsets_D, lengths_D = rows_D[order], offsets_D[order], lengths_D[order]
    check.looked_at += len(rows_D)
    before_D = np.append(-1, rows_D)[: len(rows_D)]
    first_D = rows_D != before_D
    expected_D = np.where(first_D, 0, np.append(0, offsets_D + lengths_D)[: len(rows_D)])
    bad = np.flatnonzero(offsets_D != expected_D)
    check.found(
        [f"row {rows_D[i]}: expected a document from token {expected_D[i]}, got {offsets_D[i]}" for i in bad[:_NAMED]],
        len(bad),
    )
    if n_rows is not None:
        there = rows_D[first_D]
        # A damaged file may claim any number of rows, so they are not listed.
        edges = np.concatenate([[-1], there[there < n_rows], [n_rows]])
        before = np.flatnonzero(np.diff(edges) > 1)[:_NAMED].tolist()
        missing = [row for at in before for row in range(edges[at] + 1, min(edges[at + 1], edges[at] + 1 + _NAMED))]
        check.found(
            [f"row {row}: expected its document, got none" for row in missing[:_NAMED]], n_rows - (len(edges) - 2)
        )
        beyond = there[there >= n_rows]
        check.found([f"row {row}: expected rows below {n_rows}" for row in beyond[:_NAMED]], len(beyond))


def _check_run(run: RunFolder, checker: _Checker) -> str | None:
    """Check a run folder. Return the remaining work."""
    try:
        part = RunPart.open(run)
    except CacheError as error:
        checker.checksums.looked_at += 1
        checker.checksums.found([error.message])
        return None
    if part.state.cache is not None:
        _check_caches([reader.path for reader in part.state.cache.readers], checker, is_list=is_index(run.path))
    keeps = bool(part.state.manifest.setting("job.keep_partitions"))
    missing = 0
    digests: list[str] = []
    for each in part.state.partitions():
        partition, receipt = each.partition, each.receipt
        missing += not each.is_done
        if not each.is_done and each.problem is None:
            continue
        checker.receipts.looked_at += 1
        if receipt is None:
            got = each.error.message if each.error else "others" if each.problem else "none; its rows are in the cache"
            checker.receipts.found(
                [f"partition {partition.name}: expected a receipt for its rows and arrays, got {got}"]
            )
            continue
        digests.append(receipt.content_digest)
        checker.environment(receipt)
        path = run.partitions_path / receipt.attempt
        if partition.n_rows and (not each.is_cached or (keeps and path.exists())):
            _check_partition(PartitionPiece(path=path, receipt=receipt, profile=part.profile), checker)
    whole = open_run_cache(run)
    if whole is not None and whole.n_rows == part.n_rows and len(digests) == part.state.log.n_partitions:
        _compare_digest(checker, "receipts", whole.content_digest, total_digest(digests))
    if part.state.log.end is None:
        return "the plan is still growing"
    if missing:
        return f"{missing:,} of {plural(part.state.log.n_partitions, 'partition')} not committed"
    return None if whole is not None and whole.n_rows == part.n_rows else "the cache is not written"


def _check_partition(piece: PartitionPiece, checker: _Checker) -> None:
    checker.checksums.looked_at += 1
    try:
        piece.check()
        for records in piece.runs():
            checker.records(records, piece.profile)
            _compare_digest(checker, str(piece.path), piece.content_digest(), digest_of([records]))
    except CacheError as error:
        checker.checksums.found([error.message])
