"""The self-check takes what is as exact as the model's own rounding, and nothing that lost a part of the model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from families import VALID, family_model

from dask_logits.teacher import probe, selfcheck
from dask_logits.teacher.cpu import attention
from dask_logits.teacher.cpu.attention import block_attention
from dask_logits.teacher.model import ScoringPath, Teacher
from dask_logits.teacher.probe import SHORT, make_probe, probe_depth
from dask_logits.teacher.selfcheck import check

DTYPES = (torch.float32, torch.bfloat16)


def teacher_of(family: str, dtype: torch.dtype = torch.float32, **overrides) -> Teacher:
    return Teacher(family_model(family, **overrides).to(dtype), VALID)


def without_softcap(query, key, value, mask, scaling, softcap, sinks):
    return block_attention(query, key, value, mask, scaling, None, sinks)


def without_sinks(query, key, value, mask, scaling, softcap, sinks):
    return block_attention(query, key, value, mask, scaling, softcap, None)


def without_window(query, key, value, mask, scaling, softcap, sinks):
    return block_attention(query, key, value, None, scaling, softcap, sinks)


def with_wrong_scale(query, key, value, mask, scaling, softcap, sinks):
    return block_attention(query, key, value, mask, 1.01 * scaling, softcap, sinks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("broken", "family", "overrides"),
    [
        (without_softcap, "vaultgemma", {}),
        (without_sinks, "gpt_oss", {}),
        (without_window, "mistral", {}),
        # Random tokens of the check are fewer than the window: the probe's is shortened.
        (without_window, "mistral", {"sliding_window": 4096}),
        (without_window, "gemma3_text", {"sliding_window": 4096}),
        (without_window, "llama4_text", {}),
        (with_wrong_scale, "llama", {}),
    ],
)
def test_block_attention_that_loses_something_is_refused(broken, family, overrides, dtype, monkeypatch) -> None:
    assert check(teacher_of(family, dtype, **overrides), exact=True).path.attention == "blocks"
    monkeypatch.setitem(attention._ATTEND, "blocks", broken)
    choice = check(teacher_of(family, dtype, **overrides), exact=True)
    assert choice.path.attention == "model"
    assert choice.refusals["blocks"].startswith("off by")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("keyword", "family"),
    [("indices", "deepseek_v32"), ("position_bias", "inkling_text")],
)
def test_an_unknown_keyword_refuses_and_dropping_it_would_be_seen(
    keyword: str, family: str, dtype, monkeypatch
) -> None:
    choice = check(teacher_of(family, dtype), exact=True)
    assert choice.path.attention == "model"
    assert f"does not support {keyword}" in choice.refusals["blocks"]
    monkeypatch.setattr(attention, "IGNORED", attention.IGNORED | {keyword})
    choice = check(teacher_of(family, dtype), exact=True)
    assert choice.path.attention == "model"
    assert choice.refusals["blocks"].startswith("off by")


def test_keywords_that_are_absent_or_without_effect_are_accepted() -> None:
    query = torch.randn(1, 2, 5, 4)
    layer = torch.nn.Identity()
    attend = attention._ATTEND["blocks"]
    known = {"dropout": 0.0, "sliding_window": 16, "position_ids": torch.arange(5), "indices": None}
    out, _ = attention.attention_layer(attend, layer, query, query, query, None, **known)
    torch.testing.assert_close(out, block_attention(query, query, query, scaling=0.5))
    for unknown in ({"dropout": 0.1}, {"indices": torch.zeros(1)}, {"sinks": torch.zeros(2)}, {"anything": 1}):
        with pytest.raises(ValueError, match="block attention does not support"):
            attention.attention_layer(attend, layer, query, query, query, None, **unknown)
    with pytest.raises(ValueError, match="SDPA does not support"):
        attention.attention_layer(attend, layer, query, query, query, None, is_causal=False, softcap=2.0)


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("family", "overrides", "wrong"),
    [
        ("gemma3n_text", {"final_logit_softcapping": 30.0}, {}),
        ("vaultgemma", {"final_logit_softcapping": 30.0}, {}),
        ("nanochat", {}, {}),
        ("llama", {}, {"scale": 1.01}),
        ("cohere", {}, {}),
    ],
)
def test_a_head_that_loses_a_factor_or_a_soft_cap_is_refused(
    family, overrides, wrong, dtype, copied, monkeypatch
) -> None:
    def only_wrong(_teacher, head):
        return iter([ScoringPath(head=head, **(wrong if head == "linear" else {}))])

    if not copied:
        monkeypatch.setattr(probe, "_free_bytes", lambda device: -1)
    monkeypatch.setattr(selfcheck, "_ways", only_wrong)
    choice = check(teacher_of(family, dtype, **overrides), exact=True)
    assert choice.path.head == "replay"
    assert "linear" in choice.refusals


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_without_memory_for_a_copy_the_teacher_itself_is_compared(family: str, dtype, monkeypatch) -> None:
    monkeypatch.setattr(probe, "_free_bytes", lambda device: -1)
    choice = check(teacher_of(family, dtype), exact=True)
    assert (choice.path.attention, choice.path.head) == ("blocks", "linear")
    assert "more than half of the free memory" in choice.refusals["float32"]


def test_a_window_that_cannot_be_tested_refuses(monkeypatch) -> None:
    monkeypatch.setattr(selfcheck, "set_reach", lambda *_: None)
    far, near = (teacher_of("mistral", sliding_window=w, max_position_embeddings=4096) for w in (3000, 300))
    choice = check(far, exact=True)
    assert choice.path.attention == "model"
    assert choice.refusals["blocks"].endswith("tokens do not reach beyond sliding_window=3000")
    assert check(near, exact=True).path.attention == "blocks"


def test_a_probe_shares_weights_and_leaves_the_teacher_as_it_is() -> None:
    teacher = teacher_of("mistral", num_hidden_layers=5, sliding_window=100)
    before = teacher.model.config.to_dict()
    copied = make_probe(teacher)
    assert (probe_depth(teacher), len(copied.layers())) == (2, 2)
    assert copied.head.weight.data_ptr() == teacher.head.weight.data_ptr()
    probe.set_reach(copied, "sliding_window", 100, SHORT)
    assert copied.model.config.sliding_window == SHORT
    assert teacher.model.config.to_dict() == before
    assert len(teacher.layers()) == 5
    half = teacher_of("llama", torch.bfloat16)
    copied = make_probe(half)
    assert (half.head.weight.dtype, copied.head.weight.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(copied.head.weight, half.head.weight.float())


def test_a_probe_has_every_kind_of_layer() -> None:
    kinds = ["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 4
    assert probe_depth(teacher_of("gemma3_text", num_hidden_layers=8, layer_types=kinds)) == 4
    assert probe_depth(teacher_of("deepseek_v3", num_hidden_layers=6, first_k_dense_replace=2)) == 3


def test_the_yardstick_is_the_rounding_of_the_dtype() -> None:
    noise = {dtype: check(teacher_of("llama", dtype), exact=True).errors["rounding"] for dtype in DTYPES}
    assert 1e-8 < noise[torch.float32] < 1e-5
    assert 1e-3 < noise[torch.bfloat16] < 1e-1


def test_a_path_that_fails_on_the_whole_teacher_is_given_up(monkeypatch) -> None:
    original = selfcheck.Oracle.error

    def error(self, path: ScoringPath) -> float:
        # The probe has two layers.
        return 1.0 if len(self.teacher.layers()) > 2 and path.attention == "blocks" else original(self, path)

    monkeypatch.setattr(selfcheck.Oracle, "error", error)
    choice = check(teacher_of("llama"), exact=True)
    assert dataclasses.replace(choice.path, exact=False) == ScoringPath(attention="model", head="linear")
    assert "in torch.float32" in choice.refusals["blocks"]


def test_without_a_faster_path_the_models_own_forward_is_taken(monkeypatch) -> None:
    monkeypatch.setattr(selfcheck.Oracle, "error", lambda *_: 1.0)
    choice = check(teacher_of("llama"), exact=True)
    assert choice.path == ScoringPath()
    assert {way for way, reason in choice.refusals.items() if reason.startswith("off by 1 nats, the limit is ")} == {
        "linear", "replay", "blocks",
    }  # fmt: skip


class _Fp8Head(torch.nn.Module):
    """A head that is stored in 8 bits, and computes in the dtype of its input."""

    def __init__(self, weight_VD: torch.Tensor) -> None:
        super().__init__()
        self.scale = weight_VD.abs().amax() / 448
        self.weight = torch.nn.Parameter((weight_VD / self.scale).to(torch.float8_e4m3fn), False)

    def forward(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden_RD, self.weight.to(hidden_RD.dtype) * self.scale)


def test_a_quantized_head_runs_its_own_code_and_its_logits_are_not_rounded() -> None:
    model = family_model("llama")
    model.lm_head = _Fp8Head(model.lm_head.weight.data)
    teacher = Teacher(model, VALID)
    path = check(teacher, exact=True).path
    assert (teacher.logits_dtype, path.head) == (torch.float32, "replay")
    tokens_BT = torch.arange(2, 42).view(2, 20)
    with torch.inference_mode():
        expected_RV = model(input_ids=tokens_BT).logits.flatten(0, 1)[:, :VALID]
        found_RV = torch.empty_like(expected_RV)
        teacher.logits(teacher.hidden_states(tokens_BT).flatten(0, 1), found_RV)
    torch.testing.assert_close(found_RV, expected_RV, rtol=1e-4, atol=1e-5)
