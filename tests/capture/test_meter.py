from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import HEAD_WIDTH, VOCAB_SIZE, tiny_model

from dask_logits.capture.meter import Cost, Stopwatch, measure_cost
from dask_logits.capture.teacher import Teacher
from dask_logits.capture.transfer import OutputRing, to_device

CPU = torch.device("cpu")


def test_flops_are_two_for_every_weight_that_is_multiplied() -> None:
    cost = measure_cost(Teacher(tiny_model("llama"), VOCAB_SIZE))
    layer = 4 * 32 * 32 + 3 * 32 * 64
    # The scores of four tokens are counted with the weights: 4 · 32 · 4 in each of two layers.
    assert cost.linear_flops == pytest.approx(2 * (2 * layer + 32 * HEAD_WIDTH), rel=0.05)
    assert cost.attention_flops == 4 * 32 * 2
    assert cost.peak_flops > 1e8


def test_attention_counts_pairs() -> None:
    assert Cost(linear_flops=10.0, attention_flops=1.0).flops([1, 3]) == 10 + 1 + 30 + 6


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


def test_a_ring_delivers_in_order_and_holds_no_more_than_its_slots() -> None:
    delivered: list[float] = []
    ring = OutputRing(CPU, slots=2)
    for i in range(5):
        ring.put({"x": torch.tensor([float(i)])}, lambda found: delivered.append(float(found["x"][0])))
        assert delivered == [float(j) for j in range(max(0, i - 1))]
    ring.drain()
    assert delivered == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_arrays_reach_the_device_unchanged() -> None:
    np.testing.assert_array_equal(to_device(np.arange(3), CPU).numpy(), [0, 1, 2])
