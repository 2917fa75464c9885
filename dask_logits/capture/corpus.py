"""Dataset + tokenizer → token ids of any range of rows, read by each worker from the Arrow files themselves.

The driver opens the dataset, finds the column, hashes the rows that are used and cuts them into slices of files; a
worker reads its slices and tokenises them. No row passes through Dask. A dataset whose rows are not plainly those of
its files (in memory, selected, shuffled, sliced) is written once into the run folder.

This is the home of ``datasets``.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from dask_logits.capture.tokens import TokenizerSpec, tokenize
from dask_logits.config import DatasetConfig, nearest
from dask_logits.errors import DatasetError
from dask_logits.records import Array

if TYPE_CHECKING:
    from datasets import Dataset

_HASH_ROWS = 10_000
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_SAMPLE_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class FileRows:
    """A range of rows of one Arrow file."""

    path: str
    first: int
    n_rows: int


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

    def __init__(self, dataset: Dataset, n_rows: int, column: str) -> None:
        self.dataset = dataset
        self.n_rows = n_rows
        self.column = column

    @property
    def is_text(self) -> bool:
        """Whether rows must be tokenised."""
        return self.column != "input_ids"

    @functools.cached_property
    def content_digest(self) -> str:
        """SHA-256 of the used rows of the used column, however they are chunked or stored."""
        return hash_rows(self.dataset, self.column, self.n_rows)

    @functools.cached_property
    def files(self) -> list[FileRows] | None:
        """The files whose first rows are exactly the used rows, or None if there are none.

        Compared by content: a selected, renamed or concatenated dataset may name files that hold other rows.
        """
        from datasets import concatenate_datasets

        if self.dataset._indices is not None or not self.dataset.cache_files:
            return None
        paths = [entry["filename"] for entry in self.dataset.cache_files]
        mapped = [_open_arrow(path) for path in paths]
        if any(self.column not in part.column_names for part in mapped) or sum(map(len, mapped)) < self.n_rows:
            return None
        whole = concatenate_datasets([part.select_columns([self.column]) for part in mapped])
        if hash_rows(whole, self.column, self.n_rows) != self.content_digest:
            return None
        return [FileRows(path=path, first=0, n_rows=len(part)) for path, part in zip(paths, mapped, strict=True)]

    def sample(self) -> list[tuple[int, Any]]:
        """Return a fixed sample of (row number, row), spread evenly, for estimates."""
        count = min(self.n_rows, _SAMPLE_ROWS)
        rows = [i * self.n_rows // count for i in range(count)]
        return list(zip(rows, self._plain()[rows][self.column], strict=True))

    def rows(self, first: int, count: int) -> list[Any]:
        """Return up to `count` of the used rows."""
        return list(self._plain()[first : min(first + count, self.n_rows)][self.column])

    def _plain(self) -> Dataset:
        """The used column as plain Python values, without a format that was set on the dataset."""
        return self.dataset.with_format(None).select_columns([self.column])

    def materialise(self, folder: Path) -> list[FileRows]:
        """Write the used rows to a folder, or take the ones that are there, and return their files.

        Raises
        ------
        DatasetError
            If the folder holds other rows.
        """
        from datasets import load_from_disk

        if not folder.exists():
            for stale in folder.parent.glob(f".{folder.name}.*"):
                shutil.rmtree(stale)
            aside = folder.with_name(f".{folder.name}.{os.getpid()}")
            self._plain().select(range(self.n_rows)).save_to_disk(str(aside))
            aside.replace(folder)
        saved = load_from_disk(str(folder))
        written = Corpus(saved, len(saved), self.column)
        if written.content_digest != self.content_digest or written.files is None:
            raise DatasetError(f"{folder}: expected the rows this run was made with, got others; delete the folder")
        return written.files


def open_corpus(config: DatasetConfig, dataset: Dataset | None = None) -> Corpus:
    """Open the dataset and find its column.

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

    opened = _load(config) if dataset is None else dataset
    if not isinstance(opened, RegularDataset):
        raise DatasetError(
            f"dataset: expected a datasets.Dataset, got {type(opened).__name__}; choose a split of a DatasetDict, "
            "make a regular dataset of anything else"
        )
    if opened.format["type"] == "custom":
        raise DatasetError("dataset: expected plain rows, got a dataset with a transform; apply it with .map() first")
    n_rows = len(opened) if config.max_samples in (None, "all") else min(len(opened), int(config.max_samples))
    columns = opened.column_names
    column = "input_ids" if "input_ids" in columns else config.text_column
    if column not in columns:
        raise DatasetError(
            f"distillation.dataset.text_column: expected one of the columns {columns}, got {column!r}"
            f"{nearest(column, columns)}"
        )
    if n_rows == 0:
        raise DatasetError(
            "distillation.dataset.name: expected at least one row, got an empty dataset; check the split"
        )
    return Corpus(opened, n_rows, column)


def read_documents(files: Sequence[FileRows], column: str, spec: TokenizerSpec, *, first_row: int) -> list[Array]:
    """Read and tokenise consecutive rows from Arrow files."""
    rows: list[Any] = []
    for file in files:
        rows += _open_arrow(file.path)[file.first : file.first + file.n_rows][column]
    return tokenize(rows, spec, first_row=first_row)


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


def hash_rows(dataset: Dataset, column: str, n_rows: int) -> str:
    """Digest the first rows of a column by content: lengths and values, in order."""
    lengths, values = hashlib.sha256(), hashlib.sha256()
    narrow = dataset.select_columns([column]).with_format("arrow")
    for first in range(0, n_rows, _HASH_ROWS):
        table = narrow[first : min(first + _HASH_ROWS, n_rows)]
        for chunk in _flat_chunks(table[column]):
            lengths.update(chunk[0].tobytes())
            values.update(chunk[1])
    return hashlib.sha256(lengths.digest() + values.digest()).hexdigest()


def _flat_chunks(column: Any) -> Iterator[tuple[Array, bytes]]:
    """Yield each chunk's row lengths (−1 for null) as int64, and its values' bytes."""
    for chunk in column.chunks:
        if any(is_list(chunk.type) for is_list in _LISTS):
            rows = chunk.cast(pa.large_list(pa.int64()))
            yield _lengths(rows), rows.flatten().to_numpy(zero_copy_only=False).astype("<i8").tobytes()
        else:
            rows = chunk.cast(pa.large_binary()) if pa.types.is_binary(chunk.type) else chunk.cast(pa.large_string())
            yield (
                _lengths(rows.cast(pa.large_binary())),
                b"".join(value.as_buffer() for value in rows if value.is_valid),
            )


def _lengths(rows: Any) -> Array:
    import pyarrow.compute as pc

    counts = pc.binary_length(rows) if pa.types.is_large_binary(rows.type) else pc.list_value_length(rows)
    filled: Array = counts.fill_null(-1).to_numpy(zero_copy_only=False).astype("<i8")
    return filled


def _load(config: DatasetConfig) -> Any:
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    name = str(config.name)
    where = f"distillation.dataset.name: expected a dataset, got {name!r}"
    folder = Path(name).expanduser()
    saved = (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()
    try:
        if saved:
            loaded = load_from_disk(str(folder))
        else:
            loaded = load_dataset(
                name,
                config.config_name,
                split=config.split,
                data_files=list(config.data_files) if config.data_files else None,
                revision=config.revision,
                num_proc=config.num_proc if config.data_files is None and not folder.is_dir() else None,
            )
    except StopIteration as error:
        # datasets 5.2 says so of JSON files without a row.
        raise DatasetError(f"{where} without a single row; check data_files") from error
    except (DatasetNotFoundError, DatasetGenerationError, ValueError, OSError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise DatasetError(f"{where}: {reason}; correct the name, config_name, split or data_files") from error
    if saved and isinstance(loaded, Dataset) and config.split != "train":
        raise DatasetError(
            f"distillation.dataset.split: expected 'train' for the saved dataset {name!r}, which has no splits, got "
            f"{config.split!r}; save the part, or use dataset.max_samples"
        )
    if isinstance(loaded, DatasetDict):
        if config.split not in loaded:
            raise DatasetError(
                f"distillation.dataset.split: expected one of {list(loaded)}, got {config.split!r}"
                f"{nearest(config.split, list(loaded))}"
            )
        loaded = loaded[config.split]
    return loaded


def _open_arrow(path: str) -> Any:
    state = Path(path).stat()
    return _map_arrow(path, state.st_ino, state.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _map_arrow(path: str, inode: int, changed: int) -> Any:
    """Map an Arrow file; the state is part of the key, because a worker may outlive the file of an earlier run."""
    from datasets import Dataset

    return Dataset.from_file(path)
