"""Adapters (PEFT) next to or on top of a teacher: find them, merge them into the weights, or refuse them.

An ignored adapter would give the targets of another model. An exactly mergeable adapter is merged once, when the
teacher is loaded, and scoring then costs nothing more. Adapters that add tokens, layers or state cannot be merged and
are refused, and so is one after whose merge the model gives other logits. This is the only module that imports peft,
which is optional.

Dimension letters: T tokens, V vocabulary (logit width).
"""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dask_logits.errors import TeacherError, first_line
from dask_logits.teacher.weights import file_tensors, prefix_renames, weight_files

logger = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# Types that change weights by an input-independent term or factor. Each is tested.
MERGEABLE = ("LORA", "LOHA", "LOKR", "IA3", "OFT")
# LoRA options that make the change depend on the input, or repeat layers.
_NOT_MERGEABLE_OPTIONS = ("alora_invocation_tokens", "layer_replication", "arrow_config")
_WHERE = "distillation.teacher.model_path"
_CURE = "merge it into its base model (peft: model.merge_and_unload()), save that, and give its folder"
# Tokens whose logits are compared before and after a merge.
_CHECKED_TOKENS = 16
# Largest difference that rounding explains, as a share of the logits' standard deviation. A merge of a 30-layer model
# rounded by 3e-6, 0.005 and 0.04.
_ROUNDING = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.2}
_INSTALL = "pip install -c constraints.txt '.[adapters]' in the checkout of dask_logits"


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter in a folder.

    Parameters
    ----------
    folder
        Folder of the adapter.
    kind
        PEFT type, e.g. ``LORA``.
    base
        Folder or hub name of its base model.
    revision
        Branch, tag or commit of a base model on the hub, as the adapter names it. None: it names none.
    """

    folder: Path
    kind: str
    base: str
    revision: str | None = None


def find_adapter(folder: Path) -> Adapter | None:
    """Return the adapter in a teacher's folder, or None.

    Raises
    ------
    TeacherError
        If the adapter cannot be merged exactly, is incomplete, or its base model or the package peft is missing.
    """
    config_path = folder / CONFIG
    if not config_path.is_file():
        stray = sorted(path.name for path in folder.glob("adapter_model.*"))
        if stray:
            raise TeacherError(
                f"{_WHERE}: {folder} holds adapter weights ({stray[0]}) but no {CONFIG}; add that file, or remove the "
                "adapter weights to score the base model"
            )
        return None
    try:
        config: dict[str, Any] = json.loads(config_path.read_text())
        kind = str(config.get("peft_type"))
    except (ValueError, AttributeError) as error:
        raise TeacherError(f"{_WHERE}: {config_path} cannot be read ({first_line(error)}); save it again") from error
    _require_mergeable(config_path, kind, config)
    if not (folder / WEIGHTS).is_file():
        raise TeacherError(
            f"{_WHERE}: expected the weights of the adapter in {folder / WEIGHTS}, got no such file; {_CURE}"
        )
    file_tensors(folder / WEIGHTS)
    if find_spec("peft") is None:
        raise TeacherError(
            f"{_WHERE}: {folder} holds an adapter ({kind}), which the package peft merges into the teacher, and peft "
            f"is not installed; install it ({_INSTALL}), or {_CURE}"
        )
    return Adapter(
        folder=folder,
        kind=kind,
        base=_base_of(folder, config.get("base_model_name_or_path")),
        revision=config.get("revision") or None,
    )


def merge_adapter(model: Any, adapter: Adapter) -> Any:
    """Merge an adapter into its loaded base model.

    Returns
    -------
    torch.nn.Module
        The model with changed weights, without adapter layers.

    Raises
    ------
    TeacherError
        If the adapter does not fit the model, or the merged model gives other logits.
    """
    from peft import PeftModel, get_peft_model_state_dict

    stored = set(file_tensors(adapter.folder / WEIGHTS))
    if renames := prefix_renames(stored):
        raise TeacherError(
            f"{_WHERE}: the names of the adapter's weights in {adapter.folder} start with a prefix that peft does not "
            f"know ({', '.join(renames)}); save the adapter again without it"
        )
    try:
        with warnings.catch_warnings():
            # peft 0.21 only warns of missing weights, which are checked below.
            warnings.simplefilter("ignore", UserWarning)
            adapted = PeftModel.from_pretrained(model, adapter.folder)
        expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        # An adapter may also contain weights of the base model itself, such as embeddings of new tokens.
        surplus, absent = sorted(stored - expected - set(adapted.state_dict())), sorted(expected - stored)
        if surplus or absent:
            raise TeacherError(
                f"{_WHERE}: the adapter in {adapter.folder} does not fit its base model {adapter.base}: "
                f"{len(surplus)} of its weights have no place{_example(surplus)}, {len(absent)} are missing"
                f"{_example(absent)}; give the base model that it was trained on"
            )
        _untie_changed_head(model)
        ids_T = _few_ids(model)
        expected_TV = _logits(model, ids_T)
        merged = adapted.merge_and_unload(safe_merge=True)
        _require_same_logits(expected_TV, _logits(merged, ids_T), merged.dtype, adapter)
    except (RuntimeError, ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        if isinstance(error, TeacherError):
            raise
        raise TeacherError(
            f"{_WHERE}: the adapter in {adapter.folder} cannot be merged into {adapter.base}: {first_line(error)}; "
            f"{_CURE}"
        ) from error
    logger.info("adapter %s of %s merged into the weights of %s", adapter.kind, adapter.folder, adapter.base)
    return merged


def _untie_changed_head(model: Any) -> None:
    """Give the head its own weight if it shares that of the embedding and an adapter changes one of them.

    Otherwise the change would be merged into both. peft then corrects ``tie_word_embeddings`` in the configuration.
    """
    layers: list[Any] = [model.get_output_embeddings(), model.get_input_embeddings()]
    # Trained copies of a layer and learned tokens have no such part. peft does not merge them into a shared weight.
    if not any("base_layer" in dict(layer.named_children()) for layer in layers):
        return
    head, embedding = (getattr(layer, "base_layer", layer) for layer in layers)
    if id(head.weight) == id(getattr(embedding, "weight", None)):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def _few_ids(model: Any) -> Tensor:
    # The last ids of a vocabulary often have no trained embedding.
    half = model.config.get_text_config().vocab_size // 2
    return torch.linspace(1, half, _CHECKED_TOKENS, device=model.device).long()


@torch.no_grad()
def _logits(model: Any, ids_T: Tensor) -> Tensor:
    """Return the logits of tokens in float32, [T, V]."""
    model.eval()
    logits_TV: Tensor = model(input_ids=ids_T[None], use_cache=False).logits[0]
    return logits_TV.float()


def _require_same_logits(expected_TV: Tensor, got_TV: Tensor, dtype: torch.dtype, adapter: Adapter) -> None:
    """Refuse a merge after which the logits differ by more than rounding.

    Medians over the tokens are compared, because rounding may send a few of them to other experts.
    """
    # Some families exclude ids with −inf.
    usable_TV = expected_TV.isfinite()
    error = torch.where(usable_TV, got_TV - expected_TV, 0.0).std(-1).median().item()
    spread = torch.where(usable_TV, expected_TV, 0.0).std(-1).median().item()
    # A NaN is refused, too.
    if not error <= _ROUNDING.get(dtype, max(_ROUNDING.values())) * spread:
        raise TeacherError(
            f"{_WHERE}: the adapter in {adapter.folder} cannot be merged into {adapter.base} exactly: the merged model "
            f"gives other logits than the model with the adapter (they differ by {error:.2g}, typical logits by "
            f"{spread:.2g}); merge it with peft yourself, compare the two, save the whole model, and give its folder"
        )


def _require_mergeable(config_path: Path, kind: str, config: dict[str, Any]) -> None:
    if kind not in MERGEABLE:
        raise TeacherError(
            f"{_WHERE}: {config_path} names an adapter of type {kind!r}, which cannot be merged exactly into the "
            f"teacher's weights (those that can: {', '.join(MERGEABLE)}); train such an adapter, or use a full model"
        )
    for option in _NOT_MERGEABLE_OPTIONS:
        if config.get(option):
            raise TeacherError(
                f"{_WHERE}: {config_path} sets {option}, with which an adapter cannot be merged exactly; use a full "
                "model"
            )


def _base_of(folder: Path, named: Any) -> str:
    """Return the base model: the folder itself if it contains one, else the model named by the adapter."""
    has_weights = weight_files(folder) or any(folder.glob("pytorch_model*.bin"))
    if (folder / "config.json").is_file() and has_weights:
        return str(folder)
    if not isinstance(named, str) or not named:
        raise TeacherError(
            f"{_WHERE}: {folder / CONFIG} names no base model; set base_model_name_or_path in it to the folder or hub "
            "name of the model that the adapter was trained on"
        )
    for candidate in (folder / named, Path(named).expanduser()):
        if candidate.is_dir():
            return str(candidate.absolute())
    if named.startswith((".", "/", "~")) or named.count("/") > 1:
        raise TeacherError(
            f"{_WHERE}: the adapter in {folder} belongs to {named!r}, which does not exist; set "
            f"base_model_name_or_path in {folder / CONFIG} to the base model's folder or hub name"
        )
    return named


def _example(names: list[str]) -> str:
    return f" (e.g. {names[0]})" if names else ""
