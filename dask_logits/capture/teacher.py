"""The teacher: looked at by the driver, loaded once per worker process, checked against its own plain forward.

Three ways lead from hidden states to logits, tried from the fastest:

* ``linear``: one matrix product with the head's weight (and bias), into a buffer that is reused;
* ``replay``: the model's own ``forward`` over a stub that returns our hidden states, so soft-capping, scaling and
  whatever else a family does after its head is done by the family's code;
* ``forward``: the whole model per batch. Its logits exist for one whole batch; the last resort.

The calibration takes the first one that reproduces the model's plain forward on random tokens, and the run keeps it.
This is transformers' home for models; nothing else in the package imports one.

Dimension letters: B sequences, T tokens, R rows of hidden states, D hidden width, V vocabulary (logit width).
"""

from __future__ import annotations

import gc
import hashlib
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dask_logits.config import TeacherConfig
from dask_logits.errors import CapacityError, TeacherError

logger = logging.getLogger(__name__)

Head = Literal["linear", "replay", "forward"]
HEADS: tuple[Head, ...] = ("linear", "replay", "forward")

# Largest RMS difference in log-probs (nats) that rounding alone explains, between two orders of the same sums.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.15, "float16": 0.03}


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """All a worker needs to load the teacher; hashable, so that it keys the worker's one slot.

    Parameters
    ----------
    path, revision
        Folder, or hub name and commit.
    identity
        Digest of the weights and configuration (folder) or the commit (hub).
    dtype, device
        Resolved: ``float32``, ``bfloat16`` or ``float16``; ``cpu`` or ``cuda``.
    torch_threads
        CPU threads of the worker.
    trust_remote_code
        Run model code that comes with the checkpoint.
    """

    path: str
    revision: str | None
    identity: str
    dtype: str
    device: str
    torch_threads: int
    trust_remote_code: bool


@dataclass(frozen=True, kw_only=True)
class TeacherFacts:
    """What the driver learns of a teacher without loading its weights.

    Parameters
    ----------
    identity
        As in :class:`TeacherSpec`.
    revision
        Commit on the hub, None for a folder.
    parameters, head_parameters
        Counts; tied weights count once in the first.
    hidden_width, head_width, layers
        D, the logits' width, and the depth.
    checkpoint_dtype
        Dtype the checkpoint names, e.g. ``bfloat16``.
    max_positions
        Longest input the architecture takes and whose targets do not depend on its batch; None where unbounded.
    """

    identity: str
    revision: str | None
    parameters: int
    head_parameters: int
    hidden_width: int
    head_width: int
    layers: int
    checkpoint_dtype: str
    max_positions: int | None


def inspect_teacher(config: TeacherConfig) -> TeacherFacts:
    """Read a teacher's configuration and fingerprint its files; the weights are not loaded.

    Raises
    ------
    TeacherError
        If there is no such model, or it is not a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = str(config.model_path)
    folder = Path(path).expanduser()
    if not folder.is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise TeacherError(
            f"distillation.teacher.model_path: expected a folder with a model, got {path!r}, which does not exist; "
            "correct the path or give a hub name"
        )
    source = str(folder) if folder.is_dir() else path
    try:
        model_config = AutoConfig.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise TeacherError(
            f"distillation.teacher.model_path: expected a causal language model, got {path!r}: "
            f"{_first_line(error)}; correct the name, or download it and give its folder"
        ) from error
    head = model.get_output_embeddings()
    text_config = model_config.get_text_config()
    commit = None if folder.is_dir() else getattr(model_config, "_commit_hash", None)
    return TeacherFacts(
        identity=_fingerprint_folder(folder) if folder.is_dir() else f"commit:{commit}",
        revision=commit,
        parameters=sum(p.numel() for p in model.parameters()),
        head_parameters=head.weight.numel(),
        hidden_width=head.weight.shape[1],
        head_width=head.weight.shape[0],
        layers=int(getattr(text_config, "num_hidden_layers", 1)),
        checkpoint_dtype=str(getattr(model_config, "dtype", None) or torch.float32).removeprefix("torch."),
        max_positions=_max_positions(text_config),
    )


def _max_positions(text_config: Any) -> int | None:
    """Return the longest input whose targets do not depend on what it is batched with.

    Rotary embeddings of type ``longrope`` and ``dynamic`` change with the width of the batch beyond the length they
    were first trained for (Phi-3 long-context models), so a padded document would get other targets there.
    """
    longest: int | None = getattr(text_config, "max_position_embeddings", None)
    rope = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) in ("longrope", "dynamic"):
        original = rope.get("original_max_position_embeddings") or getattr(
            text_config, "original_max_position_embeddings", None
        )
        return original or longest
    return longest


def resolve_dtype(setting: str, checkpoint_dtype: str, device: str) -> str:
    """Return the dtype the weights are run in.

    On a CPU without bfloat16 units half precision is slower than float32 (and less exact), so ``auto`` takes float32.
    """
    if setting != "auto":
        return setting
    if checkpoint_dtype == "float32" or device == "cuda":
        return checkpoint_dtype if checkpoint_dtype in TOLERANCE else "float32"
    return "bfloat16" if _cpu_has_bfloat16() and checkpoint_dtype in ("bfloat16", "float16") else "float32"


class Teacher:
    """A loaded teacher, cut in two: trunk and head.

    Parameters
    ----------
    model
        A causal language model in evaluation mode.
    vocab_size
        Valid vocabulary: the columns of the logits that are kept.
    """

    def __init__(self, model: Any, vocab_size: int) -> None:
        self.model = model
        self.vocab_size = vocab_size
        self.trunk: Any = self.model.base_model
        self.head: Any = self.model.get_output_embeddings()
        self.device: torch.device = self.head.weight.device
        self.dtype: torch.dtype = self.head.weight.dtype

    def hidden_states(self, input_ids_BT: Tensor) -> Tensor:
        """Run the trunk on right-padded tokens, without a mask: what stands to the right cannot reach the left.

        Returns
        -------
        Tensor
            [B, T, D].
        """
        output = self.trunk(input_ids=input_ids_BT, use_cache=False, return_dict=True)
        hidden_BTD: Tensor = output.last_hidden_state
        return hidden_BTD

    def logits_linear(self, hidden_RD: Tensor, out_RV: Tensor) -> None:
        """Write the logits of R positions into a buffer by one matrix product."""
        weight_VD = self.head.weight[: self.vocab_size]
        torch.mm(hidden_RD, weight_VD.t(), out=out_RV)
        if getattr(self.head, "bias", None) is not None:
            out_RV += self.head.bias[: self.vocab_size]

    def logits_replay(self, hidden_RD: Tensor, out_RV: Tensor) -> None:
        """Write the logits of R positions into a buffer by the model's own code on the trunk's output."""
        from transformers.modeling_outputs import BaseModelOutputWithPast

        name: str = self.model.base_model_prefix
        tokens = torch.zeros(1, len(hidden_RD), dtype=torch.int64, device=self.device)
        output = BaseModelOutputWithPast(last_hidden_state=hidden_RD[None])
        # The attribute is swapped, not the module's forward, so that hooks on the trunk do not run again.
        setattr(self.model, name, _Stub(output))
        try:
            logits_1RV: Tensor = self.model(input_ids=tokens, use_cache=False, return_dict=True).logits
        finally:
            setattr(self.model, name, self.trunk)
        out_RV.copy_(logits_1RV[0, :, : self.vocab_size])

    def logits_forward(self, input_ids_BT: Tensor) -> Tensor:
        """Return the whole model's logits, [B, T, valid V]."""
        logits_BTV: Tensor = self.model(input_ids=input_ids_BT, use_cache=False, return_dict=True).logits
        return logits_BTV[:, :, : self.vocab_size]


class _Stub(nn.Module):
    """Stands in for the trunk and returns an output made beforehand."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


# The teacher this process holds, at most one: a worker serves one run at a time, and two may not fit its device.
_LOADED: dict[tuple[TeacherSpec, int], Teacher] = {}


def load_teacher(spec: TeacherSpec, vocab_size: int) -> Teacher:
    """Load the teacher, or return the one this process already holds; another one is let go first.

    Raises
    ------
    TeacherError
        If the checkpoint cannot be loaded, lacks weights, is not the one the driver saw, or there is no such device.
    CapacityError
        If it does not fit the device.
    """
    key = (spec, vocab_size)
    if key not in _LOADED:
        _LOADED.clear()
        gc.collect()
        if spec.device == "cuda":
            torch.cuda.empty_cache()
        _LOADED[key] = _load(spec, vocab_size)
    return _LOADED[key]


def _load(spec: TeacherSpec, vocab_size: int) -> Teacher:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(spec.torch_threads)
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise TeacherError(
            "distillation.teacher.generation.device: expected a CUDA device in this worker, got none; "
            "set distillation.teacher.generation.device=cpu, or start the worker where a GPU is visible"
        )
    folder = Path(spec.path)
    if folder.is_dir() and (found := _fingerprint_folder(folder)) != spec.identity:
        raise TeacherError(
            f"distillation.teacher.model_path: expected the teacher {spec.identity[:23]}… that the driver saw, got "
            f"{found[:23]}… in {spec.path!r}; give every machine the same files"
        )
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            spec.path,
            revision=spec.revision,
            dtype=getattr(torch, spec.dtype),
            trust_remote_code=spec.trust_remote_code,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError as error:
        raise CapacityError(f"teacher: expected to fit in memory, got {_first_line(error)}") from error
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise TeacherError(
            f"distillation.teacher.model_path: expected to load {spec.path!r}, got {_first_line(error)}; "
            "check that this worker sees the model's folder or the hub's cache"
        ) from error
    absent = sorted([*loading["missing_keys"], *(str(key) for key in loading["mismatched_keys"])])
    if absent:
        # transformers would fill them at random.
        raise TeacherError(
            f"distillation.teacher.model_path: expected all weights of a causal language model in {spec.path!r}, got "
            f"none for {', '.join(absent[:3])} ({len(absent)} in all); give a complete checkpoint"
        )
    model.requires_grad_(False)
    try:
        model = model.eval().to("cuda:0" if spec.device == "cuda" else "cpu")
    except torch.OutOfMemoryError as error:
        raise CapacityError(
            f"teacher: expected to fit on the GPU, got {_first_line(error)}; use a smaller teacher or dtype"
        ) from error
    return Teacher(model, vocab_size)


@torch.inference_mode()
def choose_head(teacher: Teacher, candidates: tuple[Head, ...] = HEADS) -> tuple[Head, dict[str, float]]:
    """Find the fastest way from hidden states to logits that reproduces the model's plain forward.

    Parameters
    ----------
    teacher
        A loaded teacher.
    candidates
        Ways to try, in order.

    Returns
    -------
    head
        The first that agrees.
    errors
        Way → RMS difference in log-probs (nats); ``padding`` → that of right padding without a mask.

    Raises
    ------
    TeacherError
        If right padding changes the teacher's output (it is not causal), its logits are not finite, or no candidate
        agrees.
    """
    tolerance = TOLERANCE[str(teacher.dtype).removeprefix("torch.")]
    generator = torch.Generator().manual_seed(20_260_101)
    lengths = (17, 9, 4)
    tokens_BT = torch.randint(teacher.vocab_size, (len(lengths), lengths[0]), generator=generator)
    tokens_BT = tokens_BT.to(teacher.device)
    plain_BTV = teacher.logits_forward(tokens_BT).float().log_softmax(-1)
    # The same shapes with other padding: a causal model gives the same numbers left of it, whatever its dtype.
    padding_BT = torch.arange(lengths[0]) >= torch.tensor(lengths)[:, None]
    other_BT = torch.randint(teacher.vocab_size, tokens_BT.shape, generator=generator)
    repadded_BT = torch.where(padding_BT, other_BT, tokens_BT.cpu()).to(teacher.device)
    repadded_BTV = teacher.logits_forward(repadded_BT).float().log_softmax(-1)
    # Some checkpoints hold NaN for ids that never occur; a document that has one is refused when it is scored.
    usable_BT = plain_BTV.isfinite().all(-1)
    if not usable_BT.any():
        raise TeacherError(
            "teacher: expected finite logits on random tokens, got NaN or infinity everywhere; "
            "set distillation.teacher.dtype=float32, or use another checkpoint"
        )
    compared_BT = usable_BT & ~padding_BT.to(teacher.device)
    errors = {"padding": _rms(repadded_BTV[compared_BT] - plain_BTV[compared_BT])}
    if not errors["padding"] <= tolerance:
        raise TeacherError(
            f"teacher: expected a causal model, which right padding cannot change, got an RMS difference of "
            f"{errors['padding']:.2g} nats (tolerance {tolerance:.2g}); use a decoder-only teacher"
        )
    for head in candidates:
        errors[head] = _head_error(teacher, head, tokens_BT, plain_BTV, usable_BT)
        if errors[head] <= tolerance / 10:
            logger.info("head path %s: RMS difference %.2g nats from the plain forward", head, errors[head])
            return head, errors
    raise TeacherError(
        f"teacher: expected one of the head paths {', '.join(candidates)} to reproduce the model's forward within "
        f"{tolerance / 10:.2g} nats, got {errors}; run again with distillation.teacher.generation.force_regenerate=true"
    )


def _head_error(teacher: Teacher, head: Head, tokens_BT: Tensor, plain_BTV: Tensor, usable_BT: Tensor) -> float:
    if head == "forward":
        return 0.0
    try:
        hidden_RD = teacher.hidden_states(tokens_BT).flatten(0, 1)
        logits_RV = torch.empty(len(hidden_RD), teacher.vocab_size, dtype=teacher.dtype, device=teacher.device)
        (teacher.logits_linear if head == "linear" else teacher.logits_replay)(hidden_RD, logits_RV)
    except (AttributeError, TypeError, RuntimeError) as error:
        logger.info("head path %s does not apply: %s", head, _first_line(error))
        return float("inf")
    return _rms(logits_RV.float().log_softmax(-1)[usable_BT.flatten()] - plain_BTV[usable_BT])


def _rms(difference: Tensor) -> float:
    return float(difference.double().square().mean().sqrt())


def _fingerprint_folder(folder: Path) -> str:
    """Digest the files that define a teacher: weights, configuration, code."""
    names = sorted(
        path
        for pattern in (
            "*.safetensors",
            "*.bin",
            "config.json",
            "*.py",
            "*.index.json",
            "adapter_config.json",
        )
        for path in folder.glob(pattern)
    )
    with ThreadPoolExecutor(max_workers=8) as pool:
        digests = list(pool.map(_file_digest, names))
    lines = "".join(f"{path.name} {digest}\n" for path, digest in zip(names, digests, strict=True))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cpu_has_bfloat16() -> bool:
    capabilities = torch.backends.cpu.get_cpu_capability()
    flags = Path("/proc/cpuinfo")
    text = flags.read_text() if flags.exists() else ""
    return "AVX512" in capabilities and ("avx512_bf16" in text or "amx_bf16" in text)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
