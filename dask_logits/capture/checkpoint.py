"""The teacher's checkpoint: looked at by the driver without its weights, loaded once per worker process.

The driver learns sizes and a fingerprint of the files; a worker loads only files with that fingerprint.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from dask_logits.capture.placement import DeviceMap, free_gpu_bytes, require_room, spread_layers
from dask_logits.capture.teacher import Teacher
from dask_logits.config import TeacherConfig
from dask_logits.errors import CapacityError, TeacherError, first_line

# glibc's M_ARENA_MAX, M_MMAP_MAX and M_TRIM_THRESHOLD.
_MALLOC = ((-8, 1), (-4, 0), (-1, 2**31 - 1))
# PyTorch and oneDNN keep 0.3 MB of code for every shape of a matrix product that occurs, up to 1,024 of them each. One
# batch uses at most some 260: attention has two for each of its blocks.
_KEPT_SHAPES = 384
# What the identity of a teacher in a folder begins with; one of the hub has a commit.
_FOLDER_IDENTITY = "sha256:"
# Teachers that one process holds at most.
_MOST_TEACHERS = 4
_SHAPE_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
DTYPES = ("float32", "bfloat16", "float16")


logger = logging.getLogger(__name__)


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
    n_gpus
        Over how many of the worker's GPUs the layers are spread.
    trust_remote_code
        Run model code that comes with the checkpoint.
    allow_pickle
        Load weights that are not in safetensors.
    """

    path: str
    revision: str | None
    identity: str
    dtype: str
    device: str
    torch_threads: int
    n_gpus: int = 1
    trust_remote_code: bool
    allow_pickle: bool = False


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
    path = str(config.model_path)
    folder = Path(path).expanduser()
    if not folder.is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise TeacherError(
            f"distillation.teacher.model_path: expected a folder with a model, got {path!r}, which does not exist; "
            "correct the path or give a hub name"
        )
    source = str(folder) if folder.is_dir() else path
    pickled = folder.is_dir() and not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin"))
    if pickled and not config.allow_pickle:
        raise TeacherError(
            f"distillation.teacher.model_path: expected weights in safetensors, got pickled ones in {path!r}, which "
            "may be made to run code; convert them (model.save_pretrained writes safetensors), or set "
            "distillation.teacher.allow_pickle=true if you trust where they come from"
        )
    if config.trust_remote_code:
        logger.warning("trust_remote_code: code that comes with %s runs here and in every worker", path)
    try:
        model_config, model = _empty_model(source, config.revision, config.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise TeacherError(
            f"distillation.teacher.model_path: expected a causal language model, got {path!r}: "
            f"{first_line(error)}; correct the name, or download it and give its folder"
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
        return checkpoint_dtype if checkpoint_dtype in DTYPES else "float32"
    return "bfloat16" if _cpu_has_bfloat16() and checkpoint_dtype in ("bfloat16", "float16") else "float32"


# The teachers this process holds, the one that was used last at the end. Runs may share a scheduler, and loading and
# hashing takes longer than a partition; a GPU holds one, whose memory the calibration gave away.
_LOADED: dict[tuple[TeacherSpec, int], Teacher] = {}


def load_teacher(spec: TeacherSpec, vocab_size: int) -> Teacher:
    """Load the teacher, or return the one this process already holds; others are dropped if memory is short.

    Raises
    ------
    TeacherError
        If the checkpoint cannot be loaded, lacks weights, is not the one the driver saw, or there is no such device.
    CapacityError
        If it does not fit the device.
    """
    # Of the calling thread: each has its own number.
    torch.set_num_threads(spec.torch_threads)
    key = (spec, vocab_size)
    if key not in _LOADED:
        _make_room(spec)
        _LOADED[key] = _load(spec, vocab_size)
    teacher = _LOADED[key] = _LOADED.pop(key)
    if teacher.device.type == "cuda":
        # Of the calling thread too: where events and kernels go. A head may lie on another GPU than the first.
        torch.cuda.set_device(teacher.device)
    return teacher


def _make_room(spec: TeacherSpec) -> None:
    """Drop teachers, the longest unused first, until another fits into memory beside those that remain."""
    while _LOADED and (spec.device == "cuda" or len(_LOADED) >= _MOST_TEACHERS or not _fits_beside(spec)):
        _LOADED.pop(next(iter(_LOADED)))
        gc.collect()
    if spec.device == "cuda":
        torch.cuda.empty_cache()


def _fits_beside(spec: TeacherSpec) -> bool:
    """Whether a folder's weights take at most half of this worker's share of the free memory."""
    folder = Path(spec.path)
    if not folder.is_dir():
        # The size of a checkpoint in the hub's cache is not known here.
        return False
    stored_bytes = sum(path.stat().st_size for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
    needed_bytes = stored_bytes * (2 if spec.dtype == "float32" else 1)
    workers = max(1, (psutil.cpu_count() or 1) // spec.torch_threads)
    return needed_bytes <= psutil.virtual_memory().available / workers / 2


def _load(spec: TeacherSpec, vocab_size: int) -> Teacher:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    set_memory()
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise TeacherError(
            "distillation.teacher.generation.device: expected a CUDA device in this worker, got none; "
            "set distillation.teacher.generation.device=cpu, or start the worker where a GPU is visible"
        )
    folder = Path(spec.path)
    if spec.identity.startswith(_FOLDER_IDENTITY) and not folder.is_dir():
        # A disk that is away for a moment, perhaps: unlike a teacher that is wrong, this is tried again.
        raise FileNotFoundError(errno.ENOENT, "the teacher's folder is not here", str(folder))
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
            use_safetensors=None if spec.allow_pickle else True,
            output_loading_info=True,
            device_map=_device_map(spec) if spec.n_gpus > 1 else None,
        )
    except torch.OutOfMemoryError as error:
        raise CapacityError(f"teacher: expected to fit in memory, got {first_line(error)}") from error
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise TeacherError(
            f"distillation.teacher.model_path: expected to load {spec.path!r}, got {first_line(error)}; "
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
    model.eval()
    if spec.n_gpus > 1:
        return Teacher(model, vocab_size)
    if spec.device == "cuda":
        require_room(model, *torch.cuda.mem_get_info())
    try:
        model.to("cuda:0" if spec.device == "cuda" else "cpu")
    except torch.OutOfMemoryError as error:
        raise CapacityError(
            f"teacher: expected to fit on the GPU, got {first_line(error)}; use a smaller teacher or dtype"
        ) from error
    return Teacher(model, vocab_size)


def _device_map(spec: TeacherSpec) -> DeviceMap:
    _, model = _empty_model(spec.path, spec.revision, spec.trust_remote_code)
    return spread_layers(model, free_gpu_bytes(spec.n_gpus), getattr(torch, spec.dtype))


def _empty_model(source: str, revision: str | None, trust_remote_code: bool) -> tuple[Any, Any]:
    """Return a checkpoint's configuration and its model without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return config, AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def set_memory() -> None:
    """Let glibc keep freed memory for the next layer, CUDA's allocator grow what it has, and bound code kept by shape.

    Activations of some MiB are mapped and unmapped at every operation otherwise; page faults were a fifth of the time.
    """
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    for name in _SHAPE_CACHES:
        os.environ.setdefault(name, str(_KEPT_SHAPES))
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in _MALLOC:
            mallopt(option, value)


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
    return _FOLDER_IDENTITY + hashlib.sha256(lines.encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cpu_has_bfloat16() -> bool:
    capabilities = torch.backends.cpu.get_cpu_capability()
    flags = Path("/proc/cpuinfo")
    text = flags.read_text() if flags.exists() else ""
    return "AVX512" in capabilities and ("avx512_bf16" in text or "amx_bf16" in text)
