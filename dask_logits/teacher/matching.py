"""Match a checkpoint's weights against its model: none missing, none unused, all of the right shape.

transformers fills missing weights at random and skips unused ones, with a warning. Either would be a different teacher.
The same rules apply to a folder before any weight is read, with shapes instead of values, and to the result of the
actual loading. Wrapper prefixes of training frameworks are removed. Weights that a family declares ignorable are
ignored.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from dask_logits.errors import TeacherError
from dask_logits.teacher.architecture import LORA, Architecture, is_quantized, surplus_weights
from dask_logits.teacher.locate import Location
from dask_logits.teacher.weights import StoredTensor, prefix_renames, quantized_names

logger = logging.getLogger(__name__)

_WHERE = "distillation.teacher.model_path"


def require_matching_tensors(location: Location, architecture: Architecture) -> None:
    """Refuse a folder whose tensors differ from the model's, before any of them is read.

    Raises
    ------
    TeacherError
        If weights are missing, unused, of another shape, or quantized without a quantization configuration.
    """
    if not location.tensors or is_quantized(architecture):
        return
    refuse_quantized(location.base, location.tensors)
    if architecture.is_remote or find_spec("accelerate") is None:
        # A checkpoint's own code may need the values, and without accelerate there is no device for shapes alone. The
        # worker that loads the weights performs the same check.
        return
    renames = prefix_renames(location.tensors)
    if renames:
        logger.warning("%s: prefixes of a training framework are removed from the names of its weights", location.base)
    shapes = {name: torch.empty(tensor.shape, device="meta") for name, tensor in location.tensors.items()}
    with _quiet_transformers():
        _, loading = type(architecture.model).from_pretrained(
            None,
            config=copy.deepcopy(architecture.load_config),
            state_dict=shapes,
            key_mapping=renames or None,
            device_map={"": "meta"},
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    require_complete(loading, location.base, architecture)


def refuse_quantized(base: str, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse quantized weights of a checkpoint whose configuration does not say how to read them.

    Raises
    ------
    TeacherError
        With some of the names.
    """
    if names := quantized_names(tensors):
        raise TeacherError(
            f"{_WHERE}: {base!r} holds quantized weights of type {tensors[names[0]].dtype}, {_some(names)}, and its "
            "config.json has no quantization_config that says how to read them; use the complete checkpoint, or one "
            "that is not quantized"
        )


def require_complete(loading: Mapping[str, Any], base: str, architecture: Architecture) -> None:
    """Refuse a loaded model with randomly filled, unused or misshapen weights.

    Parameters
    ----------
    loading
        Report of ``from_pretrained(output_loading_info=True)``.
    base
        Folder or hub name of the model.
    architecture
        Architecture from its configuration.

    Raises
    ------
    TeacherError
        With some of the names.
    """
    surplus = surplus_weights([str(key) for key in loading["unexpected_keys"]], architecture)
    if adapters := [name for name in surplus if LORA in name]:
        raise TeacherError(
            f"{_WHERE}: {base!r} holds adapters among its own weights, {_some(adapters)}, and nothing says which "
            "of them to use; merge one into the weights and save the result, or give a checkpoint without them"
        )
    absent = sorted(map(str, loading["missing_keys"]))
    if absent:
        raise TeacherError(
            f"{_WHERE}: expected all weights of a causal language model ({type(architecture.model).__name__}) in "
            f"{base!r}, got none for {_some(absent)}; give a complete checkpoint"
        )
    if mismatched := sorted(loading["mismatched_keys"], key=str):
        name, got, expected = mismatched[0]
        raise TeacherError(
            f"{_WHERE}: the weights in {base!r} do not have the shapes that config.json describes: "
            f"expected {tuple(expected)} for {name}, got {tuple(got)} ({len(mismatched)} in all); give the config.json "
            "that belongs to these weights"
        )
    if surplus:
        raise TeacherError(
            f"{_WHERE}: {base!r} holds weights that {type(architecture.model).__name__} with this config.json has no "
            f"place for: {_some(surplus)}; the model without them would be another one: give the config.json that "
            "belongs to these weights (its class, its number of layers)"
        )


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])} ({len(names)} in all)"


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' loading report, which is replaced by our own message."""
    from transformers.utils import logging as library

    level = library.get_verbosity()
    library.set_verbosity_error()
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(level)
