"""``CachedLogitsDataset``: the cache as a map-style dataset, and the collate function that makes batches of it.

Ragged in, sparse out: a document of T tokens comes as arrays of T rows, a batch as padded [B, T] and [B, T, K]; nothing
of width V is ever made. The file is opened on first use in each process, so the dataset may be forked, pickled and
spawned freely.

Dimension letters: B documents in a batch, T tokens, K kept entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dask_logits.errors import ConfigError
from dask_logits.store.cache import CacheReader

IGNORED_LABEL = -100

# In the file's dtype, except that torch has no arithmetic on unsigned 16 and 32 bit integers.
_DTYPES = {"input_ids": np.int64, "topk_ids": np.int32}
_ITEM = ("input_ids", "topk_ids", "topk_logprobs", "logsumexp", "tail_logmass", "label_logprob")


class CachedLogitsDataset(Dataset[dict[str, Tensor]]):
    """Documents of a cache with the teacher's targets.

    Item `i` is document `i` in dataset order: ``input_ids`` [T] int64, ``topk_ids`` [T, K] int32, ``topk_logprobs``
    [T, K] float16, ``logsumexp``, ``tail_logmass``, ``label_logprob`` [T] float32, and ``row``, the dataset row. The
    targets at position t are the teacher's distribution over the token at t + 1.

    Parameters
    ----------
    path
        ``teacher_logits.h5``, or the run folder it lies in.
    top_k
        Keep only so many entries per position; the rest of their mass goes to the tail. None: all.

    Raises
    ------
    CacheError
        If the file is missing, truncated, incomplete, not a cache, or of a newer format.
    ConfigError
        If `top_k` is not between 1 and the cache's.
    """

    def __init__(self, path: str | Path, *, top_k: int | None = None) -> None:
        path = Path(path).expanduser().absolute()
        self.path = path / "teacher_logits.h5" if path.is_dir() else path
        self._reader: CacheReader | None = CacheReader(self.path)
        self._length = self._reader.n_documents
        self.top_k = self._reader.top_k if top_k is None else top_k
        self.vocab_size = self._reader.vocab_size
        if not 1 <= self.top_k <= self._reader.top_k:
            raise ConfigError(f"top_k: expected 1 to {self._reader.top_k}, which the cache holds, got {top_k!r}")

    @property
    def attributes(self) -> dict[str, Any]:
        """What the cache says of itself: teacher, settings, statistics, content digest."""
        return self._cache().attributes

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -self._length <= index < self._length:
            raise IndexError(f"document {index}: expected an index below {self._length}")
        document = self._cache().document(index % self._length)
        item = {
            name: torch.from_numpy(np.array(document[name], dtype=_DTYPES.get(name, document[name].dtype)))
            for name in _ITEM
        }
        item["row"] = torch.tensor(int(document["row"]))
        return item if self.top_k == self._cache().top_k else _cut(item, self.top_k)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}

    def _cache(self) -> CacheReader:
        if self._reader is None:
            self._reader = CacheReader(self.path)
        return self._reader


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
        there are targets; ``row`` [B].

    Examples
    --------
    >>> item = {"input_ids": torch.tensor([5, 6]), "topk_ids": torch.zeros(2, 1, dtype=torch.int32),
    ...         "topk_logprobs": torch.zeros(2, 1), "logsumexp": torch.zeros(2), "tail_logmass": torch.zeros(2),
    ...         "label_logprob": torch.zeros(2), "row": torch.tensor(0)}
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
    }
