"""``EnsembleDataset``: the mixture of several teachers that scored the same documents.

Each teacher keeps its own ids. The mixture ``Σ share · p`` is known at an id that every teacher kept. At any other id,
some teacher's probability is unknown, because it is a part of that teacher's tail. The cells are therefore the ids that
every teacher kept, and the tail, on which the mixture is exact. At k = 64 this costs 3 points of kept mass for two
similar teachers. The union of the ids would need a guess for each missing probability, and with zeros 1 % of the mass
was in wrong cells (docs/measurements.md).

Dimension letters: S sources, J temperatures (the first is 1), T tokens, K kept entries, M = S · K entries of all
sources, W places where a run of S equal ids may begin.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dask_logits.errors import ConfigError
from dask_logits.train.batches import CachedItem
from dask_logits.train.dataset import CachedLogitsDataset
from dask_logits.train.objective import normalise_targets
from dask_logits.train.sources import check_sources, shares

_SHARED = ("top_k", "vocab_size", "decode", "student_vocab_size", "window", "max_tokens", "is_masked", "has_target_pos")


class EnsembleDataset(Dataset[CachedItem]):
    """Caches of the same documents by several teachers, mixed at every position.

    The target is the mixture ``Σ share · p`` of the teachers' distributions, at a temperature that of the tempered
    distributions. An item is like one of :class:`dask_logits.CachedLogitsDataset`, with these differences:

    * The kept entries are the ids that every teacher kept. The other entries are absent, and the tail has their mass.
      The mixture is exact on these cells, so a loss with the ghost token is a proper divergence from it, coarser than
      on the cells of one teacher.
    * ``topk_logprobs`` are float32, and ``topk_logprobs_T`` [T, K, J] has those at the further temperatures, because
      the log-probs of a mixture at temperature 1 do not determine them.
    * ``logsumexp`` is 0, because a mixture has no raw logits. Its log-probs serve as such.

    For the forward KL, the sum of the losses of the teachers, each weighted with its share, has the gradient of the
    mixture and uses all entries of every teacher. :class:`dask_logits.MixedDataset` over the same caches draws one
    teacher for each item, which gives this gradient on average.

    Parameters
    ----------
    sources
        Name → opened cache. All must hold the same tokens and agree on the tokenizer and the number of entries. Their
        order does not matter.
    weights
        Name → weight, any positive numbers, scaled to a sum of one. None: equal weights.

    Raises
    ------
    ConfigError
        If the sources, their tokenizers or their documents do not agree, or weights do not match them. Rows, offsets
        and lengths are compared at once, the tokens of an item when it is read.
    """

    decode = "worker"
    draws = 0
    tables_digest = ""

    def __init__(
        self, sources: Mapping[str, CachedLogitsDataset], *, weights: Mapping[str, float] | None = None
    ) -> None:
        check_sources(sources, (CachedLogitsDataset,), *_SHARED)
        for name, source in sources.items():
            if source.draws:
                raise ConfigError(
                    f"sources: expected caches of the most probable tokens, got draws in {name!r}, which do not say "
                    "how probable a token is. MixedDataset over the same caches draws one teacher for each item"
                )
        self.sources = dict(sources)
        share_S = shares(dict.fromkeys(sources, 1.0) if weights is None else weights, sources)
        self.shares = dict(zip(sources, share_S.tolist(), strict=True))
        # Sums of floats depend on the order of their terms.
        self._order = sorted(sources, key=self._identity)
        self._share_S = torch.tensor([self.shares[name] for name in self._order], dtype=torch.float32)
        first = next(iter(self.sources.values()))
        if first.decode != self.decode:
            raise ConfigError(f"sources: expected caches opened with decode='worker', got {first.decode!r}")
        self.top_k, self.vocab_size, self.student_vocab_size = first.top_k, first.vocab_size, first.student_vocab_size
        self.window, self.max_tokens = first.window, first.max_tokens
        self.is_masked, self.has_target_pos = first.is_masked, first.has_target_pos
        self.temperatures = tuple(
            T for T in first.temperatures if all(T in source.temperatures for source in self.sources.values())
        )
        self._check_places()
        # Caches of other texts are refused here, unless their first items agree.
        self[0]

    def __len__(self) -> int:
        return len(next(iter(self.sources.values())))

    def __getitem__(self, index: int) -> CachedItem:
        named = {name: source[index] for name, source in self.sources.items()}
        self._check_items(list(named.values()))
        items = [named[name] for name in self._order]
        logps, tails = zip(*(self._cells(item) for item in items), strict=True)
        ids_TK, logp_JTK, logtail_JT = mix_cells(
            torch.stack([item["topk_ids"] for item in items]),
            torch.stack(logps, 1),
            torch.stack(tails, 1),
            self._share_S,
        )
        label_logprob_ST = torch.stack([item["label_logprob"] for item in items])
        tensors = {
            **items[0].tensors,
            "topk_ids": ids_TK,
            "topk_logprobs": logp_JTK[0],
            "topk_logprobs_T": logp_JTK[1:].movedim(0, -1),
            "tail_logmass": logtail_JT[0],
            "logsumexp": torch.zeros_like(items[0]["logsumexp"]),
            "label_logprob": (label_logprob_ST + self._share_S.log()[:, None]).logsumexp(0),
        }
        if self.temperatures:
            tensors["tail_logmass_T"] = logtail_JT[1:].movedim(0, -1)
        if "n_beyond" in tensors:
            tensors["n_beyond"] = torch.stack([item["n_beyond"] for item in items]).sum()
        return CachedItem(tensors=tensors, vocab_size=items[0].vocab_size, temperatures=self.temperatures)

    def __repr__(self) -> str:
        lines = [
            f"\n    {name}: weight {self.shares[name]:g}, teacher {source.attributes.get('teacher_path') or 'unknown'}"
            for name, source in self.sources.items()
        ]
        return f"EnsembleDataset({''.join(lines)}\n    items: {len(self):,}\n)"

    @property
    def paths(self) -> tuple[Path, ...]:
        """Files of all sources."""
        return tuple(path for source in self.sources.values() for path in source.paths)

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes that all sources have, with the same values."""
        first, *others = (source.attributes for source in self.sources.values())
        missing = object()
        return {
            name: value for name, value in first.items() if all(other.get(name, missing) == value for other in others)
        }

    @property
    def content_digest(self) -> str:
        """SHA-256 of the sources' content and shares."""
        parts = ["ensemble", *(self._identity(name) for name in self._order)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def n_tokens(self) -> int:
        """Number of tokens of all items."""
        return next(iter(self.sources.values())).n_tokens

    def _identity(self, name: str) -> tuple[str, str]:
        """Return what a source adds to the mixture: its content, and its share without the last bits."""
        return self.sources[name].content_digest, f"{self.shares[name]:.9g}"

    def _cells(self, item: CachedItem) -> tuple[Tensor, Tensor]:
        """Return a teacher's normalised log-probs [J, T, K] and tails [J, T] at all temperatures."""
        tails = {1.0: item["tail_logmass"]}
        for j, temperature in enumerate(item.temperatures):
            tails[temperature] = item["tail_logmass_T"][:, j]
        cells = [
            normalise_targets(item["topk_logprobs"].float() / temperature, tails[temperature])
            for temperature in (1.0, *self.temperatures)
        ]
        return torch.stack([logp_TK for logp_TK, _ in cells]), torch.stack([logtail_T for _, logtail_T in cells])

    def _named(self) -> list[str]:
        """Return the name and the first file of each source, for messages."""
        return [f"{name!r} ({source.paths[0]})" for name, source in self.sources.items()]

    def _check_places(self) -> None:
        """Refuse caches whose items are not the same pieces of the same rows."""
        places = [source.places() for source in self.sources.values()]
        names = self._named()
        for name, places_I3 in zip(names[1:], places[1:], strict=True):
            n_items = min(len(places[0]), len(places_I3))
            differs_I = (places[0][:n_items] != places_I3[:n_items]).any(1)
            if not differs_I.any() and len(places[0]) == len(places_I3):
                continue
            at = int(differs_I.argmax()) if differs_I.any() else n_items
            shown = [_place(every_I3, at) for every_I3 in (places[0], places_I3)]
            raise ConfigError(
                f"sources: expected the same documents, got {shown[0]} as item {at} of {names[0]} and {shown[1]} of "
                f"{name}; score the same dataset with the same settings of `dataset` with each teacher"
            )

    def _check_items(self, items: list[CachedItem]) -> None:
        """Refuse items with other tokens, or with another mask."""
        names = self._named()
        first = items[0]
        for name, item in zip(names[1:], items[1:], strict=True):
            if not torch.equal(first["segments"], item["segments"]):
                raise ConfigError(
                    f"sources: expected the same segments, got {first['segments'].tolist()} in {names[0]} and "
                    f"{item['segments'].tolist()} in {name}; pack the same documents for each teacher"
                )
            if self.has_target_pos and not torch.equal(first["target_pos"], item["target_pos"]):
                raise ConfigError(
                    f"sources: expected targets at the same positions, got other ones in {names[0]} and {name} in "
                    f"dataset row {int(first['segments'][0, 0])}; score with positions=all or labels"
                )
            for what in ("input_ids", "loss_mask") if self.is_masked else ("input_ids",):
                differs_T = first[what] != item[what]
                if differs_T.any():
                    at = int(differs_T.nonzero()[0])
                    rows_T = torch.repeat_interleave(first["segments"][:, 0], first["segments"][:, 2])
                    raise ConfigError(
                        f"sources: expected the same {what}, got {first[what][at].item()} in {names[0]} and "
                        f"{item[what][at].item()} in {name} at position {at} of the item, in dataset row "
                        f"{int(rows_T[at])}; score the same dataset with each teacher"
                    )


def mix_cells(
    ids_STK: Tensor, logp_JSTK: Tensor, logtail_JST: Tensor, share_S: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix distributions, each on its kept ids and its tail.

    Parameters
    ----------
    ids_STK
        Kept ids of each source. No id is there twice in a row.
    logp_JSTK
        Their log-probs at each temperature. −∞ marks an absent entry, whose id is ignored.
    logtail_JST
        Log of the mass of the tail.
    share_S
        Weight of each source. They sum to one.

    Returns
    -------
    ids_TK
        The ids that every source kept, most probable first at the first temperature, ties by lower id. Absent entries
        follow.
    logp_JTK
        Their log-probs in the mixture, −∞ for absent entries.
    logtail_JT
        Log of the remaining mass.

    Examples
    --------
    >>> ids = torch.tensor([[[5, 7]], [[7, 9]]])
    >>> logp, logtail = torch.tensor([[[[0.6, 0.3]], [[0.5, 0.1]]]]).log(), torch.tensor([[[0.1], [0.4]]]).log()
    >>> mixed_ids, mixed_logp, mixed_logtail = mix_cells(ids, logp, logtail, torch.tensor([0.5, 0.5]))
    >>> mixed_ids[0, :1].tolist(), [round(p, 3) for p in mixed_logp.exp()[0, 0].tolist()]
    ([7], [0.4, 0.0])
    >>> round(mixed_logtail.exp().item(), 3)
    0.6
    """
    n_sources, k = ids_STK.shape[0], ids_STK.shape[-1]
    ids_STK = ids_STK.masked_fill(logp_JSTK[0] == -torch.inf, -1)
    ids_TM, order_TM = ids_STK.movedim(0, 1).flatten(1).sort(dim=1, stable=True)
    logp_JSTK = logp_JSTK + share_S.log()[:, None, None]
    logp_JTM = logp_JSTK.movedim(1, 2).flatten(2)
    logp_JTM = logp_JTM.gather(2, order_TM.expand_as(logp_JTM))

    # A source has an id once, so an id that all of them have is a run of S equal ids.
    width = ids_TM.shape[1] - n_sources + 1
    is_common_TW = ids_TM[:, :width] == ids_TM[:, n_sources - 1 :]
    logp_JTW = reduce(torch.logaddexp, [logp_JTM[..., place : place + width] for place in range(n_sources)])
    logp_JTW = logp_JTW.masked_fill(~is_common_TW, -torch.inf)
    best_TK = logp_JTW[0].sort(dim=1, descending=True, stable=True).indices[:, :k]
    is_cell_TM = torch.zeros_like(ids_TM, dtype=torch.bool)
    for place in range(n_sources):
        is_cell_TM[:, place : place + width] |= is_common_TW
    rest_JT = logp_JTM.masked_fill(is_cell_TM, -torch.inf).logsumexp(-1)
    tail_JT = (logtail_JST + share_S.log()[:, None]).logsumexp(1)
    return (
        ids_TM.gather(1, best_TK).clamp(min=0),
        logp_JTW.gather(2, best_TK.expand(len(logp_JTW), -1, -1)),
        torch.logaddexp(rest_JT, tail_JT),
    )


def _place(places_I3: npt.NDArray[np.int64], index: int) -> str:
    """Describe an item's place."""
    if index >= len(places_I3):
        return "nothing"
    row, offset, length = places_I3[index].tolist()
    return f"{length} tokens from token {offset} of dataset row {row}"
