"""The plan on disk: segments in order, then an end marker. It only grows, and the first writer of an entry wins.

A regular dataset is planned completely before its first partition. A stream is planned as it is read, so an interrupted
run knows exactly how far its plan reaches. The end is explicit, because a stream that stops early would look like an
interrupted one. Several processes may plan the same run: entries are created if absent, and compared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from dask_logits.errors import CacheError, RunConflictError
from dask_logits.files.atomic import (
    COUNT,
    OBJECT,
    Json,
    Kind,
    check_fields,
    create_json,
    read_json,
    replace_json,
    shown,
)
from dask_logits.run.folder import RunFolder
from dask_logits.run.plan import Partition, Segment

End = Literal["exhausted", "max_samples"]
# Entries are looked up by number, so a plan that claims more would never be read to its end.
_MOST_PARTITIONS = 10_000_000
_SEGMENT = {
    "first_partition": COUNT,
    "first_row": COUNT,
    "cuts": Kind(
        "pairs of partitions and their rows",
        lambda value: (
            isinstance(value, list)
            and all(isinstance(cut, list) and len(cut) == 2 and all(map(COUNT.holds, cut)) for cut in value)
        ),
    ),
    "source": OBJECT,
}
_END = {
    "end": Kind("'exhausted' or 'max_samples'", lambda value: value in ("exhausted", "max_samples")),
    "partitions": COUNT,
    "rows": COUNT,
}


class PlanLog:
    """The plan of a run folder up to its current end.

    Parameters
    ----------
    run
        The folder. Nothing is written before the first :meth:`append`.

    Attributes
    ----------
    n_partitions, n_rows : int
        Planned so far.
    n_unread : int
        Partitions without rows, because their part of a stream could not be read.
    end : str or None
        Why the plan ends: ``exhausted`` (no more rows) or ``max_samples`` (more may follow). None: the plan is open.
    replanned_from : int or None
        First partition dropped by :meth:`drop_from`.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.replanned_from: int | None = None
        self._recount()

    def segments(self) -> Iterator[Segment]:
        """Yield the segments in order, read from their files."""
        for entry in self._read():
            if "end" not in entry:
                yield Segment.from_json(entry)

    def partitions(self) -> Iterator[Partition]:
        """Yield the planned partitions in order."""
        for segment in self.segments():
            yield from segment.partitions()

    def append(self, cuts: tuple[tuple[int, int], ...], source: Json) -> Segment:
        """Append further partitions.

        Raises
        ------
        RunConflictError
            If another process has planned different partitions in their place.
        """
        segment = Segment(first_partition=self.n_partitions, first_row=self.n_rows, cuts=cuts, source=source)
        self._create(segment.to_json())
        return segment

    def close(self, end: End) -> None:
        """End the plan, unless it has already ended for this reason."""
        if self.end != end:
            self._create({"end": end, "partitions": self.n_partitions, "rows": self.n_rows})

    def drop_from(self, segment: Segment) -> None:
        """Drop a segment and all later ones with their receipts, because its unreadable source can now be read."""
        self._check_alone(segment)
        ordinal = self._ordinal(segment)
        for index in range(segment.first_partition, self.n_partitions):
            self.run.receipt_path(index).unlink(missing_ok=True)
            (self.run.spool_path / f"{index:06d}.arrow").unlink(missing_ok=True)
        for index in reversed(range(ordinal, self._entries)):
            self.run.plan_path(index).unlink()
        self.replanned_from = segment.first_partition
        self._recount()

    def mend(self, segment: Segment, source: Json) -> Segment:
        """Replace the source of a segment, because one of its unusable rows has become usable."""
        self._check_alone(segment)
        mended = dataclasses.replace(segment, source=source)
        replace_json(self.run.plan_path(self._ordinal(segment)), mended.to_json(), durable=True)
        return mended

    def digest(self, n_rows: int | None = None) -> str:
        """SHA-256 of the segments, equal if two runs cut the same rows in the same way.

        Parameters
        ----------
        n_rows
            Only segments that begin before this row. None: all.
        """
        lines = hashlib.sha256()
        for segment in self.segments():
            if n_rows is not None and segment.first_row >= n_rows:
                break
            lines.update(json.dumps(segment.known_by(), sort_keys=True).encode())
        return lines.hexdigest()

    def _check_alone(self, segment: Segment) -> None:
        manifest = self.run.manifest() or {}
        if manifest.get("total_workers", 1) > 1:
            raise RunConflictError(
                f"{self.run.path}: expected the dataset as static workers planned it, got one in which partition "
                f"{segment.first_partition:06d} can be read now; start anew in another distillation.teacher.cache_dir"
            )

    def _ordinal(self, segment: Segment) -> int:
        return next(i for i, entry in enumerate(self._read()) if entry == segment.to_json())

    def _recount(self) -> None:
        self.n_partitions = 0
        self.n_rows = 0
        self.n_unread = 0
        self.end: End | None = None
        self._entries = 0
        for entry in self._read():
            self._count(entry)

    def _read(self) -> Iterator[Json]:
        ordinal = partitions = rows = 0
        while (entry := read_json(path := self.run.plan_path(ordinal))) is not None:
            partitions, rows = _check_entry(path, entry, partitions, rows)
            yield entry
            ordinal += 1

    def _create(self, entry: Json) -> None:
        path = self.run.plan_path(self._entries)
        if not create_json(path, entry):
            found = read_json(path)
            if found is not None:
                _check_shape(path, found)
            if found is None or _known_by(found) != _known_by(entry):
                raise RunConflictError(
                    f"{path}: expected the plan to go on with {entry}, got {found} from another process; give every "
                    "worker of a run the same dataset and dataset.max_samples",
                    {"plan": (found, entry)},
                )
        self._count(entry)

    def _count(self, entry: Json) -> None:
        self._entries += 1
        if "end" in entry:
            self.end = entry["end"]
        else:
            self.end = None
            self.n_partitions += sum(count for count, _ in entry["cuts"])
            self.n_rows += sum(count * rows for count, rows in entry["cuts"])
            self.n_unread += sum(count for count, rows in entry["cuts"] if not rows)


def _known_by(entry: Json) -> Json:
    return entry if "end" in entry else Segment.from_json(entry).known_by()


def _check_entry(path: Path, entry: Json, partitions: int, rows: int) -> tuple[int, int]:
    """Refuse an entry that does not continue the plan. Return the totals after it."""
    _check_shape(path, entry)
    names = ("partitions", "rows") if "end" in entry else ("first_partition", "first_row")
    begin = tuple(entry[name] for name in names)
    cuts = entry.get("cuts", ())
    after = partitions + sum(count for count, _ in cuts), rows + sum(count * rows for count, rows in cuts)
    if begin != (partitions, rows) or after[0] > _MOST_PARTITIONS or not COUNT.holds(after[1]):
        raise CacheError(
            f"{path}: expected the plan to go on at partition {partitions}, row {rows}, to at most "
            f"{_MOST_PARTITIONS:,} partitions, got {begin} to {after}; restore the file",
            str(path),
        )
    return after


def _check_shape(path: Path, entry: Json) -> None:
    kinds = _END if "end" in entry else _SEGMENT
    check_fields(path, entry, kinds)
    if unknown := entry.keys() - kinds.keys():
        raise CacheError(f"{path}: expected only {', '.join(kinds)}, got {shown(min(unknown))}; restore it", str(path))
