"""Compute exact top-k, logsumexp, tail and label log-prob from logits, with tensors only.

The method uses blocks of 64 columns. One read of the logits computes each block's maximum and the sum of its
exponentials, relative to the highest value of some neighbouring blocks (its own would need a second reduction of each
block). The k blocks with the largest maxima contain the k largest values, so only k·64 candidates are sorted, and the
sums of all other blocks are ready. Values and ids are packed into one int64 key, which makes the order total: larger
value first, equal values by lower id (``torch.topk`` leaves ties open, and bfloat16 logits tie at the k-th place in
most rows). The tail is summed from the remaining terms, never as 1 − Σp, which cancels when K covers almost all mass.

If logits were rounded to half precision, the caller recomputes the k + 32 best in float32 (`refine`), and the best k of
those are kept. The remaining error is the rounding of the other terms of the logsumexp, which averages out.

Cost per row at V = 49,152, k = 64 on two Zen 5 cores, compiled: 11 µs statistics, 5 µs selection, 3 µs
refinement, 3 µs order, 10 µs sums and small steps. ``torch.topk`` and ``log_softmax`` in float32 take six times as
long.

Dimension letters: R rows, V vocabulary padded to whole blocks, N blocks, G groups of neighbouring blocks, C candidates,
K kept entries, J temperatures, S draws.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dask_logits.teacher.cuda import kernels
from dask_logits.teacher.cuda.kernels import BLOCK
from dask_logits.teacher.draws import draw_ids
from dask_logits.teacher.model import ScoringPath

# Refined candidates beyond k. The k best by float32 logits were always within this margin by bfloat16 logits.
SPARE = 32
# Maximum neighbouring blocks with sums relative to one value.
_MOST_BLOCKS = 8
# Rows whose float32 logits exist at one time without compilation: 16 rows × 49k × 4 bytes stay in the caches.
_CPU_TILE = 16
# Memory of float32 logits for entropies and further temperatures on a GPU. Four such arrays exist at one time.
_GPU_TILE_BYTES = 256 << 20

# Relative to the highest logit. Its exponential is 0 in float32.
_LEAST_LOGIT = -200.0

PLAIN = ScoringPath()


@dataclass(frozen=True, kw_only=True)
class TopK:
    """Targets of R positions.

    Parameters
    ----------
    ids_RK
        int64, most probable first, ties by lower id.
    logits_RK
        float32, the logits of `ids_RK`.
    logsumexp_R
        float32, over the whole row. NaN for a row with NaN or +inf.
    tail_logmass_R
        float32, log of the probability outside the K entries.
    label_logits_R
        float32, the labels' logits, arbitrary if there is no label.
    tail_logmass_RJ
        float32, log of the probability outside the K entries at each further temperature.
    entropy_R
        float32, entropy of the whole distribution in nats. None unless it is asked for.
    drawn_RS
        int64, ids drawn from the whole distribution. None unless uniform numbers are given.
    """

    ids_RK: Tensor
    logits_RK: Tensor
    logsumexp_R: Tensor
    tail_logmass_R: Tensor
    label_logits_R: Tensor
    tail_logmass_RJ: Tensor
    entropy_R: Tensor | None = None
    drawn_RS: Tensor | None = None


def padded_width(vocab_size: int) -> int:
    """Return the vocabulary rounded up to whole blocks.

    >>> padded_width(49_152), padded_width(50_257)
    (49152, 50304)
    """
    return -(-vocab_size // BLOCK) * BLOCK


def scratch_rows(rows: int, device: str) -> int:
    """Return the number of rows that exist in float32 beside the logits.

    >>> scratch_rows(256, "cpu"), scratch_rows(256, "cuda")
    (16, 256)
    """
    return min(rows, _CPU_TILE) if device == "cpu" else rows


def tile_rows(width: int, device: str) -> int:
    """Return the number of rows whose entropies, or tails at further temperatures, are computed at one time.

    On a CPU, logits of more rows do not fit into the caches. A GPU is busy only with many rows.

    >>> tile_rows(128_256, "cpu"), tile_rows(128_256, "cuda"), tile_rows(262_144, "cuda")
    (16, 523, 256)
    """
    return _CPU_TILE if device == "cpu" else max(1, _GPU_TILE_BYTES // (4 * width))


def topk_with_tail(
    logits_RV: Tensor,
    k: int,
    *,
    labels_R: Tensor | None = None,
    vocab_size: int | None = None,
    path: ScoringPath = PLAIN,
    refine: Callable[[Tensor], Tensor] | None = None,
    temperatures: tuple[float, ...] = (),
    has_entropy: bool = False,
    uniform_RS: Tensor | None = None,
) -> TopK:
    """Compute the targets of R positions from their logits.

    Parameters
    ----------
    logits_RV
        Floating, contiguous, width a multiple of 64. Columns beyond the valid vocabulary hold −inf.
    k
        Kept entries, at most the valid vocabulary.
    labels_R
        int64, true next tokens, −1 if there is none. None: no labels.
    vocab_size
        Valid vocabulary. None: the whole width.
    path
        Factor and soft cap to apply to every logit, and whether passes over the logits run as compiled code.
    refine
        int64 ids [R, C] → float32 finished logits [R, C]. None: the logits are already exact.
    temperatures
        Divisors of the logits, each for one more tail.
    has_entropy
        Whether to compute the entropy.
    uniform_RS
        Uniform numbers, each for one draw (:mod:`dask_logits.teacher.draws`). `logits_RV` is overwritten then.
    """
    rows, width = logits_RV.shape
    labels_R = torch.zeros(rows, dtype=torch.int64, device=logits_RV.device) if labels_R is None else labels_R
    labels_R1 = labels_R.clamp(min=0)[:, None]
    count = k if refine is None else min(k + SPARE, vocab_size or width)
    maxima_RN, sums_RN, bases_RG = block_statistics(logits_RV, path)
    blocks = width // BLOCK
    chosen_RC = _largest_blocks(maxima_RN, min(count, blocks), path)
    rows_R1 = torch.arange(rows, device=logits_RV.device)[:, None]
    candidates = logits_RV.view(-1, BLOCK).index_select(0, (chosen_RC + rows_R1 * blocks).view(-1)).view(rows, -1)
    if refine is None:
        values = path.finish(candidates.float())
        ids = (chosen_RC[:, :, None] * BLOCK + torch.arange(BLOCK, device=logits_RV.device)).view(rows, -1)
        place_RK = _ordered(values, ids, width, k, path)
        ids_RC, values_RC = ids.gather(1, place_RK), values.gather(1, place_RK)
        ids_RK, kept_RK = ids_RC, values_RC
        label_logits_R = path.finish(logits_RV.gather(1, labels_R1).float())[:, 0]
        highest_R1 = maxima_RN.amax(-1, keepdim=True)
        left_R = torch.zeros(rows, device=logits_RV.device)
    else:
        place_RK = _largest_halves(candidates, count, path)
        ids_RC = chosen_RC.gather(1, place_RK // BLOCK) * BLOCK + place_RK % BLOCK
        refined = refine(torch.cat([ids_RC, labels_R1], 1))
        values_RC, label_logits_R = refined[:, :-1].contiguous(), refined[:, -1]
        order_RC = _ordered(values_RC, ids_RC, width, count, PLAIN)
        ids_RC, values_RC = ids_RC.gather(1, order_RC), values_RC.gather(1, order_RC)
        ids_RK, kept_RK = ids_RC[:, :k].contiguous(), values_RC[:, :k].contiguous()
        highest_R1 = torch.maximum(maxima_RN.amax(-1, keepdim=True), kept_RK[:, :1])
        left_R = (values_RC[:, k:] - highest_R1).exp().sum(-1)
    sums_RN.scatter_(1, chosen_RC, 0.0)
    # Only the base of a group of −inf exceeds the highest value: it is 0 and may lie far above, and 0 · inf is NaN.
    rest_RG = sums_RN.view(*bases_RG.shape, -1).sum(-1) * (bases_RG - highest_R1).clamp(max=0.0).exp()
    candidates.scatter_(1, place_RK, -torch.inf)
    entropy_R = _entropy(logits_RV, ids_RC, values_RC - highest_R1, highest_R1, path) if has_entropy else None
    tail_logmass_RJ = _tails(logits_RV, ids_RC, values_RC - highest_R1, highest_R1, k, temperatures, path)
    drawn_RS = None
    if uniform_RS is not None:
        scale_RG1 = (bases_RG - highest_R1).clamp(max=0.0).exp()[:, :, None]
        mass_RN = (sums_RN.view(*bases_RG.shape, -1) * scale_RG1).flatten(1)
        blocks_RCB = candidates.view(rows, -1, BLOCK)
        mass_RN.scatter_(1, chosen_RC, compiled_if(path.compiled, _sum_exp)(blocks_RCB, highest_R1[:, :, None], path))
        mass_RC = (values_RC - highest_R1).exp()
        drawn_RS = draw_ids(logits_RV, ids_RC, mass_RC, mass_RN, highest_R1, uniform_RS, path)
    left_R = left_R + rest_RG.sum(-1) + compiled_if(path.compiled, _sum_exp)(candidates, highest_R1, path)
    total_R = left_R + (kept_RK - highest_R1).exp().sum(-1)
    return TopK(
        ids_RK=ids_RK,
        logits_RK=kept_RK,
        logsumexp_R=highest_R1[:, 0] + total_R.log(),
        tail_logmass_R=left_R.log() - total_R.log(),
        label_logits_R=label_logits_R,
        tail_logmass_RJ=tail_logmass_RJ,
        entropy_R=entropy_R,
        drawn_RS=drawn_RS,
    )


def _tails(
    logits_RV: Tensor,
    exact_ids_RC: Tensor,
    exact_RC: Tensor,
    highest_R1: Tensor,
    k: int,
    temperatures: tuple[float, ...],
    path: ScoringPath,
) -> Tensor:
    """Return the log of the mass outside the kept entries at some temperatures: float32 [R, J].

    The first k of the entries with exact values are the kept ones. Exact values are relative to the highest one.
    """
    found_RJ = highest_R1.new_empty((len(logits_RV), len(temperatures)))
    rows = tile_rows(logits_RV.shape[1], logits_RV.device.type)
    for first in range(0, len(logits_RV) if temperatures else 0, rows):
        part = slice(first, first + rows)
        rest = path.finish(logits_RV[part].float()).scatter(1, exact_ids_RC[part], -torch.inf) - highest_R1[part]
        for j, temperature in enumerate(temperatures):
            exact = (exact_RC[part] / temperature).exp()
            left_R = (rest / temperature).exp().sum(-1) + exact[:, k:].sum(-1)
            found_RJ[part, j] = left_R.log() - (left_R + exact[:, :k].sum(-1)).log()
    return found_RJ


def _entropy(
    logits_RV: Tensor, exact_ids_RC: Tensor, exact_RC: Tensor, highest_R1: Tensor, path: ScoringPath
) -> Tensor:
    """Return the entropy of the distribution in nats: float32 [R].

    With z relative to the highest logit and Z = Σ exp(z), H = log Z − Σ exp(z) z / Z (Shannon's −Σ p log p). Columns of
    −inf count 0. Exact values are relative to the highest one and replace the rounded ones.
    """
    found_R = highest_R1.new_empty(len(logits_RV))
    rows = tile_rows(logits_RV.shape[1], logits_RV.device.type)
    for first in range(0, len(logits_RV), rows):
        part = slice(first, first + rows)
        z_RV = path.finish(logits_RV[part].float()) - highest_R1[part]
        z_RV.scatter_(1, exact_ids_RC[part], exact_RC[part])
        exp_RV = z_RV.exp()
        sum_R = exp_RV.sum(-1)
        found_R[part] = sum_R.log() - (exp_RV * z_RV.clamp_(min=_LEAST_LOGIT)).sum(-1) / sum_R
    return found_R


def kernels_agree(logits_RV: Tensor, k: int, path: ScoringPath) -> bool:
    """Whether the Triton kernels agree with torch on this machine: the same ids, and sums within rounding.

    Parameters
    ----------
    logits_RV, k
        As for :func:`topk_with_tail`.
    path
        A path without kernels.
    """
    wanted = topk_with_tail(logits_RV, k, path=path)
    found = topk_with_tail(logits_RV, k, path=dataclasses.replace(path, kernels=True))
    close = torch.allclose(found.logsumexp_R, wanted.logsumexp_R, atol=1e-4, rtol=1e-6)
    return close and torch.equal(found.ids_RK, wanted.ids_RK)


def block_statistics(logits_RV: Tensor, path: ScoringPath = PLAIN) -> tuple[Tensor, Tensor, Tensor]:
    """Compute for every block of 64 its maximum and the sum of its exponentials, in one read of the logits.

    Parameters
    ----------
    logits_RV, path
        As for :func:`topk_with_tail`.

    Returns
    -------
    maxima_RN, sums_RN
        float32. A block of −inf has the sum 0. NaN or +inf in a block makes its maximum or sum NaN.
    bases_RG
        float32, finite unless there is NaN or +inf: the reference value for the sums of the group's N / G blocks.
    """
    rows, width = logits_RV.shape
    blocks = width // BLOCK
    groups = blocks // max(count for count in range(1, _MOST_BLOCKS + 1) if blocks % count == 0)
    if path.kernels:
        return kernels.block_statistics(logits_RV, path.scale, path.softcap)
    if path.compiled or logits_RV.is_cuda:
        found: tuple[Tensor, Tensor, Tensor] = compiled_if(path.compiled, _statistics)(logits_RV, path, groups)
        return found
    found = torch.empty(rows, blocks), torch.empty(rows, blocks), torch.empty(rows, groups)
    for first in range(0, rows, _CPU_TILE):
        part = slice(first, first + _CPU_TILE)
        for whole, tile in zip(found, _statistics(logits_RV[part], path, groups), strict=True):
            whole[part] = tile
    return found


def _statistics(logits_RV: Tensor, path: ScoringPath, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = len(logits_RV)
    values_RGNB = path.finish(logits_RV.float()).view(rows, groups, -1, BLOCK)
    maxima_RGN = values_RGNB.amax(-1)
    bases_RG = maxima_RGN.amax(-1)
    # −inf cannot be subtracted.
    bases_RG = bases_RG.masked_fill(bases_RG == -torch.inf, 0.0)
    sums_RGN = (values_RGNB - bases_RG[..., None, None]).exp().sum(-1)
    return maxima_RGN.view(rows, -1), sums_RGN.view(rows, -1), bases_RG


def _sum_exp(values: Tensor, highest_R1: Tensor, path: ScoringPath) -> Tensor:
    return (path.finish(values.float()) - highest_R1).exp().sum(-1)


@functools.cache
def compiled_if(wanted: bool, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function, compiled once for all shapes if that is wanted."""
    return torch.compile(function, dynamic=True) if wanted else function


def _largest_blocks(maxima_RN: Tensor, count: int, path: ScoringPath) -> Tensor:
    """Return the ids of the blocks with the largest maxima, equal ones by lower id. Kernels return them ascending."""
    blocks = maxima_RN.shape[1]
    if path.kernels and blocks <= kernels.MOST_VALUES:
        return kernels.largest(maxima_RN, count)
    keys = _order_preserving(maxima_RN) | torch.arange(blocks - 1, -1, -1, device=maxima_RN.device)
    chosen_RC = (blocks - 1) - (_largest_keys(keys, count) & 0xFFFFFFFF)
    return chosen_RC.sort(1).values if path.kernels else chosen_RC


def _largest_halves(candidates: Tensor, count: int, path: ScoringPath) -> Tensor:
    """Return the places of the largest of each row's half-precision values, unordered, equal ones by first place."""
    width = candidates.shape[1]
    wide = width > 1 << 16
    keys = compiled_if(path.compiled, _half_keys)(candidates, wide)
    return (width - 1) - (_largest_keys(keys, count).long() & (0xFFFFFFFF if wide else 0xFFFF))


def _half_keys(candidates: Tensor, wide: bool) -> Tensor:
    """Pack half-precision values and their places into integers that sort by value, then by first place."""
    bits = candidates.view(torch.int16).int()
    # Half-precision floats sort like sign and magnitude.
    ordered = bits ^ ((bits >> 15) & 0x7FFF)
    places = torch.arange(candidates.shape[1] - 1, -1, -1, dtype=torch.int32, device=candidates.device)
    return (ordered.long() << 32) | places if wide else (ordered << 16) | places


def _largest_keys(keys: Tensor, count: int) -> Tensor:
    """Return each row's largest keys, unordered. `keys` is overwritten.

    On CPUs, numpy's partition (AVX-512 or AVX2) takes a tenth of ``torch.topk``'s time.
    """
    if keys.device.type != "cpu":
        return torch.topk(keys, count, sorted=False).values
    least = keys.shape[1] - count
    keys.numpy().partition(least, axis=1)
    return keys[:, least:]


def _ordered(values: Tensor, ids: Tensor, width: int, count: int, path: ScoringPath) -> Tensor:
    """Return the places of the largest values, equal ones by lower id, in order."""
    if path.kernels and ids.shape[1] <= kernels.MOST_VALUES:
        # Blocks are chosen in ascending order, so the first place has the lowest id.
        places = kernels.largest(values, count)
        return places.gather(1, values.gather(1, places).sort(stable=True, dim=1, descending=True).indices)
    keys = _order_preserving(values) | (width - 1 - ids)
    return torch.topk(keys, count).indices


def _order_preserving(values: Tensor) -> Tensor:
    """Map float32 to int64 with the upper half in the order of the values. −0.0 and 0.0 are equal."""
    bits = (values + 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
