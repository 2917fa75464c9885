"""The most downloaded teacher families, each as a tiny random checkpoint of its real class.

A family is a model type with the smallest configuration that keeps what is special about it: windows, experts, several
head widths, a wrapper around a text model. ``save_family`` writes the checkpoint with ``save_pretrained``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builders import HEAD_WIDTH, save_tokenizer

BASE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": HEAD_WIDTH,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}  # fmt: skip
GROUPED = {**BASE, "head_dim": 8}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
       "num_key_value_heads": 4}  # fmt: skip
DEEPSEEK = {**BASE, **MOE, **MLA, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
            "first_k_dense_replace": 1}  # fmt: skip
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
          "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": HEAD_WIDTH, "bos_token_id": 0,
       "eos_token_id": 0}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip
QWEN_VISION = {"depth": 3, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
               "deepstack_visual_indexes": [0], "num_position_embeddings": 16}  # fmt: skip
PIXTRAL = {**VISION, "head_dim": 8, "model_type": "pixtral"}
# Enough heads that no two positions have equal scores.
INDEXED = {"index_topk": 16, "index_n_heads": 16, "index_head_dim": 16}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A checkpoint to build.

    Parameters
    ----------
    model_type
        Model type of the configuration.
    known_as
        Models that people know it by.
    config
        Values of the configuration.
    wrapper
        Whether the class is one of AutoModelForImageTextToText: a multimodal wrapper around a text model, or Mistral 4.
    """

    model_type: str
    known_as: str
    config: dict[str, Any] = field(default_factory=dict)
    wrapper: bool = False


def _wrapper(text: dict[str, Any], vision: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"text_config": text, "vision_config": VISION if vision is None else vision, **more}


FAMILIES = [
    Family(model_type="gemma2", known_as="Gemma 2", config={**GROUPED, **SLIDING, "final_logit_softcapping": 5.0}),
    Family(model_type="gemma3_text", known_as="Gemma 3 270M, 1B", config={**GROUPED, **SLIDING}),
    Family(model_type="gemma3", known_as="Gemma 3 4B, 12B, 27B", wrapper=True,
           config=_wrapper({**GROUPED, **SLIDING}, mm_tokens_per_image=4, image_token_index=100,
                           boi_token_index=101, eoi_token_index=102)),
    Family(model_type="gemma3n_text", known_as="Gemma 3n text",
           config={**GROUPED, "num_hidden_layers": 4, "sliding_window": 8, "laurel_rank": 4,
                   "hidden_size_per_layer_input": 4, "num_kv_shared_layers": 0,
                   "vocab_size_per_layer_input": HEAD_WIDTH,
                   "layer_types": ["sliding_attention", "full_attention"] * 2,
                   "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [64] * 4}),
    Family(model_type="gemma4_unified", known_as="Gemma 4 12B", wrapper=True,
           config=_wrapper({**GROUPED, **SLIDING},
                           {"mm_embed_dim": 16, "mm_posemb_size": 8, "output_proj_dims": 32, "patch_size": 2,
                            "pooling_kernel_size": 1}, audio_config=None, image_token_id=100, boi_token_id=101,
                           eoi_token_id=102, audio_token_id=103, video_token_id=104)),
    Family(model_type="gemma4_text", known_as="Gemma 4 text",
           config={**GROUPED, "global_head_dim": 16, **SLIDING, "num_global_key_value_heads": 1,
                   "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": HEAD_WIDTH,
                   "num_kv_shared_layers": 0}),
    Family(model_type="gemma4", known_as="Gemma 4", wrapper=True,
           config=_wrapper({**GROUPED, "global_head_dim": 16, **SLIDING, "num_global_key_value_heads": 1,
                            "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": HEAD_WIDTH,
                            "num_kv_shared_layers": 0},
                           {**VISION, "head_dim": 8, "num_key_value_heads": 2, "pooling_kernel_size": 1,
                            "position_embedding_size": 16}, audio_config=None,
                           image_token_id=100, boi_token_id=101, eoi_token_id=102, audio_token_id=103)),
    Family(model_type="qwen2", known_as="Qwen 2, Qwen 2.5, QwQ", config=BASE),
    Family(model_type="qwen3", known_as="Qwen 3", config=GROUPED),
    Family(model_type="qwen2_moe", known_as="Qwen 1.5 MoE, Qwen 2 MoE",
           config={**BASE, **MOE, "num_experts": 4, "shared_expert_intermediate_size": 32}),
    Family(model_type="qwen3_moe", known_as="Qwen 3 MoE", config={**GROUPED, **MOE, "num_experts": 4}),
    Family(model_type="qwen3_next", known_as="Qwen 3 Next",
           config={**GROUPED, **MOE, **LINEAR, "num_experts": 4, "shared_expert_intermediate_size": 32}),
    Family(model_type="qwen3_5", known_as="Qwen 3.5", wrapper=True,
           config=_wrapper({**GROUPED, **LINEAR}, QWEN_VISION, image_token_id=100, video_token_id=101,
                           vision_start_token_id=102, vision_end_token_id=103)),
    Family(model_type="qwen3_5_moe", known_as="Qwen 3.5 MoE", wrapper=True,
           config=_wrapper({**GROUPED, **MOE, **LINEAR, "num_experts": 4, "shared_expert_intermediate_size": 32},
                           QWEN_VISION, image_token_id=100, video_token_id=101, vision_start_token_id=102,
                           vision_end_token_id=103)),
    Family(model_type="qwen2_5_vl", known_as="Qwen 2.5 VL", wrapper=True,
           config=_wrapper({**BASE, **MROPE}, {"depth": 3, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2,
                                               "out_hidden_size": 32, "fullatt_block_indexes": [0]},
                           image_token_id=100, video_token_id=101, vision_start_token_id=102,
                           vision_end_token_id=103)),
    Family(model_type="qwen3_vl", known_as="Qwen 3 VL", wrapper=True,
           config=_wrapper({**GROUPED, **MROPE}, QWEN_VISION, image_token_id=100, video_token_id=101,
                           vision_start_token_id=102, vision_end_token_id=103)),
    Family(model_type="qwen3_vl_moe", known_as="Qwen 3 VL MoE", wrapper=True,
           config=_wrapper({**GROUPED, **MOE, **MROPE, "num_experts": 4}, QWEN_VISION, image_token_id=100,
                           video_token_id=101, vision_start_token_id=102, vision_end_token_id=103)),
    Family(model_type="llama", known_as="Llama 2, 3, 3.1, 3.2, 3.3; SmolLM 2; Yi; TinyLlama; DeepSeek R1 distilled",
           config=BASE),
    Family(model_type="llama4_text", known_as="Llama 4 text",
           config={**GROUPED, "intermediate_size_mlp": 64, "num_local_experts": 4, "attention_chunk_size": 8,
                   "moe_layers": [1]}),
    Family(model_type="llama4", known_as="Llama 4 Scout, Maverick", wrapper=True,
           config=_wrapper({**GROUPED, "intermediate_size_mlp": 64, "num_local_experts": 4,
                            "attention_chunk_size": 8, "moe_layers": [1]},
                           {**VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
                           image_token_index=100, boi_token_index=101, eoi_token_index=102)),
    Family(model_type="mistral", known_as="Mistral 7B, Nemo, Small; Zephyr",
           config={**GROUPED, "sliding_window": 8}),
    Family(model_type="ministral", known_as="Ministral 8B", config={**GROUPED, **SLIDING}),
    Family(model_type="ministral3", known_as="Ministral 3 text", config=GROUPED),
    Family(model_type="mistral3", known_as="Mistral Small 3.1, 3.2", wrapper=True,
           config=_wrapper({**GROUPED, "model_type": "mistral"}, PIXTRAL, image_token_index=100)),
    Family(model_type="mistral3", known_as="Ministral 3", wrapper=True,
           config=_wrapper({**GROUPED, "model_type": "ministral3"}, PIXTRAL, image_token_index=100)),
    Family(model_type="mistral3", known_as="Mistral Small 4", wrapper=True,
           config=_wrapper({**DEEPSEEK, "model_type": "mistral4"}, PIXTRAL, image_token_index=100)),
    Family(model_type="mistral4", known_as="Mistral Small 4 text", wrapper=True, config=DEEPSEEK),
    Family(model_type="mistral_large4", known_as="Mistral Large 4", wrapper=True,
           config=_wrapper({**DEEPSEEK, **INDEXED, "model_type": "mistral_large4_text"}, PIXTRAL,
                           image_token_index=100)),
    Family(model_type="mixtral", known_as="Mixtral 8x7B, 8x22B", config={**BASE, "num_local_experts": 4}),
    Family(model_type="gpt_oss", known_as="GPT-OSS 20B, 120B",
           config={**GROUPED, **SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Family(model_type="glm4", known_as="GLM-4 9B, 32B", config=GROUPED),
    Family(model_type="glm4_moe", known_as="GLM-4.5, 4.6, 4.7",
           config={**GROUPED, **MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
                   "first_k_dense_replace": 1}),
    Family(model_type="glm4_moe_lite", known_as="GLM-4.7 Flash",
           config={**BASE, **MOE, **MLA, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}),
    Family(model_type="glm_moe_dsa", known_as="GLM-5", config={**DEEPSEEK, **INDEXED}),
    Family(model_type="deepseek_v3", known_as="DeepSeek V3, R1; Kimi K2; Moonlight", config=DEEPSEEK),
    Family(model_type="deepseek_v32", known_as="DeepSeek V3.2", config={**DEEPSEEK, **INDEXED}),
    Family(model_type="deepseek_v4", known_as="DeepSeek V4",
           config={"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16,
                   "max_position_embeddings": 256, "vocab_size": HEAD_WIDTH, "bos_token_id": 0, "eos_token_id": 0,
                   "pad_token_id": 0, **MOE, **INDEXED, "index_topk": 4, "n_routed_experts": 4, "n_shared_experts": 1,
                   "q_lora_rank": 16, "o_lora_rank": 8, "o_groups": 2, "partial_rotary_factor": 0.5, "hc_mult": 2,
                   "sliding_window": 8, "mlp_layer_types": ["hash_moe", "moe", "moe"],
                   "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention",
                                   "sliding_attention"],
                   "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}}),
    Family(model_type="kimi_k25", known_as="Kimi K2.5, K2.6", wrapper=True,
           config=_wrapper({**DEEPSEEK, "model_type": "deepseek_v3"},
                           {"pos_emb_height": 4, "pos_emb_width": 4, "num_attention_heads": 2, "num_hidden_layers": 3,
                            "hidden_size": 16, "intermediate_size": 32}, projection_hidden_size=16,
                           image_token_id=100, video_token_id=101, vision_start_token_id=102,
                           vision_end_token_id=103)),
    Family(model_type="kimi_linear", known_as="Kimi Linear",
           config={**BASE, **MLA, "q_lora_rank": None, "moe_intermediate_size": 32, "num_experts_per_token": 2,
                   "num_experts": 4, "num_expert_group": 1, "topk_group": 1, "num_shared_experts": 1,
                   "linear_head_dim": 8, "linear_num_heads": 4,
                   "layer_types": ["linear_attention", "full_attention"]}),
    Family(model_type="phi", known_as="Phi-1.5, Phi-2", config={**BASE, "num_key_value_heads": 4}),
    Family(model_type="phi3", known_as="Phi-3, Phi-3.5, Phi-4", config=BASE),
    Family(model_type="phi4_multimodal", known_as="Phi-4 multimodal",
           config={**BASE, "vision_config": {**VISION, "crop_size": 28, "image_token_id": 100},
                   "audio_config": {"hidden_size": 16, "intermediate_size": 32, "num_blocks": 2,
                                    "num_attention_heads": 2, "ext_pw_out_channel": 16,
                                    "depthwise_separable_out_channel": 16, "nemo_conv_channels": 8, "input_size": 16,
                                    "audio_token_id": 101}}),
    Family(model_type="olmo2", known_as="OLMo 2", config=BASE),
    Family(model_type="olmo3", known_as="OLMo 3", config={**BASE, **SLIDING}),
    Family(model_type="smollm3", known_as="SmolLM 3", config=BASE),
    Family(model_type="granite", known_as="Granite 3", config={**BASE, "logits_scaling": 3.0}),
    Family(model_type="granitemoehybrid", known_as="Granite 4",
           config={**BASE, **MAMBA, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32,
                   "layer_types": ["mamba", "attention"], "logits_scaling": 3.0}),
    Family(model_type="nemotron", known_as="Nemotron 4, Minitron", config=BASE),
    Family(model_type="nemotron_h", known_as="Nemotron Nano 2, Nemotron 3",
           config={**GROUPED, **MOE, "layers_block_type": ["mamba", "moe", "attention"], "num_hidden_layers": 3,
                   "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1,
                   "n_routed_experts": 4, "n_shared_experts": 1, "moe_shared_expert_intermediate_size": 32,
                   "n_group": 1, "topk_group": 1}),
    Family(model_type="falcon_h1", known_as="Falcon H1",
           config={**GROUPED, **MAMBA, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5}),
    Family(model_type="cohere2", known_as="Command R7B, Command A", config={**BASE, **SLIDING}),
    Family(model_type="exaone4", known_as="EXAONE 4", config={**BASE, **SLIDING}),
    Family(model_type="hunyuan_v1_dense", known_as="Hunyuan dense", config=GROUPED),
    Family(model_type="hunyuan_v1_moe", known_as="Hunyuan A13B",
           config={**GROUPED, "num_experts": 4, "moe_topk": [2, 2], "moe_intermediate_size": [32, 32],
                   "num_shared_expert": [1, 1]}),
    Family(model_type="minicpm3", known_as="MiniCPM 3", config={**BASE, **MLA}),
    Family(model_type="minimax_m2", known_as="MiniMax M2",
           config={**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 4}),
    Family(model_type="ernie4_5", known_as="ERNIE 4.5 0.3B", config=GROUPED),
    Family(model_type="ernie4_5_moe", known_as="ERNIE 4.5 MoE",
           config={**BASE, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1,
                   "moe_layer_start_index": 1, "moe_layer_end_index": 1}),
    Family(model_type="seed_oss", known_as="Seed-OSS", config=GROUPED),
    Family(model_type="lfm2", known_as="LFM2", config={**BASE, "layer_types": ["conv", "full_attention"]}),
    Family(model_type="lfm2_moe", known_as="LFM2 MoE",
           config={**BASE, **MOE, "num_experts": 4, "num_dense_layers": 1,
                   "layer_types": ["conv", "full_attention"]}),
    Family(model_type="gpt2", known_as="GPT-2", config=GPT),
    Family(model_type="opt", known_as="OPT",
           config={"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                   "max_position_embeddings": 256, "vocab_size": HEAD_WIDTH, "word_embed_proj_dim": 32,
                   "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}),
    Family(model_type="gpt_neox", known_as="Pythia, GPT-NeoX",
           config={name: value for name, value in BASE.items() if name != "num_key_value_heads"}),
    Family(model_type="falcon", known_as="Falcon 7B, 40B",
           config={name: value for name, value in BASE.items() if name != "num_key_value_heads"}),
    Family(model_type="starcoder2", known_as="StarCoder 2", config=BASE),
    Family(model_type="bloom", known_as="BLOOM", config={"hidden_size": 32, "n_layer": 2, "n_head": 4,
                                                       "vocab_size": HEAD_WIDTH}),
]  # fmt: skip
BY_TYPE = {family.model_type: family for family in FAMILIES}


def build_family(family: Family) -> Any:
    """Build the family's model with random weights in float32, sharp enough that mistakes are visible."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.for_model(family.model_type, **family.config)
    torch.manual_seed(7)
    auto = AutoModelForImageTextToText if family.wrapper else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return model


def save_family(folder: Path, family: Family, dtype: str = "float32") -> Any:
    """Save the family's checkpoint in a dtype, and a tokenizer; return the model of the same values in float32."""
    import torch

    stored, model = build_family(family), build_family(family)
    # Parameters only: buffers such as the rotary frequencies are computed anew when a checkpoint is loaded.
    for narrow, wide in zip(stored.parameters(), model.parameters(), strict=True):
        narrow.data = narrow.data.to(getattr(torch, dtype))
        wide.data = narrow.data.float()
    stored.save_pretrained(folder)
    save_tokenizer(folder)
    return model
