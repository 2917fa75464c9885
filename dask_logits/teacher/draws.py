"""Draws from the teacher's distribution, by the inverse of its cumulative distribution in two levels.

A uniform number chooses an entry with an exact logit, or a block of 64 columns, from cumulative sums over the K entries
and the N blocks. In a chosen block it then chooses a column. The sums of the blocks come from the one read of the
logits that top-k makes. A cumulative sum over the whole vocabulary, or a random number for each of its ids, would cost
more than the head.

The uniform numbers are hashes of (seed, dataset row, position in the row, number of the draw) by SplitMix64 (Steele,
Lea and Flood, OOPSLA 2014). There is no state, so the draws do not depend on batches, partitions or workers. Entries
and blocks are in the order of their ids, so that another rounding of the logits moves a draw to a neighbouring id only.

Logits that were rounded to half precision are exact for the entries of the top k and its spare candidates, which have
almost all of the mass. The other columns are drawn by their rounded logits, whose errors average out.

Dimension letters: R rows, V vocabulary padded to whole blocks, N blocks, C entries with exact logits, S draws,
K distinct ids, M positions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dask_logits.records import Array
from dask_logits.teacher.cuda.kernels import BLOCK
from dask_logits.teacher.model import ScoringPath

_STEP = 0x9E3779B97F4A7C15
_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
_WORD = 1 << 64
# Columns of chosen blocks that exist at one time.
_GATHERED = 1 << 22
# A product of a sum with a number below 1 of 52 bits is below the sum, also after rounding.
_BITS = 52
_BELOW_ONE = 1 - 2.0**-_BITS


def _signed(word: int) -> int:
    """Return the int64 with the bits of an unsigned word."""
    return word - _WORD if word >= _WORD // 2 else word


def _mixed(words: Tensor) -> Tensor:
    """Return the hash of each int64: SplitMix64's finaliser."""
    for shift, multiplier in _MULTIPLIERS:
        # int64 has no logical shift.
        words = (words ^ ((words >> shift) & ((1 << (64 - shift)) - 1))) * _signed(multiplier)
    return words


def draw_keys(seed: int, rows: Array, positions: Array) -> Array:
    """Return the key of each position's uniform numbers.

    Parameters
    ----------
    seed
        From 0.
    rows, positions
        [M] dataset row, and position in the tokens of the row.

    Returns
    -------
    ndarray
        [M] int64.
    """
    # Hashed first, because the seeds 0 and 1 would otherwise give the same keys to other rows.
    words = _mixed(torch.full((len(rows),), _signed((seed + _STEP) % _WORD), dtype=torch.int64))
    for part in (rows, positions):
        words = _mixed((words + _signed(_STEP)) ^ torch.from_numpy(part.astype(np.int64)))
    keys: Array = words.numpy()
    return keys


def uniforms(keys_R: Tensor, draws: int) -> Tensor:
    """Return the uniform numbers of some positions.

    Parameters
    ----------
    keys_R
        int64, from :func:`draw_keys`, on any device.
    draws
        S.

    Returns
    -------
    Tensor
        [R, S] float64 of 52 bits, from 0 to less than 1.

    Examples
    --------
    >>> keys = torch.from_numpy(draw_keys(0, np.array([3]), np.array([7])))
    >>> bool((uniforms(keys, 4)[:, :2] == uniforms(keys, 2)).all())
    True
    """
    number_S = torch.arange(1, draws + 1, dtype=torch.int64, device=keys_R.device) * _signed(_STEP)
    words_RS = _mixed(keys_R[:, None] + number_S)
    return ((words_RS >> (64 - _BITS)) & ((1 << _BITS) - 1)).double() * 2.0**-_BITS


def draw_ids(
    logits_RV: Tensor, ids_RC: Tensor, mass_RC: Tensor, mass_RN: Tensor, highest_R1: Tensor, uniform_RS: Tensor,
    path: ScoringPath,
) -> Tensor:  # fmt: skip
    """Return the ids that uniform numbers choose.

    Parameters
    ----------
    logits_RV
        Raw logits. Those of `ids_RC` are overwritten with −inf. Columns of −inf are never drawn.
    ids_RC, mass_RC
        Entries with exact logits, in any order, and exp(logit − highest).
    mass_RN
        The sum of exp(logit − highest) of the other columns of each block.
    highest_R1
        The reference of the masses, about the highest logit.
    uniform_RS
        From :func:`uniforms`.
    path
        Factor and soft cap of the logits.

    Returns
    -------
    Tensor
        int64 [R, S].
    """
    ids_RC, order_RC = ids_RC.sort(1)
    n_entries = ids_RC.shape[1]
    mass_RA = torch.cat([mass_RC.gather(1, order_RC), mass_RN], 1).double()
    chosen_RS, within_RS = _chosen(mass_RA, uniform_RS)
    entry_RS = ids_RC.gather(1, chosen_RS.clamp(max=n_entries - 1))
    block_RS = (chosen_RS - n_entries).clamp(min=0)
    # A scatter into half-precision values copies all of them on CPUs (torch 2.13).
    starts_R1 = torch.arange(len(logits_RV), device=logits_RV.device)[:, None] * logits_RV.shape[1]
    logits_RV.view(-1).index_fill_(0, (ids_RC + starts_R1).view(-1), -torch.inf)
    logits_RNB = logits_RV.view(len(logits_RV), -1, BLOCK)
    column_RS = torch.empty_like(block_RS)
    step = max(1, _GATHERED // (BLOCK * block_RS.shape[1]))
    for first in range(0, len(logits_RV), step):
        rows = slice(first, min(first + step, len(logits_RV)))
        rows_R1 = torch.arange(rows.stop - first, device=logits_RV.device)[:, None]
        raw_RSB = logits_RNB[rows][rows_R1, block_RS[rows]]
        mass_RSB = (path.finish(raw_RSB.float()) - highest_R1[rows, :, None]).exp().double()
        column_RS[rows] = _chosen(mass_RSB, within_RS[rows, :, None])[0][..., 0]
    return torch.where(chosen_RS < n_entries, entry_RS, block_RS * BLOCK + column_RS)


def _chosen(mass_RA: Tensor, uniform_RS: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cells of the last axis that uniform numbers choose, and where inside: a uniform number again.

    A cell without mass is never chosen, unless a row has no other.
    """
    sum_RA = mass_RA.cumsum(-1)
    at_RS = uniform_RS * sum_RA[..., -1:]
    chosen_RS = torch.searchsorted(sum_RA, at_RS, right=True).clamp(max=mass_RA.shape[-1] - 1)
    ends_RS = sum_RA.gather(-1, chosen_RS)
    starts_RS = torch.where(chosen_RS > 0, sum_RA.gather(-1, (chosen_RS - 1).clamp(min=0)), 0.0)
    within_RS = (at_RS - starts_RS) / (ends_RS - starts_RS)
    return chosen_RS, within_RS.clamp(0.0, _BELOW_ONE)


def count_draws(ids_RS: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the distinct ids of each row's draws and how often each was drawn.

    Parameters
    ----------
    ids_RS
        int64, the draws.
    width
        K, at least the number of distinct ids of a row.

    Returns
    -------
    ids_RK
        int64, the largest counts first, equal ones by lower id. 0 for absent entries, which follow.
    counts_RK
        uint8, 0 for absent entries.

    Examples
    --------
    >>> ids, counts = count_draws(torch.tensor([[7, 4, 7, 9]]), 4)
    >>> ids.tolist(), counts.tolist()
    ([[7, 4, 9, 0]], [[2, 1, 1, 0]])
    """
    ids_RS = ids_RS.sort(1).values
    is_new_RS = torch.ones_like(ids_RS, dtype=torch.bool)
    is_new_RS[:, 1:] = ids_RS[:, 1:] != ids_RS[:, :-1]
    place_RS = is_new_RS.cumsum(1) - 1
    counts_RS = torch.zeros_like(ids_RS).scatter_add_(1, place_RS, torch.ones_like(ids_RS))
    distinct_RS = torch.zeros_like(ids_RS).scatter_(1, place_RS, ids_RS)
    counts_RK, order_RK = (each[:, :width] for each in counts_RS.sort(stable=True, dim=1, descending=True))
    return distinct_RS.gather(1, order_RK), counts_RK.to(torch.uint8)
