"""A tiny random model of every family that `attach` knows, from transformers' own configuration classes."""

from __future__ import annotations

import importlib

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY, LAYERS, EXPERTS, TOP_K = 64, 2, 16, 4

# What a family's configuration class has of these fields gets these values.
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "share_expert_dim": 16,
    "dense_intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_experts_per_token": TOP_K,
    "moe_k": TOP_K,
    "moe_topk": TOP_K,
    "top_k_experts": TOP_K,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "chunk_size": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
}
LATENT = {"num_key_value_heads": 4}
SLIDING = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "unpadded_vocab_size": VOCABULARY,
}
MROPE = {"mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 1e4}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
MORE: dict[str, dict[str, object]] = {
    "axk1": LATENT | {"n_group": 4, "topk_group": 2},
    "axk2": LATENT,
    "bailing_hybrid": LATENT | HYBRID | {"num_experts": EXPERTS, "num_experts_per_token": TOP_K},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": LAYERS,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {
            "ffn_hidden_size": 32,
            "moe_num_experts": EXPERTS,
            "moe_top_k": TOP_K,
            "hidden_size": 32,
        },
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v2": LATENT | {"norm_topk_prob": False},
    "deepseek_v3": LATENT | {"n_group": 4, "topk_group": 2},
    "deepseek_v32": LATENT | {"n_group": 4, "topk_group": 2},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "mlp_layer_types": ["hash_moe", "moe"],
        "layer_types": ["sliding_attention", "sliding_attention"],
        "o_groups": 2,
        "o_lora_rank": 8,
        "hc_mult": 2,
    },
    "diffusion_gemma_text": {"global_head_dim": 8},
    "dots3_note_text": LATENT,
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [16, 8],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma4_text": {
        "enable_moe_block": True,
        "global_head_dim": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
    },
    "glm4_moe_lite": LATENT,
    "glm4v_moe_text": {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}},
    "glm5_next_text": LATENT
    | {
        "index_topk": 16,
        "qk_rope_head_dim": 0,
        "layer_types": HYBRID["layer_types"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "glm_moe_dsa": LATENT,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hy_v4_vl_text": {"rope_parameters": MROPE},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
    },
    "inkling2_loop_text": SLIDING,
    "inkling2_text": SLIDING,
    "jetmoe": {"kv_channels": 8},
    "kolibri1": {"norm_topk_prob": False, "num_experts": EXPERTS},
    "kimi_linear": LATENT
    | HYBRID
    | {"num_experts": EXPERTS, "num_experts_per_token": TOP_K, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mellum": {"num_experts": EXPERTS},
    "mistral4": LATENT | {"n_group": 4, "topk_group": 2},
    "mistral_large4_text": LATENT | {"n_group": 4, "topk_group": 2},
    "muse_spark_text": {"moe_hidden_size": 32},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "moe_shared_expert_intermediate_size": 16,
        "n_groups": 2,
        "n_group": 4,
        "topk_group": 2,
    },
    "qwen3_5_moe_text": HYBRID,
    "qwen3_moe": {"num_experts": EXPERTS},
    "qwen3_next": HYBRID,
    "qwen4_exp_text": HYBRID
    | {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 8,
    },
    "qwen3_vl_moe_text": {"num_experts": EXPERTS},
    "sarvam_mla": LATENT,
    "step3p5": {"mlp_layer_types": ["dense", "sparse"]},
}


def fields(config_class):
    names = set()
    for base in config_class.__mro__:
        names |= set(getattr(base, "__annotations__", {}))
    return names | set(config_class.attribute_map)


def tiny_config(model_type):
    config_class = CONFIG_MAPPING[model_type]
    known = fields(config_class)
    mapped = set(config_class.attribute_map)
    values = {name: value for name, value in SMALL.items() if name in known and name not in mapped}
    return config_class(**(values | MORE.get(model_type, {})))


def model_class(config):
    """Of the text model with a head if there is one, else without."""
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, PreTrainedModel)]
    found, *_older_names = [
        c
        for c in classes
        if c.__dict__.get("config_class") is type(config)
        and c.__name__.endswith("Model")
        and "PreTrained" not in c.__name__
    ]
    return found


def scattered(model):
    """The model with routers that spread the rows over the experts, and biases that matter."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                tensor.normal_(std=0.1)
            elif tensor.dim() == 2 and tensor.shape[0] == EXPERTS and any(n in name for n in ROUTERS):
                tensor.normal_(std=0.5)
    return model.eval()


def tiny_model(model_type, dtype=torch.float32):
    torch.manual_seed(0)
    config = tiny_config(model_type)
    return scattered(model_class(config)._from_config(config, experts_implementation="eager", dtype=dtype))


ROUTERS = ("gate", "router")
WRAPPERS = {
    "ernie4_5_vl_moe": "ernie4_5_vl_moe_text",
    "gemma4": "gemma4_text",
    "kimi_k25": "deepseek_v3",
    "llava": "mixtral",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 4,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 4,
    "image_size": 16,
}


def tiny_wrapper(model_type):
    """A multimodal model around a tiny text model of WRAPPERS."""
    torch.manual_seed(0)
    text = tiny_config(WRAPPERS[model_type])
    config_class = CONFIG_MAPPING[model_type]
    vision = config_class().vision_config
    blocks: dict[str, object] = {"text_config": text.to_dict()}
    if vision is not None:
        small = {name: value for name, value in VISION.items() if name in fields(type(vision))}
        blocks["vision_config"] = vision.to_dict() | small
    config = config_class(**blocks)
    return scattered(AutoModelForImageTextToText.from_config(config, experts_implementation="eager"))
