"""The plan on disk: segments in order, then an end marker. It only grows, and the first writer of an entry wins.

A regular dataset is planned completely before its first partition. A stream is planned as it is read, so an interrupted
run knows exactly how far its plan reaches. The end is explicit, because a stream that stops early would look like an
interrupted one. Several processes may plan the same run: entries are created if absent, and compared.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
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
    """The plan of a run folder up to its current end. Each entry is read once, and takes about 1 kB of memory.

    Parameters
    ----------
    run
        The folder. Nothing is written before the first :meth:`append`.

    Attributes
    ----------
    n_partitions, n_rows : int
        Planned so far.
    replanned_from : int or None
        First partition dropped by :meth:`drop_from`.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.n_partitions = 0
        self.n_rows = 0
        self.replanned_from: int | None = None
        self._entries: list[Segment | PlanEnd] = []
        self.read_on()

    def read_on(self) -> None:
        """Read the entries that follow those that are known.

        Raises
        ------
        CacheError
            If one does not continue the plan.
        """
        while (entry := self._entry(len(self._entries))) is not None:
            self._add(entry)

    @property
    def end(self) -> End | None:
        """Reason why the plan ends: ``exhausted`` or ``max_samples`` (more may follow). None: the plan is open."""
        last = self._entries[-1] if self._entries else None
        return last.end if isinstance(last, PlanEnd) else None

    @property
    def n_unread(self) -> int:
        """Partitions without rows, because their part of a stream could not be read."""
        return sum(count for segment in self.segments() for count, rows in segment.cuts if not rows)

    def segments(self) -> list[Segment]:
        """Return the segments in order."""
        return [entry for entry in self._entries if isinstance(entry, Segment)]

    def partitions(self, wanted: Callable[[int], bool] = lambda index: True) -> Iterator[Partition]:
        """Yield the planned partitions with these indices in order."""
        for segment in self.segments():
            yield from segment.partitions(wanted)

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
        ordinal = self._entries.index(segment)
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
        for index in reversed(range(ordinal, len(self._entries))):
            self.run.plan_path(index).unlink()
        del self._entries[ordinal:]
        self.n_partitions, self.n_rows = segment.first_partition, segment.first_row
        self.replanned_from = segment.first_partition

    def update_source(self, segment: Segment, source: dict[str, Any]) -> Segment:
        """Replace the source of a segment, because one of its unusable rows has become usable."""
        self._check_alone(segment)
        updated, ordinal = segment.model_copy(update={"source": source}), self._entries.index(segment)
        replace_json(self.run.plan_path(ordinal), updated.to_json(), durable=True)
        self._entries[ordinal] = updated
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

    def _entry(self, ordinal: int) -> Segment | PlanEnd | None:
        path = self.run.plan_path(ordinal)
        values = read_json(path)
        return None if values is None else (PlanEnd if "end" in values else Segment).parse(path, values)

    def _create(self, entry: Segment | PlanEnd) -> None:
        path = self.run.plan_path(len(self._entries))
        created = create_json(path, entry.to_json())
        found = entry if created else self._entry(len(self._entries))
        if found is None or found.known_by() != entry.known_by():
            theirs, ours = None if found is None else found.to_json(), entry.to_json()
            raise RunConflictError(
                f"{path}: expected the plan to go on with {ours}, got {theirs} from another process; give every "
                "worker of a run the same dataset and dataset.max_samples",
                {"plan": (theirs, ours)},
            )
        self._add(found)

    def _add(self, entry: Segment | PlanEnd) -> None:
        """Add an entry. Refuse one that does not continue the plan."""
        planned = (self.n_partitions, self.n_rows)
        if isinstance(entry, PlanEnd):
            begin, after = (entry.partitions, entry.rows), planned
        else:
            begin = (entry.first_partition, entry.first_row)
            after = (self.n_partitions + entry.n_partitions, self.n_rows + entry.n_rows)
        if begin != planned or after[0] > _MOST_PARTITIONS or after[1] >= MOST_COUNT:
            raise CacheError.at(
                self.run.plan_path(len(self._entries)),
                f"expected the plan to go on at partition {planned[0]}, row {planned[1]}, to at most "
                f"{_MOST_PARTITIONS:,} partitions, got {begin} to {after}; restore the file",
            )
        self._entries.append(entry)
        self.n_partitions, self.n_rows = after
