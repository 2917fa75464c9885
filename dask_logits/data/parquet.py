"""A stream of Parquet files, local or remote, read in place by the workers.

The planner reads footers in file order, only as far as partitions are requested. A partition is a range of rows of one
file: whole row groups, or a part of a huge one. Each file is a segment of the plan, which records its size, etag and
footer, so that a later start can refuse changed files.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dask_logits.config.groups import DatasetConfig
from dask_logits.data.columns import choose_column
from dask_logits.data.hub import pinned_commit
from dask_logits.data.parquet_files import (
    FileState,
    Footer,
    file_state,
    patiently,
    read_footer,
    read_parquet,
    unreachable,
)
from dask_logits.data.source import SAMPLE_ROWS, FileRows, Planned, Source
from dask_logits.errors import DatasetError
from dask_logits.run.folder import conflict
from dask_logits.run.plan import Segment, group_cuts
from dask_logits.run.plan_log import PlanLog
from dask_logits.run.timings import plural

_T = TypeVar("_T")


class ParquetStream(Source):
    """Parquet files, local or remote, read in place.

    Parameters
    ----------
    files
        Paths or URLs, in order.
    config
        Settings: the requested columns, and the number of rows to use.
    identity
        Identity of the dataset.
    """

    def __init__(self, files: list[str], config: DatasetConfig, identity: dict[str, Any]) -> None:
        self.files = files
        # Upper bound on the number of rows, or None: files are not counted in advance.
        self.n_rows = config.row_limit
        self._limit = math.inf if self.n_rows is None else self.n_rows
        self.commit = pinned_commit(files)
        self._identity = identity
        self._footers: dict[str, Footer | None] = {}
        self._broken: dict[str, str] = {}
        first = next((self._footer(file) for file in files if self._count(file)), None)
        if first is None:
            raise DatasetError(
                f"distillation.dataset.name: expected a Parquet file with rows, got none in "
                f"{plural(len(files), 'file')} such as {files[0]!r}; restore the files"
            )
        self.column = choose_column(first.columns, config)

    def identity(self) -> dict[str, Any]:
        """Return the identity of this dataset."""
        return {**self._identity, "dataset.stream": "parquet", "dataset.n_files": len(self.files)}

    def head(self) -> Iterator[Any]:
        """Yield the rows from the first. Damaged files are left for the workers to report."""
        return itertools.islice(self._readable_rows(), self.n_rows)

    def _readable_rows(self) -> Iterator[Any]:
        for file in self.files:
            n_rows = self._count(file)
            for first in range(0, n_rows, SAMPLE_ROWS):
                count = min(SAMPLE_ROWS, n_rows - first)
                rows = self._usable(file, functools.partial(read_parquet, file, self.column, first, count))
                if rows is None:
                    break
                yield from rows

    def count_rows(self, seconds: float) -> tuple[int, int]:
        """Count rows from the footers, in file order, until the row limit or the time limit is reached.

        Returns
        -------
        tuple
            Number of rows counted, and number of their files.
        """
        rows, deadline = 0, time.monotonic() + seconds
        for n_files, file in enumerate(self.files):
            if rows >= self._limit or (n_files and time.monotonic() > deadline):
                return rows, n_files
            rows += self._count(file)
        return rows, len(self.files)

    def check(self, log: PlanLog) -> None:
        """Refuse files that differ from the planned files of a run.

        Raises
        ------
        RunConflictError
            Naming the first file whose size, etag or footer differs.
        """
        if self._limit < log.n_rows:
            raise conflict(log.run.path, {"dataset.max_samples": (log.n_rows, self.n_rows)})
        planned: set[int] = set()
        for segment in log.segments():
            source = segment.source
            place = source["ordinal"]
            planned.add(place)
            file = self.files[place] if place < len(self.files) else None
            if file is None or Path(file).name != Path(source["file"]).name:
                raise conflict(log.run.path, {f"dataset file {place}": (source["file"], file)})
            if "error" not in source:
                _check_state(log, file, source)
        # Files without a segment had no rows when the plan passed them.
        passed = len(self.files) if log.end == "exhausted" else max(planned, default=0)
        for place in sorted(set(range(passed)) - planned):
            footer = self._footer(self.files[place])
            if footer is None or any(footer.row_groups):
                got = "a file that cannot be read" if footer is None else f"{sum(footer.row_groups)} rows"
                raise conflict(log.run.path, {f"dataset file {self.files[place]}": ("0 rows", got)})

    def plan(self, log: PlanLog, partition_rows: int, wanted: Callable[[int], bool]) -> Iterator[Planned]:
        """Yield the wanted partitions. Footers are read and the plan extended only on demand.

        Parameters
        ----------
        log
            The plan.
        partition_rows
            Target rows of a partition.
        wanted
            Whether the partition with this index is to be computed now.
        """
        place, done = 0, 0
        for segment in log.segments():
            source = segment.source
            if "error" in source and self._footer(self.files[source["ordinal"]]):
                log.drop_from(segment, source["file"])
                break
            place, done = source["ordinal"], source["first"] + segment.n_rows
            if "error" in source:
                place, done = place + 1, 0
            yield from self._planned(segment, wanted)
        if log.end == "exhausted" or (log.end and log.n_rows == self.n_rows):
            return
        while place < len(self.files) and log.n_rows < self._limit:
            added = self._append(log, place, done, partition_rows)
            place, done = place + 1, 0
            if added is not None:
                yield from self._planned(added, wanted)
        log.close("max_samples" if log.n_rows >= self._limit else "exhausted")

    def _append(self, log: PlanLog, ordinal: int, first: int, partition_rows: int) -> Segment | None:
        """Plan the rest of a file. Return None if it has no more rows."""
        file = self.files[ordinal]
        source: dict[str, Any] = {"kind": "parquet", "ordinal": ordinal, "file": file, "first": first}
        footer = self._footer(file)
        if footer is None:
            return log.append(((1, 0),), {**source, "error": self._broken[file]})
        count = int(min(sum(footer.row_groups) - first, self._limit - log.n_rows))
        if count == 0:
            return None
        state = file_state(file)
        source |= {"size": state.size, "etag": state.etag, "modified": state.modified, "footer": footer.digest}
        self._footers.pop(file, None)
        return log.append(group_cuts(footer.row_groups, first, count, partition_rows), source)

    def _planned(self, segment: Segment, wanted: Callable[[int], bool]) -> Iterator[Planned]:
        source = segment.source
        for partition in segment.partitions():
            self.passed += 1
            if wanted(partition.index):
                rows = FileRows(
                    path=self.files[source["ordinal"]],
                    first=source["first"] + partition.first_row - segment.first_row,
                    n_rows=partition.n_rows,
                    kind="parquet",
                    digest=source.get("footer"),
                )
                yield Planned(partition=partition, files=(rows,), column=self.column, error=source.get("error"))

    def _count(self, file: str) -> int:
        """Return the rows of a file, 0 if it is damaged."""
        footer = self._footer(file)
        return sum(footer.row_groups) if footer else 0

    def _footer(self, file: str) -> Footer | None:
        """Read a footer, cached while needed. None if it is damaged."""
        if file not in self._footers:
            self._footers[file] = self._usable(file, functools.partial(read_footer, file))
        return self._footers[file]

    def _usable(self, file: str, read: Callable[[], _T]) -> _T | None:
        """Read a file when its store answers. Return None if it is damaged."""
        try:
            return patiently(file, read)
        except DatasetError as error:
            self._broken[file] = str(error)
            return None
        except OSError as error:
            raise unreachable(file, error) from error


def _check_state(log: PlanLog, file: str, source: Mapping[str, Any]) -> None:
    """Compare a file with the plan: by its listing, and by its footer if only the modification time differs."""
    old = FileState(size=source["size"], etag=source["etag"], modified=source["modified"])
    state = file_state(file)
    same = state.size == old.size and (not old.etag or not state.etag or old.etag == state.etag)
    if same and state.modified != old.modified:
        same = read_footer(file).digest == source["footer"]
    if not same:
        raise conflict(log.run.path, {f"dataset file {file}": (str(old), str(state))})
