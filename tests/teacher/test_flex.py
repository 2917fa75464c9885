"""FlexAttention with soft caps, sinks and windows equals dense attention, and the self-check notices what it lacks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from families import VALID, family_model
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dask_logits.teacher import selfcheck
from dask_logits.teacher.cuda import flex, kernels
from dask_logits.teacher.cuda.flex import flex_layer, windowed_attention
from dask_logits.teacher.model import Teacher
from dask_logits.teacher.selfcheck import check, fast_attention
from dask_logits.teacher.torch_internals import strict_compiler

# Without a GPU it is not compiled, which torch warns of.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
DTYPES = (torch.float32, torch.bfloat16)
FAMILIES = ("gemma2", "gpt_oss")


def dense(query, key, value, scaling, softcap, sinks, window):
    """Attention with all scores, in float64."""
    query, key, value = (tensor.double() for tensor in (query, key, value))
    group = query.shape[1] // key.shape[1]
    scores = scaling * query @ key.repeat_interleave(group, 1).transpose(2, 3)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    place = torch.arange(query.shape[2])
    distance = place[:, None] - place
    hidden = (distance < 0) | (distance >= (window or len(place)))
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : len(place)]
    return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [2, 150])
@pytest.mark.parametrize(
    ("softcap", "has_sinks", "window"), [(None, False, None), (5.0, False, 16), (None, True, 16), (2.0, True, None)]
)
@torch.inference_mode()
def test_it_equals_dense_attention(softcap, has_sinks, window, tokens, device) -> None:
    generator = torch.Generator().manual_seed(tokens)
    query = torch.randn(2, 4, tokens, 16, generator=generator)
    key, value = torch.randn(2, 2, 2, tokens, 16, generator=generator)
    sinks = torch.randn(4, generator=generator) if has_sinks else None
    sent = [tensor if tensor is None else tensor.to(device) for tensor in (query, key, value, sinks)]
    # On a GPU it must not fall back to uncompiled code after some shapes.
    with strict_compiler(64):
        found = windowed_attention(*sent[:3], 0.7, softcap, sent[3], window).cpu()
    wanted = dense(query, key, value, 0.7, softcap, sinks, window)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 2, 16, 127, 128, 129, 200, 255, 256, 257, 300, 512, 5000])
def test_a_mask_equals_that_of_torch(window) -> None:
    for tokens in (2, 3, 127, 128, 129, 130, 255, 256, 257, 383, 384, 385, 500, 640, 777, 1024, 1025):
        mask = flex._mask.__wrapped__(tokens, window, torch.device("cpu"))
        wanted = create_block_mask(flex._visible(window), None, None, tokens, tokens, device="cpu")
        for found, value in zip(mask.as_tuple(), wanted.as_tuple(), strict=True):
            if isinstance(value, torch.Tensor):
                assert (found.shape, found.dtype, found.stride()) == (value.shape, value.dtype, value.stride()), tokens
                assert torch.equal(found, value), tokens
            else:
                assert found == value, tokens
        assert torch.equal(mask.to_dense(), wanted.to_dense())


class _LargestResult(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is computed."""

    n_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
        self.n_bytes = max([self.n_bytes, *(tensor.nbytes for tensor in tensors)])
        return result


@pytest.mark.parametrize("window", [None, 4096])
def test_a_mask_takes_memory_for_pairs_of_blocks_only(window) -> None:
    tokens = 32_768
    with _LargestResult() as largest:
        mask = flex._mask.__wrapped__(tokens, window, torch.device("cpu"))
    n_pairs = (tokens // 128) ** 2
    assert largest.n_bytes <= 8 * (n_pairs + 256)
    assert sum(value.nbytes for value in mask.as_tuple() if isinstance(value, torch.Tensor)) <= 4 * 4 * (n_pairs + 256)
    assert mask.kv_num_blocks.max() <= 2
    wanted = range(1, 257) if window is None else [min(n, 33) for n in range(1, 257)]
    assert (mask.kv_num_blocks + mask.full_kv_num_blocks).flatten().tolist() == list(wanted)


@pytest.mark.slow
@torch.inference_mode()
def test_compiled_code_serves_all_lengths_and_equals_the_uncompiled_one() -> None:
    with strict_compiler(64):
        for tokens, window in ((150, 16), (300, None)):
            query, key, value = torch.randn(3, 2, 4, tokens, 16, generator=torch.Generator().manual_seed(tokens))
            wanted = windowed_attention(query, key, value, 0.7, 5.0, None, window)
            # torch 2.13 has no logsumexp in compiled code for CPUs.
            found = flex._compiled()(
                query, key, value, score_mod=flex._capped(5.0), block_mask=flex._mask(tokens, window, query.device),
                scale=0.7,
            )  # fmt: skip
            torch.testing.assert_close(found.transpose(1, 2), wanted, atol=1e-5, rtol=1e-5)


@pytest.fixture
def _flex_on_a_cpu(monkeypatch) -> None:
    monkeypatch.setattr(selfcheck, "fast_attention", lambda teacher, may_compile: "flex")


@pytest.mark.usefixtures("_flex_on_a_cpu")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_self_check_accepts_it_for_families_with_soft_caps_and_sinks(family, dtype, device) -> None:
    choice = check(Teacher(family_model(family, head_dim=16).to(device, dtype), VALID), exact=True)
    assert choice.path.attention == "flex", choice
    assert "flex" not in choice.refusals


def without_softcap(query, key, value, scaling, softcap, sinks, window):
    return windowed_attention(query, key, value, scaling, None, sinks, window)


def without_sinks(query, key, value, scaling, softcap, sinks, window):
    return windowed_attention(query, key, value, scaling, softcap, None, window)


def without_window(query, key, value, scaling, softcap, sinks, window):
    return windowed_attention(query, key, value, scaling, softcap, sinks, None)


def without_compiler(query, key, value, scaling, softcap, sinks, window):
    raise RuntimeError("FlexAttention: no compiler here")


@pytest.mark.usefixtures("_flex_on_a_cpu")
@pytest.mark.parametrize(
    ("broken", "family", "reason"),
    [
        (without_softcap, "gemma2", "off by"),
        (without_sinks, "gpt_oss", "off by"),
        (without_window, "gemma2", "off by"),
        (without_compiler, "gpt_oss", "FlexAttention: no compiler here"),
    ],
)
def test_the_self_check_refuses_it_if_something_is_lost(broken, family, reason, monkeypatch) -> None:
    monkeypatch.setattr(flex, "_ATTEND", broken)
    choice = check(Teacher(family_model(family), VALID), exact=True)
    assert choice.path.attention == "model"
    assert choice.refusals["flex"].startswith(reason)


def test_what_it_does_not_know_is_refused() -> None:
    query, layer = torch.randn(1, 2, 5, 4), torch.nn.Identity()
    out, _ = flex_layer(layer, query, query, query, None, dropout=0.0, sliding_window=3)
    torch.testing.assert_close(out.double(), dense(query, query, query, 0.5, None, None, 3), atol=1e-5, rtol=1e-5)
    for more, match in (
        ({"position_bias": query}, "FlexAttention does not support position_bias"),
        ({"is_causal": False}, "FlexAttention is used for causal layers only"),
    ):
        with pytest.raises(ValueError, match=match):
            flex_layer(layer, query, query, query, None, **more)
    with pytest.raises(ValueError, match="FlexAttention is used without a mask only"):
        flex_layer(layer, query, query, query, torch.ones(5, 5))


@pytest.mark.parametrize(
    ("family", "device", "n_devices", "may_compile", "has_triton", "wanted"),
    [
        ("gemma2", "cuda", 1, True, True, "flex"),
        ("gemma2", "cpu", 1, True, True, "blocks"),
        ("llama", "cuda", 1, True, True, None),
        ("gemma2", "cuda", 2, True, True, None),
        ("gemma2", "cuda", 1, False, True, None),
        ("gemma2", "cuda", 1, True, False, None),
    ],
)
def test_it_is_tried_on_one_gpu_for_teachers_that_are_eager_otherwise(
    family, device, n_devices, may_compile, has_triton, wanted, monkeypatch
) -> None:
    monkeypatch.setattr(kernels, "available", lambda: has_triton)
    teacher = SimpleNamespace(
        device=torch.device(device), devices=[device] * n_devices, model=family_model(family)
    )  # fmt: skip
    assert fast_attention(teacher, may_compile=may_compile) == wanted
