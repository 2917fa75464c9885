"""Results leave the device in order and whole, however late the copies are."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from dask_logits.teacher import transfer
from dask_logits.teacher.transfer import OutputRing, to_device

CPU = torch.device("cpu")


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


class LateCopies(TorchFunctionMode):
    """Delays every copy of the side stream until its event is waited for, as late as CUDA may do it."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.done = 0
        self.on_stream = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.copy_ and self.on_stream:
            self.copies.append((args[0], args[1]))
            return args[0]
        if function is torch.empty and kwargs.pop("pin_memory", False):
            # Memory that is read too early is noticed.
            return function(*args, **kwargs).fill_(-7)
        return function(*args, **kwargs)

    @contextlib.contextmanager
    def stream(self, _):
        self.on_stream = True
        yield
        self.on_stream = False

    def event(self, blocking: bool) -> SimpleNamespace:
        # Otherwise a thread that waits keeps a core busy.
        assert blocking
        event = SimpleNamespace(upto=0)
        event.record = lambda: setattr(event, "upto", len(self.copies))
        event.synchronize = lambda: self.copy(event.upto)
        return event

    def copy(self, upto: int) -> None:
        """Copy what was sent before an event, in order."""
        for target, source in self.copies[self.done : upto]:
            target.copy_(source)
        self.done = max(self.done, upto)


@pytest.mark.parametrize("seed", range(20))
def test_copies_as_late_as_possible_lose_nothing(seed, monkeypatch) -> None:
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, 40, draw.integers(5, 25)).tolist()
    wanted_N3 = draw.normal(size=(sum(sizes), 3)).astype(np.float32)
    found_N3 = np.full_like(wanted_N3, np.nan)
    late = LateCopies()
    side = SimpleNamespace(wait_stream=lambda other: None)
    cuda = SimpleNamespace(
        Stream=lambda device: side, Event=late.event, stream=late.stream, current_stream=lambda device: None
    )  # fmt: skip
    monkeypatch.setattr(transfer, "cuda", cuda)
    with late:
        ring = OutputRing(SimpleNamespace(type="cuda"), slots=3)
        start = 0
        for size in sizes:
            part = slice(start, start + size)

            def deliver(results, part=part) -> None:
                found_N3[part] = results["x"]

            ring.put({"x": torch.from_numpy(wanted_N3[part].copy())}, deliver)
            start += size
        ring.drain()
    np.testing.assert_array_equal(found_N3, wanted_N3)
