"""``MixedDataset``: several caches as one dataset, each with a weight.

Dimension letters: S sources, I items.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from dask_logits.errors import ConfigError
from dask_logits.train.batches import CachedItem
from dask_logits.train.dataset import CachedLogitsDataset
from dask_logits.train.ensemble import EnsembleDataset
from dask_logits.train.order import is_integer
from dask_logits.train.sources import OPTIONS, check_sources, shares


class MixedDataset(Dataset[CachedItem]):
    """Items of several caches, such as other corpora or other teachers with the same tokenizer.

    Each item has ``source``, the place of its cache among the sources. The numbers of items follow the weights exactly.
    The items of a source come in an order that the seed draws anew for each pass over it, so none comes twice before
    all others of its source have come once. The whole is shuffled, and it is the same in every process.

    Parameters
    ----------
    sources
        Name → opened cache, or :class:`dask_logits.EnsembleDataset`. All must agree on the number of entries, the
        vocabulary and the temperatures. If some have a mask, all tokens of the others are learned. If some have targets
        at chosen positions, the others have them at all.
    weights
        Name → share of the items, any positive numbers. None: every item of every source once.
    n_items
        Number of items. None: as many as there are until the first source is used up.
    seed
        Any integer. It draws the order.

    Raises
    ------
    ConfigError
        If the sources or their tokenizers do not agree, or weights do not match them.
    """

    def __init__(
        self,
        sources: Mapping[str, CachedLogitsDataset | EnsembleDataset],
        *,
        weights: Mapping[str, float] | None = None,
        n_items: int | None = None,
        seed: int = 0,
    ) -> None:
        self.sources = dict(sources)
        shared = ("draws", "top_k", "vocab_size", "temperatures", "decode", "student_vocab_size")
        check_sources(self.sources, (CachedLogitsDataset, EnsembleDataset), *shared)
        if len({source.tables_digest for source in self.sources.values()}) > 1:
            raise ConfigError("decode: expected 'worker' for sources with different id tables, got 'device'")
        self.seed = seed
        first = next(iter(self.sources.values()))
        self.draws, self.top_k, self.vocab_size = first.draws, first.top_k, first.vocab_size
        self.temperatures = first.temperatures
        self.decode, self.student_vocab_size = first.decode, first.student_vocab_size
        self.is_masked = any(source.is_masked for source in self.sources.values())
        # Each source has its own, and the content digest covers them.
        self.window: int | None = None
        self.max_tokens: int | None = None
        sizes = {name: len(source) for name, source in self.sources.items()}
        sizes_S = np.array([*sizes.values()], np.int64)
        share_S = shares(sizes if weights is None else weights, sources)
        if n_items is None:
            n_items = int((sizes_S / share_S).min() + 1e-9)
        elif not is_integer(n_items) or n_items < 1:
            raise ConfigError(f"n_items: expected a positive integer or None, got {n_items!r}")
        counts_S = _counts(share_S, n_items)
        self._source_I = np.repeat(np.arange(len(sizes_S), dtype=np.int32), counts_S)
        self._item_I = np.concatenate([self._drawn(s, sizes_S[s], count) for s, count in enumerate(counts_S.tolist())])
        order_I = np.random.default_rng([seed % (1 << 64), len(sizes_S)]).permutation(n_items)
        self._source_I, self._item_I = self._source_I[order_I], self._item_I[order_I]

    def _drawn(self, source: int, size: int, count: int) -> npt.NDArray[np.int64]:
        """Return the items of a source in order, pass after pass."""
        passes = [
            np.random.default_rng([self.seed % (1 << 64), source, number]).permutation(size)
            for number in range(-(-count // size))
        ]
        return np.concatenate([*passes, np.zeros(0, np.int64)])[:count].astype(np.int64)

    def __len__(self) -> int:
        return len(self._item_I)

    def __getitem__(self, index: int) -> CachedItem:
        place = int(self._source_I[index])
        item = list(self.sources.values())[place][int(self._item_I[index])]
        return replace(item, tensors={**item.tensors, "source": torch.tensor(place)})

    def __repr__(self) -> str:
        counts_S = np.bincount(self._source_I, minlength=len(self.sources))
        lines = [
            f"\n    {name}: {count:,} of {len(source):,} items"
            for (name, source), count in zip(self.sources.items(), counts_S.tolist(), strict=True)
        ]
        return f"MixedDataset({''.join(lines)}\n)"

    @property
    def paths(self) -> tuple[Any, ...]:
        """Files of all sources."""
        return tuple(path for source in self.sources.values() for path in source.paths)

    @property
    def content_digest(self) -> str:
        """SHA-256 of the sources' content and of the order of the items."""
        parts = [
            [name, source.content_digest, len(source), *(getattr(source, option) for option in OPTIONS)]
            for name, source in self.sources.items()
        ]
        order = hashlib.sha256(self._source_I.astype("<i4").tobytes() + self._item_I.astype("<i8").tobytes())
        return hashlib.sha256(json.dumps([parts, order.hexdigest()]).encode()).hexdigest()


def _counts(share_S: npt.NDArray[np.float64], n_items: int) -> npt.NDArray[np.int64]:
    """Round shares to whole items that sum to `n_items`, the largest remainders up.

    >>> _counts(np.array([0.5, 0.25, 0.25]), 7).tolist()
    [3, 2, 2]
    """
    exact_S = share_S * n_items
    counts_S: npt.NDArray[np.int64] = np.floor(exact_S + 1e-9).astype(np.int64)
    left = n_items - int(counts_S.sum())
    counts_S[np.argsort(counts_S - exact_S, kind="stable")[:left]] += 1
    return counts_S
