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
    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    mask_BT = torch.arange(int(lengths.max())) < lengths[:, None]
    input_ids_BT = _padded(items, "input_ids", pad_id, torch.int64)
    learned_BT, labels_BT = mask_BT, torch.where(mask_BT, input_ids_BT, IGNORED_LABEL)
    if "loss_mask" in items[0]:
        # What a causal model learns from its labels does not depend on which positions have targets.
        learned_BT = mask_BT & _padded(items, "loss_mask", False, torch.bool)
        # A position's mask is about the next token, labels are about the token itself.
        labels_BT[:, 1:].masked_fill_(~learned_BT[:, :-1], IGNORED_LABEL)
        labels_BT[:, :1] = IGNORED_LABEL
    for labels_T, item in zip(labels_BT, items, strict=True):
        if "target_pos" not in item:
            # The last token of a document does not predict the first one of the next.
            ends_T = item["label_logprob"].isnan()
            labels_T[1 : len(ends_T)].masked_fill_(ends_T[:-1], IGNORED_LABEL)
    batch = {
        "input_ids": input_ids_BT,
        "attention_mask": mask_BT.long(),
        "labels": labels_BT,
        "targets": _targets(items, input_ids_BT, mask_BT, learned_BT & _has_targets(items, mask_BT)),
        "row": torch.stack([item["row"] for item in items]),
        "segments": _padded_segments([item["segments"] for item in items]),
    }
    return batch | _of_items(items)


def _of_items(items: Sequence[CachedItem]) -> dict[str, Tensor]:
    """Return the further numbers of each item, by name."""
    names = [name for name in ("n_beyond", "source") if all(name in item for item in items)]
    return {name: torch.stack([item[name] for item in items]) for name in names}


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
    more: list[dict[str, Tensor]] = [{} for _ in items]
    if any("loss_mask" in item for item in items):
        for own, item in zip(more, items, strict=True):
            own["loss_mask"] = item.get("loss_mask", torch.ones(len(item["input_ids"]), dtype=torch.bool))
    if any("topk_logprobs_T" in item for item in items):
        for own, item in zip(more, items, strict=True):
            # One teacher's log-probs at temperature 1 determine those at the others, up to their sum.
            temperatures_J = torch.tensor(item.temperatures, dtype=torch.float32)
            at_others_TKJ = item["topk_logprobs"].float()[..., None] / temperatures_J
            own["topk_logprobs_T"] = item.get("topk_logprobs_T", at_others_TKJ)
    if items[0].draws:
        width = max(item["topk_ids"].shape[1] for item in items)
        for own, item in zip(more, items, strict=True):
            # The entries of the widest item. The new ones are absent.
            for name, fill in (("topk_ids", 0), ("topk_logprobs", -torch.inf)):
                own[name] = pad(item[name], (0, width - item[name].shape[1]), value=fill)
    return [replace(item, tensors={**item.tensors, **own}) for item, own in zip(items, more, strict=True)]


def _kind(item: CachedItem) -> tuple[object, ...]:
    """Return what must be equal for the items of a batch, in the order of ``_SHARED``."""
    codes = [name for name in item if name.startswith(_CODES)]
    width = None if item.draws else max(item[name].shape[-1] for name in (codes or _ENTRIES) if name != "top1_logprob")
    return item.draws, width, item.vocab_size, item.temperatures, item.tables_digest


def _targets(
    items: Sequence[CachedItem], input_ids_BT: Tensor, mask_BT: Tensor, learned_BT: Tensor
) -> SparseTargets | CodedTargets:
    label_ids_BT = torch.full_like(input_ids_BT, IGNORED_LABEL)
    label_ids_BT[:, :-1] = torch.where(mask_BT[:, 1:], input_ids_BT[:, 1:], IGNORED_LABEL)
    label_logprob_BT = _padded(items, "label_logprob", float("nan"), torch.float32)
    # In a window over several documents, the first token of a document is not a label of the preceding token.
    label_ids_BT.masked_fill_(label_logprob_BT.isnan(), IGNORED_LABEL)
    is_coded = "topk_ids" not in items[0]
    no_entries_BT0 = torch.zeros((*mask_BT.shape, 0))
    targets = SparseTargets(
        input_ids=input_ids_BT,
        topk_ids=no_entries_BT0.long() if is_coded else _padded(items, "topk_ids", 0, torch.int64),
        topk_logprobs=no_entries_BT0 if is_coded else _padded(items, "topk_logprobs", 0.0, torch.float32),
        tail_logmass=_padded(items, "tail_logmass", 0.0, torch.float32),
        logsumexp=_padded(items, "logsumexp", 0.0, torch.float32),
        label_ids=label_ids_BT,
        label_logprob=label_logprob_BT,
        mask=learned_BT,
        vocab_size=max(item.vocab_size for item in items),
        temperatures=items[0].temperatures,
        draws=items[0].draws,
        tail_logmass_NJ=_padded(items, "tail_logmass_T", 0.0, torch.float32) if items[0].temperatures else None,
        topk_logprobs_NKJ=_padded(items, "topk_logprobs_T", 0.0, torch.float32)
        if "topk_logprobs_T" in items[0]
        else None,
    )
    if not is_coded:
        return targets
    names = [name for name in items[0] if name.startswith(_CODES)]
    return CodedTargets(
        codes={name: _padded(items, name, 0, items[0][name].dtype) for name in names},
        rest=targets,
        tables_digest=items[0].tables_digest,
    )


def _has_targets(items: Sequence[CachedItem], mask_BT: Tensor) -> Tensor:
    """Return which positions have targets, those of padding included unless an item has ``target_pos``."""
    has_targets_BT = torch.ones_like(mask_BT)
    for b, item in enumerate(items):
        if "target_pos" in item:
            has_targets_BT[b] = False
            has_targets_BT[b, item["target_pos"]] = True
    return has_targets_BT


def _padded(items: Sequence[CachedItem], name: str, fill: float, dtype: torch.dtype) -> Tensor:
    """Pad an array of the items. Targets of chosen positions are put in their places."""
    width = max(len(item["input_ids"]) for item in items)
    out = torch.full((len(items), width, *items[0][name].shape[1:]), fill, dtype=dtype)
    for b, item in enumerate(items):
        is_chosen = "target_pos" in item and name not in EVERY_TOKEN
        out[b, item["target_pos"] if is_chosen else slice(len(item[name]))] = item[name].to(dtype)
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
    rows = [collate([item]) for item in items]
    targets = [row["targets"] for row in rows]
    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    ends = lengths.cumsum(0)
    starts_N = torch.repeat_interleave(ends - lengths, lengths)
    labels_1N = torch.cat([row["labels"] for row in rows], 1)
    labels_1N[0, (ends - lengths)[lengths > 0]] = IGNORED_LABEL
    batch = {
        "input_ids": torch.cat([row["input_ids"] for row in rows], 1),
        "labels": labels_1N,
        "targets": targets[0].joined(targets),
        "position_ids": (torch.arange(len(starts_N)) - starts_N)[None],
        "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), ends]).int(),
        "row": torch.stack([item["row"] for item in items]),
        "segments": _padded_segments([item["segments"] for item in items]),
    }
    return batch | _of_items(items)


def _collate_default(items: Sequence[CachedItem], *, collate_fn_map: object = None) -> dict[str, Any]:
    return collate(items)


register_collate(CachedItem, _collate_default)
