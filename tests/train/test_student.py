"""The head of Hugging Face models, and their loss with it against the loss of their own logits."""

from __future__ import annotations

import copy
import dataclasses
import logging

import pytest
import torch
from builders import records, write_cache
from dense_losses import gradients, sparse_targets
from families import family_model
from torch import Tensor, nn

from dask_logits import (
    CachedLogitsDataset,
    Objective,
    SparseTargets,
    StudentWithLoss,
    collate,
    collate_flat,
    distillation_loss,
    student_head,
)

V = 112


def batch() -> tuple[Tensor, SparseTargets]:
    """Return tokens [2, 9] and targets, with padding and a masked position."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(V, (2, 9), generator=draw)
    teacher = torch.randn(2, 9, V, generator=draw) * 3
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    labels = torch.where(mask, ids.roll(-1, 1), -100)
    labels[:, -1] = labels[1, 5] = -100
    return ids, dataclasses.replace(sparse_targets(teacher, labels, 6, mask), input_ids=ids)


def assert_equals_the_logits(model: nn.Module) -> StudentWithLoss:
    """Compare loss and gradients of a model with those of its own logits."""
    ids, targets = batch()
    objective = Objective(tail="residual", alpha=0.6)
    plain = copy.deepcopy(model)
    student = StudentWithLoss(model, objective)
    attention_mask = targets.mask.long()
    found = student(ids, targets, attention_mask)
    found.loss.backward()
    logits = plain(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits
    expected = distillation_loss(logits, targets, objective)
    expected.loss.backward()
    torch.testing.assert_close(found.loss, expected.loss, atol=2e-5, rtol=2e-5)
    wanted = gradients(plain)
    assert gradients(model).keys() == wanted.keys()
    for name, grad in gradients(model).items():
        assert (grad - wanted[name]).norm() <= 1e-4 * wanted[name].norm() + 1e-6, name
    return student


@pytest.mark.parametrize(
    ("family", "scale", "softcap", "has_bias"),
    [
        ("llama", 1.0, None, False),
        ("gemma2", 1.0, 5.0, False),
        ("granite", 1 / 3, None, False),
        ("cohere", 0.25, None, False),
        ("minicpm3", 8.0, None, False),
        ("phi", 1.0, None, True),
        ("llama4_text", 1.0, None, False),
    ],
)
def test_heads_of_families_reproduce_loss_and_gradients(family, scale, softcap, has_bias) -> None:
    model = family_model(family).requires_grad_(True)
    student = assert_equals_the_logits(model)
    assert (student.head.scale, student.head.softcap) == (pytest.approx(scale), softcap)
    assert (student.head.bias is not None) == has_bias


def test_a_tied_head_and_a_frozen_one() -> None:
    tied = family_model("llama", tie_word_embeddings=True).requires_grad_(True)
    assert assert_equals_the_logits(tied).head.weight is tied.model.embed_tokens.weight
    frozen = family_model("llama", tie_word_embeddings=False).requires_grad_(True)
    frozen.lm_head.requires_grad_(False)
    assert_equals_the_logits(frozen)
    assert frozen.lm_head.weight.grad is None


@pytest.mark.parametrize("options", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_heads_that_peft_wrapped(options) -> None:
    from peft import LoraConfig, get_peft_model

    base = family_model("granite", tie_word_embeddings=False)
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=3, **{"target_modules": ["q_proj"], **options}))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    head = student_head(model)
    assert len(head.adapters) == ("modules_to_save" not in options)
    assert head.scale == pytest.approx(1 / 3)
    assert all((value == before[name]).all() for name, value in model.state_dict().items())
    # A zero second factor would hide an error in the first.
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    assert_equals_the_logits(model)


def test_a_variant_of_lora_takes_full_logits(caplog) -> None:
    from peft import LoraConfig, get_peft_model

    base = family_model("llama", tie_word_embeddings=False)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head"], use_dora=True))
    assert assert_equals_the_logits(model).head is None
    assert "expected plain LoRA on the head, got a variant of it" in caplog.text


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("modernbert-decoder", r"expected a linear head with a factor and a soft cap to reproduce the model's logits"),
        ("opt", r"expected a forward that calls OPTModel, got one that calls its parts"),
    ],
)
def test_other_heads_take_full_logits_and_the_reason_is_logged(family, reason, caplog) -> None:
    assert assert_equals_the_logits(family_model(family).requires_grad_(True)).head is None
    assert f"uses the loss of full logits: {reason}" in caplog.text


def test_a_head_that_accelerate_moves_takes_full_logits(caplog) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = family_model("llama", tie_word_embeddings=False)
    add_hook_to_module(model.lm_head, AlignDevicesHook(execution_device="cpu"))
    assert student_head(model) is None
    assert "expected a head on the device of its inputs, got one that accelerate moves" in caplog.text


def test_the_check_changes_neither_modes_nor_gradients(caplog) -> None:
    caplog.set_level(logging.INFO)
    model = family_model("llama", attention_dropout=0.5).requires_grad_(True).train()
    model.model.norm.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert student_head(model) is not None
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert gradients(model) == {}
    assert "head of LlamaForCausalLM: scale 1, soft cap None" in caplog.text


def test_half_precision_heads_are_recognised() -> None:
    assert student_head(family_model("gemma2").bfloat16()).softcap == 5.0


def test_float32_adapters_beside_a_bfloat16_head() -> None:
    from peft import LoraConfig, get_peft_model

    base = family_model("llama", tie_word_embeddings=False).bfloat16()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head"]))
    student = StudentWithLoss(model)
    (adapter,) = student.head.adapters
    assert (student.head.weight.dtype, adapter.up.dtype) == (torch.bfloat16, torch.float32)
    nn.init.normal_(adapter.up)
    ids, targets = batch()
    found = student(ids, targets)
    found.loss.backward()
    assert adapter.up.grad.dtype == torch.float32
    assert adapter.up.grad.norm() > 0
    expected = distillation_loss(model(input_ids=ids).logits, targets)
    torch.testing.assert_close(found.loss, expected.loss, atol=0.02, rtol=0.02)


def test_values_per_token_and_the_normaliser_pass_through() -> None:
    ids, targets = batch()
    student = StudentWithLoss(family_model("llama"))
    each = student(ids, targets, per_token=True)
    torch.testing.assert_close(each.loss.sum() / 4, student(ids, targets, normaliser=4).loss)
    assert each.entropy.shape == ids.shape


@pytest.mark.parametrize(
    ("family", "scale", "softcap"), [("llama", 1.0, None), ("gemma2", 1.0, 5.0), ("granite", 1 / 3, None)]
)
def test_heads_are_recognised_under_autocast(family, scale, softcap) -> None:
    ids, targets = batch()
    model = family_model(family)
    with torch.autocast("cpu", torch.bfloat16):
        student = StudentWithLoss(model)
        found = student(ids, targets)
        expected = distillation_loss(model(input_ids=ids).logits, targets)
    assert (student.head.scale, student.head.softcap) == (pytest.approx(scale), softcap)
    torch.testing.assert_close(found.loss, expected.loss, atol=0.02, rtol=0.02)


def test_the_items_of_a_flat_batch_do_not_see_each_other(tmp_path) -> None:
    write_cache(tmp_path / "c.h5", records((7, 5, 4)))
    items = list(CachedLogitsDataset(tmp_path / "c.h5"))
    student = StudentWithLoss(family_model("llama"))
    padded, flat = collate(items), collate_flat(items)
    expected = student(padded["input_ids"], padded["targets"], padded["attention_mask"])
    found = student(flat["input_ids"], flat["targets"], position_ids=flat["position_ids"])
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-5)
    assert abs(student(flat["input_ids"], flat["targets"]).loss - expected.loss) > 1e-3


def test_a_router_without_its_auxiliary_loss_is_named(caplog) -> None:
    model = family_model("llama")
    StudentWithLoss(model)
    assert "router" not in caplog.text
    model.config.output_router_logits = True
    StudentWithLoss(model)
    assert "output_router_logits is set, but the auxiliary loss of the router is not part" in caplog.text
