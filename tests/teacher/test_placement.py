"""Weights and memory: where layers go, what is refused, that hooks change nothing and shapes are forgotten."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dask_logits.errors import CapacityError, TeacherError
from dask_logits.teacher.cpu import fused
from dask_logits.teacher.model import Teacher
from dask_logits.teacher.placement import (
    free_gpu_bytes,
    require_code,
    require_room,
    sized_as_stored,
    spread_layers,
    weight_bytes,
)
from dask_logits.teacher.selfcheck import check, try_compiled

LAYERS = 8
# As torch 2.13 for CUDA 13 is built.
BUILT_FOR = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip


def empty_model() -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(config())


def test_layers_are_spread_in_order_and_about_evenly() -> None:
    model = empty_model()
    found = spread_layers(model, {0: 10**9, 1: 10**9}, torch.bfloat16)
    layer_devices = [found[f"model.layers.{i}"] for i in range(LAYERS)]
    assert layer_devices == sorted(layer_devices)
    bytes_each = {0: 0, 1: 0}
    for name, parameter in model.named_parameters():
        place = max((module for module in found if name.startswith(module + ".")), key=len)
        bytes_each[found[place]] += 2 * parameter.numel()
    assert sum(bytes_each.values()) == 2 * sum(parameter.numel() for parameter in model.parameters())
    assert 0.5 < bytes_each[0] / bytes_each[1] < 2.0


@pytest.mark.parametrize("scales", [".scales", ".weight.absmax"])
def test_quantized_layers_take_the_bytes_of_their_checkpoint(scales) -> None:
    model = empty_model()
    weights = {name: parameter.numel() for name, parameter in model.named_parameters() if ".layers." in name}
    stored = {name: n // 2 for name, n in weights.items() if name.endswith("proj.weight")}
    stored |= {name.removesuffix(".weight") + scales: n // 32 for name, n in stored.items()}
    stored["lm_head.weight"] = 2 * model.lm_head.weight.numel()
    sized = sized_as_stored(model, stored)
    assert weight_bytes(sized.model.layers[0].mlp.up_proj) == 64 * 256 // 2 * 33 // 32
    assert weight_bytes(sized.lm_head) == weight_bytes(model.lm_head)
    assert model.model.layers[0].mlp.up_proj.weight.is_floating_point()
    half = sum(weights.values()) // 2
    with pytest.raises(CapacityError, match=r"\(\d[\d,]+ values of 2 bytes\) and room"):
        spread_layers(model, {0: 2 * half, 1: 2 * half}, torch.bfloat16)
    found = spread_layers(sized, {0: 2 * half, 1: 2 * half}, torch.bfloat16)
    assert set(found.values()) == {0, 1}
    with pytest.raises(CapacityError, match=r"values of 2 bytes and \d[\d,]+ bytes of quantized ones\) and room"):
        spread_layers(sized, {0: half // 4, 1: half // 4}, torch.bfloat16)


def test_weights_that_do_not_fit_several_gpus_are_refused_with_the_arithmetic() -> None:
    model = empty_model()
    values = sum(parameter.numel() for parameter in model.parameters())
    free = {0: values // 2, 1: values // 2}
    with pytest.raises(
        CapacityError, match=rf"expected 0\.00 GiB for the weights \({values:,} values of 2 bytes\).*on 2 GPUs .*layers"
    ) as caught:
        spread_layers(model, free, torch.bfloat16)
    assert (caught.value.needed_bytes, caught.value.free_bytes) == (2 * values, 2 * (values // 2))


def test_weights_that_do_not_fit_one_gpu_are_refused_with_the_arithmetic() -> None:
    model = LlamaForCausalLM(config())
    require_room(model, weight_bytes(model), weight_bytes(model))
    with pytest.raises(CapacityError, match=r"several for each worker \(distillation\.teacher\.generation\.gpus_per"):
        require_room(model, weight_bytes(model) - 1, weight_bytes(model))


@pytest.mark.skipif(torch.cuda.device_count() >= 2, reason="there are two GPUs")
def test_a_worker_with_too_few_gpus_names_the_cure() -> None:
    with pytest.raises(TeacherError, match=r"gpus_per_worker: expected 2 GPUs in this worker, got \d; start every"):
        free_gpu_bytes(2)


def test_a_teacher_under_placement_hooks_scores_the_same() -> None:
    from accelerate import dispatch_model

    torch.manual_seed(7)
    plain, hooked = LlamaForCausalLM(config()).eval(), LlamaForCausalLM(config()).eval()
    hooked.load_state_dict(plain.state_dict())
    # The hooks of a real map; on a machine without GPUs both devices are the CPU.
    names = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    dispatch_model(hooked, {**names, **{f"model.layers.{i}": "cpu" for i in range(LAYERS)}}, force_hooks=True)
    teachers = [Teacher(model, 512) for model in (plain, hooked)]
    paths = [check(teacher, exact=True).path for teacher in teachers]
    assert paths[0] == paths[1]
    assert paths[0].head == "linear"
    tokens_BT = torch.arange(96).view(2, 48)
    with torch.inference_mode():
        assert torch.equal(teachers[0].hidden_states(tokens_BT), teachers[1].hidden_states(tokens_BT))


def test_layers_on_several_devices_are_not_compiled() -> None:
    teacher = Teacher(LlamaForCausalLM(config()).eval(), 512)
    check(teacher, exact=True)
    teacher.devices = [torch.device("cuda:0"), torch.device("cuda:1")]
    before = teacher.path
    with pytest.raises(RuntimeError, match="expected a teacher on one device to compile"):
        try_compiled(teacher)
    assert teacher.path == before


@pytest.mark.skipif(sys.platform != "linux", reason="glibc tells what is in use")
# Other CPUs compute these products without code of their own: 400 shapes take 2 KB with and without the bounds.
@pytest.mark.skipif(not fused.available(), reason="needs a CPU with AVX512-BF16")
def test_code_kept_for_every_shape_is_bounded() -> None:
    """In a process of its own: the bounds are read once. Without them 400 more shapes take 120 MB more."""
    code = """
import ctypes
import torch
from dask_logits.teacher.checkpoint import set_memory

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "abcdefghij"]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
set_memory()
weight = torch.zeros(576, 576).bfloat16().t()
used = []
for rows in range(100, 900):
    torch.mm(torch.zeros(rows, 576).bfloat16(), weight)
    used.append(libc.mallinfo2().h)
print(used[-1] - used[399])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert int(done.stdout or 2**60) < 30 << 20, done.stderr


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (13, 0)])
def test_gpus_that_torch_has_code_for_are_accepted(capability) -> None:
    require_code("NVIDIA X", capability, BUILT_FOR)


@pytest.mark.parametrize(
    ("capability", "built_for"),
    [
        ((7, 0), BUILT_FOR),
        ((6, 1), BUILT_FOR),
        ((13, 0), ["sm_90", "sm_120"]),
        ((9, 1), ["sm_90a"]),
        ((8, 0), ["sm_86"]),
    ],
)
def test_gpus_that_torch_has_no_code_for_are_refused(capability, built_for) -> None:
    got = rf"got NVIDIA X with compute capability {capability[0]}\.{capability[1]}; install a build of torch for it"
    with pytest.raises(TeacherError, match=got):
        require_code("NVIDIA X", capability, built_for)
