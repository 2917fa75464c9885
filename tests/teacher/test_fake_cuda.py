"""The CUDA branch of scoring on fake CUDA tensors, on a machine without a GPU.

Fake tensors have a device, a dtype and a shape, but no values. An operation on tensors of two devices raises, and so
does one that must know a value. What is computed is not tested.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import VOCAB_SIZE, compact, tiny_model
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from dask_logits.data.items import plain_items
from dask_logits.teacher import meter, scoring, transfer
from dask_logits.teacher.cuda import kernels
from dask_logits.teacher.model import ScoringPath, Teacher
from dask_logits.worker import encoder

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a build of torch with CUDA treats them otherwise")


class CpuBuild(TorchFunctionMode):
    """Does without what a build of torch for CPUs lacks: guards of the device, pinned memory, fused attention."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        if function is Tensor.__getitem__:
            return subscript(*args)
        if function is torch.nn.functional.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        if function is Tensor.__bool__:
            raise DataDependentOutputException("bool() of a tensor")
        return function(*args, **kwargs)


def subscript(tensor: Tensor, key) -> Tensor:
    """Subscript by operators, which need no guard of the device."""
    key = list(key) if isinstance(key, tuple) else [key]
    places = [i for i, part in enumerate(key) if part is Ellipsis]
    used = sum(part is not None and part is not Ellipsis for part in key)
    at = places[0] if places else len(key)
    key[at : at + 1] = [slice(None)] * (tensor.dim() - used)
    dim = 0
    for part in key:
        if part is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(part, int):
            tensor = torch.ops.aten.select.int(tensor, dim, part)
            continue
        elif isinstance(part, slice):
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, part.start, part.stop, part.step or 1)
        elif part.dtype == torch.bool:
            raise DataDependentOutputException("a mask as an index")
        else:
            tensor = torch.ops.aten.index.Tensor(tensor, [None] * dim + [part])
            dim += part.dim() - 1
        dim += 1
    return tensor


def fake_cuda() -> SimpleNamespace:
    """Stands in for ``torch.cuda``: streams and events that do nothing."""
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda other: 1.0)
    return SimpleNamespace(
        Stream=lambda device: SimpleNamespace(wait_stream=lambda other: None),
        Event=lambda **options: event,
        stream=lambda stream: contextlib.nullcontext(),
        current_stream=lambda device: None,
    )


def send(model: torch.nn.Module) -> None:
    """Replace the parameters, in bfloat16, and the buffers of a model by fake ones on a GPU."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda:0")
            setattr(module, name, torch.nn.Parameter(fake, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda:0"))


@pytest.fixture
def delivered(monkeypatch) -> list[dict[str, Tensor]]:
    """The results that would leave the device."""
    found: list[dict[str, Tensor]] = []

    def to_device(array, device):
        return torch.empty(array.shape, dtype=torch.from_numpy(array).dtype, device=device)

    for module in (transfer, meter):
        monkeypatch.setattr(module, "cuda", fake_cuda())
    for module in (scoring, encoder):
        monkeypatch.setattr(module, "to_device", to_device)
    monkeypatch.setattr(transfer.OutputRing, "put", lambda ring, results, deliver: found.append(results))
    return found


def score(family: str, attention: str = "model") -> int:
    """Score four documents in one batch; return the tokens kept."""
    model = tiny_model(family)
    texts = [np.zeros(n, np.int32) for n in (30, 20, 10, 5)]
    with FakeTensorMode(allow_non_fake_inputs=True), CpuBuild(), torch.inference_mode():
        send(model)
        teacher = Teacher(model, VOCAB_SIZE)
        teacher.take(ScoringPath(head="linear", exact=True, attention=attention))
        settings = scoring.ScoringSettings(
            top_k=8, vocab_size=VOCAB_SIZE, batch_tokens=500, batch_size=None, head_rows=16, path=teacher.path
        )  # fmt: skip
        encode = encoder.Encoder(compact(8, VOCAB_SIZE), teacher.device)
        return scoring._Run(teacher, plain_items(texts), settings, lambda tokens: None, encode)._score((0, 1, 2, 3))


@pytest.mark.parametrize(
    ("family", "attention"), [("llama", "model"), ("qwen3", "model"), ("gemma3_text", "model"), ("gemma2", "flex")]
)
def test_scoring_stays_on_the_gpu_and_needs_no_value(family, attention, delivered, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda: True)
    assert score(family, attention) == 65
    assert sum(len(results["topk_ids"]) for results in delivered) == 65
    for results in delivered:
        assert {tensor.device for tensor in results.values()} == {torch.device("cuda:0")}
        assert results["topk_ids"].shape[1:] == (8,)
        assert results["topk_logprobs"].dtype == torch.float16
        assert results["topk_gaps_b0"].dtype == results["topk_ids_b0"].dtype == torch.uint8
        assert results["logsumexp"].dtype == torch.float32


def test_a_tensor_that_is_left_on_the_cpu_is_noticed(delivered, monkeypatch) -> None:
    sent = scoring.to_device
    monkeypatch.setattr(
        scoring, "to_device", lambda array, device: torch.empty(array.shape, dtype=torch.int64)
        if array.ndim == 1 else sent(array, device),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="device"):
        score("llama")


def test_a_value_that_is_needed_is_noticed(delivered, monkeypatch) -> None:
    whole = scoring.topk_with_tail

    def peek(logits_RV, *given, **named):
        assert (logits_RV[0, 0] > 0) in (True, False)
        return whole(logits_RV, *given, **named)

    monkeypatch.setattr(scoring, "topk_with_tail", peek)
    with pytest.raises(DataDependentOutputException):
        score("llama")
