"""Datasets by name: opened as a regular dataset or as a stream, and, for those who want it, tokenised.

:func:`prepare_dataset` is the public way in; the job opens its own datasets through it, and tokenises in its workers.

This is the home of ``datasets``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dask_logits.capture.tokens import encode
from dask_logits.config import nearest
from dask_logits.errors import DatasetError, first_line

_COMMIT = re.compile(r"@([0-9a-f]{40})/")


def prepare_dataset(
    name: str,
    tokenizer: Any = None,
    *,
    config_name: str | None = None,
    split: str = "train",
    data_files: Sequence[str] | None = None,
    revision: str | None = None,
    text_column: str = "text",
    max_length: int | None = 2048,
    max_samples: int | str | None = None,
    add_special_tokens: bool = True,
    streaming: bool = False,
    num_proc: int | None = None,
) -> Any:
    """Load a dataset and tokenise it for language modelling.

    Parameters
    ----------
    name
        Hub name, a ``save_to_disk`` folder, a folder of files, or ``json``, ``text``, ``parquet``, … with `data_files`.
    tokenizer
        A Hugging Face tokenizer; None: rows stay as they are.
    config_name, split, data_files, revision
        Which rows.
    text_column
        Column to tokenise; ignored where there is an ``input_ids`` column.
    max_length
        Tokens kept of a document; None: all.
    max_samples
        Rows kept, from the first; None or ``all``: all.
    add_special_tokens
        Let the tokenizer add its special tokens.
    streaming
        Return an ``IterableDataset``, which reads while it is iterated over.
    num_proc
        Processes that download and tokenise; None: this one.

    Returns
    -------
    datasets.Dataset or datasets.IterableDataset
        With a single column ``input_ids`` if a tokenizer is given.

    Raises
    ------
    DatasetError
        If there is no such dataset, split or column.
    """
    loaded = _load(name, config_name, split, data_files, revision, streaming, num_proc)
    if max_samples not in (None, "all"):
        count = int(str(max_samples))
        loaded = loaded.take(count) if streaming else loaded.select(range(min(count, len(loaded))))
    if tokenizer is None:
        return loaded
    columns = loaded.column_names or list(next(iter(loaded), {}))
    column = choose_column(columns, text_column)
    if column == "input_ids":
        return loaded.select_columns([column])
    workers = {} if streaming else {"num_proc": num_proc, "desc": "tokenising"}

    def tokens(rows: Mapping[str, list[Any]]) -> dict[str, list[list[int]]]:
        texts = rows[column]
        ids = iter(encode(tokenizer, [text for text in texts if text], add_special_tokens, max_length))
        return {"input_ids": [next(ids) if text else [] for text in texts]}

    return loaded.map(tokens, batched=True, remove_columns=list(columns), **workers)


def choose_column(columns: Sequence[str], text_column: str) -> str:
    """Return ``input_ids`` if it is there, else the text column.

    Raises
    ------
    DatasetError
        If neither is.
    """
    column = "input_ids" if "input_ids" in columns else text_column
    if column not in columns:
        raise DatasetError(
            f"distillation.dataset.text_column: expected one of the columns {list(columns)}, got {column!r}"
            f"{nearest(column, columns)}"
        )
    return column


def is_saved(name: str) -> bool:
    """Whether a name is a ``save_to_disk`` folder."""
    folder = Path(name).expanduser()
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def open_builder(
    name: str, config_name: str | None, split: str, data_files: Sequence[str] | None, revision: str | None
) -> tuple[Any, list[str]]:
    """Find the files of a dataset without reading them.

    Returns
    -------
    builder, files
        The ``datasets`` builder, and the paths or URLs of the split's files in order; a hub's are pinned to a commit.

    Raises
    ------
    DatasetError
        If there is no such dataset or split.
    """
    from datasets import load_dataset_builder

    builder = _translated(
        name,
        lambda: load_dataset_builder(_expanded(name), config_name, data_files=_listed(data_files), revision=revision),
    )
    files = {str(key): [str(file) for file in value] for key, value in (builder.config.data_files or {}).items()}
    if split not in files:
        raise DatasetError(
            f"distillation.dataset.split: expected one of {sorted(files)} for a stream, which has no slices, got "
            f"{split!r}{nearest(split, files)}; bound it with dataset.max_samples"
        )
    return builder, files[split]


def pinned_commit(files: Sequence[str]) -> str | None:
    """Return the commit that hub URLs are pinned to.

    >>> pinned_commit(["hf://datasets/a/b@" + "0" * 40 + "/x.parquet"]) == "0" * 40, pinned_commit(["/tmp/x.parquet"])
    (True, None)
    """
    match = _COMMIT.search(files[0]) if files else None
    return match.group(1) if match else None


def shards(stream: Any) -> Iterator[Any]:
    """Yield the parts of a stream that can be read on their own, in its order: for most readers, its files."""
    count = stream.num_shards
    for index in range(count):
        yield stream.shard(count, index) if count > 1 else stream


def _load(
    name: str,
    config_name: str | None,
    split: str,
    data_files: Sequence[str] | None,
    revision: str | None,
    streaming: bool,
    num_proc: int | None,
) -> Any:
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    if not is_saved(name):
        local = data_files is not None or Path(name).expanduser().is_dir()
        return _translated(
            name,
            lambda: load_dataset(
                _expanded(name),
                config_name,
                split=split,
                data_files=_listed(data_files),
                revision=revision,
                streaming=streaming,
                num_proc=None if local or streaming else num_proc,
            ),
        )
    loaded = _translated(name, lambda: load_from_disk(str(Path(name).expanduser())))
    if isinstance(loaded, Dataset) and split != "train":
        raise DatasetError(
            f"distillation.dataset.split: expected 'train' for the saved dataset {name!r}, which has no splits, got "
            f"{split!r}; save the part, or use dataset.max_samples"
        )
    if isinstance(loaded, DatasetDict):
        if split not in loaded:
            raise DatasetError(
                f"distillation.dataset.split: expected one of {list(loaded)}, got {split!r}"
                f"{nearest(split, list(loaded))}"
            )
        loaded = loaded[split]
    return loaded.to_iterable_dataset() if streaming else loaded


def _translated(name: str, call: Any) -> Any:
    """Run a call of ``datasets``; say its errors in terms of the settings."""
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    where = f"distillation.dataset.name: expected a dataset, got {name!r}"
    try:
        return call()
    except StopIteration as error:
        # datasets 5.2 says so of JSON files without a row.
        raise DatasetError(f"{where} without a single row; check data_files") from error
    except (DatasetNotFoundError, DatasetGenerationError, ValueError, OSError, RuntimeError, ImportError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        raise DatasetError(
            f"{where}: {first_line(cause)}; correct the name, config_name, split or data_files"
        ) from error


def _listed(data_files: Sequence[str] | None) -> list[str] | None:
    return [_expanded(file) for file in data_files] if data_files else None


def _expanded(path: str) -> str:
    """Return a path with its ``~`` resolved; anything else, such as a URL, as it is."""
    return str(Path(path).expanduser()) if path.startswith("~") else path
