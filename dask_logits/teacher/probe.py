"""A probe of a teacher: its first layers in float32, with its own weights and shortened windows.

The self-check compares two computations of the same function. In bfloat16, rounding hides a lost soft cap of 30 (0.05
nats beside 0.1). In float32 it stands out by four orders of magnitude. Therefore the comparison runs on a float32 copy,
at little cost: the copy has only enough layers to contain every kind of layer (2 of SmolLM2's 30, 6 of Gemma 3's), and
shares all tensors that are already in float32.

A window of 4,096 tokens has no effect on a document of 150. In the copy, windows, chunks and the k of sparse attention
are set to :data:`SHORT`, so that a short document exceeds all of them.

Dimension letters: none, because tensors are only copied.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from dask_logits.teacher.model import FLOATS, Teacher

SHORT = 16
_FEWEST_LAYERS = 2
# Maximum share of the free memory for the copy.
_MEMORY_SHARE = 0.5
_REACH = re.compile(r"window|chunk|topk|top_k|local_attention|block_size")
# Matches of _REACH that do not limit the visible positions.
_OTHER = re.compile(r"expert|moe|group|router|layers|pattern|feed_forward|lm_head|loss|inference")
_POSITION = re.compile(r"(^|_)(idx|id|index|number)$")


def make_probe(teacher: Teacher, *, whole: bool = False) -> Teacher:
    """Copy the first layers of a teacher, with its embeddings and head, in float32.

    Parameters
    ----------
    teacher
        The teacher, on its plain path.
    whole
        Copy all layers, for families whose model cannot run with fewer.

    Raises
    ------
    ValueError
        If the teacher cannot be copied, or the copy would take more than half of the free memory.
    """
    if len(teacher.devices) > 1:
        raise ValueError("the teacher is spread over several GPUs")
    layers = teacher.layers()
    depth = len(layers) if whole else probe_depth(teacher)
    dropped = {id(module) for layer in layers[depth:] for module in layer.modules()}
    kept = [module for module in teacher.model.modules() if id(module) not in dropped]
    tensors = {
        id(tensor): tensor
        for module in kept
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }
    packed = {p.dtype for p in tensors.values() if isinstance(p, nn.Parameter)} - {*FLOATS, torch.float64}
    if packed:
        raise ValueError(f"weights of {', '.join(sorted(map(str, packed)))} have no copy in float32")
    needed = sum(4 * tensor.numel() for tensor in tensors.values() if tensor.dtype != torch.float32)
    if needed > _MEMORY_SHARE * _free_bytes(teacher.device):
        raise ValueError(f"a copy in float32 takes {needed / 2**30:.1f} GiB, more than half of the free memory")
    # deepcopy uses the entries of the memo, so tensors are shared or converted, never copied unchanged.
    memo: dict[int, Any] = {key: _in_float32(tensor) for key, tensor in tensors.items()}
    gap = nn.Identity()
    memo |= {id(layer): gap for layer in layers[depth:]}
    model = copy.deepcopy(teacher.model, memo)
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList) and len(module) and module[-1] is gap:
            del module[depth:]
    for config in _configs(model):
        if getattr(config, "num_hidden_layers", None) == len(layers):
            config.num_hidden_layers = depth
        config.dtype = torch.float32
    return Teacher(model, teacher.vocab_size)


def reaches(teacher: Teacher) -> dict[str, int]:
    """Return the settings that limit the visible positions, if they exceed :data:`SHORT`."""
    return {
        name: value
        for name, value in vars(teacher.model.config.get_text_config()).items()
        if _is_reach(name, value) and value > SHORT
    }


def set_reach(probe: Teacher, name: str, old: int, new: int) -> None:
    """Change a window in the configuration and in every module of a probe with a copy of it."""
    for config in _configs(probe.model):
        if getattr(config, name, None) == old:
            setattr(config, name, new)
    for module in probe.model.modules():
        for attribute, value in list(vars(module).items()):
            if _is_reach(attribute, value) and value == old:
                setattr(module, attribute, new)


def probe_depth(teacher: Teacher) -> int:
    """Return the number of leading layers that include one of each kind."""
    layers = teacher.layers()
    config = teacher.model.config.get_text_config()
    by_layer = [
        value
        for name, value in vars(config).items()
        if (isinstance(value, list) or (isinstance(value, str) and "pattern" in name)) and len(value) == len(layers)
    ]
    first: dict[object, int] = {}
    for i, layer in enumerate(layers):
        first.setdefault((_kind(layer), tuple(str(values[i]) for values in by_layer)), i)
    return min(len(layers), max(_FEWEST_LAYERS, 1 + max(first.values(), default=0)))


def _kind(layer: nn.Module) -> tuple[object, ...]:
    """Return the properties that distinguish layers: classes, shapes and plain values of all modules, not the index."""
    return tuple(
        (
            name,
            type(module),
            tuple((key, tuple(p.shape)) for key, p in module.named_parameters(recurse=False, remove_duplicate=False)),
            tuple(
                (key, value)
                for key, value in vars(module).items()
                if isinstance(value, bool | int | float | str) and not _POSITION.search(key)
            ),
        )
        for name, module in layer.named_modules()
    )


def _is_reach(name: str, value: object) -> bool:
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return is_count and _REACH.search(name) is not None and _OTHER.search(name) is None


def _in_float32(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    converted = tensor.detach().float()
    return nn.Parameter(converted, requires_grad=False) if isinstance(tensor, nn.Parameter) else converted


def _configs(model: Any) -> list[Any]:
    """Return the configurations of a model and its modules."""
    return [*(module.config for module in model.modules() if hasattr(module, "config")), model.config.get_text_config()]


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
