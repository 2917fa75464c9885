"""Causal attention with soft caps, sinks and windows for GPUs, by torch's FlexAttention.

transformers runs families with soft-capped attention or sinks (Gemma 2, GPT-OSS) on eager attention, which holds the
scores of all pairs of positions in float32. FlexAttention computes them in blocks, and none outside a window.

It is registered in transformers without a mask: a window comes as the keyword ``sliding_window``. A family whose masks
say more would get other results, so the self-check decides whether a teacher uses it. On a GPU Triton compiles the
kernel, for all lengths at once, and the layers see it as one operator. On a CPU it runs uncompiled, for tests.

Dimension letters: B sequences, H query heads, T tokens, D width of a head, G query heads per key head, N blocks of
tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from dask_logits.errors import first_line
from dask_logits.teacher.cpu.attention import is_causal, operator, refuse_unknown
from dask_logits.teacher.torch_internals import constant_floats

NAME = "dask_logits_flex"
# The same kernel for short sequences, whatever was compiled before.
_ONE_KERNEL = {"FORCE_USE_FLEX_ATTENTION": True}
# Masks of the widths of recent batches.
_KEPT_MASKS = 64
# Queries and keys of a block: torch's default.
_BLOCK = 128


def offer() -> str:
    """Register the implementation with transformers. Return its name for ``set_attn_implementation``."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, flex_layer)
    return NAME


def flex_layer(
    module: nn.Module,
    query_BHTD: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Compute attention with the calling convention of transformers' attention functions.

    Parameters
    ----------
    module
        The attention layer.
    query_BHTD, key, value, scaling, softcap, s_aux
        As for :func:`windowed_attention`.
    attention_mask
        None.
    sliding_window
        Keys that a query sees, itself included. None: all before it.

    Returns
    -------
    Tensor
        [B, T, H, D of the values].
    None
        Attention weights are not kept.

    Raises
    ------
    ValueError
        If there is a mask, the layer is not causal, or the family passes an argument that may change the result.
    """
    refuse_unknown(module, settings, "FlexAttention")
    if not is_causal(module, settings, query_BHTD, key):
        raise ValueError(f"{type(module).__name__}: FlexAttention is used for causal layers only")
    if attention_mask is not None:
        raise ValueError(f"{type(module).__name__}: FlexAttention is used without a mask only")
    scale = query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling
    return _ATTEND(query_BHTD, key, value, scale, softcap, s_aux, sliding_window), None


def windowed_attention(
    query_BHTD: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Compute causal attention.

    A sink is a logit without a value (GPT-OSS). With the logsumexp L of the others, it scales the result by
    ``exp(L) / (exp(L) + exp(sink)) = sigmoid(L − sink)``.

    Parameters
    ----------
    query_BHTD, key, value
        [B, H, T, D], and [B, H/G, T, D] twice. The values' width may differ.
    scaling
        Factor on the scores.
    softcap
        Scores become ``softcap · tanh(score / softcap)`` (Gemma 2, arXiv 2408.00118).
    s_aux
        [H] sinks.
    window
        Keys that a query sees, itself included. None: all before it.

    Returns
    -------
    Tensor
        [B, T, H, D of the values].

    Raises
    ------
    RuntimeError
        If the kernel cannot be compiled for this GPU.
    """
    T, device = query_BHTD.shape[2], query_BHTD.device
    attend: Any = _compiled() if device.type == "cuda" else flex_attention
    try:
        out_BHTD: Tensor
        out_BHTD, aux = attend(
            query_BHTD, key, value, score_mod=_capped(softcap), block_mask=_mask(T, window, device), scale=scaling,
            enable_gqa=True, return_aux=AuxRequest(lse=True), kernel_options=_ONE_KERNEL,
        )  # fmt: skip
    except RuntimeError:
        raise
    except Exception as error:
        # Triton and its compilers raise whatever they like.
        raise RuntimeError(f"FlexAttention: {first_line(error)}") from error
    if s_aux is not None:
        share_BHT = torch.sigmoid(aux.lse - s_aux.float()[None, :, None])
        out_BHTD = (out_BHTD.float() * share_BHT[..., None]).to(query_BHTD.dtype)
    return out_BHTD.transpose(1, 2).contiguous()


@functools.cache
def _compiled() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=True)

    def attend(*tensors: Tensor, **settings: Any) -> Any:
        with constant_floats():
            return compiled(*tensors, **settings)

    return attend


@functools.cache
def _capped(softcap: float | None) -> Callable[..., Tensor] | None:
    if softcap is None:
        return None

    def capped(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@functools.lru_cache(maxsize=_KEPT_MASKS)
def _mask(tokens: int, window: int | None, device: torch.device) -> BlockMask:
    """Return what torch's ``create_block_mask`` returns, which computes all T² pairs on the way (torch 2.13)."""
    first_N = torch.arange(0, tokens, _BLOCK, device=device)
    last_N = (first_N + _BLOCK - 1).clamp(max=tokens - 1)
    nearest_NN = first_N[:, None] - last_N
    farthest_NN = last_N[:, None] - first_N
    width = tokens if window is None else window
    is_seen_NN = (farthest_NN >= 0) & (nearest_NN < width)
    # A block that ends beyond the tokens is never full.
    is_complete_N = first_N + _BLOCK <= tokens
    is_full_NN = (nearest_NN >= 0) & (farthest_NN < width) & is_complete_N[:, None]
    return BlockMask.from_kv_blocks(
        *_ordered(is_seen_NN & ~is_full_NN), *_ordered(is_full_NN), BLOCK_SIZE=_BLOCK, mask_mod=_visible(window),
        seq_lengths=(tokens, tokens),
    )  # fmt: skip


def _ordered(chosen_NN: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of chosen blocks of each row, and the row's blocks, chosen ones first: int32 [1, 1, N, …]."""
    order_NN = torch.argsort(chosen_NN.int(), dim=-1, descending=True, stable=True)
    return chosen_NN.sum(-1).int()[None, None], order_NN.int()[None, None]


@functools.cache
def _visible(window: int | None) -> Callable[..., Tensor]:
    def before(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    if window is None:
        return before

    def within(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    return within


# An operator is opaque to the compiler of the layers.
_ATTEND = operator("flex_attention", windowed_attention)
