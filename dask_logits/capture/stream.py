"""Open a dataset as a stream: Parquet files in place, anything else through one reader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dask_logits.capture.load import is_saved, open_builder, pinned_commit, prepare_dataset, shards
from dask_logits.capture.parquet import file_state
from dask_logits.capture.parquet_stream import ParquetStream
from dask_logits.capture.row_stream import RowStream
from dask_logits.config import UNBOUNDED_STREAM, DatasetConfig
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
        Which dataset, column and bound; only the latter two matter if `dataset` is given.
    dataset
        An ``IterableDataset``, or an iterator over rows (mappings, or plain texts).
    commit
        Hub commit that a run is pinned to.

    Raises
    ------
    DatasetError
        If the dataset is missing or empty or lacks the column.
    ConfigError
        If nothing says how far to read.
    """
    if config.max_samples is None:
        raise ConfigError.from_problems([UNBOUNDED_STREAM])
    limit = None if config.max_samples == "all" else int(config.max_samples)
    if dataset is not None:
        return RowStream([dataset], config.text_column, limit, {"dataset.stream": "object"})
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
        return RowStream([saved], config.text_column, limit, identity, file_states=_states(arrow))
    builder, files = open_builder(name, config.config_name, config.split, config.data_files, commit or config.revision)
    if not files:
        raise DatasetError(f"distillation.dataset.name: expected files of {name!r}, got none; check data_files")
    if builder.name == "parquet":
        return ParquetStream(files, config.text_column, limit, identity)
    opened = prepare_dataset(
        name,
        config_name=config.config_name,
        split=config.split,
        data_files=config.data_files,
        revision=commit or config.revision,
        streaming=True,
    )
    return RowStream(
        shards(opened),
        config.text_column,
        limit,
        identity,
        commit=pinned_commit(files),
        file_states=_states(files),
    )


def _states(files: Sequence[str]) -> tuple[str, ...]:
    states = ((Path(file).name, file_state(file)) for file in files)
    return tuple(f"{name}: {state.size} bytes, etag {state.etag}" for name, state in states)
