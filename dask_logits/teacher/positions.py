"""Which positions of an item get targets: all, those that a student learns, or those of high entropy.

Entropy is compared within an item, so the choice does not depend on partitions.

Dimension letters: N tokens of the partition, M positions with targets, L tokens kept of an item.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from dask_logits.data.items import Item
from dask_logits.records import Array

Positions = Literal["all", "labels", "entropy"]


def scored_positions(items: Sequence[Item], positions: Positions) -> Array:
    """Return the tokens whose positions go through the head: [M] int64, rising.

    Parameters
    ----------
    items
        Items of a partition, in order.
    positions
        ``all``, or with a mask only those that a student learns.
    """
    learned = [
        np.ones(item.n_kept, bool) if item.loss_mask is None or positions == "all" else item.loss_mask for item in items
    ]
    return np.flatnonzero(np.concatenate(learned) if learned else np.zeros(0, bool))


def highest_entropy(items: Sequence[Item], scored_M: Array, entropy_M: Array, share: float) -> Array:
    """Return the tokens of each item whose positions have the highest entropy, equal ones by lower position.

    An item keeps its share, rounded half up, and at least one position if it has any. arXiv 2602.01395 selects by the
    student's entropy, which a cache cannot know, and loses nothing with 20 % of the positions.

    Parameters
    ----------
    items
        Items of a partition, in order.
    scored_M
        The tokens whose positions compete, rising.
    entropy_M
        Their entropies.
    share
        Share of the positions to keep, above 0 and at most 1.

    Examples
    --------
    >>> from dask_logits.data.items import plain_items
    >>> items = plain_items([np.arange(4), np.arange(3)])
    >>> highest_entropy(items, np.arange(7), np.array([1.0, 3.0, 3.0, 2.0, 0.0, 0.5, 0.0]), 0.25).tolist()
    [1, 5]
    """
    ends = np.cumsum([item.n_kept for item in items], dtype=np.int64)
    chosen = []
    for places in np.split(np.arange(len(scored_M)), np.searchsorted(scored_M, ends[:-1])):
        count = max(1, math.floor(share * len(places) + 0.5))
        chosen.append(np.sort(places[np.argsort(-entropy_M[places], kind="stable")[:count]]))
    return scored_M[np.concatenate(chosen) if chosen else np.zeros(0, np.int64)]
