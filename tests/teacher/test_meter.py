from __future__ import annotations

import pytest
import torch
from builders import HEAD_WIDTH, VOCAB_SIZE, tiny_model
from popular import BY_TYPE, Family, build_family

from dask_logits.teacher.meter import Cost, Stopwatch, measure_cost, peak_flops
from dask_logits.teacher.model import Teacher

CPU = torch.device("cpu")


def cost_of(family: str, **overrides) -> Cost:
    return measure_cost(Teacher(tiny_model(family, **overrides), VOCAB_SIZE))


def test_flops_are_two_for_every_weight_that_is_multiplied() -> None:
    cost = cost_of("llama")
    layer = 4 * 32 * 32 + 3 * 32 * 64
    assert cost.linear_flops == 2 * (2 * layer + 32 * HEAD_WIDTH)
    assert cost.attention_flops == 4 * 32 * 2
    assert cost.peak_flops > 1e8


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_of_routed_experts_only_the_chosen_ones_count(family: str) -> None:
    sparse, dense = (cost_of(family, num_experts_per_tok=chosen).linear_flops for chosen in (2, 4))
    model = tiny_model(family)
    routed = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if ".experts." in name and weight.dim() > 1 and "router" not in name
    )
    # Two of four experts.
    assert dense - sparse == 2 * routed / 2
    assert routed > 0


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "glm4", "phi3"])
def test_flops_agree_with_a_counter_that_runs_the_model(family: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    teacher = Teacher(tiny_model(family), VOCAB_SIZE)
    counted = measure_cost(teacher).linear_flops
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        teacher.logits_forward(torch.arange(4).view(4, 1))
    # The counter also sees the attention of a token to itself.
    assert counted == pytest.approx(counter.get_total_flops() / 4, rel=0.05)


def test_packed_weights_count_as_what_they_multiply() -> None:
    model = tiny_model("llama")
    packed = model.model.layers[0].mlp.down_proj
    # As bitsandbytes stores four bits: two in a byte, in one column.
    packed.weight = torch.nn.Parameter(torch.zeros(packed.weight.numel() // 2, 1, dtype=torch.uint8), False)
    packed.weight_scale = torch.nn.Parameter(torch.zeros(32, 1))
    assert measure_cost(Teacher(model, VOCAB_SIZE)).linear_flops == cost_of("llama").linear_flops


def test_layers_with_a_window_count_the_pairs_in_it() -> None:
    cost = cost_of("gemma2")
    assert (cost.attention_flops, cost.window_flops, cost.window) == (4 * 32, 4 * 32, 8)


def test_heads_of_several_widths_are_counted_by_layer() -> None:
    cost = measure_cost(Teacher(build_family(BY_TYPE["gemma4_text"]), VOCAB_SIZE))
    # Eight wide in the layer with a window, sixteen in the other one; the configuration raises for head_dim.
    assert (cost.window_flops, cost.attention_flops) == (4 * 4 * 8, 4 * 4 * 16)


def test_only_the_text_part_of_a_wrapper_counts() -> None:
    family = BY_TYPE["qwen3_vl"]
    whole, text = (
        measure_cost(Teacher(build_family(one), VOCAB_SIZE))
        for one in (family, Family(model_type="qwen3", known_as="", config=family.config["text_config"]))
    )
    assert (whole.linear_flops, whole.attention_flops) == (text.linear_flops, text.attention_flops)


def test_a_teacher_that_cannot_be_counted_has_no_figure(monkeypatch, caplog) -> None:
    def fails(*_: object) -> float:
        raise RuntimeError("no such instruction\nsecond line")

    monkeypatch.setattr("dask_logits.teacher.meter.peak_flops", fails)
    caplog.set_level("INFO", "dask_logits")
    assert cost_of("llama") == Cost()
    assert [record.message for record in caplog.records] == [
        "MFU is unknown: the teacher's FLOPs could not be counted (no such instruction)"
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_limit_is_measured_in_bounded_time(dtype: torch.dtype, monkeypatch) -> None:
    # A clock that each product advances as far as on a device that takes 100 ns for a multiplication.
    clock = [0.0]

    def slow_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        clock[0] += len(a) ** 3 * 1e-7
        return a

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("torch.mm", slow_product)
    peak_flops.cache_clear()
    try:
        assert peak_flops(CPU, dtype, 64) == pytest.approx(2 / 1e-7)
    finally:
        peak_flops.cache_clear()
    assert clock[0] < 1.0


def test_attention_counts_pairs() -> None:
    assert Cost(linear_flops=10.0, attention_flops=1.0).flops([1, 3]) == 10 + 1 + 30 + 6
    # Ten tokens, of which each sees itself and two before it.
    assert Cost(window_flops=1.0, window=3).flops([10]) == 1 + 2 + 8 * 3


def test_a_stopwatch_adds_up_by_stage() -> None:
    watch = Stopwatch(CPU)
    for stage in ("trunk", "head", "trunk"):
        with watch.span(stage):
            pass
    assert set(watch.seconds()) == {"trunk", "head"}


def test_a_stage_inside_another_counts_once(monkeypatch) -> None:
    ticks = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    watch = Stopwatch(CPU)
    with watch.span("tail"), watch.span("refine"):
        pass
    assert watch.seconds() == {"tail": 5.0, "refine": 2.0}
