"""A Hugging Face model as a student: find its head, compare it with the model's own forward, and compute its loss.

There is no table of families. Weight, bias and LoRA adapters come from the output embedding, factors and soft caps are
tried with the numbers in the configuration, and the model's own forward decides. Hidden states are also multiplied by
8 and 64 on their way to the head, which reveals a soft cap that random tokens never reach. An adapter is compared with
noise in its second factor, which is zero before training.

Dimension letters: B sequences, T tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dask_logits.errors import MISFITS, first_line
from dask_logits.train.heads import Adapter, Head
from dask_logits.train.losses import DistillationLoss, distillation_loss, fused_distillation_loss
from dask_logits.train.objective import Objective
from dask_logits.train.targets import SparseTargets

logger = logging.getLogger(__name__)

_SHAPE = (2, 12)
_LOUDNESS = (1.0, 8.0, 64.0)
# Tolerated relative RMS difference of logits in units of the dtype's epsilon, as for teachers (teacher/selfcheck.py).
_EPSILONS, _EPSILONS_HALF = 100.0, 0.75


def student_head(model: Any) -> Head | None:
    """Describe the head of a Hugging Face model, after comparing it with the model's own forward.

    Parameters
    ----------
    model
        A causal language model, also one wrapped by peft. Its weights, modes and gradients are unchanged. It is run
        under autocast if the caller is, as flash attention needs for float32 weights.

    Returns
    -------
    Head or None
        None if no description reproduces the model's logits. The reason is logged. Use :func:`distillation_loss` then.
    """
    try:
        head = _described(model)
        with _evaluating(model), _noisy(head), torch.no_grad():
            return _agreeing(model, head)
    except MISFITS as error:
        logger.warning("%s uses the loss of full logits: %s", type(model).__name__, first_line(error))
        return None


class StudentWithLoss(nn.Module):
    """A Hugging Face model whose forward is its distillation loss.

    Wrap this module in DistributedDataParallel, so that the loss is part of the wrapped forward.

    Parameters
    ----------
    model
        A causal language model. Its head is checked once, here. If the check fails, the loss takes full logits, and the
        reason is logged.
    objective
        Divergence, tail, temperature and mix. None: the defaults.

    Attributes
    ----------
    head
        From :func:`student_head`.
    """

    def __init__(self, model: Any, objective: Objective | None = None) -> None:
        super().__init__()
        self.model = model
        self.objective = objective or Objective()
        self.head = student_head(model)
        if getattr(model.config, "output_router_logits", False):
            logger.warning(
                "%s: output_router_logits is set, but the auxiliary loss of the router is not part of the distillation "
                "loss",
                type(model).__name__,
            )

    def forward(
        self,
        input_ids: Tensor,
        targets: SparseTargets,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        normaliser: float | Tensor | None = None,
        per_token: bool = False,
    ) -> DistillationLoss:
        """Run the model on a batch.

        Parameters
        ----------
        input_ids, targets, attention_mask
            Of the batch, [B, T]. The tokens are compared with the teacher's.
        position_ids
            Of a batch of :func:`dask_logits.collate_flat`, by which the model tells its items apart. None: every row
            is one item.
        normaliser, per_token
            As for :func:`dask_logits.distillation_loss`.

        Returns
        -------
        DistillationLoss
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False, "return_dict": True}
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        options: dict[str, Any] = {"normaliser": normaliser, "per_token": per_token, "input_ids": input_ids}
        if self.head is None:
            return distillation_loss(self.model(**inputs).logits, targets, self.objective, **options)
        hidden_BTD = _trunk(self.model)(**inputs).last_hidden_state
        return fused_distillation_loss(hidden_BTD, self.head, targets, self.objective, **options)


def _base(model: Any) -> Any:
    """Return the model that peft wrapped."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _trunk(model: Any) -> Any:
    base = _base(model)
    # Llama 4's class names a nonexistent trunk.
    trunk = getattr(base, base.base_model_prefix, None) or base.model
    if trunk is base:
        raise ValueError("expected a trunk beside the head, got one module for both")
    return trunk


def _described(model: Any) -> Head:
    """Read weight, bias and adapters of the output embedding."""
    module = _base(model).get_output_embeddings()
    if module is None:
        raise ValueError("expected an output embedding, got none")
    # peft: a copy that is trained as a whole, or a layer with LoRA adapters beside it.
    if hasattr(module, "modules_to_save"):
        module = module.modules_to_save[module.active_adapter]
    adapters: tuple[Adapter, ...] = ()
    if hasattr(module, "base_layer"):
        if module.lora_variant or any(layer.bias is not None for layer in module.lora_B.values()):
            raise ValueError("expected plain LoRA on the head, got a variant of it")
        active = () if module.merged or module.disable_adapters else module.active_adapters
        adapters = tuple(
            Adapter(
                down=nn.Sequential(module.lora_dropout[name], module.lora_A[name]),
                up=module.lora_B[name].weight,
                scaling=module.scaling[name],
            )
            for name in active
            if name in module.lora_A
        )
        module = module.base_layer
    weight, bias = module.weight, getattr(module, "bias", None)
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.dim() != 2:
        raise ValueError(f"expected a plain floating-point weight [V, D] in the head, got {type(weight).__name__}")
    # A process that has not imported the class of accelerate's hooks has none, and may lack accelerate.
    hooks = sys.modules.get("accelerate.hooks")
    if hooks and any(isinstance(value, hooks.ModelHook) for value in vars(module).values()):
        raise ValueError("expected a head on the device of its inputs, got one that accelerate moves")
    return Head(weight=weight, bias=bias, adapters=adapters)


def _agreeing(model: Any, head: Head) -> Head:
    """Return the head with the factor and the soft cap that reproduce the model's logits."""
    V = model.get_input_embeddings().weight.shape[0]
    tokens_BT = torch.randint(V, _SHAPE, generator=torch.Generator().manual_seed(0)).to(head.weight.device)
    runs = [_run(model, tokens_BT, loudness) for loudness in _LOUDNESS]
    alone_BTD = _trunk(model)(input_ids=tokens_BT, use_cache=False, return_dict=True).last_hidden_state
    dtype = head.product_dtype
    limit = torch.finfo(dtype).eps * (_EPSILONS if dtype.itemsize >= 4 else _EPSILONS_HALF)
    if not _difference(alone_BTD, runs[0][0]) <= limit:
        raise ValueError("the model's forward gives its trunk other inputs than the tokens")
    least = float("inf")
    for way in _ways(model.config.get_text_config().to_dict(), head):
        error = max(_difference(way.logits(hidden_BTD), logits_BTV) for hidden_BTD, logits_BTV in runs)
        if error <= limit:
            logger.info("head of %s: scale %g, soft cap %s", type(model).__name__, way.scale, way.softcap)
            return way
        least = min(least, error)
    raise ValueError(
        f"expected a linear head with a factor and a soft cap to reproduce the model's logits within {limit:.1e}, got "
        f"relative differences of {least:.1e} and more"
    )


def _run(model: Any, tokens_BT: Tensor, loudness: float) -> tuple[Tensor, Tensor]:
    """Run the model with its hidden states multiplied on their way to the head. Return them and the logits."""
    seen: list[Tensor] = []

    def multiply(module: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * loudness
        seen.append(output.last_hidden_state)
        return output

    handle = _trunk(model).register_forward_hook(multiply)
    try:
        logits_BTV: Tensor = model(input_ids=tokens_BT, use_cache=False, return_dict=True).logits
    finally:
        handle.remove()
    if not seen:
        raise ValueError(f"expected a forward that calls {type(_trunk(model)).__name__}, got one that calls its parts")
    return seen[0], logits_BTV


def _difference(found: Tensor, wanted: Tensor) -> float:
    """Return the RMS difference as a share of the RMS value, infinite if the shapes differ."""
    if found.shape != wanted.shape:
        return float("inf")
    wanted = wanted.double()
    return float((found.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def _ways(config: dict[str, Any], head: Head) -> Iterator[Head]:
    """Yield the head with every factor and soft cap that the configuration implies."""
    numbers = {
        name: float(value)
        for name, value in config.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    }
    caps = [None, *(value for name, value in numbers.items() if "cap" in name and "logit" in name)]
    factors = [
        value
        for name, value in numbers.items()
        if "cap" not in name and ("logit" in name or "lm_head" in name or "output_multiplier" in name)
    ]
    if "dim_model_base" in numbers and "hidden_size" in numbers:  # MiniCPM
        factors.append(numbers["hidden_size"] / numbers["dim_model_base"])
    for scale in (1.0, *factors, *(1 / factor for factor in factors)):
        for softcap in caps:
            yield dataclasses.replace(head, scale=scale, softcap=softcap)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, then restore the mode of each module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, is_training in modes:
            module.training = is_training


@contextlib.contextmanager
def _noisy(head: Head) -> Iterator[None]:
    """Fill the second factors of adapters with noise, then restore them."""
    kept = [(adapter.up, adapter.up.detach().clone()) for adapter in head.adapters]
    with torch.no_grad():
        for up, value in kept:
            up.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(value))
    try:
        yield
    finally:
        with torch.no_grad():
            for up, value in kept:
                up.copy_(value)
