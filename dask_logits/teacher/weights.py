"""Inspect a checkpoint's files without loading them: names, shapes, dtypes and defects of its tensors.

Only the headers of safetensors files are read, some kilobytes per file. They reveal an incomplete download, a missing
shard, quantized tensors, and prefixes of a training framework in the names. transformers later receives the names and
shapes instead of the weights, so that its own rules decide whether they match the model.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from dask_logits.errors import TeacherError, first_line

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LFS_POINTER = b"version https://git-lfs"
_FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
# torch.compile, distributed data parallel, FSDP and activation checkpointing wrap modules under their own names.
_WRAPPERS = r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
_AT_START = rf"^(?:module\.|{_WRAPPERS})+"
_INSIDE = rf"\.(?:{_WRAPPERS})+"
_WHERE = "distillation.teacher.model_path"


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Header entry of a stored tensor.

    Parameters
    ----------
    dtype
        In the notation of safetensors, e.g. ``BF16``.
    shape
        Dimensions.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Size, from the bits in the name of the dtype.

        >>> [StoredTensor(dtype=dtype, shape=(2, 3)).n_bytes for dtype in ("BF16", "F8_E4M3", "I32", "BOOL")]
        [12, 6, 24, 6]
        """
        bits = re.search(r"\d+", self.dtype)
        return prod(self.shape) * (int(bits.group()) if bits else 8) // 8


def weight_files(folder: Path) -> list[Path]:
    """Return a model's safetensors files: one file, or the shards named by the index.

    Raises
    ------
    TeacherError
        If the index cannot be read or a shard is missing.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        return []
    names = sorted(set(_weight_map(index).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise TeacherError(
            f"{_WHERE}: {len(missing)} of the {len(names)} weight files that {index} names are missing, e.g. "
            f"{missing[0]}; download the model again"
        )
    return [folder / name for name in names]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Read the headers of a model's safetensors files.

    Returns
    -------
    dict
        Name → tensor. Empty if the folder holds no model in safetensors.

    Raises
    ------
    TeacherError
        If a file is incomplete, missing or not in safetensors, or lacks a tensor named by the index.
    """
    files = weight_files(folder)
    found: dict[str, StoredTensor] = {}
    for file in files:
        found |= file_tensors(file)
    if files and files[0].name != SINGLE:
        absent = sorted(set(_weight_map(folder / INDEX)) - set(found))
        if absent:
            raise TeacherError(
                f"{_WHERE}: {len(absent)} tensors that {folder / INDEX} names are in none of the weight files, e.g. "
                f"{absent[0]}; download the model again"
            )
    return found


def file_tensors(file: Path) -> dict[str, StoredTensor]:
    """Read the header of one safetensors file.

    Raises
    ------
    TeacherError
        If the file is incomplete or not in safetensors.
    """
    from safetensors import SafetensorError, safe_open

    with file.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise TeacherError(
                f"{_WHERE}: {file} is a Git LFS pointer, not the weights; run git lfs pull in the model's folder"
            )
    try:
        with safe_open(file, framework="np") as stored:
            parts = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118 - not a dict
            return {
                name: StoredTensor(dtype=part.get_dtype(), shape=tuple(part.get_shape()))
                for name, part in parts.items()
            }
    except SafetensorError as error:
        raise TeacherError(
            f"{_WHERE}: expected a complete safetensors file in {file}, got {file.stat().st_size:,} bytes "
            f"({first_line(error)}); download the file again"
        ) from error


def main_dtype(tensors: Mapping[str, StoredTensor]) -> str | None:
    """Return the floating-point dtype of most stored values, or None.

    >>> main_dtype({"a": StoredTensor(dtype="BF16", shape=(8, 8)), "b": StoredTensor(dtype="F32", shape=(8,))})
    'bfloat16'
    """
    values: Counter[str] = Counter()
    for tensor in tensors.values():
        if tensor.dtype in _FLOATS:
            values[_FLOATS[tensor.dtype]] += prod(tensor.shape)
    return values.most_common(1)[0][0] if values else None


def quantized_names(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Return the weights stored in 8 bits or fewer, or as integers, excluding masks and counters.

    >>> quantized_names({"q_proj.weight": StoredTensor(dtype="F8_E4M3", shape=(8, 8))})
    ['q_proj.weight']
    """
    return sorted(
        name
        for name, tensor in tensors.items()
        if tensor.dtype.startswith(("F8", "F6", "F4"))
        or (tensor.dtype in _INTEGERS and name.endswith("weight") and len(tensor.shape) > 1)
    )


def prefix_renames(names: Iterable[str]) -> dict[str, str]:
    """Return the renames that remove prefixes of ``torch.compile`` and data-parallel training from the names.

    Returns
    -------
    dict
        Regular expression → replacement, for ``from_pretrained(key_mapping=…)``. Empty if no name has a prefix.

    Examples
    --------
    >>> prefix_renames(["module._orig_mod.lm_head.weight"])
    {'^(?:module\\\\.|(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\\\\.)+': ''}
    >>> prefix_renames(["lm_head.weight"])
    {}
    """
    names = list(names)
    renames = {}
    if any(re.search(_AT_START, name) for name in names):
        renames[_AT_START] = ""
    if any(re.search(_INSIDE, re.sub(_AT_START, "", name)) for name in names):
        renames[_INSIDE] = "."
    return renames


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads(index.read_text())["weight_map"]
        names = {Path(name).name == name for name in found.values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TeacherError(
            f"{_WHERE}: the list of weight files {index} cannot be read ({type(error).__name__}); download it again"
        ) from error
    if not found or names != {True}:
        raise TeacherError(f"{_WHERE}: expected names of weight files in {index}, got none; download it again")
    return found
