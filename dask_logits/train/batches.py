"""Collate items of a cache into batches: padded (:func:`collate`) or joined to one row (:func:`collate_flat`).

torch's default ``collate_fn`` also gives the batches of :func:`collate`, because the type of the items is registered
there. A loader without ``collate_fn`` is therefore correct.

Dimension letters: B items in a batch, T tokens, S segments of an item, K kept entries, N tokens of a flat batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dask_logits.errors import DatasetError
from dask_logits.records import EVERY_TOKEN
from dask_logits.train.targets import IGNORED_LABEL, CodedTargets, SparseTargets
from dask_logits.train.torch_internals import register_collate

_CODES = ("topk_ids_b", "topk_gaps_b", "top1_logprob")
_ENTRIES = ("topk_ids", "topk_logprobs")
# What the items of a batch share.
_SHARED = ("number of draws", "number of entries", "vocabulary", "temperatures", "id table of codes")


@dataclass(frozen=True, kw_only=True, eq=False)
class CachedItem(Mapping[str, Tensor]):
    """One item of a cache: a read-only mapping of tensors.

    It is not a ``dict``, because the Hugging Face ``Trainer`` removes columns unused by the model from a ``dict``.

    Parameters
    ----------
    tensors
        Name → tensor, see :class:`dask_logits.CachedLogitsDataset`.
    vocab_size
        Exclusive upper bound of all ids.
    temperatures
        Temperature of each column of ``tail_logmass_T``.
    draws
        Number of draws of each position, 0 if the entries are the most probable tokens.
    tables_digest
        Digest of the tables that decode codes, empty for decoded entries.
    """

    tensors: dict[str, Tensor]
    vocab_size: int
    temperatures: tuple[float, ...] = ()
    draws: int = 0
    tables_digest: str = ""

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def collate(items: Sequence[CachedItem], *, pad_id: int = 0) -> dict[str, Any]:
    """Pad items to a batch.

    Parameters
    ----------
    items
        From :class:`dask_logits.CachedLogitsDataset`.
    pad_id
        Token id of padding.

    Returns
    -------
    dict
        ``input_ids``, ``attention_mask`` [B, T]. ``labels`` [B, T], the input ids with −100 at padding, at tokens that
        are not learned, and at the first token of a further document of an item, as Hugging Face models expect them
        (they shift inside). ``targets``, the
        :class:`dask_logits.SparseTargets` [B, T] of the batch, with the mask False at positions without targets.
        The targets of draws have as many entries as the widest position.
        ``row`` [B]. ``segments`` [B, S, 3], with rows −1 and lengths 0 for missing segments. ``n_beyond`` [B] with a
        `student_vocab_size`, ``source`` [B] with a :class:`dask_logits.MixedDataset`. With ``decode="device"`` the
        targets are still encoded.

    Raises
    ------
    DatasetError
        If the items do not come from a :class:`dask_logits.CachedLogitsDataset`, or from caches that do not agree.

    Examples
    --------
    >>> item = CachedItem(
    ...     tensors={"input_ids": torch.tensor([5, 6]), "topk_ids": torch.zeros(2, 1, dtype=torch.int32),
    ...              "topk_logprobs": torch.zeros(2, 1), "logsumexp": torch.zeros(2), "tail_logmass": torch.zeros(2),
    ...              "label_logprob": torch.zeros(2), "row": torch.tensor(0), "segments": torch.tensor([[0, 0, 2]])},
    ...     vocab_size=7,
    ... )
    >>> collate([item])["targets"].label_ids.tolist()
    [[6, -100]]
    """
    items = _alike(items)
    lengths_B1 = torch.tensor([[len(item["input_ids"])] for item in items])
    position_T = torch.arange(int(lengths_B1.max()))
    grid = _Grid(
        items=items,
        places=[(b, 0) for b in range(len(items))],
        mask_BT=position_T < lengths_B1,
        has_next_BT=position_T < lengths_B1 - 1,
    )
    return {**grid.batch(pad_id), "attention_mask": grid.mask_BT.long()}


def _alike(items: Sequence[CachedItem]) -> list[CachedItem]:
    """Return items with the same arrays of the same widths, or refuse items of caches that do not agree."""
    if not items:
        raise DatasetError("collate: expected at least one item, got an empty list")
    for item in items:
        if not isinstance(item, CachedItem):
            raise DatasetError(
                f"collate: expected the items of a CachedLogitsDataset, unchanged, got {type(item).__name__}. To "
                "change an item, use dataclasses.replace(item, tensors=...)."
            )
        for what, ours, theirs in zip(_SHARED, _kind(items[0]), _kind(item), strict=True):
            if ours != theirs:
                raise DatasetError(
                    f"collate: expected items with the same {what}, got {ours or 'none'} and {theirs or 'none'} in one "
                    "batch; open the caches with the same options, or do not put them into one dataset"
                )
    has_mask, is_mixture = (any(name in item for item in items) for name in ("loss_mask", "topk_logprobs_T"))
    width = max(item["topk_ids"].shape[1] for item in items) if items[0].draws else 0
    alike = []
    for item in items:
        tensors = dict(item.tensors)
        if has_mask and "loss_mask" not in item:
            tensors["loss_mask"] = torch.ones(len(item["input_ids"]), dtype=torch.bool)
        if is_mixture and "topk_logprobs_T" not in item:
            # One teacher's log-probs at temperature 1 determine those at the others, up to their sum.
            temperatures_J = torch.tensor(item.temperatures, dtype=torch.float32)
            tensors["topk_logprobs_T"] = item["topk_logprobs"].float()[..., None] / temperatures_J
        if item.draws:
            # The entries of the widest item. The new ones are absent.
            for name, fill in (("topk_ids", 0), ("topk_logprobs", -torch.inf)):
                tensors[name] = pad(item[name], (0, width - item[name].shape[1]), value=fill)
        alike.append(replace(item, tensors=tensors))
    return alike


def _kind(item: CachedItem) -> tuple[object, ...]:
    """Return what must be equal for the items of a batch, in the order of ``_SHARED``."""
    codes = [name for name in item if name.startswith(_CODES)]
    width = None if item.draws else max(item[name].shape[-1] for name in (codes or _ENTRIES) if name != "top1_logprob")
    return item.draws, width, item.vocab_size, item.temperatures, item.tables_digest


@dataclass(frozen=True, kw_only=True, eq=False)
class _Grid:
    """Items in the rows of a batch: one in each, or all in one.

    Parameters
    ----------
    items
        From :func:`_alike`.
    places
        Row and column of the first token of each item.
    mask_BT, has_next_BT
        Whether there is a token, and whether it has a next one in its item.
    """

    items: Sequence[CachedItem]
    places: Sequence[tuple[int, int]]
    mask_BT: Tensor
    has_next_BT: Tensor

    def batch(self, pad_id: int) -> dict[str, Any]:
        """Return all but what padded and flat batches have on their own."""
        items = self.items
        input_ids_BT = self._placed("input_ids", pad_id, torch.int64)
        learned_BT, labels_BT = self.mask_BT, torch.where(self.mask_BT, input_ids_BT, IGNORED_LABEL)
        if "loss_mask" in items[0]:
            # What a causal model learns from its labels does not depend on which positions have targets.
            learned_BT = self.mask_BT & self._placed("loss_mask", False, torch.bool)
            # A position's mask is about the next token, labels are about the token itself.
            labels_BT[:, 1:].masked_fill_(~learned_BT[:, :-1], IGNORED_LABEL)
            labels_BT[:, :1] = IGNORED_LABEL
        has_targets_BT = torch.ones_like(self.mask_BT)
        for item, (row, column) in zip(items, self.places, strict=True):
            own_T = slice(column, column + len(item["input_ids"]))
            if "target_pos" in item:
                has_targets_BT[row, own_T] = False
                has_targets_BT[row, column + item["target_pos"]] = True
            else:
                # The last token of a document does not predict the first one of the next.
                ends_T = item["label_logprob"].isnan()
                labels_BT[row, own_T][1:].masked_fill_(ends_T[:-1], IGNORED_LABEL)
        names = ["row", *(name for name in ("n_beyond", "source") if all(name in item for item in items))]
        return {
            "input_ids": input_ids_BT,
            "labels": labels_BT,
            "targets": self._targets(input_ids_BT, learned_BT & has_targets_BT),
            "segments": _padded_segments([item["segments"] for item in items]),
            **{name: torch.stack([item[name] for item in items]) for name in names},
        }

    def _targets(self, input_ids_BT: Tensor, mask_BT: Tensor) -> SparseTargets | CodedTargets:
        first = self.items[0]
        label_logprob_BT = self._placed("label_logprob", float("nan"), torch.float32)
        label_ids_BT = torch.full_like(input_ids_BT, IGNORED_LABEL)
        label_ids_BT[:, :-1] = torch.where(self.has_next_BT[:, :-1], input_ids_BT[:, 1:], IGNORED_LABEL)
        # In a window over several documents, the first token of a document is not a label of the preceding token.
        label_ids_BT.masked_fill_(label_logprob_BT.isnan(), IGNORED_LABEL)
        codes = {name: self._placed(name, 0, first[name].dtype) for name in first if name.startswith(_CODES)}
        no_entries_BT0 = torch.zeros((*mask_BT.shape, 0))
        targets = SparseTargets(
            input_ids=input_ids_BT,
            topk_ids=no_entries_BT0.long() if codes else self._placed("topk_ids", 0, torch.int64),
            topk_logprobs=no_entries_BT0 if codes else self._placed("topk_logprobs", 0.0, torch.float32),
            tail_logmass=self._placed("tail_logmass", 0.0, torch.float32),
            logsumexp=self._placed("logsumexp", 0.0, torch.float32),
            label_ids=label_ids_BT,
            label_logprob=label_logprob_BT,
            mask=mask_BT,
            vocab_size=first.vocab_size,
            temperatures=first.temperatures,
            draws=first.draws,
            tail_logmass_NJ=self._placed("tail_logmass_T", 0.0, torch.float32) if first.temperatures else None,
            topk_logprobs_NKJ=self._placed("topk_logprobs_T", 0.0, torch.float32)
            if "topk_logprobs_T" in first
            else None,
        )
        return CodedTargets(codes=codes, rest=targets, tables_digest=first.tables_digest) if codes else targets

    def _placed(self, name: str, fill: float, dtype: torch.dtype) -> Tensor:
        """Put an array of each item in its place. Targets of chosen positions go to their positions."""
        out = torch.full((*self.mask_BT.shape, *self.items[0][name].shape[1:]), fill, dtype=dtype)
        for item, (row, column) in zip(self.items, self.places, strict=True):
            is_chosen = "target_pos" in item and name not in EVERY_TOKEN
            at = column + item["target_pos"] if is_chosen else slice(column, column + len(item[name]))
            out[row, at] = item[name].to(dtype)
        return out


def _padded_segments(segments: Sequence[Tensor]) -> Tensor:
    most = max(len(segments_S3) for segments_S3 in segments)
    segments_BS3 = torch.tensor([-1, 0, 0]).repeat(len(segments), most, 1)
    for b, segments_S3 in enumerate(segments):
        segments_BS3[b, : len(segments_S3)] = segments_S3
    return segments_BS3


def collate_flat(items: Sequence[CachedItem]) -> dict[str, Any]:
    """Join items to one row without padding, for attention over sequences of varying length.

    Parameters
    ----------
    items
        From :class:`dask_logits.CachedLogitsDataset`.

    Returns
    -------
    dict
        The keys of :func:`collate`, with B = 1 and T = N, the sum of the lengths, without ``attention_mask``, plus
        ``position_ids`` [1, N], which restart with every item, and ``cu_seqlens`` [items + 1] int32, the start of each
        item and the end of the last. ``labels`` is −100 at the first token of an item, which the preceding token must
        not predict. ``row``, ``segments`` and ``n_beyond`` are those of the items.

    Raises
    ------
    DatasetError
        If the items do not come from a :class:`dask_logits.CachedLogitsDataset`, or from caches that do not agree.

    Examples
    --------
    >>> def item(ids):
    ...     tokens, zeros = torch.tensor(ids), torch.zeros(len(ids))
    ...     return CachedItem(
    ...         tensors={"input_ids": tokens, "topk_ids": tokens[:, None].int(), "topk_logprobs": zeros[:, None],
    ...                  "logsumexp": zeros, "tail_logmass": zeros, "label_logprob": zeros, "row": torch.tensor(0),
    ...                  "segments": torch.tensor([[0, 0, len(ids)]])},
    ...         vocab_size=10,
    ...     )
    >>> batch = collate_flat([item([5, 6, 7]), item([8, 9])])
    >>> batch["position_ids"].tolist(), batch["cu_seqlens"].tolist(), batch["labels"].tolist()
    ([[0, 1, 2, 0, 1]], [0, 3, 5], [[-100, 6, 7, -100, 9]])
    """
    items = _alike(items)
    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    ends = lengths.cumsum(0)
    start_N, length_N = (torch.repeat_interleave(of_item, lengths) for of_item in (ends - lengths, lengths))
    position_1N = (torch.arange(len(start_N)) - start_N)[None]
    grid = _Grid(
        items=items,
        places=[(0, start) for start in (ends - lengths).tolist()],
        mask_BT=torch.ones_like(position_1N, dtype=torch.bool),
        has_next_BT=position_1N < length_N - 1,
    )
    batch = grid.batch(pad_id=0)
    batch["labels"][position_1N == 0] = IGNORED_LABEL
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).int()
    return {**batch, "position_ids": position_1N, "cu_seqlens": cu_seqlens}


register_collate(CachedItem, collate)
