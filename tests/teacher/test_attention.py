"""Attention in blocks and by native code against the formula in float64, over several blocks and a rest."""

from __future__ import annotations

import pytest
import torch
from builders import FAMILIES, VOCAB_SIZE, tiny_model

from dask_logits.errors import TeacherError
from dask_logits.teacher.cpu import fused
from dask_logits.teacher.cpu.attention import _ATTEND, block_attention
from dask_logits.teacher.model import ScoringPath, Teacher
from dask_logits.teacher.selfcheck import check, try_compiled

# These do not ask transformers' registry for their attention.
_OWN = {"bloom", "codegen", "falcon", "gptj"}

native = pytest.mark.skipif(not fused.available(), reason="needs a CPU with AVX512-BF16")


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
    for attend in (block_attention, *_ATTEND.values()):
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
    choice = check(Teacher(tiny_model(family), VOCAB_SIZE), exact=True)
    path, errors = choice.path, choice.errors
    assert path.attention == ("model" if family in _OWN else "blocks")
    assert family in _OWN or errors["blocks"] < 1e-5


def parts(B: int, H: int, KV: int, T: int, width: int, value_width: int) -> tuple[torch.Tensor, ...]:
    """Return queries, keys and values in three memory layouts."""
    generator = torch.Generator().manual_seed(B * T + H)
    query = 3 * torch.randn(B, T, H, width, generator=generator)
    key = torch.randn(B, KV, width, T, generator=generator)
    value = torch.randn(B, KV, T, value_width, generator=generator)
    return query.bfloat16().transpose(1, 2), key.bfloat16().transpose(2, 3), value.bfloat16()


@native
@pytest.mark.parametrize(
    ("B", "H", "KV", "T", "width", "value_width"),
    [
        (1, 1, 1, 1, 2, 16),
        (1, 4, 2, 7, 32, 48),
        (2, 9, 3, 130, 64, 64),
        (3, 4, 4, 65, 64, 64),
        (1, 40, 1, 64, 6, 112),
        # More keys than are weighed at once.
        (1, 8, 1, 700, 128, 80),
        (1, 2, 2, 1025, 16, 16),
    ],
)
def test_native_code_equals_the_formula(B: int, H: int, KV: int, T: int, width: int, value_width: int) -> None:
    query, key, value = parts(B, H, KV, T, width, value_width)
    assert fused.fits(query, key, value)
    mask = torch.ones(T, T).tril().bool()
    exact = dense(query, key, value, mask, 0.2, None, None)
    found = fused.fused_attention(query, key, value, 0.2)
    torch.testing.assert_close(found.double(), exact, atol=1e-2, rtol=1e-2)
    blocks = block_attention(query, key, value, scaling=0.2)
    assert (found - exact).square().mean() <= (blocks - exact).square().mean() + 1e-12


@native
def test_native_code_gives_the_same_bits_in_any_batch_and_on_any_number_of_threads() -> None:
    query, key, value = parts(3, 6, 2, 300, 64, 64)
    found = fused.fused_attention(query, key, value, 0.125)
    assert torch.equal(found[1:2], fused.fused_attention(query[1:2], key[1:2], value[1:2], 0.125))
    assert torch.equal(found[:, :77], fused.fused_attention(*(part[:, :, :77] for part in (query, key, value)), 0.125))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(found, fused.fused_attention(query, key, value, 0.125))
    finally:
        torch.set_num_threads(threads)


@native
def test_native_code_keeps_large_scores_and_not_a_number() -> None:
    query, key, value = parts(1, 2, 1, 600, 16, 16)
    loud = fused.fused_attention(query * 1e4, key, value, 1.0)
    assert loud.isfinite().all()
    query[0, 1, 300] = torch.nan
    found = fused.fused_attention(query, key, value, 0.2)
    assert found[0, 300, 1].isnan().all()
    assert found[0, :, 0].isfinite().all()
    assert found[0, 299].isfinite().all()


@native
def test_what_it_is_not_made_for_goes_in_blocks() -> None:
    query, key, value = parts(1, 2, 1, 70, 16, 16)
    attend = _ATTEND["fused"]
    assert torch.equal(attend(query, key, value), fused.fused_attention(query, key, value, 1.0))
    sinks = torch.zeros(2)
    assert torch.equal(attend(query, key, value, s_aux=sinks), block_attention(query, key, value, s_aux=sinks))
    assert torch.equal(attend(query, key, value, softcap=2.0), block_attention(query, key, value, softcap=2.0))
    mask = torch.ones(1, 1, 70, 70).tril().bool()
    assert torch.equal(attend(query, key, value, mask), block_attention(query, key, value, mask))
    for other in ((query, key, value[..., :15]), (query.float(), key, value), (query[:, :, :1], key, value)):
        assert not fused.fits(*other)


@native
def test_a_compiled_bfloat16_teacher_takes_it() -> None:
    teacher = Teacher(tiny_model("llama", head_dim=16).bfloat16(), VOCAB_SIZE)
    check(teacher, exact=True)
    assert 0 < try_compiled(teacher) < 0.1
    assert (teacher.path.attention, teacher.path.compiled) == ("fused", True)


@native
def test_without_a_compiler_for_it_layers_are_compiled_with_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = Teacher(tiny_model("llama", head_dim=16).bfloat16(), VOCAB_SIZE)
    check(teacher, exact=True)

    def broken() -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(fused, "_library", broken)
    try_compiled(teacher)
    assert (teacher.path.attention, teacher.path.compiled) == ("blocks", True)


def test_a_run_with_it_is_refused_on_another_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "available", lambda: False)
    with pytest.raises(TeacherError, match="AVX512-BF16"):
        Teacher(tiny_model("llama"), VOCAB_SIZE).take(ScoringPath(attention="fused"))
