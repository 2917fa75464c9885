"""A regular dataset as slices of Arrow files, which each worker reads itself.

The driver opens the dataset, finds the column, hashes the used rows and cuts them into slices of files. No row passes
through Dask. If the rows differ from those of the dataset's files (in memory, selected, shuffled, sliced), they are
written once into the run folder.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dask_logits.config.groups import DatasetConfig
from dask_logits.data.columns import TEXT, Column, choose_column
from dask_logits.data.load import load_rows
from dask_logits.data.source import SAMPLE_ROWS, FileRows, Planned, RowsDigest, Source, open_arrow
from dask_logits.data.splits import refuse_splits
from dask_logits.data.values import PROBLEM, arrow_values, row_value, type_problem, value_table
from dask_logits.errors import DatasetError
from dask_logits.files.lock import lease
from dask_logits.run.folder import RunFolder, conflict
from dask_logits.run.plan import Segment, uniform_cuts
from dask_logits.run.plan_log import PlanLog

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_HASH_ROWS = 10_000
_DATASET_LOCK = ".materialise.lock"


class Corpus(Source):
    """An opened dataset: its used rows, and their location for workers.

    Parameters
    ----------
    dataset
        The dataset with all rows.
    n_rows
        Number of rows used, from the first.
    column
        The column of the documents.
    repairs
        Whether rows that could not be used may have been repaired since they were planned.
    """

    streams = False
    n_rows: int

    def __init__(self, dataset: Dataset, n_rows: int, column: Column, *, repairs: bool = False) -> None:
        self.dataset = dataset
        self.n_rows = n_rows
        self.column = column
        self.repairs = repairs
        names = dataset.column_names
        # Columns that identify rows by content. A reader's notes on bad rows are kept separately.
        self._content = [column.name, *(name for name in column.beside if name in names)]
        self._used = [*self._content, *(name for name in (PROBLEM,) if name in names)]
        self._digests: dict[tuple[int, int], str] = {}

    @property
    def content_digest(self) -> str:
        """SHA-256 of the used rows of the used column, independent of chunks and storage."""
        return self._digest(0, self.n_rows)

    def _digest(self, first: int, n_rows: int) -> str:
        """Hash a range of rows, once."""
        if (first, n_rows) not in self._digests:
            self._digests[first, n_rows] = self._hashed(self.dataset, first, n_rows)
        return self._digests[first, n_rows]

    def _hashed(self, dataset: Dataset, first: int, n_rows: int, without: frozenset[int] = frozenset()) -> str:
        made = self.column if self.column.kind == "chat" or self.column.mask else None
        return hash_rows(dataset, self._used if made else self._content, first, n_rows, without=without, made=made)

    @functools.cached_property
    def files(self) -> list[FileRows] | None:
        """The files whose first rows are exactly the used rows, or None.

        The content is compared, because a selected, renamed or concatenated dataset may name files with other rows.
        """
        from datasets import concatenate_datasets

        if not self.dataset.cache_files:
            return None
        paths = [entry["filename"] for entry in self.dataset.cache_files]
        mapped = [open_arrow(path) for path in paths]
        if any(set(self._used) - set(part.column_names) for part in mapped) or sum(map(len, mapped)) < self.n_rows:
            return None
        whole = concatenate_datasets([part.select_columns(self._used) for part in mapped])
        if self._hashed(whole, 0, self.n_rows) != self.content_digest:
            return None
        return [FileRows(path=path, first=0, n_rows=len(part)) for path, part in zip(paths, mapped, strict=True)]

    def check(self, log: PlanLog) -> None:
        """Refuse rows that differ from the planned rows of a run.

        Raises
        ------
        RunConflictError
            If rows differ, or their number is outside the range that the run allows.
        """
        for segment in log.segments():
            last = segment.first_row + segment.n_rows
            if last > self.n_rows:
                raise conflict(log.run.path, {"dataset.max_samples": (last, self.n_rows)})
            found = self._digest(segment.first_row, segment.n_rows)
            if found != segment.source["content"] and not self._is_repaired(segment):
                raise conflict(log.run.path, {"dataset.content": (segment.source["content"], found)})
        if log.end == "exhausted" and self.n_rows > log.n_rows:
            raise conflict(log.run.path, {"dataset.rows": (log.n_rows, self.n_rows)})

    def _bad_rows(self, first: int, n_rows: int) -> list[int]:
        """Return the rows of a range that a reader marked as bad."""
        if PROBLEM not in self._used:
            return []
        problems = self.dataset.with_format("arrow").select_columns([PROBLEM])[first : first + n_rows][PROBLEM]
        return [first + i for i, problem in enumerate(problems.to_pylist()) if problem is not None]

    def _is_repaired(self, segment: Segment) -> bool:
        """Whether rows differ from the plan, and only unusable ones."""
        bad, content = segment.source.get("bad_rows"), segment.source["content"]
        if not bad or not self.repairs or self._digest(segment.first_row, segment.n_rows) == content:
            return False
        found = self._hashed(self.dataset, segment.first_row, segment.n_rows, without=frozenset(bad))
        return bool(found == content)

    def _source(self, first: int, n_rows: int) -> dict[str, Any]:
        source: dict[str, Any] = {"kind": "rows", "content": self._digest(first, n_rows)}
        bad = self._bad_rows(first, n_rows)
        return {**source, "bad_rows": bad} if bad else source

    def plan(self, log: PlanLog, partition_rows: int, wanted: Callable[[int], bool]) -> Iterator[Planned]:
        """Plan all rows, and yield the wanted partitions.

        Parameters
        ----------
        log
            The plan. Missing segments are appended.
        partition_rows
            Rows of a partition.
        wanted
            Whether the partition with this index is to be computed now.
        """
        for segment in list(log.segments()):
            if self._is_repaired(segment):
                logger.warning("rows that could not be used have been repaired: their partitions are computed")
                log.update_source(segment, self._source(segment.first_row, segment.n_rows))
                shutil.rmtree(log.run.dataset_path, ignore_errors=True)
        if log.n_rows < self.n_rows:
            count = self.n_rows - log.n_rows
            log.append(uniform_cuts(count, partition_rows), self._source(log.n_rows, count))
        log.close("exhausted" if self.n_rows == len(self.dataset) else "max_samples")
        files: list[FileRows] = []
        for partition in log.partitions():
            self.passed += 1
            if wanted(partition.index):
                files = files or self.files or self._materialise(log.run)
                yield Planned(
                    partition=partition,
                    files=slice_files(files, partition.first_row, partition.n_rows),
                    column=self.column,
                )

    def sample(self) -> list[tuple[int, Any]]:
        """Return a fixed, evenly spread sample of (row number, row), for estimates."""
        count = min(self.n_rows, SAMPLE_ROWS)
        rows = [i * self.n_rows // count for i in range(count)]
        return list(zip(rows, self._values(rows), strict=True))

    def head(self) -> Iterator[Any]:
        """Yield the used rows from the first, for the calibration."""
        for first in range(0, self.n_rows, SAMPLE_ROWS):
            yield from self._values(range(first, min(first + SAMPLE_ROWS, self.n_rows)))

    def _values(self, rows: Sequence[int]) -> list[Any]:
        """Return texts, token ids or bad rows."""
        return arrow_values(self._plain().with_format("arrow")[rows], self.column)

    def _plain(self) -> Dataset:
        """The used columns, without the dataset's format."""
        return self.dataset.with_format(None).select_columns(self._used)

    def _materialise(self, run: RunFolder) -> list[FileRows]:
        # Static workers may all need the files at the same time.
        with lease(run.path / _DATASET_LOCK, wait=True):
            return self.materialise(run.dataset_path)

    def materialise(self, folder: Path) -> list[FileRows]:
        """Write the used rows to a folder, or reuse existing files, and return the files.

        Raises
        ------
        DatasetError
            If the folder holds other rows.
        """
        from datasets import load_from_disk

        there = 0
        with contextlib.suppress(OSError, ValueError, KeyError):
            # Existing files may be truncated or incomplete.
            there = len(load_from_disk(str(folder)))
        if there < self.n_rows:
            for stale in folder.parent.glob(f".{folder.name}.*"):
                shutil.rmtree(stale)
            aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
            try:
                self._plain().select(range(self.n_rows)).save_to_disk(str(aside))
                shutil.rmtree(folder, ignore_errors=True)
                aside.replace(folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        written = Corpus(load_from_disk(str(folder)), self.n_rows, self.column)
        if written.content_digest != self.content_digest or written.files is None:
            raise DatasetError(f"{folder}: expected the rows this run was made with, got others; delete the folder")
        return written.files


def open_corpus(config: DatasetConfig, dataset: Dataset | None = None) -> Corpus:
    """Open a regular dataset and find its column.

    Parameters
    ----------
    config
        Dataset and column settings. Only the column settings are used if `dataset` is given.
    dataset
        An opened dataset.

    Raises
    ------
    DatasetError
        If the dataset is missing or empty, or lacks the column.
    """
    from datasets import Dataset as RegularDataset

    if dataset is None:
        opened = load_rows(config)
    else:
        opened = _from_rows(dataset, config) if isinstance(dataset, list | tuple) else dataset
    refuse_splits(opened)
    if not isinstance(opened, RegularDataset):
        raise DatasetError(
            f"dataset: expected a datasets.Dataset, a list or a stream of rows, got {type(opened).__name__}; make a "
            "dataset of it, for instance with datasets.Dataset.from_pandas"
        )
    if opened.format["type"] == "custom":
        raise DatasetError("dataset: expected plain rows, got a dataset with a transform; apply it with .map() first")
    n_rows = len(opened) if config.row_limit is None else min(len(opened), config.row_limit)
    if n_rows == 0:
        raise DatasetError(
            "distillation.dataset.name: expected at least one row, got an empty dataset; check the split"
        )
    names = opened.column_names
    column = choose_column([name for name in names if name != PROBLEM], config, is_converted=PROBLEM in names)
    where = f"distillation.dataset.{'messages' if column.kind == 'chat' else 'text'}_column"
    if column.name not in names:
        opened = opened.flatten()
        if column.name not in opened.column_names:
            raise DatasetError(f"{where}: expected one of the fields {opened.column_names}, got {column.name!r}")
    problem = type_problem(opened.data.schema.field(column.name).type, column)
    if problem is not None:
        first = opened.with_format(None).select_columns([column.name])[0][column.name]
        expected = {"ids": "lists of integers", "text": "texts", "chat": "lists of messages, or texts with their JSON"}
        reason = row_value({column.name: first}, column)
        raise DatasetError(
            f"{where}: expected {expected[column.kind]} in the column {column.name!r}, got {problem}; dataset row 0: "
            f"{getattr(reason, 'reason', repr(first)[:80])}"
        )
    return Corpus(opened, n_rows, column, repairs=config.on_bad_row == "fail")


def _from_rows(rows: Sequence[Any], config: DatasetConfig) -> Dataset:
    """Build a dataset from a list of texts or mappings, with only the used column of mappings."""
    from datasets import Dataset as RegularDataset

    wrong = next((row for row in rows if not isinstance(row, str | Mapping)), None)
    if wrong is not None:
        raise DatasetError(
            f"dataset: expected a list of texts or of dicts, got {type(wrong).__name__} {wrong!r:.80} in it; make each "
            "row a text, or a dict with a text or input_ids column"
        )
    names = dict.fromkeys(name for row in rows if isinstance(row, Mapping) for name in row)
    column = choose_column(list(names) or [config.text_column or TEXT], config)
    return RegularDataset(value_table([row_value(row, column) for row in rows], column))


def slice_files(files: Sequence[FileRows], first: int, n_rows: int) -> tuple[FileRows, ...]:
    """Cut the range of rows [first, first + n_rows) out of consecutive files.

    >>> parts = [FileRows(path="a", first=0, n_rows=3), FileRows(path="b", first=0, n_rows=4)]
    >>> [(part.path, part.first, part.n_rows) for part in slice_files(parts, 2, 3)]
    [('a', 2, 1), ('b', 0, 2)]
    """
    pieces, start = [], 0
    for file in files:
        low, high = max(0, first - start), min(file.n_rows, first + n_rows - start)
        if low < high:
            pieces.append(FileRows(path=file.path, first=file.first + low, n_rows=high - low))
        start += file.n_rows
    return tuple(pieces)


def hash_rows(
    dataset: Dataset,
    columns: Sequence[str],
    first: int,
    n_rows: int,
    *,
    without: frozenset[int] = frozenset(),
    made: Column | None = None,
) -> str:
    """Digest a range of rows of some columns by content.

    Parameters
    ----------
    dataset, columns, first, n_rows
        The rows.
    without
        Rows that count as rows without a value.
    made
        Column whose values are made of the columns. None: the columns themselves are compared.
    """
    digests = {name: RowsDigest() for name in (columns if made is None else [made.name])}
    narrow = dataset.select_columns(list(columns)).with_format("arrow")
    unused = np.array(sorted(without), np.int64)
    for start in range(first, first + n_rows, _HASH_ROWS):
        table = narrow[start : min(start + _HASH_ROWS, first + n_rows)]
        if made is not None:
            table = value_table(arrow_values(table, made), made)
        kept = np.ones(len(table), bool)
        kept[unused[slice(*np.searchsorted(unused, (start, start + len(table))))] - start] = False
        for name, digest in digests.items():
            column = table[name]
            digest.update(column if kept.all() else pc.if_else(kept, column, pa.scalar(None, column.type)))
    found = [digest.hexdigest() for digest in digests.values()]
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()
