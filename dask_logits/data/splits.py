"""Splits of a dataset by name, their slices and their sums."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dask_logits.config.setting import nearest
from dask_logits.errors import DatasetError, first_line

_ENDLESS = 1 << 62


def stream_parts(split: str, splits: Sequence[str]) -> list[tuple[str, int, int | None]]:
    """Return the parts of a stream's split: (name, first row, row after the last or None for the end).

    Raises
    ------
    DatasetError
        If the split does not exist, or a slice depends on the number of rows, which is unknown for a stream.

    Examples
    --------
    >>> stream_parts("train[:5]+test", ["train", "test"])
    [('train', 0, 5), ('test', 0, None)]
    """
    if split in splits:
        return [(split, 0, None)]
    if re.search(r"\[[^\]]*[-%]", split):
        raise DatasetError(
            f"distillation.dataset.split: expected slices by row numbers such as 'train[100:200]' for a stream, whose "
            f"length is unknown, got {split!r}; set distillation.dataset.streaming=false for others"
        )
    parts = _absolute(split, dict.fromkeys(splits, _ENDLESS))
    return [(name, first, None if last == _ENDLESS else last) for name, first, last in parts]


def picked(split: str, splits: Sequence[str], load: Callable[[str], Any]) -> Any:
    """Return a split, or slices and sums of splits."""
    from datasets import concatenate_datasets

    if split in splits:
        return load(split)
    names = dict.fromkeys(names_in(split))
    loaded = {name: load(name) for name in names if name in splits}
    lengths = {name: len(loaded[name]) if name in loaded else 0 for name in splits}
    parts = [loaded[name].select(range(first, max(first, last))) for name, first, last in _absolute(split, lengths)]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def names_in(split: str) -> list[str]:
    """Return the names of the splits in an expression of slices and sums."""
    return [re.split(r"[\[(]", part.strip())[0] for part in split.split("+")]


def refuse_splits(dataset: Any) -> None:
    """Refuse an object with several splits, because iterating over it would yield their names.

    Raises
    ------
    DatasetError
        Naming the splits.
    """
    if isinstance(dataset, Mapping):
        splits = list(dataset)
        raise DatasetError(
            f"dataset: expected one split, got a {type(dataset).__name__} with the splits {splits}; pass one of them, "
            f"such as dataset[{splits[0] if splits else 'train'!r}]"
        )


def _absolute(split: str, lengths: Mapping[str, int]) -> list[tuple[str, int, int]]:
    from datasets import ReadInstruction

    for name in names_in(split):
        if name not in lengths:
            raise DatasetError(
                f"distillation.dataset.split: expected one of {sorted(lengths)}, or slices and sums of them, got "
                f"{split!r}{nearest(name, list(lengths))}"
            )
    try:
        found = ReadInstruction.from_spec(split).to_absolute(dict(lengths))
    except (ValueError, AssertionError) as error:
        raise DatasetError(
            f"distillation.dataset.split: expected slices such as 'train[:500]' or 'train[10%:20%]', got {split!r}: "
            f"{first_line(error)}"
        ) from error
    return [(part.splitname, part.from_, part.to) for part in found]
