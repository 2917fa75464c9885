"""A pipeline over the devices of one worker: each holds some of a teacher's layers and works on another batch.

``accelerate`` moves tensors inside the forward pass, once for every layer, and each copy makes two GPUs wait for each
other. So n GPUs work one after the other. Here a thread for each device runs its layers, and hands hidden states, masks
and rotary tables over once per batch. With n + 1 batches in flight all devices are busy. The next partition follows as
soon as the last batch of this one has begun, so the pipeline fills and drains once per job.

What happens before the first layer and after the last one is the model's own code: its trunk, with layers that only
note what they are given, or return what the real ones computed. There is no table of families. A teacher is staged if
its hidden states have the same bits as those of its own forward. Otherwise the hooks of ``accelerate`` remain.

Dimension letters: B sequences, T tokens, D hidden width.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import queue
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from dask_logits.errors import MISFITS, first_line
from dask_logits.teacher.placement import hooks_of, without_hooks
from dask_logits.teacher.transformers_internals import one_sequence_per_row

logger = logging.getLogger(__name__)

_Key = TypeVar("_Key")
# Tokens of the comparison with the model's own forward.
_SHAPE = (2, 40)
# Its classes are untyped.
cuda: Any = torch.cuda


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Contiguous layers on one device.

    Parameters
    ----------
    device
        The device.
    layers
        The layers, in order.
    """

    device: torch.device
    layers: tuple[nn.Module, ...]


def split_layers(layers: Sequence[nn.Module]) -> list[Stage]:
    """Return the stages of layers that are already on their devices."""
    groups = groupby(layers, key=lambda layer: next(layer.parameters()).device)
    return [Stage(device=device, layers=tuple(group)) for device, group in groups]


def staged(trunk: nn.Module, stages: Sequence[Stage], device: torch.device) -> Pipeline | None:
    """Return a pipeline with the same bits as the trunk's own forward, or None if there is none.

    Parameters
    ----------
    trunk
        Returns hidden states. Its devices are connected by hooks.
    stages
        Its layers.
    device
        Where the inputs come from and the hidden states are needed.
    """
    if len(stages) < 2:
        return None
    pipeline = None
    try:
        pipeline = Pipeline(trunk, stages, device)
        ids_BT = torch.arange(1, 1 + _SHAPE[0] * _SHAPE[1], device=device).view(_SHAPE) % 64
        with torch.inference_mode():
            expected_BTD = trunk(input_ids=ids_BT, use_cache=False, return_dict=True).last_hidden_state.to(device)
            if torch.equal(pipeline.submit(ids_BT).result(), expected_BTD):
                return pipeline
        reason = "its hidden states differ from the model's own"
    except MISFITS as error:
        reason = first_line(error)
    if pipeline is not None:
        pipeline.close()
    logger.warning("the teacher's layers run on one device after the other, not as a pipeline: %s", reason)
    return None


@dataclass
class _Batch:
    """A batch on its way through the stages."""

    ids_BT: Tensor
    result: Future[Tensor]
    # The hidden states, and the other arguments of each layer that is still to come.
    hidden_BTD: Any = None
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    arrived: Any = None


class Pipeline:
    """Threads that run the stages of a teacher, one for each.

    Parameters
    ----------
    trunk, stages, device
        As for :func:`staged`.

    Raises
    ------
    RuntimeError
        If the layers return anything else than hidden states.
    """

    def __init__(self, trunk: nn.Module, stages: Sequence[Stage], device: torch.device) -> None:
        self._stages = list(stages)
        self._device = device
        layers = [layer for stage in stages for layer in stage.layers]
        self._more = _more_outputs(trunk, layers[0], device)
        self._first, self._recorders = _with_stubs(trunk, layers, self._wrapped, stages[0].device)
        self._last, self._replacements = _with_stubs(trunk, layers, self._wrapped, stages[0].device)
        self._n_threads = torch.get_num_threads()
        self._is_closed = False
        self._queues: list[queue.Queue[_Batch | None]] = [queue.Queue(1) for _ in stages]
        self._threads = [threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(len(stages))]
        for thread in self._threads:
            thread.start()

    @property
    def input_device(self) -> torch.device:
        """Where the first stage needs the tokens. A copy from another GPU would wait for all of that GPU's work."""
        return self._stages[0].device

    @property
    def depth(self) -> int:
        """Number of batches in flight that keeps all stages busy."""
        return len(self._stages) + 1

    def submit(self, ids_BT: Tensor) -> Future[Tensor]:
        """Start a batch. It waits while the first stage has another one waiting.

        Parameters
        ----------
        ids_BT
            int64 tokens, right-padded.

        Returns
        -------
        Future
            Hidden states [B, T, D] on the pipeline's device, or the error of a stage. Stages skip a batch whose future
            is cancelled.

        Raises
        ------
        RuntimeError
            If the pipeline is closed.
        """
        if self._is_closed:
            raise RuntimeError("expected a pipeline, got one whose teacher was dropped for another one")
        batch = _Batch(ids_BT, Future())
        self._queues[0].put(batch)
        return batch.result

    def close(self) -> None:
        """End the threads after the batches in flight, so that the layers can be freed."""
        self._is_closed = True
        self._queues[0].put(None)
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        """Run one stage until the end."""
        stage, waiting = self._stages[number], self._queues[number]
        torch.set_num_threads(self._n_threads)
        if stage.device.type == "cuda":
            cuda.set_device(stage.device)
        with torch.inference_mode():
            while (batch := waiting.get()) is not None:
                # A batch that was cancelled or that fails ends here.
                if not batch.result.cancelled():
                    try:
                        self._advance(number, batch)
                    except BaseException as error:  # noqa: BLE001 - the thread that waits for the batch raises it
                        _fail(batch, error)
                    else:
                        if number + 1 < len(self._stages):
                            self._queues[number + 1].put(batch)
                # Nothing of a batch may be kept while this thread waits for the next one.
                del batch
        if number + 1 < len(self._stages):
            self._queues[number + 1].put(None)

    def _advance(self, number: int, batch: _Batch) -> None:
        """Run a batch through one stage."""
        stage = self._stages[number]
        if number == 0:
            self._begin(batch)
        _await(batch, stage.device)
        calls = batch.calls[: len(stage.layers)]
        del batch.calls[: len(stage.layers)]
        for layer, (args, kwargs) in zip(stage.layers, calls, strict=True):
            output = layer(batch.hidden_BTD, *args, **kwargs)
            batch.hidden_BTD = output if self._more is None else output[0]
        if number + 1 < len(self._stages):
            _hand_over(batch, self._stages[number + 1].device)
            return
        self._end(batch)
        _hand_over(batch, self._device)
        # The consumer's stream waits for the copy, which was sent before the result is set.
        _await(batch, self._device)
        if batch.result.set_running_or_notify_cancel():
            batch.result.set_result(batch.hidden_BTD)

    def _begin(self, batch: _Batch) -> None:
        """Run the model's own code up to the first layer."""
        try:
            with contextlib.suppress(_AllCalledError):
                self._forward(self._first, batch.ids_BT)
            calls = [recorder.call for recorder in self._recorders]
        finally:
            for recorder in self._recorders:
                recorder.call = None
        if any(call is None for call in calls):
            raise RuntimeError("expected a trunk that calls each of its layers once, got one that leaves some out")
        batch.hidden_BTD = calls[0][0]
        batch.calls = [call[1:] for call in calls]

    def _end(self, batch: _Batch) -> None:
        """Run the model's own code after the last layer."""
        for replacement in self._replacements:
            replacement.output = batch.hidden_BTD
        try:
            batch.hidden_BTD = self._forward(self._last, batch.ids_BT)
        finally:
            for replacement in self._replacements:
                replacement.output = replacement.call = None

    def _forward(self, trunk: Any, ids_BT: Tensor) -> Tensor:
        ids_BT = ids_BT.to(self._stages[0].device, non_blocking=True)
        with one_sequence_per_row():
            hidden_BTD: Tensor = trunk(input_ids=ids_BT, use_cache=False, return_dict=True).last_hidden_state
        return hidden_BTD

    def _wrapped(self, hidden_BTD: Tensor) -> Any:
        return hidden_BTD if self._more is None else (hidden_BTD, *self._more)


class Ahead(Generic[_Key]):
    """Hidden states of batches, computed ahead of their use by a pipeline.

    Parameters
    ----------
    pipeline
        The pipeline.
    tokens_of
        Batch → int64 tokens [B, T] on the pipeline's input device.
    """

    def __init__(self, pipeline: Pipeline, tokens_of: Callable[[_Key], Tensor]) -> None:
        self._pipeline = pipeline
        self._tokens_of = tokens_of
        self._flying: dict[_Key, Future[Tensor]] = {}

    @property
    def n_begun(self) -> int:
        """Number of batches that the pipeline has been given and that were not taken."""
        return len(self._flying)

    def take(self, keys: Sequence[_Key]) -> Tensor:
        """Return the hidden states of the first batch, and have the pipeline begin the next ones.

        Raises
        ------
        Exception
            The error of the stage that failed.
        """
        for key in keys:
            if len(self._flying) >= self._pipeline.depth:
                break
            if key not in self._flying:
                self._flying[key] = self._pipeline.submit(self._tokens_of(key))
        return self._flying.pop(keys[0]).result()

    def keep(self, keys: Iterable[_Key]) -> None:
        """Drop all batches in flight but these."""
        for key in self._flying.keys() - set(keys):
            self._flying.pop(key).cancel()


class _AllCalledError(Exception):
    """Ends a forward pass at the last layer."""


class _Stub(nn.Module):
    """Stands in for a layer: notes its arguments, and returns a given output, or else its input."""

    def __init__(self, layer: nn.Module, wrapped: Callable[[Tensor], Any]) -> None:
        super().__init__()
        # In a tuple, so that it does not become a module of this one.
        self._layer = (layer,)
        self._wrapped = wrapped
        self.call: Any = None
        self.output: Tensor | None = None
        self.is_last = False

    def __getattr__(self, name: str) -> Any:
        # Trunks read attributes of their layers, such as the kind of attention. Hooks belong to the layer alone.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.__dict__["_layer"][0], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.call = (hidden_states, args, kwargs)
        if self.is_last and self.output is None:
            raise _AllCalledError
        return self._wrapped(hidden_states if self.output is None else self.output)


def _with_stubs(
    trunk: nn.Module, layers: Sequence[nn.Module], wrapped: Callable[[Tensor], Any], device: torch.device
) -> tuple[nn.Module, list[_Stub]]:
    """Return a copy of a trunk that shares its weights and configuration. Its layers are stubs, its tables moved."""
    stubs = [_Stub(layer, wrapped) for layer in layers]
    stubs[-1].is_last = True
    memo: dict[int, Any] = {id(parameter): parameter for parameter in trunk.parameters()}
    memo |= {id(module.config): module.config for module in trunk.modules() if hasattr(module, "config")}
    # The hooks of accelerate may hold weights, too.
    memo |= {id(hook): hook for hook in hooks_of(trunk)}
    memo |= {id(layer): stub for layer, stub in zip(layers, stubs, strict=True)}
    copied = copy.deepcopy(trunk, memo)
    without_hooks(copied)
    for module in copied.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    return copied, stubs


def _fail(batch: _Batch, error: BaseException) -> None:
    """End a batch with an error. Its tensors, which the frames of the traceback hold, too, are freed before."""
    batch.hidden_BTD, batch.calls = None, []
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    if batch.result.set_running_or_notify_cancel():
        batch.result.set_exception(error)


def _hand_over(batch: _Batch, target: torch.device) -> None:
    """Send what a batch carries to another device.

    A copy between two GPUs makes the current stream of each wait for that of the other (torch 2.13), so the current
    streams are replaced by streams that only copy.
    """
    source = batch.hidden_BTD.device
    if source == target:
        return
    batch.arrived = None
    if source.type != "cuda":
        batch.hidden_BTD, batch.calls = _sent((batch.hidden_BTD, batch.calls), target)
        return
    sending, receiving = _copy_stream(source, "send"), _copy_stream(target, "receive")
    sending.wait_stream(cuda.current_stream(source))
    with cuda.stream(sending), cuda.stream(receiving):
        _each_tensor((batch.hidden_BTD, batch.calls), lambda tensor: tensor.record_stream(sending))
        batch.hidden_BTD, batch.calls = _sent((batch.hidden_BTD, batch.calls), target)
        batch.arrived = cuda.Event()
        batch.arrived.record(receiving)


def _await(batch: _Batch, device: torch.device) -> None:
    """Make a device's stream wait for what was sent to it."""
    if batch.arrived is not None:
        stream = cuda.current_stream(device)
        stream.wait_event(batch.arrived)
        _each_tensor((batch.hidden_BTD, batch.calls), lambda tensor: tensor.record_stream(stream))


@functools.cache
def _copy_stream(device: torch.device, role: str) -> Any:
    return cuda.Stream(device)


def _sent(values: Any, device: torch.device) -> Any:
    """Return nested values with their tensors on a device. Layers share masks and tables, which are sent once."""
    copies: dict[int, Tensor] = {}

    def send(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.to(device, non_blocking=True)
        return copies[id(tensor)]

    return _each_tensor(values, send)


def _each_tensor(values: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply a function to the tensors in nested tuples, lists and dicts."""
    if isinstance(values, Tensor):
        return function(values)
    if isinstance(values, dict):
        return {name: _each_tensor(value, function) for name, value in values.items()}
    if type(values) in (tuple, list):
        return type(values)(_each_tensor(value, function) for value in values)
    return values


def _more_outputs(trunk: nn.Module, layer: nn.Module, device: torch.device) -> tuple[None, ...] | None:
    """Return placeholders for what layers return behind their hidden states, or None if they return no tuple."""
    outputs: list[Any] = []
    handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        with torch.inference_mode():
            trunk(input_ids=torch.ones(1, 2, dtype=torch.int64, device=device), use_cache=False, return_dict=True)
    finally:
        handle.remove()
    output = outputs[0] if len(outputs) == 1 else None
    if isinstance(output, Tensor):
        return None
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        # Such as attention weights, which the trunk passes on at most.
        return (None,) * len(output[1:])
    raise RuntimeError(f"expected layers that return hidden states, got {type(output).__name__}")
