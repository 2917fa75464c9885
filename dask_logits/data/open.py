"""Open a dataset as a stream: Parquet files in place, all other data through one reader."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dask_logits.config.checks import UNBOUNDED_STREAM
from dask_logits.config.groups import DatasetConfig
from dask_logits.data.find import FoundFiles, find_files, is_saved
from dask_logits.data.hub import pinned_commit
from dask_logits.data.load import load_by_library
from dask_logits.data.parquet import ParquetStream
from dask_logits.data.parquet_files import all_batches, file_state
from dask_logits.data.splits import refuse_splits, stream_parts
from dask_logits.data.stream import RowStream
from dask_logits.data.text_files import read_file
from dask_logits.data.values import python_rows
from dask_logits.errors import ConfigError, DatasetError


def is_stream(dataset: Any) -> bool:
    """Whether an object is a stream of rows: an ``IterableDataset``, an iterator or a generator."""
    from datasets import IterableDataset

    return isinstance(dataset, IterableDataset | Iterator)


def open_stream(config: DatasetConfig, dataset: Any = None, commit: str | None = None) -> ParquetStream | RowStream:
    """Open a stream and find its column.

    Parameters
    ----------
    config
        Dataset, column and limit. Only the latter two are used if `dataset` is given.
    dataset
        An ``IterableDataset``, or an iterator over rows (mappings or plain texts).
    commit
        Hub commit to which a run is pinned.

    Raises
    ------
    DatasetError
        If the dataset is missing or empty, or lacks the column.
    ConfigError
        If no limit is set.
    """
    if config.max_samples is None:
        raise ConfigError.from_problems(UNBOUNDED_STREAM)
    if dataset is not None:
        refuse_splits(dataset)
        return RowStream([dataset], config, {"dataset.stream": "object"})
    name = str(config.name)
    identity: dict[str, Any] = {
        "dataset.name": name,
        "dataset.config_name": config.config_name,
        "dataset.split": config.split,
        "dataset.revision": config.revision,
        "dataset.data_files": list(config.data_files) if config.data_files else None,
    }
    if commit is not None:
        config = config.model_copy(update={"revision": commit})
    if is_saved(name):
        arrow = sorted(str(path) for path in Path(name).expanduser().rglob("*.arrow"))
        return RowStream([load_by_library(config, streaming=True)], config, identity, file_states=_states(arrow))
    found = find_files(config)
    parts = stream_parts(config.split, list(found.files))
    files = [file for split, _, _ in parts for file in found.files[split]]
    if not files:
        raise DatasetError(f"distillation.dataset.name: expected files of {name!r}, got none; check data_files")
    whole = all(first == 0 and last is None for _, first, last in parts)
    if found.reader == "parquet" and found.is_ours and whole:
        return ParquetStream(files, config, identity)
    rows = itertools.chain.from_iterable(
        _sliced(_readable(found, split, config), first, last) for split, first, last in parts
    )
    return RowStream(rows, config, identity, commit=pinned_commit(files), file_states=_states(files))


def _readable(found: FoundFiles, split: str, config: DatasetConfig) -> list[Iterable[Any]]:
    """Return the parts of a split that are read independently, in order. For most readers these are its files."""
    if found.is_ours:
        return [_rows(found, file) for file in found.files[split]]
    stream = load_by_library(config.model_copy(update={"split": split}), streaming=True)
    count = stream.num_shards
    return [stream.shard(count, index) for index in range(count)] if count > 1 else [stream]


def _rows(found: FoundFiles, file: str) -> Iterable[Any]:
    if found.reader == "parquet":
        return (row for batch in all_batches(file) for row in python_rows(batch))
    return read_file(found, file)


def _sliced(files: Sequence[Iterable[Any]], first: int, last: int | None) -> Sequence[Iterable[Any]]:
    whole = first == 0 and last is None
    return files if whole else [itertools.islice(itertools.chain.from_iterable(files), first, last)]


def _states(files: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{Path(file).name}: {file_state(file)}" for file in files)
