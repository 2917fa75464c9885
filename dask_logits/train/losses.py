"""Distillation losses on sparse targets.

The teacher's distribution is its K kept entries plus one *ghost token* with the tail's mass. The student's is its
probabilities of the same K tokens plus its own mass outside them. Their divergence is a proper one: it is never
negative, and zero only if the two agree. Renormalising the K entries has neither property, and is biased
(arXiv 2503.16870).

The student's logits are read in row chunks, in both the forward and the backward pass. No float32 copy of [N, V] is
ever held, only the logits and their gradient in the logits' own dtype.

Dimension letters: N positions, R rows of a chunk, V vocabulary, K kept entries.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dask_logits.errors import ConfigError, DatasetError
from dask_logits.train.targets import CodedTargets, SparseTargets

_CHUNK_ROWS = 512


def distillation_loss(
    logits: Tensor, targets: SparseTargets, *, input_ids: Tensor | None = None, chunk_rows: int = _CHUNK_ROWS
) -> Tensor:
    r"""Compute the forward KL divergence from the teacher to the student, with the tail as one ghost token.

    .. math:: \sum_k p_k (\log p_k - \log q_k) + p_\text{tail} (\log p_\text{tail} - \log q_\text{tail})

    Parameters
    ----------
    logits
        [..., V], of the same positions as the targets: the targets at t are for the token at t + 1, like the logits at
        t, so nothing is shifted. V may exceed the teacher's vocabulary. The excess counts in the student's tail.
    targets
        ``batch["targets"]`` of :func:`dask_logits.collate`. Positions outside its mask are ignored.
    input_ids
        The student's input tokens, compared with the teacher's. None: not compared.
    chunk_rows
        Positions whose float32 logits exist at one time.

    Returns
    -------
    Tensor
        Scalar float32, nats per position, the mean over unmasked positions, 0 if there are none.

    Raises
    ------
    ConfigError
        If `logits` do not fit the targets: another shape, one position less, another device, not floating-point, or
        fewer logits than the vocabulary.
    DatasetError
        If `input_ids` differ from the teacher's tokens, or if a kept id is outside the vocabulary.

    Notes
    -----
    Stored log-probs are rounded to float16. The kept entries are rescaled to the mass outside the tail, so that the
    teacher's distribution sums to one.

    Examples
    --------
    >>> teacher = torch.tensor([[2.0, 1.0, 0.0]]).log_softmax(-1)
    >>> targets = SparseTargets(
    ...     input_ids=torch.tensor([1]), topk_ids=torch.tensor([[0, 1]]), topk_logprobs=teacher[:, :2],
    ...     tail_logmass=teacher[:, 2], logsumexp=torch.zeros(1), label_ids=torch.tensor([-100]),
    ...     label_logprob=torch.tensor([torch.nan]), mask=torch.tensor([True]), vocab_size=3,
    ... )
    >>> round(abs(distillation_loss(teacher, targets).item()), 6)
    0.0
    """
    _check_logits(logits, targets)
    if input_ids is not None:
        targets.check_alignment(input_ids)
    vocab_size = logits.shape[-1]
    rows_N = targets.mask.reshape(-1).nonzero().squeeze(-1)
    ids_NK = targets.topk_ids.reshape(targets.mask.numel(), targets.topk_ids.shape[-1]).long()
    if ids_NK.numel() and not 0 <= int(ids_NK.min()) <= int(ids_NK.max()) < vocab_size:
        raise DatasetError(
            f"targets.topk_ids: expected ids from 0 to {vocab_size - 1}, got {int(ids_NK.min())} to "
            f"{int(ids_NK.max())}; run `dask-logits verify` on the cache"
        )
    logp_NK, logtail_N = normalise_targets(
        targets.topk_logprobs.reshape(ids_NK.shape).float(), targets.tail_logmass.reshape(-1).float()
    )
    # A column of −∞ follows the logits, for absent entries.
    absent_NK = logp_NK == -torch.inf
    ids_NK = ids_NK.masked_fill(absent_NK, vocab_size)
    loss: Tensor = _SparseForwardKL.apply(  # type: ignore[no-untyped-call]
        logits.reshape(-1, vocab_size), ids_NK, logp_NK, logtail_N, rows_N, chunk_rows, int(absent_NK.any())
    )
    return loss


def _check_logits(logits: Tensor, targets: SparseTargets) -> None:
    """Refuse logits that cannot belong to the targets, and name the likely cause."""
    if isinstance(targets, CodedTargets):
        raise ConfigError(
            "The targets are still encoded, because the cache was opened with decode='device'. Decode them first: "
            "decoder = dataset.decoder().to(device); targets = decoder(batch['targets'])."
        )
    if not isinstance(targets, SparseTargets):
        raise ConfigError(
            f"targets: expected the SparseTargets of the batch, batch['targets'], got {type(targets).__name__}"
        )
    if not isinstance(logits, Tensor):
        raise ConfigError(
            f"logits: expected a tensor, got {type(logits).__name__}; take .logits of a Hugging Face model's output"
        )
    shape, positions = tuple(logits.shape), tuple(targets.shape)
    if not logits.is_floating_point():
        raise ConfigError(f"logits: expected floating-point numbers [..., V], got {logits.dtype} of the shape {shape}")
    if shape[:-1] != positions:
        raise ConfigError(
            f"logits: expected the shape {(*positions, 'V')}, one row for each position of the targets, got {shape}; "
            f"{_shape_advice(shape, positions)}"
        )
    if logits.device != targets.device:
        raise ConfigError(
            f"The logits are on {logits.device}, but the targets are on {targets.device}. Move the targets with the "
            f"batch: targets = batch['targets'].to('{logits.device}')."
        )
    if shape[-1] < targets.vocab_size:
        raise ConfigError(
            f"The student has {shape[-1]} logits, but the targets are for a vocabulary of {targets.vocab_size}. Open "
            f"the cache with CachedLogitsDataset(..., student_vocab_size={shape[-1]}): then kept entries that the "
            "student has no logit for count in the tail. Check that the student uses the teacher's tokenizer."
        )


def _shape_advice(shape: tuple[int, ...], positions: tuple[int, ...]) -> str:
    if len(shape) == len(positions) + 1 and shape[:-2] == positions[:-1] and shape[-2] == positions[-1] - 1:
        return (
            "they are one position short, as if they were shifted for a label loss. Pass them unshifted: the targets "
            "at a position belong to the logits at the same position"
        )
    if shape[:-1] == (math.prod(positions),):
        return f"pass them as the model gives them, without flattening: logits.reshape{(*positions, -1)}"
    return "pass the logits and the targets of the same batch"


def normalise_targets(logp_NK: Tensor, logtail_N: Tensor) -> tuple[Tensor, Tensor]:
    """Scale the kept entries so that they and the tail sum to one.

    Parameters
    ----------
    logp_NK, logtail_N
        Log-probs as stored (rounded), and the tail's log-mass. Rows without kept entries are unchanged.

    Returns
    -------
    logp_NK, logtail_N
    """
    kept_N = torch.log(-torch.expm1(logtail_N.clamp(max=-1e-7)))
    sum_N = logp_NK.logsumexp(-1)
    return logp_NK + torch.where(sum_N == -torch.inf, 0.0, kept_N - sum_N)[:, None], logtail_N


class _SparseForwardKL(torch.autograd.Function):
    """Forward KL divergence, averaged over rows, with a closed-form gradient.

    With q the student's softmax and s its softmax outside the K ids, the derivative to logit j is q_j − p_j for a kept
    j, and s_j (q_tail − p_tail) for the others.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        ids_NK: Tensor,
        logp_NK: Tensor,
        logtail_N: Tensor,
        rows_N: Tensor,
        chunk_rows: int,
        n_beyond: int,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=logits_NV.device)
        for rows_R in torch.split(rows_N, chunk_rows):
            ids_RK, logp_RK, logtail_R = ids_NK[rows_R], logp_NK[rows_R], logtail_N[rows_R]
            logq_RK, logq_tail_R, _ = _student(logits_NV, rows_R, ids_RK, n_beyond)
            loss_R = _cross(logp_RK, logq_RK).sum(-1) + _cross(logtail_R, logq_tail_R)
            total += loss_R.sum(dtype=torch.float64)
        ctx.save_for_backward(logits_NV, ids_NK, logp_NK, logtail_N, rows_N)
        ctx.chunk_rows, ctx.n_beyond = chunk_rows, n_beyond
        return (total / max(1, len(rows_N))).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits_NV, ids_NK, logp_NK, logtail_N, rows_N = ctx.saved_tensors
        grad_NV = torch.zeros_like(logits_NV)
        scale = grads[0].float() / max(1, len(rows_N))
        for rows_R in torch.split(rows_N, ctx.chunk_rows):
            ids_RK = ids_NK[rows_R]
            logq_RK, logq_tail_R, rest_RV = _student(logits_NV, rows_R, ids_RK, ctx.n_beyond)
            share_R = logq_tail_R.exp() - logtail_N[rows_R].exp()
            grad_RV = rest_RV.mul_((share_R * scale)[:, None])
            grad_RV.scatter_(1, ids_RK, (logq_RK.exp() - logp_NK[rows_R].exp()) * scale)
            grad_NV.index_copy_(0, rows_R, grad_RV[:, : grad_NV.shape[1]].to(grad_NV.dtype))
        return grad_NV, None, None, None, None, None, None


def _student(logits_NV: Tensor, rows_R: Tensor, ids_RK: Tensor, n_beyond: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a chunk's log-probs of the kept ids and of the tail, and the softmax outside the kept ids.

    The tail is a sum over the other ids, not 1 − Σq, which cancels when q is sharp, along with its gradient.
    """
    logits_RV = logits_NV.index_select(0, rows_R).float()
    if n_beyond:
        logits_RV = torch.nn.functional.pad(logits_RV, (0, n_beyond), value=-torch.inf)
    kept_RK = logits_RV.gather(1, ids_RK)
    rest_RV = logits_RV.scatter_(1, ids_RK, -torch.inf)
    maximum_R = rest_RV.amax(-1)
    empty_R = maximum_R == -torch.inf
    rest_RV.sub_(torch.where(empty_R, 0.0, maximum_R)[:, None]).exp_()
    sum_R = rest_RV.sum(-1)
    rest_R = sum_R.log() + maximum_R
    total_R = torch.logaddexp(rest_R, kept_RK.logsumexp(-1))
    rest_RV.div_(torch.where(empty_R, 1.0, sum_R)[:, None])
    return kept_RK - total_R[:, None], rest_R - total_R, rest_RV


def _cross(logp: Tensor, logq: Tensor) -> Tensor:
    """Return p (log p − log q), or 0 if p is 0."""
    return torch.where(logp == -torch.inf, 0.0, logp.exp() * (logp - logq))
