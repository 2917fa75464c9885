"""Draws without the absent entries between them: the byte planes of a chunk, packed and unpacked.

Positions have different numbers of distinct ids, but chunks have a fixed shape (T, K). A packed chunk holds the present
entries of its positions one after the other, and zeros behind them, which compress to nothing. Nothing else marks the
positions: the counts of each sum to the number of draws. Rows of absent entries between the present ones would cost
5 bytes per position at 50 draws, columns 10 (docs/measurements.md).

Dimension letters: N positions, T positions of a chunk, K entries of a position.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dask_logits.records import Array

COUNTS = "topk_counts"


def pack(planes: Mapping[str, Array], chunk: int) -> dict[str, Array]:
    """Move the present entries of each chunk to its front.

    Parameters
    ----------
    planes
        Name → [N, K] uint8, among them the counts. Entries with the count 0 are absent.
    chunk
        T. The last chunk may be shorter.

    Returns
    -------
    dict
        The same names and shapes.

    Examples
    --------
    >>> packed = pack({"topk_counts": np.array([[2, 0], [1, 1]], np.uint8)}, 2)
    >>> packed["topk_counts"].tolist()
    [[2, 1], [1, 0]]
    """
    packed = {name: np.zeros_like(plane_NK) for name, plane_NK in planes.items()}
    for first in range(0, len(planes[COUNTS]), chunk):
        is_present_TK = planes[COUNTS][first : first + chunk] > 0
        n_present = np.count_nonzero(is_present_TK)
        for name, plane_NK in planes.items():
            packed[name][first : first + chunk].reshape(-1)[:n_present] = plane_NK[first : first + chunk][is_present_TK]
    return packed


def unpack(planes: Mapping[str, Array], chunk: int, draws: int) -> dict[str, Array]:
    """Return the entries to their positions: the inverse of :func:`pack`.

    Parameters
    ----------
    planes
        Name → [N, K] uint8, among them the counts. The first row begins a chunk.
    chunk
        T.
    draws
        Sum of the counts of a position.

    Raises
    ------
    ValueError
        If the counts do not fit into the positions.

    Examples
    --------
    >>> unpack({"topk_counts": np.array([[2, 1], [1, 0]], np.uint8)}, 2, draws=2)["topk_counts"].tolist()
    [[2, 0], [1, 1]]
    """
    unpacked = {name: np.zeros_like(plane_NK) for name, plane_NK in planes.items()}
    for first in range(0, len(planes[COUNTS]), chunk):
        flat = planes[COUNTS][first : first + chunk].reshape(-1)
        n_present = int(np.count_nonzero(flat))
        place = _places(flat[:n_present], planes[COUNTS][first : first + chunk].shape, draws)
        for name, plane_NK in planes.items():
            part_TK = plane_NK[first : first + chunk]
            unpacked[name][first : first + chunk].reshape(-1)[place] = part_TK.reshape(-1)[:n_present]
    return unpacked


def _places(counts: Array, shape: tuple[int, ...], draws: int) -> Array:
    """Return the place of each present entry among all [T · K] of a chunk."""
    before = np.cumsum(counts, dtype=np.int64) - counts
    row = before // draws
    is_first = np.diff(row, prepend=-1) > 0
    index = np.arange(len(counts))
    column = index - np.maximum.accumulate(np.where(is_first, index, 0))
    # Every row begins with a multiple of the draws, so none is skipped and none reaches into the next.
    is_whole = bool((counts > 0).all()) and bool((before[is_first] % draws == 0).all())
    if not is_whole or (row >= shape[0]).any() or (column >= shape[1]).any():
        raise ValueError(f"counts that do not sum to {draws} at each position")
    return row * shape[1] + column
