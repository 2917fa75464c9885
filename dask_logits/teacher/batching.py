"""Documents → batches under a token budget: pure integers, the same for the same lengths and settings.

Documents are sorted by length, longest first (so the largest batch comes first), and grouped greedily. Padding is
computed like everything else, so a batch ends early when its next document would leave too much of it, once the
batch is large enough to keep the device busy.
"""

from __future__ import annotations

from collections.abc import Sequence

# A batch of at least this share of the budget may end early rather than pad.
_ENOUGH = 0.125
# Share of padding from which it does.
_PADDING = 0.05


def plan_batches(lengths: Sequence[int], *, batch_tokens: int, batch_size: int | None = None) -> list[tuple[int, ...]]:
    """Group documents into batches.

    Parameters
    ----------
    lengths
        Tokens of each document. Empty documents appear in no batch.
    batch_tokens
        Most tokens of one batch, padding included. A longer document is a batch of its own.
    batch_size
        Most documents of one batch; None: unbounded.

    Returns
    -------
    list of tuple of int
        Indices into `lengths`; every non-empty document exactly once, the longest of a batch first.

    Examples
    --------
    >>> plan_batches([4, 9, 0, 4], batch_tokens=10)
    [(1,), (0, 3)]
    """
    order = sorted((i for i, n in enumerate(lengths) if n > 0), key=lambda i: (-lengths[i], i))
    batches: list[tuple[int, ...]] = []
    batch: list[int] = []
    real = 0
    for i in order:
        if batch:
            width = lengths[batch[0]]
            padded = width * (len(batch) + 1)
            full = padded > batch_tokens or (batch_size is not None and len(batch) >= batch_size)
            wasteful = real >= _ENOUGH * batch_tokens and padded - real - lengths[i] > _PADDING * padded
            if full or wasteful:
                batches.append(tuple(batch))
                batch, real = [], 0
        batch.append(i)
        real += lengths[i]
    return [*batches, tuple(batch)] if batch else batches
