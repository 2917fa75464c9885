"""A loaded teacher split into trunk and head, and the scoring path from tokens to logits.

There are three head paths from hidden states to logits:

* ``linear``: one matrix product with the head's weight (and bias) into a reused buffer, followed by a factor and a soft
  cap if the family has them.
* ``replay``: the model's own ``forward`` over a stub that returns our hidden states, so that the family's own code
  performs all operations after its head.
* ``forward``: the whole model per batch. Its logits exist for one whole batch, so this is the last resort.

On CPU the trunk may use the attention of :mod:`dask_logits.teacher.cpu.attention`. On any device its layers may be
compiled, each separately and for all shapes at once: 10 s for a family instead of minutes for a model. Compiled layers
can use the attention of :mod:`dask_logits.teacher.cpu.fused`. The path of a run is chosen by
:mod:`dask_logits.teacher.selfcheck` and frozen with the run.

Dimension letters: B sequences, T tokens, R rows of hidden states, D hidden width, V vocabulary (logit width), C ids.
"""

from __future__ import annotations

import functools
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dask_logits.errors import TeacherError, first_line, is_poisoned
from dask_logits.teacher.cpu import attention, fused
from dask_logits.teacher.cuda import flex, kernels
from dask_logits.teacher.memory import is_out_of_memory
from dask_logits.teacher.stages import Pipeline, split_layers, staged
from dask_logits.teacher.torch_internals import strict_compiler, uncompile, with_complete_code
from dask_logits.teacher.transformers_internals import attention_of, one_sequence_per_row

Attention = Literal["fused", "blocks", "flex", "model"]
Head = Literal["linear", "replay", "forward"]
HEADS: tuple[Head, ...] = ("linear", "replay", "forward")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Code is compiled for one and for several sequences. Every process starts from these shapes, so all run the same code.
_WARM_SHAPES = ((2, 64), (1, 64))
# Kinds of layers times the two shapes, plus a margin.
_RECOMPILE_LIMIT = 64


@dataclass(frozen=True, kw_only=True)
class ScoringPath:
    """Path of a run from tokens to logits, part of its numerics.

    Parameters
    ----------
    attention
        ``blocks`` (:mod:`dask_logits.teacher.cpu.attention`), ``fused`` (the same with native code where applicable),
        ``flex`` (:mod:`dask_logits.teacher.cuda.flex`), or ``model`` (the family's own).
    head
        One of :data:`HEADS`.
    scale, softcap
        With ``linear``: logits are ``scale · x``, then ``softcap · tanh(x / softcap)`` unless `softcap` is None.
    exact
        Whether logits are in float32 (with ``linear``) or rounded as by the model.
    compiled
        Whether layers and targets run as compiled code.
    kernels
        Whether targets are computed by :mod:`dask_logits.teacher.cuda.kernels`.
    """

    attention: Attention = "model"
    head: Head = "forward"
    scale: float = 1.0
    softcap: float | None = None
    exact: bool = False
    compiled: bool = False
    kernels: bool = False

    def finish(self, raw: Tensor) -> Tensor:
        """Apply factor and soft cap to products with the head's weight. −inf marks excluded values and is kept."""
        out = raw if self.scale == 1.0 else raw * self.scale
        if self.softcap is None:
            return out
        return torch.where(out == -torch.inf, out, self.softcap * torch.tanh(out / self.softcap))


class Teacher:
    """A causal language model in evaluation mode, with its scoring path.

    Parameters
    ----------
    model
        The model.
    vocab_size
        Valid vocabulary: the number of logit columns to keep.
    """

    def __init__(self, model: Any, vocab_size: int) -> None:
        self.model = model
        self.vocab_size = vocab_size
        # Llama 4's class names a nonexistent trunk, so base_model is the whole model.
        prefix: str = self.model.base_model_prefix
        self._replaying = threading.Lock()
        self._trunk_name = prefix if hasattr(self.model, prefix) else "model"
        self.trunk: Any = getattr(self.model, self._trunk_name, self.model)
        self.head: Any = self.model.get_output_embeddings()
        # Device of inputs and results. For a spread teacher, accelerate's hooks move activations to the layers.
        self.device: torch.device = self.head.weight.device
        placed = getattr(self.model, "hf_device_map", {}).values()
        self.devices = sorted({torch.device(place) for place in placed}, key=str) or [self.device]
        stored: torch.dtype = self.head.weight.dtype
        # A quantized head computes in another dtype than it is stored in. No logits may be rounded to that.
        self.dtype = stored if stored in FLOATS else torch.float32
        self.path = ScoringPath()
        # Batches go through it one behind the other, if the layers are on several devices.
        self.pipeline: Pipeline | None = None
        self._own_attention = attention_of(self.model.config)

    def take(self, path: ScoringPath) -> None:
        """Switch the model to a path.

        Raises
        ------
        ValueError, RuntimeError
            If the family's attention cannot be replaced, or its layers cannot be compiled here.
        TeacherError
            If the run was calibrated with Triton, FlexAttention or fused attention, which cannot run here.
        """
        needs_triton = path.kernels or (path.attention == "flex" and self.device.type == "cuda")
        if needs_triton and not kernels.available():
            raise TeacherError(
                "teacher: expected Triton in this worker, as in the one where the run was calibrated, got none; "
                "install the same packages for every worker (pip install triton)"
            )
        if path.attention == "fused" and not fused.available():
            raise TeacherError(
                "teacher: expected a CPU with AVX512-BF16, as that of the worker where the run was calibrated, got one "
                "without; use machines of one kind, or set distillation.scoring.compile=never"
            )
        if path.kernels and not self.path.kernels:
            _run_kernels(self.device)
        try:
            if path.attention != self.path.attention:
                self._attend_by(path.attention)
            if path.compiled != self.path.compiled:
                self._compile() if path.compiled else self._uncompile()
        except Exception:
            self._attend_by(self.path.attention)
            raise
        self.path = path

    def _attend_by(self, kind: Attention) -> None:
        match kind:
            case "model":
                name = self._own_attention
            case "flex":
                name = flex.offer()
            case _:
                name = attention.offer(kind)
        self.model.set_attn_implementation(name)
        if attention_of(self.model.config.get_text_config()) != name:
            raise ValueError(f"{type(self.model).__name__}: expected replaceable attention, got its own")

    def layers(self) -> list[nn.Module]:
        """Return the trunk's repeated layers: its longest module list, for a multimodal model the language model's."""
        text: nn.Module = getattr(self.trunk, "language_model", self.trunk)
        lists = [list(module) for module in text.modules() if isinstance(module, nn.ModuleList)]
        return max(lists, key=len, default=[])

    def stage(self) -> None:
        """Use a pipeline, if the layers are on several devices and it gives the same bits."""
        self.pipeline = staged(self.trunk, split_layers(self.layers()), self.device)

    def close(self) -> None:
        """End the threads that hold the layers."""
        if self.pipeline is not None:
            self.pipeline.close()
            self.pipeline = None

    def hidden_states(self, input_ids_BT: Tensor) -> Tensor:
        """Run the trunk on right-padded tokens, without a mask, because padding on the right cannot affect the left.

        Returns
        -------
        Tensor
            [B, T, D].
        """
        with self.strict(), one_sequence_per_row():
            output = self.trunk(input_ids=input_ids_BT, use_cache=False, return_dict=True)
        hidden_BTD: Tensor = output.last_hidden_state
        return hidden_BTD.to(self.device, non_blocking=True)

    @property
    def logits_dtype(self) -> torch.dtype:
        """Dtype of a logits buffer. Exact CPU logits are refined by ``scoring.refined_logits``."""
        return torch.float32 if self.path.exact and self.device.type == "cuda" else self.dtype

    @property
    def refines(self) -> bool:
        """Whether logits are first rounded, and the kept ones are recomputed in float32."""
        return self.path.exact and self.logits_dtype != torch.float32

    def logits(self, hidden_RD: Tensor, out_RV: Tensor) -> None:
        """Write the logits of R positions into a buffer. With ``linear``, :meth:`ScoringPath.finish` comes after."""
        (self._linear if self.path.head == "linear" else self._replay)(hidden_RD, out_RV)

    def _linear(self, hidden_RD: Tensor, out_RV: Tensor) -> None:
        weight_DV = self.head.weight[: self.vocab_size].t()
        # Some families keep the residual stream in float32 and round it here.
        hidden_RD = hidden_RD.to(weight_DV.dtype)
        if out_RV.dtype != weight_DV.dtype:
            # Half-precision factors, float32 sums and results. CUDA only (PyTorch 150812).
            torch.mm(hidden_RD, weight_DV, out_dtype=out_RV.dtype, out=out_RV)
        else:
            torch.mm(hidden_RD, weight_DV, out=out_RV)
        if getattr(self.head, "bias", None) is not None:
            out_RV += self.head.bias[: self.vocab_size]

    def _replay(self, hidden_RD: Tensor, out_RV: Tensor) -> None:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        tokens = torch.zeros(1, len(hidden_RD), dtype=torch.int64, device=self.device)
        output = BaseModelOutputWithPast(last_hidden_state=hidden_RD[None])
        # The attribute is swapped rather than the module's forward, so that hooks on the trunk do not run again.
        # With a pipeline, two partitions may be at the head at one time.
        with self._replaying:
            setattr(self.model, self._trunk_name, _Stub(output))
            try:
                logits_1RV: Tensor = self.model(input_ids=tokens, use_cache=False, return_dict=True).logits
            finally:
                setattr(self.model, self._trunk_name, self.trunk)
        out_RV.copy_(logits_1RV[0, :, : self.vocab_size])

    def logits_forward(self, input_ids_BT: Tensor) -> Tensor:
        """Return the whole model's logits, [B, T, valid V]."""
        with self.strict():
            logits_BTV: Tensor = self.model(input_ids=input_ids_BT, use_cache=False, return_dict=True).logits
        return logits_BTV[:, :, : self.vocab_size].to(self.device, non_blocking=True)

    def _compile(self) -> None:
        layers = self.layers()
        if len(self.devices) > 1:
            raise RuntimeError("expected a teacher on one device to compile its layers, got several GPUs")
        if not layers:
            raise RuntimeError(f"{type(self.model).__name__}: expected a list of layers to compile, got none")
        for layer in layers:
            layer.compile(dynamic=True)
        try:
            with self.strict(compiled=True), torch.inference_mode():
                for shape in _WARM_SHAPES:
                    ids_BT = torch.ones(shape, dtype=torch.int64, device=self.device)
                    with_complete_code(functools.partial(self.hidden_states, ids_BT))
        except Exception:
            self._uncompile()
            raise

    def strict(self, *, compiled: bool = False) -> AbstractContextManager[object]:
        """Make the compiler raise instead of falling back to uncompiled code, which would change the bits of a run."""
        if not (compiled or self.path.compiled or self.path.attention == "flex"):
            return nullcontext()
        return strict_compiler(_RECOMPILE_LIMIT, may_time=self.device.type == "cpu")

    def _uncompile(self) -> None:
        for layer in self.layers():
            uncompile(layer)


def _run_kernels(device: torch.device) -> None:
    """Compile Triton's kernels, or say what this worker lacks for that."""
    try:
        kernels.run_once(device)
    except Exception as error:
        # Triton and its compilers raise whatever they like.
        if is_out_of_memory(error) or is_poisoned(error):
            raise
        raise TeacherError(
            "teacher: expected Triton to compile in this worker, as in the one where the run was calibrated, got "
            f"{first_line(error)}; install a C compiler and Python's headers on every worker (apt install gcc "
            "python3-dev)"
        ) from error


class _Stub(nn.Module):
    """Replacement for the trunk that returns a precomputed output."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output
