"""Group documents into batches under a token budget: pure integers, determined by lengths and settings.

Documents are sorted by length, longest first (so the largest batch comes first), and grouped greedily. Padding costs
as much as other tokens, so a batch ends early if its next document would cause too much padding, once the batch is
large enough to keep the device busy.
"""

from __future__ import annotations

from collections.abc import Sequence

# A batch with at least this share of the budget may end early to avoid padding.
_ENOUGH = 0.125
# Share of padding at which it ends early.
_PADDING = 0.05
# Most blocks of a CUDA grid along y, where FlexAttention (torch 2.13) has the documents of a batch.
_MOST_DOCUMENTS = 65_535


def plan_batches(lengths: Sequence[int], *, batch_tokens: int, batch_size: int | None = None) -> list[tuple[int, ...]]:
    """Group documents into batches.

    Parameters
    ----------
    lengths
        Tokens of each document. Empty documents appear in no batch.
    batch_tokens
        Maximum tokens of one batch, padding included. A longer document forms its own batch.
    batch_size
        Maximum documents of one batch. None: as many as a GPU's attention can take.

    Returns
    -------
    list of tuple of int
        Indices into `lengths`. Every non-empty document occurs exactly once, the longest of a batch first.

    Examples
    --------
    >>> plan_batches([4, 9, 0, 4], batch_tokens=10)
    [(1,), (0, 3)]
    """
    most = _MOST_DOCUMENTS if batch_size is None else min(batch_size, _MOST_DOCUMENTS)
    order = sorted((i for i, n in enumerate(lengths) if n > 0), key=lambda i: (-lengths[i], i))
    batches: list[tuple[int, ...]] = []
    batch: list[int] = []
    real = 0
    for i in order:
        if batch:
            width = lengths[batch[0]]
            padded = width * (len(batch) + 1)
            full = padded > batch_tokens or len(batch) >= most
            wasteful = real >= _ENOUGH * batch_tokens and padded - real - lengths[i] > _PADDING * padded
            if full or wasteful:
                batches.append(tuple(batch))
                batch, real = [], 0
        batch.append(i)
        real += lengths[i]
    return [*batches, tuple(batch)] if batch else batches
