"""Convert documents to items: the token sequences read by the teacher, and the positions to keep. Pure integers.

A document is one item, or it is cut into text windows, or documents are joined into packed blocks. In all cases every
kept token belongs to exactly one item.

Dimension letters: C context tokens, L kept tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dask_logits.records import Array


@dataclass(frozen=True, kw_only=True)
class ItemSettings:
    """Settings for splitting or packing documents into items.

    Parameters
    ----------
    max_length
        Maximum tokens of an item.
    long_documents
        ``truncate`` keeps the first `max_length` tokens of a document, ``window`` all of them.
    window_stride
        Kept tokens of every window but the first. The rest of its `max_length` is context.
    packing
        ``none``, or ``concat``: documents are joined, each followed by a separator, and cut into `max_length` blocks.
    separator_id
        The separator, only for ``concat``.
    """

    max_length: int
    long_documents: Literal["truncate", "window"] = "truncate"
    window_stride: int | None = None
    packing: Literal["none", "concat"] = "none"
    separator_id: int | None = None

    @property
    def kept_tokens(self) -> int | None:
        """Tokens kept of a document. None: all."""
        return self.max_length if self.packing == "none" and self.long_documents == "truncate" else None


@dataclass(frozen=True, kw_only=True)
class Span:
    """Consecutive tokens of one dataset row inside an item.

    Parameters
    ----------
    row
        Dataset row.
    offset
        Position of the first token in the row's tokens.
    length
        Number of tokens, including a separator after the document.
    """

    row: int
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Item:
    """One sequence read by the teacher.

    Parameters
    ----------
    tokens
        [C + L] token ids.
    context
        C, the number of leading tokens whose targets belong to another item.
    next_token
        The token after the last one, −1 if there is none.
    spans
        Origin of the L kept tokens.
    loss_mask
        [L] bool, whether a student learns the token after each kept one. None: it learns all.
    """

    tokens: Array
    context: int
    next_token: int
    spans: tuple[Span, ...]
    loss_mask: Array | None = None

    @property
    def n_kept(self) -> int:
        """Number of tokens whose targets are kept, L."""
        return len(self.tokens) - self.context


def plain_items(documents: Sequence[Array], first_row: int = 0) -> list[Item]:
    """Convert each document to one item.

    Parameters
    ----------
    documents
        Token ids of consecutive rows.
    first_row
        Dataset row of the first document.
    """
    return [
        _cut(document, 0, len(document), [Span(row=row, offset=0, length=len(document))])
        for row, document in enumerate(documents, first_row)
    ]


def make_items(
    documents: Sequence[Array],
    settings: ItemSettings,
    *,
    first_row: int = 0,
    masks: Sequence[Array] | None = None,
) -> list[Item]:
    """Convert the documents of a partition to items.

    Parameters
    ----------
    documents
        Token ids of consecutive rows, including all tokens to keep.
    settings
        How documents are split or packed.
    first_row
        Dataset row of the first document.
    masks
        Which tokens of each document a student learns, bool. None: all.

    Examples
    --------
    >>> settings = ItemSettings(max_length=4, long_documents="window", window_stride=2)
    >>> [(i.tokens.tolist(), i.context, i.next_token) for i in make_items([np.arange(7)], settings)]
    [([0, 1, 2, 3], 0, 4), ([2, 3, 4, 5], 2, 6), ([4, 5, 6], 2, -1)]
    """
    if settings.packing == "concat":
        items = _blocks(documents, settings, first_row)
    elif settings.long_documents == "truncate":
        items = plain_items([document[: settings.max_length] for document in documents], first_row)
    else:
        items = [
            item for row, document in enumerate(documents, first_row) for item in _windows(document, settings, row)
        ]
    if masks is None:
        return items
    next_masks = [_next_mask(document, mask) for document, mask in zip(documents, masks, strict=True)]
    return [dataclasses.replace(item, loss_mask=_mask_of(item, next_masks, first_row)) for item in items]


def _next_mask(document: Array, mask: Array) -> Array:
    """Return whether each token's next one is learned. Nothing is learned after the last token, nor a separator."""
    next_T: Array = np.zeros(len(document) + 1, bool)
    next_T[: max(0, len(document) - 1)] = mask[1:]
    return next_T


def _mask_of(item: Item, next_masks: Sequence[Array], first_row: int) -> Array:
    parts = [next_masks[span.row - first_row][span.offset : span.offset + span.length] for span in item.spans]
    mask_L: Array = np.concatenate(parts)
    if item.next_token < 0 and len(mask_L):
        # The next token was cut off.
        mask_L[-1] = False
    return mask_L


def _cut(tokens: Array, first: int, last: int, spans: Sequence[Span], context: int = 0) -> Item:
    """Return the item that keeps the tokens [first, last)."""
    next_token = int(tokens[last]) if last < len(tokens) else -1
    return Item(tokens=tokens[first - context : last], context=context, next_token=next_token, spans=tuple(spans))


def _windows(document: Array, settings: ItemSettings, row: int) -> list[Item]:
    width, stride = settings.max_length, settings.window_stride or settings.max_length
    bounds = itertools.pairwise([0, *range(width, len(document), stride), len(document)])
    spans = [Span(row=row, offset=first, length=last - first) for first, last in bounds]
    return [
        _cut(document, span.offset, span.offset + span.length, [span], width - stride if span.offset else 0)
        for span in spans
    ]


def _blocks(documents: Sequence[Array], settings: ItemSettings, first_row: int) -> list[Item]:
    width, separator = settings.max_length, settings.separator_id
    pieces = []
    for document in documents:
        ended = len(document) == 0 or document[-1] == separator
        pieces.append(document if ended else np.append(document, np.int32(separator or 0)))
    joined = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
    spans: list[list[Span]] = [[] for _ in range(max(1, -(-len(joined) // width)))]
    first = 0
    for row, piece in enumerate(pieces, first_row):
        last = first + len(piece)
        # An empty document has one span, too.
        for start, stop in itertools.pairwise([first, *range((first // width + 1) * width, last, width), last]):
            spans[min(start // width, len(spans) - 1)].append(Span(row=row, offset=start - first, length=stop - start))
        first = last
    return [_cut(joined, b * width, min((b + 1) * width, len(joined)), found) for b, found in enumerate(spans)]
