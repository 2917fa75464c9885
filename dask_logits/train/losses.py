"""Distillation losses on sparse targets, from logits or from hidden states.

Both losses read the student in row chunks and use gradients in closed form (:mod:`dask_logits.train.cells`).
:func:`distillation_loss` never holds a float32 copy of [N, V], only the logits and their gradient in their own dtype.
:func:`fused_distillation_loss` never holds [N, V] at all: the head's product, the loss and the gradient are computed
chunk by chunk.

Dimension letters: N positions, M scored positions, R rows of a chunk, V vocabulary, D input width of a product.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.export import register_dataclass

from dask_logits.errors import ConfigError
from dask_logits.train.chunked import Chunked, GivenLogits, HeadLogits, Plan, Problem
from dask_logits.train.heads import Head
from dask_logits.train.objective import Objective, teacher_cells
from dask_logits.train.targets import CodedTargets, SparseTargets

_Function = TypeVar("_Function", bound=Callable[..., object])
_FORWARD_KL = Objective()
_TERMS = ("loss", "divergence", "cross_entropy", "kept_mass", "entropy")
# Bytes of the logits of a chunk. Larger chunks make the products with the head faster.
_CHUNK_BYTES = 128 * 2**20


def _uncompiled(function: _Function) -> _Function:
    """Keep a function out of ``torch.compile``: the number of scored rows and chunks depends on data."""
    disabled: _Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


@dataclass(frozen=True, kw_only=True, eq=False)
class DistillationLoss:
    """A loss and its terms.

    Only ``loss`` has a gradient. ``loss = (1 − alpha) · cross_entropy + alpha · temperature² · divergence``.

    Parameters
    ----------
    loss
        Scalar. Per token: of the shape of the targets, 0 at positions without targets.
    divergence, cross_entropy
        The two terms, in nats, of the same shape. Scalars are sums over the scored positions, divided by the
        normaliser. The cross-entropy of a position without a next token is 0.
    kept_mass, entropy
        Per token only: the student's mass on the kept entries, and the entropy of its distribution in nats, both at
        temperature 1. Otherwise None.
    n_tokens, n_labels
        Scored positions, and those with a next token. ``cross_entropy * n_tokens / n_labels`` is the mean over labels.
    """

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor
    kept_mass: Tensor | None = None
    entropy: Tensor | None = None
    n_tokens: int
    n_labels: int


# With static_graph, DistributedDataParallel looks for the tensors of a forward's output in this way, and does not
# average the gradients of the first step without them.
register_dataclass(DistillationLoss)


@_uncompiled
def distillation_loss(
    logits: Tensor,
    targets: SparseTargets,
    objective: Objective = _FORWARD_KL,
    *,
    normaliser: float | Tensor | None = None,
    per_token: bool = False,
    input_ids: Tensor | None = None,
    chunk_rows: int | None = None,
) -> DistillationLoss:
    """Compute the loss of a student's logits.

    By default, this is the forward KL divergence with the tail as one ghost token:
    ``Σ p_k (log p_k − log q_k) + p_tail (log p_tail − log q_tail)``, the sum over the kept entries k.

    Parameters
    ----------
    logits
        [..., V], of the same positions as the targets: the targets at t are for the token at t + 1, like the logits at
        t, so nothing is shifted. Logits beyond the teacher's vocabulary count in the student's tail. Kept entries that
        the student has no logit for count in the teacher's tail, and draws of them are left out.
    targets
        ``batch["targets"]`` of :func:`dask_logits.collate`. Positions outside its mask are ignored, also by the
        cross-entropy. With targets at chosen positions, both terms therefore cover only those.
    objective
        Divergence, tail, temperature and mix.
    normaliser
        Divisor of the sums. None: the number of scored positions of this batch. With gradient accumulation, pass the
        number of all batches of the step. With several ranks whose gradients are averaged, pass the number of all
        ranks, divided by the number of ranks.
    per_token
        Return all values per token, undivided.
    input_ids
        The student's input tokens, compared with the teacher's. None: not compared.
    chunk_rows
        Positions whose float32 logits exist at one time. None: as many as fit in 128 MiB.

    Returns
    -------
    DistillationLoss
        In float32, or in float64 if the logits are. All terms are 0 if there are no targets.

    Raises
    ------
    ConfigError
        If `logits` do not fit the targets: another shape, one position less, another device, or not floating-point.
        If the targets have no tail at the objective's temperature, or are draws and the objective is not for draws.
    DatasetError
        If `input_ids` differ from the teacher's tokens, or if a kept id is outside the vocabulary.

    Notes
    -----
    Stored log-probs are rounded to float16. The kept entries are rescaled to the mass outside the tail, so that the
    teacher's distribution sums to one. The reverse KL is infinite where the teacher has no tail mass but the student
    has. There the mass is taken as the smallest positive float32, ``e^−103.3``.

    Of targets that are draws, the divergence is the cross-entropy ``−Σ (count / n) log q`` over the tokens drawn. Its
    expectation is that of the teacher's whole distribution, and so is its gradient's. Its least value is the teacher's
    entropy, not 0, because no entropy is subtracted.

    Examples
    --------
    >>> teacher = torch.tensor([[2.0, 1.0, 0.0]]).log_softmax(-1)
    >>> targets = SparseTargets(
    ...     input_ids=torch.tensor([1]), topk_ids=torch.tensor([[0, 1]]), topk_logprobs=teacher[:, :2],
    ...     tail_logmass=teacher[:, 2], logsumexp=torch.zeros(1), label_ids=torch.tensor([-100]),
    ...     label_logprob=torch.tensor([torch.nan]), mask=torch.tensor([True]), vocab_size=3,
    ... )
    >>> round(distillation_loss(teacher, targets).loss.item(), 6)
    0.0
    """
    _check("logits", logits, targets, "V", input_ids)
    problem = Problem(
        source=partial(GivenLogits, dtype=_compute_dtype(logits)),
        tensors=(logits.flatten(0, -2),),
        width=logits.shape[-1],
        dtype=_compute_dtype(logits),
        recompute=True,
    )
    return _loss(problem, targets, objective, normaliser, per_token, chunk_rows)


@_uncompiled
def fused_distillation_loss(
    hidden: Tensor,
    head: Head,
    targets: SparseTargets,
    objective: Objective = _FORWARD_KL,
    *,
    normaliser: float | Tensor | None = None,
    per_token: bool = False,
    recompute: bool = False,
    input_ids: Tensor | None = None,
    chunk_rows: int | None = None,
) -> DistillationLoss:
    """Compute the loss of a student's hidden states, without ever storing the logits of more than one chunk.

    Only positions with targets go through the head. By default, the gradients to hidden states and weights are computed
    in the forward pass (three products of the head's size). With `recompute` or `per_token` the backward pass
    computes the logits again (four products), and no gradient is held in between. ``backward`` may run twice only
    then.

    Parameters
    ----------
    hidden
        [..., D], the inputs of the student's head.
    head
        From :func:`dask_logits.student_head`, or described by hand.
    targets, objective, normaliser, per_token, input_ids
        As for :func:`distillation_loss`.
    recompute
        Whether the backward pass computes the logits again. `per_token` implies it.
    chunk_rows
        Positions whose logits exist at one time. None: as many as fit in 128 MiB. A soft cap, a temperature other than
        1 and `per_token` need the memory of one or two more chunks.

    Returns
    -------
    DistillationLoss
        In float32, or in float64 if the weight is.

    Raises
    ------
    ConfigError, DatasetError
        As for :func:`distillation_loss`, and if the width of `hidden` differs from the head's.

    Notes
    -----
    Products are in the dtype of the weight, or of autocast. Weight gradients are summed in float32. On CUDA the logits
    are float32 for half-precision factors, too. On CPUs, which have no such product, they are rounded, and the weight
    gradient is a float32 product. Gradients have no derivatives of their own.

    Examples
    --------
    >>> teacher = torch.tensor([[2.0, 1.0, 0.0]]).log_softmax(-1)
    >>> targets = SparseTargets(
    ...     input_ids=torch.tensor([1]), topk_ids=torch.tensor([[0, 1]]), topk_logprobs=teacher[:, :2],
    ...     tail_logmass=teacher[:, 2], logsumexp=torch.zeros(1), label_ids=torch.tensor([-100]),
    ...     label_logprob=torch.tensor([torch.nan]), mask=torch.tensor([True]), vocab_size=3,
    ... )
    >>> head = Head(weight=torch.eye(3))
    >>> round(fused_distillation_loss(teacher, head, targets).loss.item(), 6)
    0.0
    """
    if not isinstance(head, Head):
        raise ConfigError(
            f"head: expected a Head, got {type(head).__name__}; use student_head(model), or describe a linear layer as "
            "Head(weight=linear.weight, bias=linear.bias)"
        )
    _check("hidden", hidden, targets, "D", input_ids)
    width, depth = head.weight.shape
    if hidden.shape[-1] != depth:
        raise ConfigError(
            f"hidden: expected the width of the head's inputs, {depth}, got {hidden.shape[-1]}; pass the output of the "
            "model's last layer after its final norm"
        )
    products = head.products(hidden)
    dtype = _compute_dtype(head.weight)
    problem = Problem(
        source=partial(HeadLogits, dtype=dtype, product_dtype=head.product_dtype, head=head),
        tensors=(
            *(x.flatten(0, -2) for x, _ in products),
            *(weight for _, weight in products),
            *(() if head.bias is None else (head.bias,)),
        ),
        width=width,
        dtype=dtype,
        recompute=recompute or per_token,
    )
    return _loss(problem, targets, objective, normaliser, per_token, chunk_rows)


def _loss(
    problem: Problem,
    targets: SparseTargets,
    objective: Objective,
    normaliser: float | Tensor | None,
    per_token: bool,
    chunk_rows: int | None,
) -> DistillationLoss:
    if per_token and normaliser is not None:
        raise ConfigError("normaliser: expected None with per_token=True, because values per token are not divided")
    if chunk_rows is not None and chunk_rows < 1:
        raise ConfigError(f"chunk_rows: expected at least 1, got {chunk_rows}")
    if isinstance(normaliser, int | float) and not 0 < normaliser < math.inf:
        raise ConfigError(f"normaliser: expected a positive number of scored tokens, got {normaliser!r}")
    objective = objective.of(targets)
    _warn_if_narrow(problem.width, targets.vocab_size)
    rows_M = targets.mask.flatten().nonzero().squeeze(-1)
    n_tokens = len(rows_M)
    teacher = teacher_cells(targets, objective, rows_M, problem.width, problem.dtype)
    if chunk_rows is None:
        most = max(1, _CHUNK_BYTES // (problem.width * problem.dtype.itemsize))
        # Chunks of equal size.
        chunk_rows = -(-n_tokens // max(1, -(-n_tokens // most)))
    plan = Plan(
        source=problem.source,
        rows_M=torch.split(rows_M, max(1, chunk_rows)),
        teacher_M=teacher.split(max(1, chunk_rows)),
        objective=objective,
        has_details=per_token,
        recompute=problem.recompute,
        has_grad=torch.is_grad_enabled() and any(tensor.requires_grad for tensor in problem.tensors),
    )
    loss, *values_M = Chunked.apply(plan, *problem.tensors)  # type: ignore[no-untyped-call]
    if per_token:
        n = targets.mask.numel()
        values = [value.new_zeros(n).index_copy(0, rows_M, value).reshape(targets.shape) for value in (loss, *values_M)]
    else:
        count = max(1, n_tokens) if normaliser is None else normaliser
        values = [(value.sum(dtype=torch.float64) / count).to(problem.dtype) for value in (loss, *values_M)]
    # The details of each position come last.
    terms: dict[str, Tensor] = dict(zip(_TERMS, values, strict=False))
    return DistillationLoss(**terms, n_tokens=n_tokens, n_labels=int((teacher.labels_N >= 0).sum()))


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _check(name: str, tensor: Tensor, targets: SparseTargets, letter: str, input_ids: Tensor | None) -> None:
    """Refuse logits, hidden states or tokens that cannot belong to the targets, and name the likely cause."""
    if isinstance(targets, CodedTargets):
        raise ConfigError(
            "The targets are still encoded, because the cache was opened with decode='device'. Decode them first: "
            "decoder = dataset.decoder().to(device); targets = decoder(batch['targets'])."
        )
    if not isinstance(targets, SparseTargets):
        raise ConfigError(
            f"targets: expected the SparseTargets of the batch, batch['targets'], got {type(targets).__name__}"
        )
    if not isinstance(tensor, Tensor):
        attribute = "logits" if name == "logits" else "last_hidden_state"
        raise ConfigError(
            f"{name}: expected a tensor, got {type(tensor).__name__}; take .{attribute} of a Hugging Face model's "
            "output"
        )
    shape, positions = tuple(tensor.shape), tuple(targets.shape)
    if not tensor.is_floating_point():
        raise ConfigError(
            f"{name}: expected floating-point numbers [..., {letter}], got {tensor.dtype} of the shape {shape}"
        )
    if shape[:-1] != positions:
        raise ConfigError(
            f"{name}: expected the shape {(*positions, letter)}, one row for each position of the targets, got "
            f"{shape}; {_shape_advice(name, shape, positions)}"
        )
    if tensor.device != targets.device:
        raise ConfigError(
            f"The {name} are on {tensor.device}, but the targets are on {targets.device}. Move the targets with the "
            f"batch: targets = batch['targets'].to('{tensor.device}')."
        )
    if input_ids is not None:
        targets.check_alignment(input_ids)


def _shape_advice(name: str, shape: tuple[int, ...], positions: tuple[int, ...]) -> str:
    if len(shape) == len(positions) + 1 and shape[:-2] == positions[:-1] and shape[-2] == positions[-1] - 1:
        return (
            "they are one position short, as if they were shifted for a label loss. Pass them unshifted: the targets "
            f"at a position belong to the {name} at the same position"
        )
    if shape[:-1] == (math.prod(positions),):
        return f"pass them as the model gives them, without flattening: {name}.reshape{(*positions, -1)}"
    return f"pass the {name} and the targets of the same batch"


def _warn_if_narrow(width: int, vocab_size: int) -> None:
    if width < vocab_size:
        warnings.warn(
            f"The student has {width} logits, but the targets are for a vocabulary of {vocab_size}. Kept entries that "
            "the student has no logit for count in the tail, and draws of them are left out. Check that the student "
            "uses the teacher's tokenizer. To "
            f"confirm, open the cache with CachedLogitsDataset(..., student_vocab_size={width}).",
            stacklevel=4,
        )
