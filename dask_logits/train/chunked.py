"""A loss over the student's logits in row chunks, as one autograd function.

A source gives the logits of a chunk and takes their gradient: the student's own logits, or products of hidden states
with the head's weights. The gradient is in closed form, so no graph is recorded inside.

Dimension letters: N positions, M scored positions, R rows of a chunk, V vocabulary, D input width of a product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dask_logits.errors import ConfigError
from dask_logits.train.cells import measure
from dask_logits.train.heads import Head
from dask_logits.train.objective import Objective, TeacherCells

# Rows of a half-precision gradient whose float32 copy exists at one time.
_SCALED_ROWS = 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """A student's side: how to get logits from tensors, each with a gradient if it requires one."""

    source: Callable[[Sequence[Tensor], Sequence[bool]], Source]
    tensors: tuple[Tensor, ...]
    width: int
    dtype: torch.dtype
    recompute: bool


class GivenLogits:
    """Logits of the student, given."""

    def __init__(self, tensors: Sequence[Tensor], needs: Sequence[bool], *, dtype: torch.dtype) -> None:
        self.logits_NV, self.dtype = tensors[0], dtype
        self.grad_NV = torch.zeros_like(self.logits_NV) if needs[0] else None

    def logits(self, rows_R: Tensor) -> Tensor:
        """Return the logits of some positions, in memory that the caller may overwrite until the next call."""
        return self.logits_NV.index_select(0, rows_R).to(self.dtype)

    def absorb(self, rows_R: Tensor, grad_RV: Tensor) -> None:
        """Take the gradient to the logits of the latest chunk, which may be overwritten."""
        if self.grad_NV is not None:
            self.grad_NV.index_copy_(0, rows_R, grad_RV.to(self.grad_NV.dtype))

    def gradients(self) -> list[Tensor | None]:
        """Return the gradient to the logits."""
        return [self.grad_NV]


class HeadLogits:
    """Logits as products of hidden states and weights, in a buffer that all chunks share."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        *,
        dtype: torch.dtype,
        product_dtype: torch.dtype,
        head: Head,
    ) -> None:
        n = 1 + len(head.adapters)
        self.head, self.dtype, self.product_dtype = head, dtype, product_dtype
        self.inputs, self.weights = tensors[:n], [weight.to(product_dtype) for weight in tensors[n : 2 * n]]
        self.bias_V = None if head.bias is None else tensors[-1].to(dtype)
        self.dtypes = [tensor.dtype for tensor in tensors]
        self.grads = [
            torch.zeros_like(tensor, dtype=tensor.dtype if i < n else dtype) if needed else None
            for i, (tensor, needed) in enumerate(zip(tensors, needs, strict=True))
        ]
        self.buffer_RV: Tensor | None = None
        self.slope_RV: Tensor | None = None

    def logits(self, rows_R: Tensor) -> Tensor:
        """Compute the logits of some positions, in memory that the caller may overwrite until the next call."""
        if self.buffer_RV is None:
            shape = (len(rows_R), len(self.weights[0]))
            self.buffer_RV = torch.empty(shape, dtype=self.dtype, device=rows_R.device)
        out_RV = self.buffer_RV[: len(rows_R)]
        for i, (x_ND, weight_VD) in enumerate(zip(self.inputs, self.weights, strict=True)):
            _add_product(out_RV, x_ND[rows_R].to(self.product_dtype), weight_VD.t(), keep=i > 0)
        if self.bias_V is not None:
            out_RV += self.bias_V
        if self.head.scale != 1:
            out_RV *= self.head.scale
        if self.head.softcap is not None:
            out_RV.div_(self.head.softcap).tanh_()
            self.slope_RV = out_RV.square().neg_().add_(1)
            out_RV *= self.head.softcap
        return out_RV

    def absorb(self, rows_R: Tensor, grad_RV: Tensor) -> None:
        """Multiply a gradient back to hidden states, weights and bias."""
        if self.slope_RV is not None:
            grad_RV *= self.slope_RV
        if self.head.scale != 1:
            grad_RV *= self.head.scale
        n = len(self.weights)
        if self.bias_V is not None and (grad_V := self.grads[-1]) is not None:
            grad_V += grad_RV.sum(0)
        # CPUs emulate half-precision products, so the gradient of a weight is a float32 product there.
        is_wide = self.product_dtype == self.dtype or grad_RV.device.type == "cpu"
        narrow_RV = grad_RV.to(self.product_dtype)
        for x_ND, weight_VD, dx_ND, dw_VD in zip(
            self.inputs, self.weights, self.grads[:n], self.grads[n : 2 * n], strict=True
        ):
            if dx_ND is not None:
                dx_ND.index_copy_(0, rows_R, (narrow_RV @ weight_VD).to(dx_ND.dtype))
            if dw_VD is not None:
                left_RV, right_dtype = (grad_RV, self.dtype) if is_wide else (narrow_RV, self.product_dtype)
                _add_product(dw_VD, left_RV.t(), x_ND[rows_R].to(right_dtype), keep=True)

    def gradients(self) -> list[Tensor | None]:
        """Return the gradients, but for float16 in the dtypes of the tensors. Sums over many rows overflow float16."""
        return [
            grad if grad is None or dtype == torch.float16 else grad.to(dtype)
            for grad, dtype in zip(self.grads, self.dtypes, strict=True)
        ]


# Logits of chunks of rows, and what becomes of their gradient.
Source = GivenLogits | HeadLogits


def _add_product(out: Tensor, left: Tensor, right: Tensor, *, keep: bool) -> None:
    """Write a matrix product, or add it to the output, in the output's dtype."""
    if left.dtype == out.dtype:
        out.addmm_(left, right, beta=int(keep))
    elif out.device.type == "cuda":
        # Half-precision factors, wide sums and results. CUDA only (PyTorch 150812).
        if keep:
            torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
        else:
            torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        out.add_(left @ right) if keep else out.copy_(left @ right)


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What the autograd function needs beside the student's tensors, to which it must hold no reference."""

    source: Callable[[Sequence[Tensor], Sequence[bool]], Source]
    rows_M: tuple[Tensor, ...]
    teacher_M: list[TeacherCells]
    objective: Objective
    has_details: bool
    recompute: bool
    has_grad: bool


class Chunked(torch.autograd.Function):
    """The loss in row chunks: of each row if the backward pass computes the logits again, otherwise its sum."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the loss, and values of each row: divergence, cross-entropy, and the details if wanted."""
        has_grads = plan.has_grad and not plan.recompute
        objective = plan.objective
        needs = [has_grads and needed for needed in ctx.needs_input_grad[1:]]
        weights_M = [torch.ones_like(teacher_R.logtail_N) if has_grads else None for teacher_R in plan.teacher_M]
        source, terms_R = _passed(plan, tensors, needs, weights_M, plan.has_details)
        values = [torch.cat(parts) for parts in zip(*terms_R, strict=True)]
        loss = (1 - objective.alpha) * values[1] + objective.alpha * objective.temperature**2 * values[0]
        ctx.plan, ctx.dtypes = plan, [tensor.dtype for tensor in tensors]
        ctx.gradients = source.gradients() if has_grads else None
        if plan.has_grad and plan.recompute:
            ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*values)
        return (loss if plan.recompute else loss.sum(dtype=torch.float64), *values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients of the forward pass, or compute them."""
        plan: Plan = ctx.plan
        if plan.recompute:
            weights_M = torch.split(grads[0], [len(rows_R) for rows_R in plan.rows_M])
            gradients = _passed(plan, ctx.saved_tensors, ctx.needs_input_grad[1:], weights_M, False)[0].gradients()
        elif ctx.gradients is None:
            raise ConfigError(
                "backward: expected one call, because the gradients of the fused loss are used up by the first; "
                "pass recompute=True to fused_distillation_loss"
            )
        else:
            gradients, ctx.gradients = ctx.gradients, None
            for grad in gradients:
                if grad is not None:
                    _scale(grad, grads[0])
        pairs = zip(gradients, ctx.dtypes, strict=True)
        return None, *(None if grad is None else grad.to(dtype) for grad, dtype in pairs)


def _passed(
    plan: Plan,
    tensors: Sequence[Tensor],
    needs: Sequence[bool],
    weights_M: Sequence[Tensor | None],
    has_details: bool,
) -> tuple[Source, list[list[Tensor]]]:
    """Measure every chunk of rows. Return the source, which has taken the gradients, and the terms of each chunk."""
    terms_R = []
    with torch.autocast(tensors[0].device.type, enabled=False):
        source = plan.source(tensors, needs)
        for rows_R, teacher_R, weights_R in zip(plan.rows_M, plan.teacher_M, weights_M, strict=True):
            terms, grad_RV = measure(
                source.logits(rows_R), teacher_R, plan.objective, weights_R=weights_R, has_details=has_details
            )
            terms_R.append(terms)
            if grad_RV is not None:
                source.absorb(rows_R, grad_RV)
    return source, terms_R


def _scale(grad: Tensor, factor: Tensor) -> None:
    """Multiply in place. The factor is not rounded to half precision, so all gradients are scaled by the same."""
    if grad.dtype.itemsize >= 4:
        grad.mul_(factor.to(grad.dtype))
        return
    for part in torch.split(grad, _SCALED_ROWS):
        part.copy_(part.float() * factor)
