"""Choose the model class of a checkpoint by its configuration, and refuse all but decoder-only language models.

transformers builds a causal model from many unsuitable configurations: the decoder of a translation model without its
encoder, a masked model, the trunk of a classifier under a new random head, quantized weights of an unknown method. Each
of these is refused by name. A multimodal wrapper is scored as the text model it contains.
"""

from __future__ import annotations

import contextlib
import copy
import re
from dataclasses import dataclass
from typing import Any

import torch

from dask_logits.errors import TeacherError, first_line

_WHERE = "distillation.teacher.model_path"
# Endings of architectures whose head does not predict the next token.
_OTHER_HEADS = re.compile(
    r"For(MaskedLM|SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|"
    r"NextSentencePrediction|ImageClassification|Reward\w*|Score|Embedding\w*|Retrieval)$|RewardModel\w*$|ValueHead\w*$"
)
# Components of a wrapper that do not process text.
_TOWERS = re.compile(r"(^|\.)(\w*vision\w*|visual|\w*audio\w*|\w*speech\w*|\w*projector|embed_vision|embed_audio)\.")
# Constants that early releases stored with the weights.
_CONSTANTS = re.compile(r"(attn|attention)\.masked_bias$|rotary_emb\.inv_freq$")
_NEXT_TOKENS = re.compile(r"(^|\.)mtp(\.|_)")
# In the name of an adapter's weight, after the module that it changes.
LORA = ".lora_"
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A checkpoint's configuration and its model without weights.

    Parameters
    ----------
    config
        The stored configuration.
    text_config
        The part of it for the language model.
    load_config
        The configuration for ``from_pretrained`` of the model's class.
    model
        The model on the ``meta`` device.
    is_remote
        Whether its class comes with the checkpoint.
    """

    config: Any
    text_config: Any
    load_config: Any
    model: Any
    is_remote: bool


def read_architecture(
    source: str, revision: str | None, *, trust_remote_code: bool, local_files_only: bool = False
) -> Architecture:
    """Read a checkpoint's configuration and build its model without weights.

    Raises
    ------
    TeacherError
        If it is not a decoder-only language model, or its quantization is unsupported in this environment.
    OSError, ValueError, ImportError, KeyError
        If the configuration does not exist, or its family is unknown.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(
        source, revision=revision, trust_remote_code=trust_remote_code, local_files_only=local_files_only
    )
    is_remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    _require_decoder(source, config)
    _require_quantizer(source, config)
    untouched = copy.deepcopy(config)
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            try:
                model = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
            except ValueError:
                raise TeacherError(
                    f"{_WHERE}: expected a decoder-only language model, got {source!r} of type {config.model_type!r}, "
                    "for which transformers has no such class; use a causal language model"
                ) from error
    if getattr(model.get_output_embeddings(), "weight", None) is None:
        raise TeacherError(
            f"{_WHERE}: expected a language model with one output head, got {type(model).__name__} without one; "
            "use a causal language model"
        )
    is_text_part = (
        not is_remote and type(model).config_class is not type(untouched) and hasattr(untouched, "text_config")
    )
    load_config = untouched.get_text_config() if is_text_part else untouched
    if is_text_part and getattr(untouched, "quantization_config", None) is not None:
        load_config.quantization_config = untouched.quantization_config
    return Architecture(
        config=untouched,
        text_config=untouched.get_text_config(),
        load_config=load_config,
        model=model,
        is_remote=is_remote,
    )


def configured_dtype(architecture: Architecture) -> str | None:
    """Return the dtype named by a configuration (for wrappers, by its language model part), or None."""
    for config in (architecture.config, architecture.text_config):
        value = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
        if value is not None:
            return str(value).removeprefix("torch.")
    return None


def is_quantized(architecture: Architecture) -> bool:
    """Whether the configuration describes a quantization of the weights."""
    return getattr(architecture.config, "quantization_config", None) is not None


def surplus_weights(names: list[str], architecture: Architecture) -> list[str]:
    """Return the unused weights of a checkpoint that affect its text output.

    transformers already excludes weights that a family declares ignorable. Also harmless are heads for further tokens,
    constants of early releases and, if only the text part of a wrapper is loaded, the weights of its other parts.
    """
    text = architecture.text_config
    layers = getattr(text, "num_hidden_layers", None)
    further = getattr(text, "num_nextn_predict_layers", None) or 0
    is_text_part = architecture.load_config is not architecture.config

    def matters(name: str) -> bool:
        layer = _LAYER.search(name)
        if layer and layers is not None and layers <= int(layer[1]) < layers + further:
            return False
        if _NEXT_TOKENS.search(name) or _CONSTANTS.search(name):
            return False
        # An adapter may have the name of a tower, and change the text part.
        module = name.partition(LORA)[0]
        return not (is_text_part and _TOWERS.search(f"{module}."))

    return sorted(filter(matters, names))


def _require_decoder(source: str, config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    named = next(iter(getattr(config, "architectures", None) or ()), None)
    for part in (config, getattr(config, "text_config", None)):
        if getattr(part, "is_encoder_decoder", False):
            raise TeacherError(
                f"{_WHERE}: expected a decoder-only language model, got the encoder-decoder "
                f"{named or config.model_type} in {source!r}, whose decoder means nothing without its encoder; use a "
                "decoder-only teacher"
            )
    is_masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and getattr(config, "is_decoder", None) is False
    if is_masked or (named or "").endswith("ForMaskedLM"):
        raise TeacherError(
            f"{_WHERE}: expected a decoder-only language model, got the masked language model "
            f"{named or config.model_type} in {source!r}, which sees the tokens it should predict; use a causal teacher"
        )
    if named and _OTHER_HEADS.search(named):
        raise TeacherError(
            f"{_WHERE}: expected a language model, got {named} in {source!r}, whose head does not predict the next "
            "token; give the language model that it was made from"
        )


def _require_quantizer(source: str, config: Any) -> None:
    """Refuse a quantization method that transformers would ignore, or with a missing package."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return
    from transformers.quantizers import AutoHfQuantizer

    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    try:
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(settings), pre_quantized=True)
        with contextlib.suppress(ValueError, RuntimeError):
            # It may need a GPU, or refuse this device. The worker may have another device, so it decides.
            quantizer.validate_environment(device_map=None, dtype=None)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TeacherError(
            f"{_WHERE}: {source!r} is quantized by {str(method)!r}, which the installed transformers cannot read "
            f"({first_line(error)[:200]}); install a version that can (pip install -U transformers), or use a "
            "checkpoint that is not quantized"
        ) from error
    except ImportError as error:
        raise TeacherError(
            f"{_WHERE}: {source!r} is quantized by {str(method)!r}, which needs a package that is missing: "
            f"{first_line(error)}; install it, or use a checkpoint that is not quantized"
        ) from error
