"""The teacher's checkpoint: inspected by the driver without its weights, loaded once per worker process.

The driver reads sizes and a fingerprint of the files. A worker loads only files with that fingerprint.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import errno
import gc
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch

from dask_logits.config.groups import TeacherConfig
from dask_logits.errors import CapacityError, TeacherError, first_line
from dask_logits.teacher.adapters import merge_adapter
from dask_logits.teacher.architecture import (
    Architecture,
    configured_dtype,
    is_quantized,
    read_architecture,
)
from dask_logits.teacher.identity import Identity, identify, require_same
from dask_logits.teacher.loading import download_bar, loading
from dask_logits.teacher.locate import (
    Location,
    hub_commit,
    hub_is_reachable,
    hub_tensors,
    locate_teacher,
    refuse_hub_adapter,
)
from dask_logits.teacher.matching import refuse_quantized, require_complete, require_matching_tensors
from dask_logits.teacher.memory import must_fit
from dask_logits.teacher.model import FLOATS, Teacher
from dask_logits.teacher.placement import (
    DeviceMap,
    free_gpu_bytes,
    require_code,
    require_gpu,
    require_room,
    sized_as_stored,
    spread_layers,
    working_bytes,
)
from dask_logits.teacher.torch_internals import grow_segments
from dask_logits.teacher.transformers_internals import kept_in_float32, repeat_grouped_heads
from dask_logits.teacher.weights import main_dtype, prefix_renames

# glibc's M_ARENA_MAX, M_MMAP_MAX and M_TRIM_THRESHOLD.
_MALLOC = ((-8, 1), (-4, 0), (-1, 2**31 - 1))
# PyTorch and oneDNN cache 0.3 MB of code for each shape of a matrix product, up to 1,024 shapes each. One batch uses
# at most about 260, because attention has two for each of its blocks.
_KEPT_SHAPES = 384
# Maximum number of teachers held by one process.
_MOST_TEACHERS = 4
_SHAPE_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """Everything a worker needs to load the teacher. It is hashable, as the key of the worker's loaded teachers.

    Parameters
    ----------
    path, revision
        Folder, or hub name and commit.
    identity, sample, stamp
        Digests of weights and configuration, or the commit of a hub model (:mod:`dask_logits.teacher.identity`).
        Without a sample, a worker reads all bytes.
    dtype, device
        Resolved values: ``float32``, ``bfloat16`` or ``float16``, and ``cpu`` or ``cuda``.
    torch_threads
        CPU threads of the worker.
    n_gpus
        Number of the worker's GPUs over which the layers are spread.
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
    sample: str = ""
    stamp: str = ""


@dataclass(frozen=True, kw_only=True)
class TeacherFacts:
    """Properties of a teacher, read by the driver without loading its weights.

    Parameters
    ----------
    identity, sample, stamp
        As in :class:`TeacherSpec`.
    revision
        Commit on the hub, None for a folder.
    parameters, head_parameters
        Counts. Tied weights count once in the first.
    hidden_width, head_width, layers
        D, the logit width, and the number of layers.
    checkpoint_dtype
        Dtype named by the checkpoint, e.g. ``bfloat16``.
    max_positions
        Longest input that the architecture accepts and whose targets do not depend on its batch. None: unlimited.
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
    sample: str = ""
    stamp: str = ""


def inspect_teacher(config: TeacherConfig, known: Mapping[str, Any] | None = None) -> TeacherFacts:
    """Read a teacher's configuration and the headers of its weights, and fingerprint its files.

    transformers' own loading matches the weights of a folder against the model, with shapes instead of values.

    Parameters
    ----------
    config
        The teacher.
    known
        Facts recorded by the run. Files that have not changed since then are not read again.

    Raises
    ------
    TeacherError
        If the model does not exist, is not a decoder-only language model, or its files do not match it.
    """
    path = str(config.model_path)
    location = locate_teacher(path, allow_pickle=config.allow_pickle)
    if location.adapter is not None:
        # Workers merge it, and nobody reads their logs.
        adapter = location.adapter
        logger.info("the %s adapter in %s is merged into the weights of %s", adapter.kind, adapter.folder, adapter.base)
    if config.trust_remote_code:
        logger.warning("trust_remote_code: code that comes with %s runs here and in every worker", path)
    # Of the full model: an adapter itself is always in a folder.
    revision = config.revision or (location.adapter.revision if location.adapter else None)
    only_cached = location.folder is None and not hub_is_reachable(location.base)
    commit = None
    try:
        if location.folder is None:
            refuse_hub_adapter(location.base, revision, local_files_only=only_cached)
            commit = hub_commit(location.base, revision, local_files_only=only_cached)
        architecture = read_architecture(
            location.base, commit or revision, trust_remote_code=config.trust_remote_code, local_files_only=only_cached
        )
    except ImportError as error:
        raise TeacherError(
            f"distillation.teacher.model_path: {path!r} needs a package that is missing: {first_line(error)}; install "
            "it"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise TeacherError(
            f"distillation.teacher.model_path: expected a causal language model, got {path!r}: "
            f"{'the model hub does not answer and its cache has no such model' if only_cached else first_line(error)}; "
            "correct the name, log in with hf auth login (or set HF_TOKEN) if it is private or gated, or download it "
            "and give its folder"
        ) from error
    require_matching_tensors(location, architecture)
    model = architecture.model
    head = model.get_output_embeddings()
    identity = identify(location, commit, known or {})
    return TeacherFacts(
        identity=identity.content,
        sample=identity.sample,
        stamp=identity.stamp,
        revision=commit,
        parameters=sum(p.numel() for p in model.parameters()),
        head_parameters=head.weight.numel(),
        hidden_width=head.weight.shape[1],
        head_width=head.weight.shape[0],
        layers=int(getattr(architecture.text_config, "num_hidden_layers", 1)),
        checkpoint_dtype=_checkpoint_dtype(location, architecture),
        max_positions=_max_positions(architecture.text_config),
    )


def _checkpoint_dtype(location: Location, architecture: Architecture) -> str:
    """Return the dtype named by the configuration, else the dtype of the stored weights."""
    named, stored = configured_dtype(architecture), main_dtype(location.tensors)
    if named and stored and named != stored:
        logger.warning(
            "%s: config.json names dtype %s and the weights are stored in %s; dtype=auto follows config.json, "
            "set distillation.teacher.dtype to choose",
            location.base,
            named,
            stored,
        )
    return named or stored or "float32"


def _max_positions(text_config: Any) -> int | None:
    """Return the longest input whose targets do not depend on its batch.

    Rotary embeddings of type ``longrope`` and ``dynamic`` change with the batch width beyond their original training
    length (Phi-3 long-context models), so a padded document would get other targets there.
    """
    longest: int | None = getattr(text_config, "max_position_embeddings", None)
    rope = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) in ("longrope", "dynamic"):
        original = rope.get("original_max_position_embeddings") or getattr(
            text_config, "original_max_position_embeddings", None
        )
        return original or longest
    return longest


def resolve_dtype(setting: str, checkpoint_dtype: str, device: str, *, has_bfloat16: bool = True) -> str:
    """Return the dtype in which the weights are used.

    On a CPU without bfloat16 units, half precision is slower than float32 and less exact, so ``auto`` selects float32.
    On a GPU without them it selects float32 for a bfloat16 checkpoint, whose values may be beyond float16.

    Parameters
    ----------
    setting
        ``distillation.teacher.dtype``.
    checkpoint_dtype
        Dtype of the stored weights.
    device
        ``cpu`` or ``cuda``.
    has_bfloat16
        Whether all GPUs have bfloat16 units.
    """
    if setting != "auto":
        return setting
    if checkpoint_dtype not in ("bfloat16", "float16"):
        return "float32"
    if device == "cuda":
        return checkpoint_dtype if has_bfloat16 or checkpoint_dtype == "float16" else "float32"
    return "bfloat16" if _cpu_has_bfloat16() else "float32"


_TEACHER = (
    "distillation.teacher.model_path",
    "use a smaller teacher, distillation.teacher.dtype=bfloat16, or a device with more free memory",
)

# Teachers held by this process, least recently used first. Runs may share a scheduler, and loading and hashing takes
# longer than a partition. A GPU holds one teacher, because the calibration assigned all its memory.
_LOADED: dict[tuple[TeacherSpec, int], Teacher] = {}


def load_teacher(spec: TeacherSpec, vocab_size: int, on_life: Callable[[], None] = lambda: None) -> Teacher:
    """Load the teacher, or return the one this process already holds. Other teachers are dropped if memory is short.

    Parameters
    ----------
    spec
        The teacher.
    vocab_size
        Valid vocabulary.
    on_life
        Called at most twice a second while weights arrive or are downloaded, or while other processes of this host
        load theirs.

    Raises
    ------
    TeacherError
        If the checkpoint cannot be loaded, lacks weights, differs from the driver's, or the device does not exist.
    CapacityError
        If it does not fit on the device.
    """
    # A per-thread setting.
    torch.set_num_threads(spec.torch_threads)
    key = (spec, vocab_size)
    if key not in _LOADED:
        _make_room(spec)
        with loading(on_life) as beat:
            _LOADED[key] = _load(spec, vocab_size, beat)
    teacher = _LOADED[key] = _LOADED.pop(key)
    if teacher.device.type == "cuda":
        # Also a per-thread setting, for events and kernels. A head may be on another GPU than the first layer.
        torch.cuda.set_device(teacher.device)
    return teacher


def _make_room(spec: TeacherSpec) -> None:
    """Drop the least recently used teachers until another one fits into memory."""
    while _LOADED and (spec.device == "cuda" or len(_LOADED) >= _MOST_TEACHERS or not _fits_beside(spec)):
        _LOADED.pop(next(iter(_LOADED))).close()
        gc.collect()
    if spec.device == "cuda":
        torch.cuda.empty_cache()


def _fits_beside(spec: TeacherSpec) -> bool:
    """Whether a folder's weights need at most half of this worker's share of the free memory."""
    folder = Path(spec.path)
    if not folder.is_dir():
        # The size of a checkpoint in the hub's cache is unknown here.
        return False
    stored_bytes = sum(path.stat().st_size for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
    needed_bytes = stored_bytes * (2 if spec.dtype == "float32" else 1)
    workers = max(1, (psutil.cpu_count() or 1) // spec.torch_threads)
    return needed_bytes <= psutil.virtual_memory().available / workers / 2


def _load(spec: TeacherSpec, vocab_size: int, beat: Callable[[], None]) -> Teacher:
    from safetensors import SafetensorError
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    set_memory()
    if spec.device == "cuda":
        require_gpu()
        grow_segments()
        choose_kernels(spec.dtype, torch.cuda.get_device_capability())
        require_code(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), torch.cuda.get_arch_list())
    folder = Path(spec.path)
    seen = Identity(content=spec.identity, sample=spec.sample, stamp=spec.stamp)
    if seen.is_of_folder and not folder.is_dir():
        # The file system may be temporarily unavailable. Raise OSError so that the task is retried.
        raise FileNotFoundError(errno.ENOENT, "the teacher's folder is not here", str(folder))
    location = locate_teacher(spec.path, allow_pickle=spec.allow_pickle)
    require_same(location, spec.revision, seen)
    try:
        architecture = read_architecture(location.base, spec.revision, trust_remote_code=spec.trust_remote_code)
        with must_fit(*_TEACHER):
            model, loading = _load_weights(spec, location, architecture, beat)
        if location.folder is None:
            # The driver has inspected the headers of a folder. Those of a hub model are known once it is downloaded.
            location = dataclasses.replace(location, tensors=hub_tensors(location.base, spec.revision))
            if not is_quantized(architecture):
                refuse_quantized(location.base, location.tensors)
            if prefix_renames(location.tensors):
                model, loading = _load_weights(spec, location, architecture, beat)
    except (TeacherError, CapacityError):
        raise
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise TeacherError(
            f"distillation.teacher.model_path: expected to load {spec.path!r}, got {first_line(error)}; "
            "check that this worker sees the model's folder or the hub's cache"
        ) from error
    require_complete(loading, location.base, architecture)
    if is_quantized(architecture):
        _settle_dtype(model, getattr(torch, spec.dtype))
    if location.adapter is not None:
        model = merge_adapter(model, location.adapter)
    model.requires_grad_(False)
    model.eval()
    if spec.device == "cuda" and spec.n_gpus == 1 and model.device.type == "cpu":
        require_room(model, *torch.cuda.mem_get_info())
        with must_fit(*_TEACHER):
            model.to("cuda:0")
    teacher = Teacher(model, vocab_size)
    if spec.n_gpus > 1:
        teacher.stage()
    return teacher


def choose_kernels(dtype: str, capability: tuple[int, int]) -> None:
    """Set what torch and transformers compute with on a GPU, in this process.

    * Products of float32 numbers are float32. NVIDIA's containers allow 10 bits of mantissa (TF32).
    * Attention is not cuDNN's, which torch 2.13 prefers on recent GPUs. It prepares a plan for every shape of a batch,
      for tens of milliseconds on the host, and hardly any shape occurs twice.
    * Without flash attention, grouped heads are repeated.

    Parameters
    ----------
    dtype
        Dtype of the teacher's weights.
    capability
        Compute capability of the GPU. Flash attention needs 8.0 and a half-precision dtype.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    if dtype == "float32" or capability < (8, 0):
        repeat_grouped_heads()


def _settle_dtype(model: Any, dtype: torch.dtype) -> None:
    """Convert a dequantized model to the teacher's dtype. A model whose weights are still quantized is left as it is.

    transformers 5.23 leaves dequantized FP8 weights in the dtype of their scales, and the others as they are stored.
    """
    parameters = dict(model.named_parameters())
    if any(parameter.dtype not in FLOATS for parameter in parameters.values()):
        return
    excepted = kept_in_float32(model, is_half=dtype == torch.float16)
    for name, parameter in parameters.items():
        if not any(part in name for part in excepted):
            parameter.data = parameter.data.to(dtype)


def _device_map(spec: TeacherSpec, location: Location, architecture: Architecture) -> DeviceMap | None:
    """Return where transformers puts the weights, or None if they are loaded into main memory first.

    For one device, an adapter is merged there, with the same bits on every kind of device.
    """
    dtype = getattr(torch, spec.dtype)
    if spec.n_gpus > 1:
        free = free_gpu_bytes(spec.n_gpus)
        try:
            return _spread(architecture.model, free, dtype)
        except CapacityError:
            if not is_quantized(architecture):
                raise
        # Some methods dequantize on some GPUs, so the size of the checkpoint counts only if there is no room for more.
        stored_bytes = {name: tensor.n_bytes for name, tensor in location.tensors.items()}
        return _spread(sized_as_stored(architecture.model, stored_bytes), free, dtype)
    if location.adapter is not None or find_spec("accelerate") is None:
        return None
    if is_quantized(architecture):
        # Some methods choose a GPU by themselves, and some models cannot be moved later.
        return {"": 0 if spec.device == "cuda" else "cpu"}
    if spec.device != "cuda":
        return None
    require_room(architecture.model.to(dtype), *torch.cuda.mem_get_info())
    return {"": 0}


def _spread(model: Any, free_bytes: Mapping[int, int], dtype: torch.dtype) -> DeviceMap:
    """Spread layers such that each GPU keeps room for a batch. If there is none, the weights alone must fit."""
    working = working_bytes(model, dtype)
    try:
        return spread_layers(model, {gpu: max(0, free - working) for gpu, free in free_bytes.items()}, dtype)
    except CapacityError:
        found = spread_layers(model, free_bytes, dtype)
    logger.warning(
        "the GPUs of a worker have room for the weights, but not for %.1f GiB more each, which scoring takes with the "
        "default budgets: batches will be halved; use more GPUs for each worker, or lower "
        "distillation.teacher.generation.batch_tokens and head_rows",
        working / 2**30,
    )
    return found


def _load_weights(
    spec: TeacherSpec, location: Location, architecture: Architecture, beat: Callable[[], None]
) -> tuple[Any, Mapping[str, Any]]:
    """Load the full model. Return it and the loading report of transformers."""
    from transformers import AutoModelForCausalLM

    options = {
        "revision": spec.revision,
        "dtype": getattr(torch, spec.dtype),
        "use_safetensors": None if spec.allow_pickle else True,
        "output_loading_info": True,
        "device_map": _device_map(spec, location, architecture),
    }
    if location.folder is None:
        options["tqdm_class"] = download_bar(beat)
    with contextlib.ExitStack() as stack:
        source = location.base
        if location.adapter is not None and location.folder == location.adapter.folder:
            source = stack.enter_context(_without_adapter(location.adapter.folder))
        loaded: tuple[Any, Mapping[str, Any]]
        if architecture.is_remote:
            loaded = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, **options)
        else:
            loaded = type(architecture.model).from_pretrained(
                source,
                # transformers 5.23 deletes the quantization from it when it dequantizes the weights.
                config=copy.deepcopy(architecture.load_config),
                key_mapping=prefix_renames(location.tensors) or None,
                # Reported with the shapes, whereas the library raises without them.
                ignore_mismatched_sizes=True,
                **options,
            )
    return loaded


@contextlib.contextmanager
def _without_adapter(folder: Path) -> Iterator[str]:
    """Yield a folder with links to all files except the adapter's, which transformers 5.23 would load unmerged."""
    with tempfile.TemporaryDirectory() as view:
        for path in folder.iterdir():
            if not path.name.startswith("adapter_"):
                (Path(view) / path.name).symlink_to(path.absolute())
        yield view


def set_memory() -> None:
    """Configure glibc to keep freed memory, and the shape caches to stay bounded.

    Otherwise activations of some MiB are mapped and unmapped at every operation. Page faults took a fifth of the time.
    """
    for name in _SHAPE_CACHES:
        os.environ.setdefault(name, str(_KEPT_SHAPES))
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in _MALLOC:
            mallopt(option, value)


def _cpu_has_bfloat16() -> bool:
    found = torch.cpu.get_capabilities()
    return "AVX512" in torch.backends.cpu.get_cpu_capability() and any(map(found.get, ("avx512_bf16", "amx_bf16")))
