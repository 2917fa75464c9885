"""Placement of the weights: on one device, or layer by layer on several GPUs of one worker.

A teacher larger than a GPU is split into whole layers, run in sequence by one process. Batches are independent, so each
GPU can work on its own batch (:mod:`dask_logits.teacher.stages`), and no process group must be kept alive inside a Dask
worker. ``accelerate`` makes the map, and its hooks move the activations where the stages cannot.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dask_logits.errors import CapacityError, TeacherError
from dask_logits.run.timings import plural
from dask_logits.teacher.transformers_internals import unsplittable

# Default budgets on GPUs.
_BATCH_TOKENS, _HEAD_ROWS = 16_384, 4_096
DeviceMap = dict[str, int | str]


def weight_bytes(model: torch.nn.Module) -> int:
    """Return the size of a model's parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def require_room(model: torch.nn.Module, free_bytes: int, total_bytes: int) -> None:
    """Refuse weights that do not fit on the device, before they are sent there.

    Parameters
    ----------
    model
        The model in main memory.
    free_bytes, total_bytes
        Free and total memory of the device.

    Raises
    ------
    CapacityError
        With the arithmetic.
    """
    need = weight_bytes(model)
    if need > free_bytes:
        tensors = [*model.parameters(), *model.buffers()]
        values, width = sum(tensor.numel() for tensor in tensors), tensors[0].element_size()
        raise CapacityError(
            f"distillation.teacher.model_path: expected {need / 2**30:.2f} GiB of free GPU memory for the weights "
            f"({values:,} values, most of {width} bytes), got {free_bytes / 2**30:.2f} of {total_bytes / 2**30:.2f} "
            "GiB; use a smaller teacher, distillation.teacher.dtype=bfloat16, a GPU with more free memory, or several "
            "for each worker (distillation.teacher.generation.gpus_per_worker)",
            need,
            free_bytes,
        )


def require_gpu() -> None:
    """Refuse to compute on a GPU where none can be used.

    Raises
    ------
    TeacherError
        If torch sees none in this process.
    """
    if not torch.cuda.is_available():
        raise TeacherError(
            "distillation.teacher.generation.device: expected a CUDA device in this worker, got none; "
            "set distillation.teacher.generation.device=cpu, or start the worker where a GPU is visible"
        )


def require_code(name: str, capability: tuple[int, int], built_for: Sequence[str]) -> None:
    """Refuse a GPU for which this build of torch has no code.

    Parameters
    ----------
    name
        Model of the GPU.
    capability
        Its compute capability.
    built_for
        Architectures of the build: ``sm_90`` runs on 9.0 and later minor versions, ``compute_90`` on 9.0 and later.

    Raises
    ------
    TeacherError
        If none of them runs on it.
    """
    here = 10 * capability[0] + capability[1]
    for architecture in built_for:
        kind, _, number = architecture.partition("_")
        built = int(number.rstrip("af"))
        # Code with an "a" runs on exactly one architecture.
        is_portable = not number.endswith("a") and built < here
        if built == here or (is_portable and (kind == "compute" or built // 10 == capability[0])):
            return
    raise TeacherError(
        f"distillation.teacher.generation.device: expected a GPU that torch {torch.__version__} was built for "
        f"({', '.join(built_for)}), got {name} with compute capability {capability[0]}.{capability[1]}; install a "
        "build of torch for it, leave it out with distillation.teacher.generation.devices, or set "
        "distillation.teacher.generation.device=cpu"
    )


def free_gpu_bytes(n_gpus: int) -> dict[int, int]:
    """Return the free memory of the first visible GPUs.

    Raises
    ------
    TeacherError
        If fewer GPUs are visible.
    """
    seen = torch.cuda.device_count()
    if seen < n_gpus:
        raise TeacherError(
            f"distillation.teacher.generation.gpus_per_worker: expected {n_gpus} GPUs in this worker, got {seen}; "
            "start every worker with its own group of GPUs in CUDA_VISIBLE_DEVICES"
        )
    return {index: torch.cuda.mem_get_info(index)[0] for index in range(n_gpus)}


def working_bytes(model: Any, dtype: torch.dtype) -> int:
    """Estimate what scoring takes on a GPU beside the weights, with the default budgets.

    A layer holds about eight rows of the hidden width and three of its inner width for each token of a batch. The GPU
    with the head also holds float32 logits of a row chunk, for each of two partitions.

    Parameters
    ----------
    model
        A transformers model, possibly without its weights.
    dtype
        Dtype of its activations.
    """
    head_VD = model.get_output_embeddings().weight
    width = head_VD.shape[1]
    inner = getattr(model.config.get_text_config(), "intermediate_size", None) or 4 * width
    return int(_BATCH_TOKENS * (8 * width + 3 * inner) * dtype.itemsize + 2 * _HEAD_ROWS * head_VD.shape[0] * 4)


def sized_as_stored(model: Any, stored_bytes: Mapping[str, int]) -> Any:
    """Return a copy of a model without weights, in which the weights that are stored quantized have their stored size.

    The head, and weights whose names differ from those of the checkpoint, such as fused experts, keep the size of
    their dtype.

    Parameters
    ----------
    model
        A transformers model on the ``meta`` device.
    stored_bytes
        Name of a stored tensor → its size. Scales and zero points of a weight are named after it or its module.
    """
    sized = copy.deepcopy(model)
    head = sized.get_output_embeddings()
    modules = {
        name: module
        for name, module in sized.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    by_module: Counter[str] = Counter()
    for name, n_bytes in stored_bytes.items():
        owner = name
        while owner and owner not in modules:
            owner = owner.rpartition(".")[0]
        by_module[owner] += n_bytes
    for name, module in modules.items():
        # Quantized weights take less than one of two bytes each.
        if 0 < by_module[name] < 2 * module.weight.numel():
            packed = torch.empty(by_module[name], dtype=torch.uint8, device="meta")
            module.weight = torch.nn.Parameter(packed, requires_grad=False)
    return sized


def without_hooks(model: torch.nn.Module) -> None:
    """Remove accelerate's hooks, which move tensors between devices, from a model and its modules, if there are any."""
    if hooks_of(model):
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(model, recurse=True)


def hooks_of(model: torch.nn.Module) -> list[Any]:
    """Return accelerate's hooks on a model and its modules."""
    # A process that has not imported their class has none, and may lack accelerate.
    hooks = sys.modules.get("accelerate.hooks")
    values = (value for module in model.modules() for value in vars(module).values())
    return [] if hooks is None else [value for value in values if isinstance(value, hooks.ModelHook)]


def spread_layers(model: Any, free_bytes: Mapping[int, int], dtype: torch.dtype) -> DeviceMap:
    """Assign whole layers to GPUs, balanced by size.

    Parameters
    ----------
    model
        A transformers model, without its weights (on the ``meta`` device).
    free_bytes
        GPU → free bytes.
    dtype
        Dtype of the loaded weights.

    Returns
    -------
    dict
        Module name → GPU, in transformers' format.

    Raises
    ------
    CapacityError
        If some layers do not fit, with the arithmetic.
    TeacherError
        If ``accelerate`` is not installed.
    """
    try:
        from accelerate import infer_auto_device_map
        from accelerate.utils import get_balanced_memory
    except ImportError as error:
        raise TeacherError(
            f"distillation.teacher.generation.gpus_per_worker: expected the package accelerate, got {error}; run "
            "pip install -c constraints.txt '.[cuda13]' in the checkout, or set gpus_per_worker=1"
        ) from error

    whole = unsplittable(model)
    model.tie_weights()
    room = get_balanced_memory(model, dict(free_bytes), no_split_module_classes=whole, dtype=dtype)
    with warnings.catch_warnings():
        # accelerate warns of what does not fit. The error below has the arithmetic.
        warnings.simplefilter("ignore", UserWarning)
        found: DeviceMap = infer_auto_device_map(model, room, no_split_module_classes=whole, dtype=dtype)
    left = sorted(name for name, device in found.items() if device in ("cpu", "disk"))
    if left:
        values = sum(tensor.numel() for tensor in model.parameters() if tensor.is_floating_point())
        packed_bytes = sum(tensor.numel() for tensor in model.parameters() if not tensor.is_floating_point())
        need, free = values * dtype.itemsize + packed_bytes, sum(free_bytes.values())
        quantized = f" and {packed_bytes:,} bytes of quantized ones" if packed_bytes else ""
        raise CapacityError(
            f"distillation.teacher.generation.gpus_per_worker: expected {need / 2**30:.2f} GiB for the weights "
            f"({values:,} values of {dtype.itemsize} bytes{quantized}) and room for a layer on each GPU, got "
            f"{free / 2**30:.2f} GiB free on {plural(len(free_bytes), 'GPU')} ({', '.join(left[:3])} left over); use "
            "more GPUs for each worker, a smaller teacher, or distillation.teacher.dtype=bfloat16",
            need,
            free,
        )
    return found
