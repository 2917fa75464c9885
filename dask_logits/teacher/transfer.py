"""Transfers between host and device: inputs through pinned memory, results through a small ring, without blocking.

On CUDA a result is copied on a side stream into pinned memory while the next batch is computed, and read when its slot
is needed again. On a CPU the ring holds the results themselves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dask_logits.records import Array

_SLOTS = 4
# Its classes are untyped.
cuda: Any = torch.cuda


def to_device(array: Array, device: torch.device) -> Tensor:
    """Send an array to the device. On CUDA the copy overlaps with computation."""
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


class OutputRing:
    """Results in transit from the device, delivered in the order of :meth:`put`.

    Parameters
    ----------
    device
        Device that computes the results.
    slots
        Maximum number of results in transit.
    """

    def __init__(self, device: torch.device, slots: int = _SLOTS) -> None:
        self._device = device
        self._slots = slots
        self._cuda = device.type == "cuda"
        self._stream: Any = cuda.Stream(device) if self._cuda else None
        # Host copies, the event that marks them as complete, and their source tensors on the device.
        self._waiting: deque[tuple[dict[str, Tensor], Any, dict[str, Tensor], Callable[[dict[str, Array]], None]]] = (
            deque()
        )
        self._free: list[dict[str, Tensor]] = []

    def put(self, results: dict[str, Tensor], deliver: Callable[[dict[str, Array]], None]) -> None:
        """Start the transfer of results. `deliver` gets them later, in this thread, and must copy them to keep them."""
        if len(self._waiting) >= self._slots:
            self._deliver()
        if not self._cuda:
            self._waiting.append((results, None, {}, deliver))
            return
        host = self._buffers(results)
        self._stream.wait_stream(cuda.current_stream(self._device))
        with cuda.stream(self._stream):
            for name, tensor in results.items():
                host[name][: len(tensor)].copy_(tensor, non_blocking=True)
            # Otherwise a thread that waits uses a core.
            done = cuda.Event(blocking=True)
            done.record()
        self._waiting.append((host, done, results, deliver))

    def drain(self) -> None:
        """Deliver all pending results."""
        while self._waiting:
            self._deliver()

    def _deliver(self) -> None:
        host, done, results, deliver = self._waiting.popleft()
        if done is None:
            deliver({name: tensor.numpy() for name, tensor in host.items()})
            return
        done.synchronize()
        deliver({name: host[name][: len(tensor)].numpy() for name, tensor in results.items()})
        self._free.append(host)

    def _buffers(self, results: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return pinned buffers that are large enough, reused if possible."""
        for i, host in enumerate(self._free):
            if all(len(host[name]) >= len(tensor) for name, tensor in results.items()):
                return self._free.pop(i)
        return {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for name, tensor in results.items()
        }
