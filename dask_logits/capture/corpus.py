"""A regular dataset → slices of its Arrow files, which each worker reads itself.

The driver opens the dataset, finds the column, hashes the rows that are used and cuts them into slices of files. No row
passes through Dask. A dataset whose rows are not plainly those of its files (in memory, selected, shuffled, sliced) is
written once into the run folder.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dask_logits.capture.load import choose_column, prepare_dataset
from dask_logits.capture.rows import FileRows, Planned, RowsDigest, open_arrow
from dask_logits.config import DatasetConfig
from dask_logits.errors import DatasetError
from dask_logits.job.manifest import RunFolder, conflict
from dask_logits.job.plan import uniform_cuts
from dask_logits.job.planlog import PlanLog
from dask_logits.store.lease import lease

if TYPE_CHECKING:
    from datasets import Dataset

_HASH_ROWS = 10_000
_SAMPLE_ROWS = 256
_DATASET_LOCK = ".materialise.lock"


class Corpus:
    """An opened dataset: the rows that are used, and where workers find them.

    Parameters
    ----------
    dataset
        All rows.
    n_rows
        Rows used, from the first.
    column
        ``input_ids`` or the text column.
    """

    streams = False
    commit: str | None = None
    file_states: tuple[str, ...] = ()

    def __init__(self, dataset: Dataset, n_rows: int, column: str) -> None:
        self.dataset = dataset
        self.n_rows = n_rows
        self.column = column
        # Partitions passed so far, wanted or not.
        self.passed = 0
        self._digests: dict[tuple[int, int], str] = {}

    @property
    def is_text(self) -> bool:
        """Whether rows must be tokenised."""
        return self.column != "input_ids"

    @property
    def content_digest(self) -> str:
        """SHA-256 of the used rows of the used column, however they are chunked or stored."""
        return self._digest(0, self.n_rows)

    def _digest(self, first: int, n_rows: int) -> str:
        """Hash a range of rows, once."""
        if (first, n_rows) not in self._digests:
            self._digests[first, n_rows] = hash_rows(self.dataset, self.column, first, n_rows)
        return self._digests[first, n_rows]

    @functools.cached_property
    def files(self) -> list[FileRows] | None:
        """The files whose first rows are exactly the used rows, or None if there are none.

        Compared by content: a selected, renamed or concatenated dataset may name files that hold other rows.
        """
        from datasets import concatenate_datasets

        if self.dataset._indices is not None or not self.dataset.cache_files:
            return None
        paths = [entry["filename"] for entry in self.dataset.cache_files]
        mapped = [open_arrow(path) for path in paths]
        if any(self.column not in part.column_names for part in mapped) or sum(map(len, mapped)) < self.n_rows:
            return None
        whole = concatenate_datasets([part.select_columns([self.column]) for part in mapped])
        if hash_rows(whole, self.column, 0, self.n_rows) != self.content_digest:
            return None
        return [FileRows(path=path, first=0, n_rows=len(part)) for path, part in zip(paths, mapped, strict=True)]

    def identity(self) -> dict[str, Any]:
        """Return what tells this dataset from others beside its rows, which the plan knows by their content."""
        return {}

    def check(self, log: PlanLog) -> None:
        """Refuse rows that are not the ones a run was planned with.

        Raises
        ------
        RunConflictError
            If rows differ, or there are fewer or more than the run allows for.
        """
        for segment in log.segments():
            last = segment.first_row + segment.n_rows
            if last > self.n_rows:
                raise conflict(log.run.path, {"dataset.max_samples": (last, self.n_rows)})
            found = self._digest(segment.first_row, segment.n_rows)
            if found != segment.source["content"]:
                raise conflict(log.run.path, {"dataset.content": (segment.source["content"], found)})
        if log.end == "exhausted" and self.n_rows > log.n_rows:
            raise conflict(log.run.path, {"dataset.rows": (log.n_rows, self.n_rows)})

    def plan(self, log: PlanLog, partition_rows: int, wanted: Callable[[int], bool]) -> Iterator[Planned]:
        """Plan all rows, and yield the partitions that are wanted.

        Parameters
        ----------
        log
            The plan; what it lacks is appended.
        partition_rows
            Rows of a partition.
        wanted
            Whether a partition of this index is to be computed now.
        """
        if log.n_rows < self.n_rows:
            count = self.n_rows - log.n_rows
            content = self._digest(log.n_rows, count)
            log.append(uniform_cuts(count, partition_rows), {"kind": "rows", "content": content})
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
        """Return a fixed sample of (row number, row), spread evenly, for estimates."""
        count = min(self.n_rows, _SAMPLE_ROWS)
        rows = [i * self.n_rows // count for i in range(count)]
        return list(zip(rows, self._plain()[rows][self.column], strict=True))

    def head(self) -> Iterator[Any]:
        """Yield the used rows from the first, for the calibration."""
        plain = self._plain()
        for first in range(0, self.n_rows, _SAMPLE_ROWS):
            yield from plain[first : min(first + _SAMPLE_ROWS, self.n_rows)][self.column]

    def _plain(self) -> Dataset:
        """The used column as plain Python values, without a format that was set on the dataset."""
        return self.dataset.with_format(None).select_columns([self.column])

    def _materialise(self, run: RunFolder) -> list[FileRows]:
        # Static workers may all need it at once.
        with lease(run.path / _DATASET_LOCK, wait=True):
            return self.materialise(run.dataset_path)

    def materialise(self, folder: Path) -> list[FileRows]:
        """Write the used rows to a folder, or take the ones that are there, and return their files.

        Raises
        ------
        DatasetError
            If the folder holds other rows.
        """
        from datasets import load_from_disk

        there = 0
        with contextlib.suppress(OSError, ValueError, KeyError):
            # What is there may be cut off, or only a part of it.
            there = len(load_from_disk(str(folder)))
        if there < self.n_rows:
            for stale in folder.parent.glob(f".{folder.name}.*"):
                shutil.rmtree(stale)
            aside = folder.with_name(f".{folder.name}.{os.getpid()}")
            self._plain().select(range(self.n_rows)).save_to_disk(str(aside))
            shutil.rmtree(folder, ignore_errors=True)
            aside.replace(folder)
        written = Corpus(load_from_disk(str(folder)), self.n_rows, self.column)
        if written.content_digest != self.content_digest or written.files is None:
            raise DatasetError(f"{folder}: expected the rows this run was made with, got others; delete the folder")
        return written.files


def open_corpus(config: DatasetConfig, dataset: Dataset | None = None) -> Corpus:
    """Open a regular dataset and find its column.

    Parameters
    ----------
    config
        Which dataset and column; only the column settings matter if `dataset` is given.
    dataset
        An opened dataset.

    Raises
    ------
    DatasetError
        If the dataset is missing or empty or lacks the column.
    """
    from datasets import Dataset as RegularDataset

    if dataset is None:
        opened = prepare_dataset(
            str(config.name),
            config_name=config.config_name,
            split=config.split,
            data_files=config.data_files,
            revision=config.revision,
            num_proc=config.num_proc,
        )
    else:
        opened = dataset
    if not isinstance(opened, RegularDataset):
        raise DatasetError(
            f"dataset: expected a datasets.Dataset or a stream of rows, got {type(opened).__name__}; choose a split of "
            "a DatasetDict, make a dataset of anything else"
        )
    if opened.format["type"] == "custom":
        raise DatasetError("dataset: expected plain rows, got a dataset with a transform; apply it with .map() first")
    n_rows = len(opened) if config.max_samples in (None, "all") else min(len(opened), int(config.max_samples))
    if n_rows == 0:
        raise DatasetError(
            "distillation.dataset.name: expected at least one row, got an empty dataset; check the split"
        )
    return Corpus(opened, n_rows, choose_column(opened.column_names, config.text_column))


def slice_files(files: Sequence[FileRows], first: int, n_rows: int) -> tuple[FileRows, ...]:
    """Cut the range of rows [first, first + n_rows) out of consecutive files.

    >>> parts = [FileRows(path="a", first=0, n_rows=3), FileRows(path="b", first=0, n_rows=4)]
    >>> [(part.path, part.first, part.n_rows) for part in slice_files(parts, 2, 3)]
    [('a', 2, 1), ('b', 0, 2)]
    """
    starts = [0, *itertools.accumulate(file.n_rows for file in files)]
    pieces = []
    i = bisect.bisect_right(starts, first) - 1
    while n_rows > 0 and i < len(files):
        skip = first - starts[i]
        taken = min(n_rows, files[i].n_rows - skip)
        if taken > 0:
            pieces.append(FileRows(path=files[i].path, first=files[i].first + skip, n_rows=taken))
        first, n_rows, i = first + taken, n_rows - taken, i + 1
    return tuple(pieces)


def hash_rows(dataset: Dataset, column: str, first: int, n_rows: int) -> str:
    """Digest a range of rows of a column by content."""
    digest = RowsDigest()
    narrow = dataset.select_columns([column]).with_format("arrow")
    for start in range(first, first + n_rows, _HASH_ROWS):
        digest.update(narrow[start : min(start + _HASH_ROWS, first + n_rows)][column])
    return digest.hexdigest()
