"""``CachedLogitsDataset``: the cache as a map-style dataset, and the collate function that makes batches of it.

Ragged in, sparse out: an item of T tokens comes as arrays of T rows, a batch as padded [B, T] and [B, T, K]; nothing
of width V is ever made. The file is opened on first use in each process, so the dataset may be forked, pickled and
spawned freely.

Dimension letters: B items in a batch, T tokens, S segments of an item, K kept entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dask_logits.errors import CacheError, ConfigError
from dask_logits.store.cache import CacheReader, find_caches

IGNORED_LABEL = -100

# In the file's dtype, except that torch has no arithmetic on unsigned 16 and 32 bit integers.
_DTYPES = {"input_ids": np.int64, "topk_ids": np.int32}
_ITEM = ("input_ids", "topk_ids", "topk_logprobs", "logsumexp", "tail_logmass", "label_logprob", "segments")


class CachedLogitsDataset(Dataset[dict[str, Tensor]]):
    """Items of one cache, or of several parts of a job as one, with the teacher's targets.

    Item `i` is the `i`-th document in dataset order (a window of one, or a packed block, if the job made such):
    ``input_ids`` [T] int64, ``topk_ids`` [T, K] int32, ``topk_logprobs`` [T, K] float16, ``logsumexp``,
    ``tail_logmass``, ``label_logprob`` [T] float32; ``row``, its (first) dataset row; ``segments`` [S, 3] int64, the
    (row, offset, length) of each run of one row's tokens in it. The targets at position t are the teacher's
    distribution over the token at t + 1.

    Parameters
    ----------
    path
        ``teacher_logits.h5``, the run folder it lies in, an index that ``dask-logits merge --index`` wrote, a folder of
        caches, or a list of such.
    top_k
        Keep only so many entries per position; the rest of their mass goes to the tail. None: all.

    Raises
    ------
    CacheError
        If a file is missing, truncated, incomplete, not a cache, or of a newer format; or if several are not parts of
        one job, or hold the same row twice.
    ConfigError
        If `top_k` is not between 1 and the cache's.
    """

    def __init__(self, path: str | Path | Sequence[str | Path], *, top_k: int | None = None) -> None:
        given = [path] if isinstance(path, str | Path) else list(path)
        self.paths = tuple(file for one in given for file in find_caches(Path(one).expanduser().absolute()))
        self._readers: list[CacheReader] | None = [CacheReader(file) for file in self.paths]
        first = self._readers[0]
        _check_one_job(self._readers)
        _check_whole(self._readers)
        self._starts = np.append(0, np.cumsum([reader.n_items for reader in self._readers]))
        self._order = _order(self._readers)
        self.top_k = first.top_k if top_k is None else top_k
        self.vocab_size = first.vocab_size
        if not 1 <= self.top_k <= first.top_k:
            raise ConfigError(f"top_k: expected 1 to {first.top_k}, which the cache holds, got {top_k!r}")

    @property
    def attributes(self) -> dict[str, Any]:
        """What the (first) cache says of itself: teacher, settings, statistics, content digest."""
        return self._opened()[0].attributes

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index}: expected an index below {len(self)}")
        place = index % len(self) if self._order is None else int(self._order[index])
        part = int(np.searchsorted(self._starts, place, side="right")) - 1
        reader = self._opened()[part]
        found = reader.item(place - int(self._starts[part]))
        item = {
            name: torch.from_numpy(np.array(found[name], dtype=_DTYPES.get(name, found[name].dtype))) for name in _ITEM
        }
        item["row"] = torch.tensor(int(found["row"]))
        return item if self.top_k == reader.top_k else _cut(item, self.top_k)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": None}

    def _opened(self) -> list[CacheReader]:
        if self._readers is None:
            self._readers = [CacheReader(file) for file in self.paths]
        return self._readers


def _check_one_job(readers: Sequence[CacheReader]) -> None:
    for reader in readers[1:]:
        for name in ("fingerprint", "plan_digest", "top_k", "vocab_size"):
            expected, found = readers[0].attributes.get(name), reader.attributes.get(name)
            if found != expected:
                raise CacheError(
                    f"{reader.path}: expected a part of the same job as {readers[0].path}, with {name} {expected!r}, "
                    f"got {found!r}; join datasets of different jobs with torch.utils.data.ConcatDataset",
                    str(reader.path),
                )


def _check_whole(readers: Sequence[CacheReader]) -> None:
    """Refuse parts of a job that leave rows out."""
    if not any(reader.attributes.get("partial") for reader in readers):
        return
    rows = np.unique(np.concatenate([np.unique(np.asarray(reader.arrays["document_row"])) for reader in readers]))
    expected = int(readers[0].attributes["n_rows"])
    if len(rows) != expected:
        raise CacheError(
            f"{readers[0].path}: expected the parts of all {expected} rows of the job, got {len(rows)} rows in "
            f"{len(readers)} parts; name the others too",
            str(readers[0].path),
        )


def _order(readers: Sequence[CacheReader]) -> npt.NDArray[np.int64] | None:
    """Return the items of several caches in dataset order; None where they are in order as they are."""
    if len(readers) == 1:
        return None
    places = [reader.item_places() for reader in readers]
    rows, offsets = (np.concatenate([place[axis] for place in places]) for axis in (0, 1))
    order = np.lexsort((offsets, rows))
    twice = (np.diff(rows[order]) == 0) & (np.diff(offsets[order]) == 0)
    if twice.any():
        row = int(rows[order][int(np.flatnonzero(twice)[0])])
        raise CacheError(
            f"{readers[0].path}: expected every row in one cache only, got row {row} in two; leave one out"
        )
    return None if (order == np.arange(len(order))).all() else order


def _cut(item: dict[str, Tensor], top_k: int) -> dict[str, Tensor]:
    """Move the entries after the first `top_k` into the tail."""
    dropped_T = item["topk_logprobs"][:, top_k:].float().logsumexp(-1)
    return {
        **item,
        "topk_ids": item["topk_ids"][:, :top_k].contiguous(),
        "topk_logprobs": item["topk_logprobs"][:, :top_k].contiguous(),
        "tail_logmass": torch.logaddexp(item["tail_logmass"], dropped_T),
    }


def collate(items: Sequence[dict[str, Tensor]], *, pad_id: int = 0) -> dict[str, Tensor]:
    """Pad documents to a batch.

    Parameters
    ----------
    items
        From :class:`CachedLogitsDataset`.
    pad_id
        Token id of padding.

    Returns
    -------
    dict of Tensor
        ``input_ids``, ``attention_mask`` [B, T]; ``labels`` [B, T], the input ids with −100 at padding, as Hugging Face
        models want them (they shift inside); ``next_ids`` [B, T], the token after each position, −100 where there is
        none, for losses on logits that are not shifted; ``topk_ids`` [B, T, K] int64, ``topk_logprobs`` [B, T, K]
        float32, ``logsumexp``, ``tail_logmass``, ``label_logprob`` [B, T]; ``target_mask`` [B, T] bool, True where
        there are targets; ``row`` [B]; ``segments`` [B, S, 3], with rows −1 and lengths 0 where an item has fewer.

    Examples
    --------
    >>> item = {"input_ids": torch.tensor([5, 6]), "topk_ids": torch.zeros(2, 1, dtype=torch.int32),
    ...         "topk_logprobs": torch.zeros(2, 1), "logsumexp": torch.zeros(2), "tail_logmass": torch.zeros(2),
    ...         "label_logprob": torch.zeros(2), "row": torch.tensor(0),
    ...         "segments": torch.tensor([[0, 0, 2]])}
    >>> collate([item])["next_ids"].tolist()
    [[6, -100]]
    """
    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    width = int(lengths.max()) if len(items) else 0
    mask_BT = torch.arange(width) < lengths[:, None]

    def padded(name: str, fill: float, dtype: torch.dtype) -> Tensor:
        first = items[0][name]
        out = torch.full((len(items), width, *first.shape[1:]), fill, dtype=dtype)
        for b, item in enumerate(items):
            out[b, : len(item[name])] = item[name]
        return out

    input_ids_BT = padded("input_ids", pad_id, torch.int64)
    next_BT = torch.full_like(input_ids_BT, IGNORED_LABEL)
    next_BT[:, :-1] = torch.where(mask_BT[:, 1:], input_ids_BT[:, 1:], IGNORED_LABEL)
    return {
        "input_ids": input_ids_BT,
        "attention_mask": mask_BT.long(),
        "labels": torch.where(mask_BT, input_ids_BT, IGNORED_LABEL),
        "next_ids": next_BT,
        "topk_ids": padded("topk_ids", 0, torch.int64),
        "topk_logprobs": padded("topk_logprobs", 0.0, torch.float32),
        "logsumexp": padded("logsumexp", 0.0, torch.float32),
        "tail_logmass": padded("tail_logmass", 0.0, torch.float32),
        "label_logprob": padded("label_logprob", float("nan"), torch.float32),
        "target_mask": mask_BT,
        "row": torch.stack([item["row"] for item in items]),
        "segments": _padded_segments([item["segments"] for item in items]),
    }


def _padded_segments(segments: Sequence[Tensor]) -> Tensor:
    most = max((len(found) for found in segments), default=0)
    segments_BS3 = torch.tensor([-1, 0, 0]).repeat(len(segments), most, 1)
    for b, found in enumerate(segments):
        segments_BS3[b, : len(found)] = found
    return segments_BS3
