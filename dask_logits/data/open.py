"""Open a dataset as a stream: Parquet files in place, all other data through one reader."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dask_logits.config.checks import UNBOUNDED_STREAM
from dask_logits.config.groups import DatasetConfig
from dask_logits.data.arrow_cache import file_rows
from dask_logits.data.columns import ColumnSettings
from dask_logits.data.find import FoundFiles, check_exists, find_files, is_saved
from dask_logits.data.hub import pinned_commit
from dask_logits.data.load import prepare_dataset
from dask_logits.data.parquet import ParquetStream
from dask_logits.data.parquet_files import all_batches, file_state
from dask_logits.data.splits import refuse_splits, stream_parts
from dask_logits.data.stream import RowStream
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
    limit = None if config.max_samples == "all" else int(config.max_samples)
    wanted, skips = ColumnSettings.of(config), config.on_bad_row == "skip"
    if dataset is not None:
        refuse_splits(dataset)
        return RowStream([dataset], wanted, limit, {"dataset.stream": "object"}, skips=skips)
    name = str(config.name)
    identity: dict[str, Any] = {
        "dataset.name": name,
        "dataset.config_name": config.config_name,
        "dataset.split": config.split,
        "dataset.revision": config.revision,
        "dataset.data_files": list(config.data_files) if config.data_files else None,
    }
    if is_saved(name):
        saved = prepare_dataset(name, split=config.split, streaming=True)
        arrow = sorted(str(path) for path in Path(name).expanduser().rglob("*.arrow"))
        return RowStream([saved], wanted, limit, identity, file_states=_states(arrow), skips=skips)
    check_exists(name, config.data_files)
    found = find_files(name, config.config_name, config.data_files, commit or config.revision)
    parts = stream_parts(config.split, list(found.files))
    files = [file for split, _, _ in parts for file in found.files[split]]
    if not files:
        raise DatasetError(f"distillation.dataset.name: expected files of {name!r}, got none; check data_files")
    whole = all(first == 0 and last is None for _, first, last in parts)
    if found.reader == "parquet" and found.is_ours and whole:
        return ParquetStream(files, wanted, limit, identity)
    rows: Iterable[Any]
    if found.is_ours:
        rows = _file_parts(found, parts)
    else:
        rows = itertools.chain.from_iterable(
            _sliced(list(_shards(_opened(config, split, commit))), first, last) for split, first, last in parts
        )
    return RowStream(
        rows,
        wanted,
        limit,
        identity,
        commit=pinned_commit(files),
        file_states=_states(files),
        skips=skips,
    )


def _opened(config: DatasetConfig, split: str, commit: str | None) -> Any:
    return prepare_dataset(
        str(config.name),
        config_name=config.config_name,
        split=split,
        data_files=config.data_files,
        revision=commit or config.revision,
        streaming=True,
    )


def _file_parts(found: FoundFiles, parts: Sequence[tuple[str, int, int | None]]) -> Iterator[Iterable[Any]]:
    """Yield the rows of each file, or of each slice of a split."""
    for split, first, last in parts:
        files = [_rows(found, file) for file in found.files[split]]
        yield from _sliced(files, first, last)


def _rows(found: FoundFiles, file: str) -> Iterable[Any]:
    if found.reader == "parquet":
        return (row for batch in all_batches(file) for row in python_rows(batch))
    return file_rows(file, found.reader, found.separator)


def _sliced(files: Sequence[Iterable[Any]], first: int, last: int | None) -> Sequence[Iterable[Any]]:
    whole = first == 0 and last is None
    return files if whole else [itertools.islice(itertools.chain.from_iterable(files), first, last)]


def _states(files: Sequence[str]) -> tuple[str, ...]:
    states = ((Path(file).name, file_state(file)) for file in files)
    return tuple(f"{name}: {state.size} bytes, etag {state.etag}" for name, state in states)


def _shards(stream: Any) -> Iterator[Any]:
    """Yield the independently readable parts of a stream, in order. For most readers these are its files."""
    count = stream.num_shards
    for index in range(count):
        yield stream.shard(count, index) if count > 1 else stream
