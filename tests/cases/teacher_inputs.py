"""Teachers that went wrong: each function writes a checkpoint that once gave silently wrong targets, or a traceback.

A function takes an empty folder and returns the path to give as ``distillation.teacher.model_path``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from builders import HEAD_WIDTH, save_tokenizer, tiny_model
from safetensors.torch import load_file, save_file

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 256, "vocab_size": HEAD_WIDTH}  # fmt: skip
WEIGHTS = "model.safetensors"
Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def teacher(folder: Path, family: str = "llama", **overrides: Any) -> Path:
    """Save a tiny teacher with its tokenizer."""
    tiny_model(family, **overrides).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def change_weights(folder: Path, change: Change) -> Path:
    """Rewrite a checkpoint's tensors."""
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def change_config(folder: Path, **values: Any) -> Path:
    """Set values of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


def change_adapter(folder: Path, **values: Any) -> Path:
    """Set values of adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def save_adapter(base: Path, folder: Path, kind: str = "LORA", **options: Any) -> None:
    """Save a random adapter for a base model."""
    import peft
    from transformers import AutoModelForCausalLM

    options = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    if kind in ("LORA", "LOHA", "LOKR"):
        options = {"r": 4, **options}
    if kind == "IA3":
        options = {"feedforward_modules": [], **options}
    if kind == "OFT":
        options = {"oft_block_size": 4, **options}
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](**options)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" not in name and any(part in name for part in (".lora_", ".hada_", ".lokr_", "oft_")):
                parameter.normal_(std=0.3)
            elif "ia3_" in name or "magnitude" in name:
                parameter.mul_(1.5)
    model.save_pretrained(folder)


# --- adapters ---
def adapter_beside(folder: Path) -> Path:
    """Base weights and a LoRA adapter in one folder."""
    teacher(folder)
    save_adapter(folder, folder)
    return folder


def adapter_only(folder: Path) -> Path:
    """A folder with only an adapter, which names its base model by a path relative to itself."""
    teacher(folder / "base")
    save_adapter(folder / "base", folder / "adapter")
    change_adapter(folder / "adapter", base_model_name_or_path="../base")
    save_tokenizer(folder / "adapter")
    return folder / "adapter"


def adapter_of_missing_base(folder: Path) -> Path:
    return change_adapter(adapter_only(folder), base_model_name_or_path="/no/such/base")


def adapter_without_weights(folder: Path) -> Path:
    adapter_beside(folder)
    (folder / "adapter_model.safetensors").unlink()
    return folder


def adapter_without_config(folder: Path) -> Path:
    adapter_beside(folder)
    (folder / "adapter_config.json").unlink()
    return folder


def prompt_adapter(folder: Path) -> Path:
    """An adapter of learned tokens, which no weight can hold."""
    teacher(folder)
    text = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "base_model_name_or_path": "t"}
    (folder / "adapter_config.json").write_text(json.dumps(text))
    return folder


def activated_adapter(folder: Path) -> Path:
    """A LoRA adapter that acts only after certain tokens."""
    adapter_beside(folder)
    return change_adapter(folder, alora_invocation_tokens=[3, 4])


# --- weights that do not make the model ---
def left_over_weights(folder: Path) -> Path:
    """config.json names fewer layers than the checkpoint has."""
    return change_config(teacher(folder, num_hidden_layers=4), num_hidden_layers=2, layer_types=None)


def adapters_inside(folder: Path, names: Sequence[str] = ("speech", "vision")) -> Path:
    """LoRA adapters among the weights and named by config.json, as in Phi-4 multimodal."""
    wide, module = torch.ones(32, 4), "model.layers.0.self_attn.q_proj"
    lora = {f"{module}.lora_{part}.{name}.weight": wide * len(name) for name in names for part in "AB"}
    change_weights(teacher(folder), lambda weights: {**weights, **lora})
    return change_config(folder, speech_lora={"r": 4, "layer": "q_proj"}, vision_lora={"r": 4, "layer": "q_proj"})


def missing_layer(folder: Path) -> Path:
    return change_config(teacher(folder), num_hidden_layers=3, layer_types=None)


def missing_head(folder: Path) -> Path:
    """A checkpoint of the trunk, as a classifier leaves it."""
    return change_weights(teacher(folder), lambda w: {n: x for n, x in w.items() if n != "lm_head.weight"})


def other_shapes(folder: Path) -> Path:
    return change_config(teacher(folder), intermediate_size=48)


def truncated_weights(folder: Path) -> Path:
    teacher(folder)
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    return folder


def large_file_pointer(folder: Path) -> Path:
    """A clone without Git LFS."""
    teacher(folder)
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    return folder


def sharded(folder: Path) -> Path:
    tiny_model("llama").save_pretrained(folder, max_shard_size="20KB")
    save_tokenizer(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def missing_shard(folder: Path) -> Path:
    next(sharded(folder).glob("model-00002-*.safetensors")).unlink()
    return folder


def missing_from_shard(folder: Path) -> Path:
    """A shard of another download, which lacks what the index says it holds."""
    shard = next(sharded(folder).glob("model-00002-*.safetensors"))
    save_file(dict(list(load_file(shard).items())[1:]), shard, metadata={"format": "pt"})
    return folder


def no_weights(folder: Path) -> Path:
    (teacher(folder) / WEIGHTS).unlink()
    return folder


def compiled_prefix(folder: Path) -> Path:
    return change_weights(teacher(folder), lambda w: {f"_orig_mod.{n}": x for n, x in w.items()})


def nested_prefixes(folder: Path) -> Path:
    """Saved from a data-parallel model whose layers are compiled one by one."""

    def wrap(name: str) -> str:
        head, layers, rest = name.partition("layers.")
        index, _, end = rest.partition(".")
        return f"module.{head}{layers}{index}._orig_mod.{end}" if layers else f"module.{name}"

    return change_weights(teacher(folder), lambda w: {wrap(n): x for n, x in w.items()})


def fp8_without_scales(folder: Path) -> Path:
    return change_weights(
        teacher(folder), lambda w: {n: x.to(torch.float8_e4m3fn) if "proj" in n else x for n, x in w.items()}
    )


def int8_without_scales(folder: Path) -> Path:
    return change_weights(teacher(folder), lambda w: {n: x.to(torch.int8) if "proj" in n else x for n, x in w.items()})


def unknown_quantization(folder: Path) -> Path:
    return change_config(teacher(folder), quantization_config={"quant_method": "exl9", "bits": 4})


def fp8_with_scales(folder: Path, block: int = 16) -> Path:
    """Projections in 8 bits with a float32 scale for each block, as those of DeepSeek V3."""

    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {}
        for name, weight in weights.items():
            if "proj" not in name:
                found[name] = weight.bfloat16()
                continue
            blocks = weight.unflatten(1, (-1, block)).unflatten(0, (-1, block))
            scales = blocks.abs().amax((1, 3), keepdim=True) / 448
            found[name] = (blocks / scales).flatten(2, 3).flatten(0, 1).to(torch.float8_e4m3fn)
            found[f"{name}_scale_inv"] = scales[:, 0, :, 0].clone()
        return found

    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    return change_config(change_weights(teacher(folder), change), quantization_config=settings)


QUANTIZED: dict[str, tuple[dict[str, Any], str]] = {
    "compressed-tensors": (
        {"format": "float-quantized", "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}}}, "ignore": ["lm_head"]},
        "compressed-tensors"),
    "gptq": ({"bits": 4, "group_size": 32}, "optimum|gptqmodel"),
    "awq": ({"bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, "gptqmodel"),
    "bitsandbytes": ({"load_in_4bit": True}, "bitsandbytes"),
    "torchao": ({"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}}, "torchao"),
}  # fmt: skip


def quantized(folder: Path, method: str) -> Path:
    """A checkpoint whose quantization method needs a package. Its weights do not matter."""
    return change_config(teacher(folder), quantization_config={"quant_method": method, **QUANTIZED[method][0]})


def channelwise_fp8(folder: Path) -> Path:
    """Projections in 8 bits with a scale for each row, in the format of compressed-tensors."""

    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {}
        for name, weight in weights.items():
            found[name] = weight
            if "proj" in name:
                scales = found[f"{name}_scale"] = weight.abs().amax(1, keepdim=True) / 448
                found[name] = (weight / scales).to(torch.float8_e4m3fn)
        return found

    settings = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
    settings |= QUANTIZED["compressed-tensors"][0]
    return change_config(change_weights(teacher(folder), change), quantization_config=settings)


def bitsandbytes(folder: Path, bits: int) -> Path:
    """Projections in 4 or 8 bits, as the package writes them."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(
        teacher(folder), quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(folder)
    return folder


def tower_without_package(folder: Path) -> Path:
    """Gemma 3n, whose vision tower is a model of timm."""
    from transformers import Gemma3nConfig

    Gemma3nConfig().save_pretrained(teacher(folder))
    return folder


def quantization_without_package(folder: Path) -> Path:
    settings = {"quant_method": "aqlm", "in_group_size": 8, "out_group_size": 1, "num_codebooks": 1}
    return change_config(teacher(folder), quantization_config=settings)


# --- other kinds of models ---
def encoder_decoder(folder: Path, family: str = "bart") -> Path:
    from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

    sizes: dict[str, Any] = {
        "vocab_size": HEAD_WIDTH, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "pad_token_id": 0, "decoder_start_token_id": 0,
    }  # fmt: skip
    if family == "t5":
        sizes = {"vocab_size": HEAD_WIDTH, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
                 "decoder_start_token_id": 0}  # fmt: skip
    auto = AutoModelForSpeechSeq2Seq if family == "whisper" else AutoModelForSeq2SeqLM
    auto.from_config(AutoConfig.for_model(family, **sizes)).save_pretrained(folder)
    save_tokenizer(folder)
    if family == "bart":
        # Older files on the hub hold every name, the tied ones too.
        tied = ("model.decoder.embed_tokens.weight", "model.encoder.embed_tokens.weight", "lm_head.weight")
        change_weights(folder, lambda w: w | {n: w["model.shared.weight"].clone() for n in tied})
    return folder


def masked_model(folder: Path) -> Path:
    from transformers import BertConfig, BertForMaskedLM

    BertForMaskedLM(BertConfig(**SMALL)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def classifier(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=1)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def tied_reward_model(folder: Path) -> Path:
    """A value head beside a language model, under the language model's own class name."""
    return change_weights(teacher(folder), lambda w: {**w, "v_head.summary.weight": torch.ones(1, 32)})


def gguf_only(folder: Path) -> Path:
    (folder / "model-q4.gguf").write_bytes(b"GGUF" + bytes(64))
    return folder


REFUSED = {
    adapter_of_missing_base: r"belongs to '/no/such/base', which does not exist; set base_model_name_or_path",
    adapter_without_weights: r"expected the weights of the adapter in .*adapter_model\.safetensors, got no such file",
    adapter_without_config: r"holds adapter weights \(adapter_model\.safetensors\) but no adapter_config\.json",
    prompt_adapter: r"adapter of type 'PROMPT_TUNING', which cannot be merged exactly",
    activated_adapter: r"sets alora_invocation_tokens, with which an adapter cannot be merged exactly",
    left_over_weights: r"has no place for: model\.layers\.2\..* \(18 in all\); the model without them would be another",
    adapters_inside: r"holds adapters among its own weights, .*q_proj\.lora_A\.speech\.weight, .* \(4 in all\), and no",
    missing_layer: r"expected all .* got none for model\.layers\.2\..* \(9 in all\); give a complete checkpoint",
    missing_head: r"got none for lm_head\.weight \(1 in all\)",
    other_shapes: r"expected \(32, 48\) for model\.layers\.0\.mlp\.down_proj\.weight, got \(32, 64\)",
    truncated_weights: r"expected a complete safetensors file in .*, got [\d,]+ bytes \(.*\); download the file again",
    large_file_pointer: r"is a Git LFS pointer, not the weights; run git lfs pull",
    missing_shard: r"1 of the \d+ weight files .* are missing, e\.g\. model-00002-of-",
    missing_from_shard: r"1 tensors that .* names are in none of the weight files",
    no_weights: r"expected weights \(model\.safetensors, .* got none; download the model again",
    fp8_without_scales: r"holds quantized weights of type F8_E4M3, model\.layers\.0\..* no quantization_config",
    int8_without_scales: r"holds quantized weights of type I8, model\.layers\.0\..* no quantization_config",
    unknown_quantization: r"is quantized by 'exl9', which the installed transformers cannot read",
    quantization_without_package: r"is quantized by 'aqlm', which needs a package that is missing: .*; install it",
    encoder_decoder: r"expected a decoder-only language model, got the encoder-decoder BartForConditionalGeneration",
    masked_model: r"got the masked language model BertForMaskedLM",
    classifier: r"got LlamaForSequenceClassification .* whose head does not predict the next token",
    tied_reward_model: r"has no place for: v_head\.summary\.weight \(1 in all\)",
    gguf_only: r"got only the GGUF file model-q4\.gguf .*; convert it once .*scripts/prepare_quickstart\.py",
}
