"""Load datasets by name, as regular datasets or streams, optionally tokenized.

:func:`prepare_dataset` is the public function. Text and Parquet files are read by :mod:`dask_logits.data.arrow_cache`.
All other formats are loaded by ``datasets``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from dask_logits.config.groups import DatasetConfig
from dask_logits.data.arrow_cache import arrow_file
from dask_logits.data.columns import IDS, choose_column
from dask_logits.data.find import call_datasets, expanded, find_files, full_cache, is_hub, is_saved, translated
from dask_logits.data.hub import downloaded
from dask_logits.data.splits import names_in, picked
from dask_logits.data.tokens import encode
from dask_logits.data.values import PROBLEM, BadRow, arrow_values
from dask_logits.errors import DatasetError
from dask_logits.files.atomic import replace_json


def prepare_dataset(
    name: str,
    tokenizer: Any = None,
    *,
    config_name: str | None = None,
    split: str = "train",
    data_files: str | Sequence[str] | None = None,
    revision: str | None = None,
    text_column: str | None = None,
    max_length: int | None = 2048,
    max_samples: int | str | None = None,
    add_special_tokens: bool = True,
    streaming: bool = False,
    num_proc: int | None = None,
) -> Any:
    """Load a dataset and tokenize it for language modelling.

    Parameters
    ----------
    name
        Hub name, a ``save_to_disk`` folder, a folder of files, or ``json``, ``csv``, ``text``, ``parquet``, … with
        `data_files`.
    tokenizer
        A Hugging Face tokenizer. None: rows are unchanged.
    config_name, split, data_files, revision
        Selection of the rows.
    text_column
        Column with the documents. None: ``text``, or ``input_ids`` if there is no ``text``.
    max_length
        Tokens kept of a document. None: all.
    max_samples
        Rows kept, from the first. None or ``all``: all.
    add_special_tokens
        Whether the tokenizer adds its special tokens.
    streaming
        Return an ``IterableDataset``, which reads during iteration.
    num_proc
        Processes that download and tokenize. None: this one.

    Returns
    -------
    datasets.Dataset or datasets.IterableDataset
        With a single column ``input_ids`` if a tokenizer is given.

    Raises
    ------
    DatasetError
        If the dataset, split or column does not exist.
    """
    if isinstance(data_files, Mapping):
        raise DatasetError(
            f"data_files: expected a path or a list of paths, got a dict with {list(data_files)}; give the paths of "
            "one split"
        )
    files = (data_files,) if isinstance(data_files, str) else data_files
    # Not validated: these are arguments of a function, with types of its own.
    config = DatasetConfig.model_construct(
        name=name,
        config_name=config_name,
        split=split,
        data_files=files,
        revision=revision,
        text_column=text_column,
        num_proc=num_proc,
    )
    loaded = load_by_library(config, streaming=streaming) if tokenizer is None or streaming else load_rows(config)
    loaded = _first(loaded, max_samples, streaming)
    if tokenizer is None:
        return loaded
    columns = loaded.column_names or list(next(iter(loaded), {}))
    column = choose_column([name for name in columns if name != PROBLEM], config)

    def tokens(rows: Any) -> pa.Table:
        values = arrow_values(rows, column)
        bad = next((value for value in values if isinstance(value, BadRow)), None)
        if bad is not None:
            raise DatasetError(f"{bad.reason}; fix the row")
        if column.kind == "ids":
            return _ids_table([value if isinstance(value, list) else [] for value in values])
        texts = [value for value in values if isinstance(value, str) and value]
        ids = iter(encode(tokenizer, texts, add_special_tokens, max_length))
        return _ids_table([next(ids) if value else [] for value in values])

    workers = {} if streaming else {"num_proc": num_proc, "desc": "tokenising"}
    return (
        loaded.with_format("arrow").map(tokens, batched=True, remove_columns=list(columns), **workers).with_format(None)
    )


def load_rows(config: DatasetConfig) -> Any:
    """Load a regular dataset. Only the used column of text and Parquet files is loaded.

    Returns
    -------
    datasets.Dataset

    Raises
    ------
    DatasetError
        If the dataset, split or column does not exist.
    """
    from datasets import Dataset
    from datasets import config as datasets_config

    if is_saved(str(config.name)):
        return load_by_library(config)
    folder = Path(datasets_config.HF_DATASETS_CACHE) / "dask_logits"
    on_hub = is_hub(str(config.name))
    columns = [config.text_column, config.messages_column, config.mask_column]
    asked = json.dumps([config.name, config.config_name, config.revision, config.data_files, *columns])
    memory = folder / "hub" / f"{hashlib.sha256(asked.encode()).hexdigest()[:32]}.json"
    try:
        found = find_files(config)
    except DatasetError:
        if not on_hub:
            raise
        known = _remembered(memory)
        if not set(names_in(config.split)) <= known.keys():
            # The library may have prepared it earlier.
            return load_by_library(config)
        return picked(config.split, list(known), lambda key: Dataset.from_file(known[key]))
    if not found.is_ours or (on_hub and found.reader == "parquet"):
        return load_by_library(config)

    def part(key: str) -> Any:
        files = translated(config, lambda: downloaded(found.files[key], config.num_proc))
        try:
            path = str(arrow_file(folder, found, files, config))
            if on_hub:
                memory.parent.mkdir(parents=True, exist_ok=True)
                replace_json(memory, {**_remembered(memory), key: path})
        except OSError as error:
            if (full := full_cache(error)) is not None:
                raise full from error
            raise
        return Dataset.from_file(path)

    return picked(config.split, list(found.files), part)


def load_by_library(config: DatasetConfig, *, streaming: bool = False) -> Any:
    """Load a dataset with ``datasets``, as a regular one or as a stream."""
    from datasets import Dataset, load_dataset, load_from_disk

    name, split = str(config.name), config.split
    if not is_saved(name):
        is_local = config.data_files is not None or Path(name).expanduser().is_dir()
        options: dict[str, Any] = {"sep": "\t"} if name == "tsv" else {}
        # Texts such as "NA" and "null" are not missing values.
        options |= {"keep_default_na": False} if name in ("csv", "tsv") else {}
        num_proc = None if is_local or streaming else config.num_proc
        return call_datasets(config, load_dataset, split=split, streaming=streaming, num_proc=num_proc, **options)
    saved = translated(config, lambda: load_from_disk(expanded(name)))
    splits = {"train": saved} if isinstance(saved, Dataset) else saved
    if isinstance(saved, Dataset) and split.split("[")[0] != "train":
        raise DatasetError(
            f"distillation.dataset.split: expected 'train', or a slice of it, for the saved dataset {name!r}, which "
            f"has no splits, got {split!r}"
        )
    loaded = picked(split, list(splits), lambda key: splits[key])
    return loaded.to_iterable_dataset() if streaming else loaded


def _remembered(memory: Path) -> dict[str, str]:
    """Return split → Arrow file for a hub dataset that was read before, for use while the hub is unavailable."""
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}
    return {str(key): str(path) for key, path in known.items() if Path(path).exists()}


def _ids_table(ids: list[list[int]]) -> pa.Table:
    return pa.table({IDS: pa.array(ids, pa.list_(pa.int64()))})


def _first(loaded: Any, max_samples: int | str | None, streaming: bool) -> Any:
    if max_samples in (None, "all"):
        return loaded
    count = int(str(max_samples))
    return loaded.take(count) if streaming else loaded.select(range(min(count, len(loaded))))
