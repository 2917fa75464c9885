"""Tiny random models of many families, with what is special about each switched on.

A configuration is the family's own default with small sizes; windows, chunks and the k of sparse attention are 16. The
values are sharpened, so that a lost bias, sink or soft cap shows in the logits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

_TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_SIZES = {
    "vocab_size": 112, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "rotary_dim": 4,
    "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512, "n_inner": 64, "ffn_dim": 64,
    "word_embed_proj_dim": 32, "d_model": 32,
}  # fmt: skip
_EXPERTS = {
    "moe_intermediate_size": 32, "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "shared_expert_intermediate_size": 32, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
           "qk_head_dim": 16}  # fmt: skip
_REACH = {
    "sliding_window": 16, "sliding_window_size": 16, "attention_chunk_size": 16, "attention_window_size": 16,
    "window_size": 16, "local_attention": 16, "keep_window_size": 16, "index_topk": 16, "index_head_dim": 16,
    # ReLU makes few heads tie at zero, where the choice of the k best is open.
    "index_n_heads": 16, "sliding_window_pattern": 2, "use_sliding_window": True, "max_window_layers": 2,
}  # fmt: skip
_RECURRENT = {
    "state_size": 8, "ssm_state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8,
    "mamba_n_groups": 1, "mamba_d_ssm": 64, "mamba_expand": 2, "expand": 2, "num_heads": 8, "n_groups": 2,
    "mamba_chunk_size": 16, "chunk_size": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "lru_width": 32,
}  # fmt: skip
_SPECIAL = {
    "final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0, "logit_scale": 0.25, "logits_scaling": 3.0,
    "lm_head_multiplier": 0.5, "attention_bias": True, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 112, "laurel_rank": 4, "num_kv_shared_layers": 2, "global_head_dim": 8,
}  # fmt: skip
_SMALL = {**_TOKENS, **_SIZES, **_EXPERTS, **_LATENT, **_REACH, **_RECURRENT, **_SPECIAL}
# Latent attention has as many key heads as query heads.
_EQUAL = {"num_key_value_heads": 4}
_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite",
                     "glm_moe_dsa", "minicpm3", "youtu"), _EQUAL),
    "gpt_neo": {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]]},
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "inkling_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "rel_extent": 32},
    "internlm3": {"attention_bias": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2, "index_n_heads": 2,
                           "index_topk_blocks": 2, "index_block_size": 16},
    "zaya": {"num_experts_per_tok": 1},
    "gemma4_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"] * 2},
}  # fmt: skip
# These amplify rounding over the length of a document where their weights are larger.
_SHARPNESS = {"mamba": 2.0, "falcon_mamba": 2.0, "rwkv": 3.0, "minicpm3": 3.0}
FAMILIES = [
    "afmoe", "apertus", "arcee", "aria_text", "axk1", "axk2", "bailing_hybrid", "bamba", "beam", "biogpt", "bitnet",
    "bloom", "codegen", "cohere", "cohere2", "cohere2_moe", "cwm", "deepseek_v2", "deepseek_v3",
    "deepseek_v32", "deepseek_v4", "diffllama", "doge", "dots1", "ernie4_5", "ernie4_5_moe",
    "exaone4", "exaone_moe", "falcon", "falcon_h1", "falcon_mamba", "flex_olmo", "flint", "gemma", "gemma2",
    "gemma3_text", "gemma3n_text", "gemma4_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt2",
    "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_neox_japanese", "gpt_oss", "gptj", "granite", "granite_swa",
    "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "helium", "hrm_text", "hunyuan_v1_dense",
    "hunyuan_v1_moe", "hy_v3", "hy_v4", "hyperclovax", "inkling_text", "internlm3", "iquestcoder",
    "jais2", "jamba", "jetmoe", "kolibri1", "laguna", "lfm2", "lfm2_moe", "lfm3", "llama", "llama4_text", "mamba",
    "mamba2", "mellum", "mimo_v2_flash", "minicpm3", "minimax", "minimax_m2", "minimax_m3_vl_text", "ministral",
    "ministral3", "mistral", "mixtral", "modernbert-decoder", "mpt", "nanochat", "nemotron", "nemotron_h", "olmo",
    "olmo2", "olmo3", "olmo_hybrid", "olmoe", "openai-gpt", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2",
    "qwen2_moe", "qwen3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "recurrent_gemma", "rwkv",
    "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma", "xglm", "youtu",
    "zaya",
]  # fmt: skip


def family_model(family: str, **overrides: Any) -> Any:
    """Build a tiny random causal model of a family in float32, the same in every process."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**_settings(family), **overrides})
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.mul_(_SHARPNESS.get(family, 6.0))
        elif (name.endswith("bias") and "dt" not in name) or "sink" in name:
            parameter.add_(torch.randn_like(parameter) / 2)
    return model


@functools.cache
def _settings(family: str) -> dict[str, Any]:
    """Return the small values of the settings that a family's configuration has."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    names = set(getattr(kind, "__dataclass_fields__", {})) | set(kind.attribute_map)
    return {name: value for name, value in _SMALL.items() if name in names} | _OWN.get(family, {})


LENGTHS = (3, 17, 70, 200)
VALID = 104


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the self-check made of a family, and how far the path is from the plain forward of each document alone.

    Parameters
    ----------
    path
        Attention and head, with a factor or soft cap.
    largest, rms
        Difference in log-probs from the plain forward in the same dtype (nats).
    ratio
        RMS distance from the forward in float32, relative to that of the plain forward.
    refusals
        Way → reason.
    """

    path: str
    largest: float
    rms: float
    ratio: float
    refusals: dict[str, str]


def measure(family: str, dtype: Any) -> Result:
    """Run the self-check on a tiny model and score documents of :data:`LENGTHS` in one padded batch."""
    import torch

    from dask_logits.teacher.model import ScoringPath, Teacher
    from dask_logits.teacher.selfcheck import check

    model = family_model(family).to(dtype)
    truth = Teacher(family_model(family).to(dtype).float(), VALID)
    teacher = Teacher(model, VALID)
    choice = check(teacher, exact=True)
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(VALID, (len(LENGTHS), max(LENGTHS)), generator=generator)
    with torch.inference_mode():
        if choice.path.head == "forward":
            fast = teacher.logits_forward(tokens)
        else:
            hidden = teacher.hidden_states(tokens).flatten(0, 1)
            fast = torch.empty(len(hidden), VALID, dtype=teacher.logits_dtype)
            teacher.logits(hidden, fast)
            fast = choice.path.finish(fast) if choice.path.head == "linear" else fast
        fast = fast.float().log_softmax(-1).view(*tokens.shape, VALID)
        found = torch.cat([row[:length] for row, length in zip(fast, LENGTHS, strict=True)])
        teacher.take(ScoringPath())
        plain, exact = (
            torch.cat([
                one.logits_forward(row[None, :length])[0].float().log_softmax(-1)
                for row, length in zip(tokens, LENGTHS, strict=True)
            ])
            for one in (teacher, truth)
        )  # fmt: skip
    path = choice.path
    steps = [path.attention, path.head]
    steps += [f"× {path.scale:.3g}"] * (path.scale != 1.0) + [f"cap {path.softcap}"] * (path.softcap is not None)
    own = (plain - exact).square().mean().sqrt()
    return Result(
        path=" ".join(steps),
        largest=float((found - plain).abs().max()),
        rms=float((found - plain).square().mean().sqrt()),
        ratio=float((found - exact).square().mean().sqrt() / own) if own else 1.0,
        refusals=choice.refusals,
    )
