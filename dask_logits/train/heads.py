"""A student's head as a description: products with weights, a bias, a factor and a soft cap.

:func:`student_head` reads it from a Hugging Face model and compares it once with the model's own forward.

Dimension letters: N positions, D input width of a product, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """A low-rank addition to a head's weight (arXiv 2106.09685).

    Parameters
    ----------
    down
        Hidden states [..., D] → [..., rank], dropout included.
    up
        [V, rank].
    scaling
        Factor of the product.
    """

    down: Callable[[Tensor], Tensor]
    up: Tensor
    scaling: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Head:
    """The operations from hidden states to logits.

    The logits are ``x = scale · (hidden @ weight.T + adapters + bias)``, then ``softcap · tanh(x / softcap)`` unless
    `softcap` is None. The tensors are the model's own parameters, so a tied embedding gets its gradient from both
    places, and a parameter without ``requires_grad`` costs no product.

    Parameters
    ----------
    weight
        [V, D].
    bias
        [V], or None.
    scale, softcap
        As above.
    adapters
        LoRA adapters of the head.

    Examples
    --------
    >>> linear = torch.nn.Linear(4, 10, bias=False)
    >>> hidden = torch.randn(2, 3, 4)
    >>> bool((Head(weight=linear.weight).logits(hidden) == linear(hidden)).all())
    True
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    adapters: tuple[Adapter, ...] = ()

    @property
    def product_dtype(self) -> torch.dtype:
        """Dtype of the products with the weight, which autocast may lower."""
        device = self.weight.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype

    def products(self, hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the factors whose products make the logits: [..., D] and [V, D]."""
        # peft keeps adapters in float32 beside half-precision weights.
        low = [(adapter.down(hidden.to(adapter.up.dtype)) * adapter.scaling, adapter.up) for adapter in self.adapters]
        return [(hidden, self.weight), *low]

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits of all positions at once, [..., V]."""
        (first, weight_VD), *low = self.products(hidden)
        logits = first.to(weight_VD.dtype) @ weight_VD.t()
        for x, up_VD in low:
            logits = logits + x @ up_VD.to(x.dtype).t()
        if self.bias is not None:
            logits = logits + self.bias
        logits = logits * self.scale if self.scale != 1 else logits
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
