"""Block attention against the formula in float64, over several blocks and a rest."""

from __future__ import annotations

import pytest
import torch
from builders import FAMILIES, VOCAB_SIZE, tiny_model

from dask_logits.capture.attention import _operator, block_attention
from dask_logits.capture.selfcheck import choose_path
from dask_logits.capture.teacher import Teacher

# These do not ask transformers' registry for their attention.
_OWN = {"bloom", "codegen", "falcon", "gptj"}


def dense(query, key, value, mask, scaling: float, softcap, sinks) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (part.double().repeat_interleave(groups, 1) for part in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        column = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)[..., : query.shape[2]]
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_blocks_equal_the_formula(dtype, atol: float, window: int | None, with_sinks: bool, softcap) -> None:
    torch.manual_seed(0)
    T = 150
    query, key = torch.randn(2, 6, T, 8).to(dtype), torch.randn(2, 3, T, 8).to(dtype)
    value = torch.randn(2, 3, T, 5).to(dtype)
    sinks = torch.randn(6).to(dtype) if with_sinks else None
    distance = torch.arange(T)[:, None] - torch.arange(T)
    mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    given = None if window is None else mask.expand(2, 1, T, T)
    for attend in (block_attention, _operator):
        found = attend(query, key, value, given, 0.3, softcap, sinks)
        torch.testing.assert_close(
            found.double(), dense(query, key, value, mask, 0.3, softcap, sinks), atol=atol, rtol=0
        )


def test_a_mask_that_is_added_does_the_same() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 70, 4) for _ in range(3))
    added = torch.full((70, 70), -torch.inf).triu_(1)[None, None]
    torch.testing.assert_close(block_attention(query, key, value, added), block_attention(query, key, value))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_take_it_where_they_can(family: str) -> None:
    path, errors = choose_path(Teacher(tiny_model(family), VOCAB_SIZE), exact=True)
    assert path.attention == ("model" if family in _OWN else "blocks")
    assert family in _OWN or errors["blocks"] < 1e-5
