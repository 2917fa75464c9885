"""The plan on disk: segments in order, then an end marker. It only grows, and the first writer of an entry wins.

A regular dataset is planned completely before its first partition. A stream is planned as it is read, so an interrupted
run knows exactly how far its plan reaches. The end is explicit, because a stream that stops early would look like an
interrupted one. Several processes may plan the same run: entries are created if absent, and compared.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from typing import Any, Literal

from dask_logits.errors import CacheError, RunConflictError
from dask_logits.fields import MOST_COUNT
from dask_logits.files.atomic import create_json, read_json, replace_json
from dask_logits.run.folder import RunFolder
from dask_logits.run.plan import Partition, PlanEnd, Segment
from dask_logits.run.timings import plural

logger = logging.getLogger(__name__)

End = Literal["exhausted", "max_samples"]
# Entries are looked up by number, so a plan that claims more would never be read to its end.
_MOST_PARTITIONS = 10_000_000


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
            if isinstance(entry, Segment):
                yield entry

    def partitions(self) -> Iterator[Partition]:
        """Yield the planned partitions in order."""
        for segment in self.segments():
            yield from segment.partitions()

    def append(self, cuts: tuple[tuple[int, int], ...], source: dict[str, Any]) -> Segment:
        """Append further partitions.

        Raises
        ------
        RunConflictError
            If another process has planned different partitions in their place.
        """
        segment = Segment(first_partition=self.n_partitions, first_row=self.n_rows, cuts=cuts, source=source)
        self._create(segment)
        return segment

    def close(self, end: End) -> None:
        """End the plan, unless it has already ended for this reason."""
        if self.end != end:
            self._create(PlanEnd(end=end, partitions=self.n_partitions, rows=self.n_rows))

    def drop_from(self, segment: Segment, source: str) -> None:
        """Drop a segment and all later ones with their receipts, because its unreadable source can now be read.

        Parameters
        ----------
        segment
            The first segment to drop.
        source
            Name of its source, for the log.
        """
        self._check_alone(segment)
        ordinal = self._ordinal(segment)
        dropped = range(segment.first_partition, self.n_partitions)
        logger.warning(
            "%s can be read now: its rows renumber those that follow, so the plan is replaced from there, and %s must "
            "be scored again",
            source,
            plural(sum(self.run.receipt_path(index).exists() for index in dropped), "committed partition"),
        )
        for index in dropped:
            self.run.receipt_path(index).unlink(missing_ok=True)
            (self.run.spool_path / f"{index:06d}.arrow").unlink(missing_ok=True)
        for index in reversed(range(ordinal, self._entries)):
            self.run.plan_path(index).unlink()
        self.replanned_from = segment.first_partition
        self._recount()

    def update_source(self, segment: Segment, source: dict[str, Any]) -> Segment:
        """Replace the source of a segment, because one of its unusable rows has become usable."""
        self._check_alone(segment)
        updated = segment.model_copy(update={"source": source})
        replace_json(self.run.plan_path(self._ordinal(segment)), updated.to_json(), durable=True)
        return updated

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
        manifest = self.run.manifest()
        if manifest is not None and manifest.total_workers > 1:
            raise RunConflictError(
                f"{self.run.path}: expected the dataset as static workers planned it, got one in which partition "
                f"{segment.first_partition:06d} can be read now; start anew in another distillation.teacher.cache_dir"
            )

    def _ordinal(self, segment: Segment) -> int:
        return next(i for i, entry in enumerate(self._read()) if entry == segment)

    def _recount(self) -> None:
        self.n_partitions = 0
        self.n_rows = 0
        self.n_unread = 0
        self.end: End | None = None
        self._entries = 0
        for entry in self._read():
            self._count(entry)

    def _read(self) -> Iterator[Segment | PlanEnd]:
        ordinal = partitions = rows = 0
        while (entry := self._entry(ordinal)) is not None:
            partitions, rows = self._check(ordinal, entry, partitions, rows)
            yield entry
            ordinal += 1

    def _entry(self, ordinal: int) -> Segment | PlanEnd | None:
        path = self.run.plan_path(ordinal)
        values = read_json(path)
        return None if values is None else (PlanEnd if "end" in values else Segment).parse(path, values)

    def _check(self, ordinal: int, entry: Segment | PlanEnd, partitions: int, rows: int) -> tuple[int, int]:
        """Refuse an entry that does not continue the plan. Return the totals after it."""
        if isinstance(entry, PlanEnd):
            begin, after = (entry.partitions, entry.rows), (partitions, rows)
        else:
            begin = (entry.first_partition, entry.first_row)
            after = (partitions + entry.n_partitions, rows + entry.n_rows)
        if begin != (partitions, rows) or after[0] > _MOST_PARTITIONS or after[1] >= MOST_COUNT:
            path = self.run.plan_path(ordinal)
            raise CacheError.at(
                path,
                f"expected the plan to go on at partition {partitions}, row {rows}, to at most "
                f"{_MOST_PARTITIONS:,} partitions, got {begin} to {after}; restore the file",
            )
        return after

    def _create(self, entry: Segment | PlanEnd) -> None:
        path = self.run.plan_path(self._entries)
        if not create_json(path, entry.to_json()):
            found = self._entry(self._entries)
            if found is None or found.known_by() != entry.known_by():
                theirs, ours = None if found is None else found.to_json(), entry.to_json()
                raise RunConflictError(
                    f"{path}: expected the plan to go on with {ours}, got {theirs} from another process; give every "
                    "worker of a run the same dataset and dataset.max_samples",
                    {"plan": (theirs, ours)},
                )
        self._count(entry)

    def _count(self, entry: Segment | PlanEnd) -> None:
        self._entries += 1
        if isinstance(entry, PlanEnd):
            self.end = entry.end
        else:
            self.end = None
            self.n_partitions += entry.n_partitions
            self.n_rows += entry.n_rows
            self.n_unread += sum(count for count, rows in entry.cuts if not rows)
