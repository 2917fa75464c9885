"""Items → targets: batches through the trunk, valid positions through the head in row chunks, top-k of each.

The logits of a whole batch never exist: beside the weights, memory holds one budgeted batch and one chunk of
``head_rows`` × V logits, whose buffer is reused. Results leave the device in their stored dtypes.

Dimension letters: B sequences, T tokens, M valid positions of a batch, R of a chunk, D hidden width, V vocabulary,
K kept entries, N tokens of the partition.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dask_logits.capture.batching import plan_batches
from dask_logits.capture.items import Item, plain_items
from dask_logits.capture.teacher import Head, Teacher
from dask_logits.capture.topk import TopK, padded_width, scratch_rows, topk_with_tail
from dask_logits.errors import TeacherError
from dask_logits.records import TOKEN_ARRAYS, Array, Records, schema


@dataclass(frozen=True, kw_only=True)
class ScoringSettings:
    """The numerics of a run, resolved; equal settings on equal hardware give equal bytes.

    Parameters
    ----------
    top_k
        K.
    vocab_size
        Valid vocabulary.
    batch_tokens, batch_size
        Bounds of a batch.
    head_rows
        Positions whose logits exist at one time.
    head
        Way from hidden states to logits.
    """

    top_k: int
    vocab_size: int
    batch_tokens: int
    batch_size: int | None
    head_rows: int
    head: Head


@torch.inference_mode()
def score_items(
    teacher: Teacher,
    items: Sequence[Item],
    settings: ScoringSettings,
    *,
    packed: bool = False,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> Records:
    """Score the items of a partition.

    Parameters
    ----------
    teacher
        A loaded teacher.
    items
        What it reads, in dataset order; empty ones are kept as documents of no tokens.
    settings
        The run's numerics.
    packed
        Whether items are blocks, whose lengths are recorded.
    on_tokens
        Called after each batch with the tokens kept since the last call.

    Raises
    ------
    TeacherError
        If an item's logits hold NaN or +inf; names its row.
    """
    lengths = np.array([len(item.tokens) for item in items], dtype=np.int64)
    contexts = np.array([item.context for item in items], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths - contexts)])
    n_tokens = int(starts[-1])
    entries = schema(settings.top_k, settings.vocab_size)
    out = {name: np.empty((n_tokens, *entries[name][1]), entries[name][0]) for name in TOKEN_ARRAYS}
    head = _HeadRunner(teacher, settings)
    for batch in plan_batches(lengths.tolist(), batch_tokens=settings.batch_tokens, batch_size=settings.batch_size):
        tokens_BT, labels_BT = _padded([items[i] for i in batch])
        where = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in batch])
        place_T, chosen = np.arange(tokens_BT.shape[1]), list(batch)
        kept_BT = (place_T < lengths[chosen][:, None]) & (place_T >= contexts[chosen][:, None])
        targets = head.run(
            torch.from_numpy(tokens_BT).to(teacher.device),
            torch.from_numpy(np.flatnonzero(kept_BT)).to(teacher.device),
            torch.from_numpy(labels_BT[kept_BT]).to(teacher.device),
        )
        out["input_ids"][where] = tokens_BT[kept_BT]
        for name, values in targets.items():
            out[name][where] = values
        bad = ~np.isfinite(targets["logsumexp"])
        if bad.any():
            row = _row_of(items, starts, int(where[np.flatnonzero(bad)[0]]))
            raise TeacherError(
                f"dataset row {row}: expected finite logits, got NaN or infinity from the teacher; "
                "run it in float32 (distillation.teacher.dtype=float32) or remove the row",
                row=row,
            )
        on_tokens(len(where))
    spans = [span for item in items for span in item.spans]
    return Records(
        **out,
        document_row=np.array([span.row for span in spans], np.uint64),
        document_offset=np.array([span.offset for span in spans], np.uint32),
        document_length=np.array([span.length for span in spans], np.uint32),
        block_length=lengths[lengths > 0].astype(np.uint32) if packed else None,
    )


def _row_of(items: Sequence[Item], starts: Array, place: int) -> int:
    """Return the dataset row of a kept token."""
    i = int(np.searchsorted(starts, place, side="right")) - 1
    ends = starts[i] + np.cumsum([span.length for span in items[i].spans])
    return items[i].spans[int(np.searchsorted(ends, place, side="right"))].row


class _HeadRunner:
    """Holds the buffers that every chunk of a partition reuses."""

    def __init__(self, teacher: Teacher, settings: ScoringSettings) -> None:
        self.teacher = teacher
        self.settings = settings
        width = padded_width(settings.vocab_size)
        rows = settings.head_rows
        self.logits = torch.full((rows, width), -torch.inf, dtype=teacher.dtype, device=teacher.device)
        self.scratch = torch.empty(
            scratch_rows(rows, teacher.device.type), width, dtype=torch.float32, device=teacher.device
        )

    def run(self, tokens_BT: Tensor, valid_M: Tensor, labels_M: Tensor) -> dict[str, Array]:
        """Score one batch; arrays in the stored dtypes, in the order of ``valid_M``."""
        source = self._forward_logits(tokens_BT) if self.settings.head == "forward" else None
        hidden = self.teacher.hidden_states(tokens_BT) if source is None else source
        rows_M = hidden.flatten(0, 1)
        pieces = []
        for first in range(0, len(valid_M), self.settings.head_rows):
            chunk = slice(first, first + self.settings.head_rows)
            rows_R = rows_M.index_select(0, valid_M[chunk])
            logits_RV = self._logits(rows_R)
            top = topk_with_tail(logits_RV, self.settings.top_k, self.scratch)
            pieces.append(self._stored(top, logits_RV, labels_M[chunk]))
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def _forward_logits(self, tokens_BT: Tensor) -> Tensor:
        return self.teacher.logits_forward(tokens_BT)

    def _logits(self, rows_R: Tensor) -> Tensor:
        """Fill the chunk's buffer; its columns beyond the valid vocabulary stay at −inf."""
        logits_RV = self.logits[: len(rows_R)]
        valid_RV = logits_RV[:, : self.settings.vocab_size]
        match self.settings.head:
            case "linear":
                self.teacher.logits_linear(rows_R, valid_RV)
            case "replay":
                self.teacher.logits_replay(rows_R, valid_RV)
            case "forward":
                valid_RV.copy_(rows_R)
        return logits_RV

    def _stored(self, top: TopK, logits_RV: Tensor, labels_R: Tensor) -> dict[str, Array]:
        label_logits = logits_RV.gather(1, labels_R.clamp(min=0)[:, None])[:, 0].float()
        label_logprobs = torch.where(labels_R >= 0, label_logits - top.logsumexp_R, torch.nan)
        logprobs_RK = (top.logits_RK - top.logsumexp_R[:, None]).half()
        return {
            "topk_ids": top.ids_RK.int().cpu().numpy(),
            "topk_logprobs": logprobs_RK.cpu().numpy(),
            "logsumexp": top.logsumexp_R.cpu().numpy(),
            "tail_logmass": top.tail_logmass_R.cpu().numpy(),
            "label_logprob": label_logprobs.cpu().numpy(),
        }


def _padded(batch: Sequence[Item]) -> tuple[Array, Array]:
    """Return the batch's tokens, right-padded with id 0, and each position's next token (−1 where there is none)."""
    width = len(batch[0].tokens)
    tokens_BT = np.zeros((len(batch), width), np.int64)
    labels_BT = np.full((len(batch), width), -1, np.int64)
    for b, item in enumerate(batch):
        length = len(item.tokens)
        tokens_BT[b, :length] = item.tokens
        labels_BT[b, : length - 1] = item.tokens[1:]
        labels_BT[b, length - 1] = item.next_token
    return tokens_BT, labels_BT


def measure(teacher: Teacher, documents: Sequence[Array], settings: ScoringSettings) -> tuple[Records, float]:
    """Score documents and time it.

    Returns
    -------
    records, tokens_per_second
    """
    started = time.perf_counter()
    records = score_items(teacher, plain_items(documents), settings)
    return records, records.n_tokens / max(time.perf_counter() - started, 1e-9)
