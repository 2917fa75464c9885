"""Causal attention for CPUs in blocks of queries: one matrix product, one softmax, one matrix product per block.

torch's own CPU kernel also computes the masked half of short sequences, and multiplies small tiles. On two Zen 5 cores
it took 26 % of the trunk's time at 256 tokens and 40 % at 512. Here a block of queries attends only to the keys up to
its end, the heads that share keys form one product, and all products are large and batched: 2 to 4 times as fast.
Scores have the teacher's dtype and the softmax is computed in float32, as in transformers' eager attention.

It is registered in transformers as another attention implementation, so that every family with registry support can use
it. The self-check decides whether a teacher does. A family may pass arguments known only to its own code (a position
bias, the indices of sparse attention). Therefore every keyword outside :data:`IGNORED` refuses the call, because
dropping an argument would silently compute other results. The kind ``fused`` uses
:mod:`dask_logits.teacher.cpu.fused` where it applies: bfloat16 without a mask, a soft cap or sinks.

Dimension letters: B sequences, T tokens, H query heads, G query heads per key head, N = B·H/G, C queries of a block,
D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dask_logits.teacher.cpu import fused

Kind = Literal["blocks", "fused"]

# Keywords that cannot change the result of a causal forward pass in evaluation mode without a key-value cache. The
# window is part of the mask, positions are part of queries and keys, and the rest requests further outputs.
IGNORED = frozenset({
    "cache_position", "deterministic", "is_causal", "layer_idx", "logits_to_keep", "num_items_in_batch",
    "output_attentions", "output_hidden_states", "output_router_logits", "position_ids", "return_dict",
    "sliding_window", "use_cache",
})  # fmt: skip

# Queries per block. Larger blocks waste the masked half, smaller ones make small products. 32, 128, 256 were slower.
_BLOCK = 64
# Maximum blocks of a sequence before blocks become larger. Each block adds two shapes to PyTorch's code cache.
_MOST_BLOCKS = 128


def offer(kind: Kind) -> str:
    """Register an implementation with transformers. Return its name for ``set_attn_implementation``."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    name = f"dask_logits_{kind}"
    AttentionInterface.register(name, partial(attention_layer, _ATTEND[kind]))
    # No mask if causality is sufficient, else a mask that is True for visible positions.
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return name


def attention_layer(
    attend: Callable[..., Tensor],
    module: nn.Module,
    query_BHTD: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Compute attention with the calling convention of transformers' attention functions.

    Parameters
    ----------
    attend
        Implementation: an operator opaque to the compiler, which would unroll a loop for every length.
    module
        The attention layer. A non-causal layer is delegated to transformers' SDPA.
    query_BHTD, key, value, attention_mask, scaling, softcap, s_aux
        As for :func:`block_attention`.

    Returns
    -------
    Tensor
        [B, T, H, D of the values].
    None
        Attention weights are not kept.

    Raises
    ------
    ValueError
        If the family passes an unsupported argument that may change the result.
    """
    refuse_unknown(module, settings, "block attention")
    if not is_causal(module, settings, query_BHTD, key):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if softcap is not None or s_aux is not None:
            raise ValueError(f"{type(module).__name__}: SDPA does not support softcap or s_aux")
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query_BHTD, key, value, attention_mask, scaling=scaling, **settings
        )
        return out
    scale = query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query_BHTD, key, value, attention_mask, scale, softcap, s_aux), None


def is_causal(module: nn.Module, settings: Mapping[str, Any], query_BHTD: Tensor, key: Tensor) -> bool:
    """Whether a layer attends from each position to those before it and to itself."""
    asked = settings.get("is_causal")
    return bool(getattr(module, "is_causal", True) if asked is None else asked) and key.shape[2] == query_BHTD.shape[2]


def refuse_unknown(module: nn.Module, settings: Mapping[str, Any], name: str) -> None:
    """Raise ValueError if a family passes an attention of ours a keyword that may change the result."""
    unknown = sorted(keyword for keyword, value in settings.items() if not _is_ignorable(keyword, value))
    if unknown:
        raise ValueError(f"{type(module).__name__}: {name} does not support {', '.join(unknown)}")


def _is_ignorable(name: str, value: Any) -> bool:
    """Whether a keyword does not change the result. Dropout qualifies if its probability is 0."""
    return value is None or name in IGNORED or (name == "dropout" and value == 0.0)


def block_attention(
    query_BHTD: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float = 1.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Compute causal attention.

    Parameters
    ----------
    query_BHTD, key, value
        [B, H, T, D], and [B, H/G, T, D] twice. The values' width may differ.
    attention_mask
        bool [B or 1, 1, T, T], True for visible positions, or a float mask to add. None: causality alone.
    scaling
        Factor on the scores.
    softcap
        Scores become ``softcap · tanh(score / softcap)`` (Gemma 2, arXiv 2408.00118).
    s_aux
        [H] sinks: logits that are part of the softmax and have no value (GPT-OSS).

    Returns
    -------
    Tensor
        [B, T, H, D of the values].
    """
    B, H, T, D = query_BHTD.shape
    groups = key.shape[1]
    G, N = H // groups, B * groups
    dtype, device = query_BHTD.dtype, query_BHTD.device
    query_NGTD = query_BHTD.reshape(N, G, T, D)
    keys_NDT = key.reshape(N, T, D).transpose(1, 2)
    values_NTD = value.reshape(N, T, value.shape[-1])
    out_BTHD = torch.empty(B, T, H, value.shape[-1], dtype=dtype, device=device)
    width = min(T, _BLOCK * -(-T // (_BLOCK * _MOST_BLOCKS)))
    ahead_CC = torch.full((width, width), -torch.inf, dtype=dtype, device=device).triu_(1)
    for first in range(0, T, width):
        stop = min(first + width, T)
        C = stop - first
        scores_NMT = torch.empty(N, G * C, stop, dtype=dtype, device=device)
        block_NMD = query_NGTD[:, :, first:stop].reshape(N, G * C, D)
        torch.baddbmm(scores_NMT, block_NMD, keys_NDT[:, :, :stop], beta=0, alpha=scaling, out=scores_NMT)
        if softcap is not None:
            scores_NMT.div_(softcap).tanh_().mul_(softcap)
        scores_NGCT = scores_NMT.view(N, G, C, stop)
        if attention_mask is None:
            scores_NGCT[..., first:] += ahead_CC[:C, :C]
        else:
            mask_B1CT = attention_mask[:, :, first:stop, :stop]
            scores_BHCT = scores_NGCT.view(B, H, C, stop)
            if attention_mask.dtype == torch.bool:
                scores_BHCT.masked_fill_(~mask_B1CT, -torch.inf)
            else:
                scores_BHCT += mask_B1CT
        if s_aux is not None:
            sinks = s_aux.to(dtype).view(1, groups, G, 1, 1).expand(B, -1, -1, C, 1).reshape(N, G, C, 1)
            weights_NGCT = torch.cat([scores_NGCT, sinks], -1).softmax(-1)[..., :-1].contiguous()
        else:
            weights_NGCT = torch.softmax(scores_NGCT, -1)
        mixed = torch.bmm(weights_NGCT.view(N, G * C, stop), values_NTD[:, :stop])
        out_BTHD[:, first:stop] = mixed.view(B, H, C, -1).transpose(1, 2)
    return out_BTHD


def _blocks_or_fused(
    query_BHTD: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float = 1.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Compute attention with native code if it supports the tensors, else in blocks."""
    if attention_mask is None and softcap is None and s_aux is None and fused.fits(query_BHTD, key, value):
        return fused.fused_attention(query_BHTD, key, value, scaling)
    return block_attention(query_BHTD, key, value, attention_mask, scaling, softcap, s_aux)


def _shape_of(query_BHTD: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    B, H, T, _D = query_BHTD.shape
    return query_BHTD.new_empty(B, T, H, value.shape[-1])


def operator(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return an attention of ours as an operator of torch, which its compiler does not look into."""
    made = torch.library.custom_op(f"dask_logits::{name}", function, mutates_args=())
    made.register_fake(_shape_of)
    return made


_ATTEND: dict[Kind, Callable[..., Tensor]] = {
    "blocks": operator("block_attention", block_attention),
    "fused": operator("fused_attention", _blocks_or_fused),
}
