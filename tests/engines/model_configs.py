"""What the recipes' models say of themselves, as far as the router, the weights and the KV cache need it.

The keys are Hugging Face repositories, the fields those of https://huggingface.co/<key>/blob/main/config.json.
The parameters that they add up to are compared with the published ones.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

_GPT_OSS: Config = {
    "model_type": "gpt_oss",
    "num_experts_per_tok": 4,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
}
_QWEN3_MOE: Config = {
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
}
_QWEN3_30B = _QWEN3_MOE | {
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
}
_QWEN3_235B = _QWEN3_MOE | {
    "num_hidden_layers": 94,
    "hidden_size": 4096,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 64,
}
_DEEPSEEK_V3: Config = {
    "num_hidden_layers": 61,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}

CONFIGS: dict[str, Config] = {
    "openai/gpt-oss-120b": _GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128},
    "openai/gpt-oss-20b": _GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32},
    "Qwen/Qwen3-30B-A3B": _QWEN3_30B,
    "Qwen/Qwen3-30B-A3B-FP8": _QWEN3_30B,
    "Qwen/Qwen3-235B-A22B": _QWEN3_235B,
    "Qwen/Qwen3-235B-A22B-FP8": _QWEN3_235B,
    "deepseek-ai/DeepSeek-R1": _DEEPSEEK_V3
    | {
        "model_type": "deepseek_v3",
        "n_routed_experts": 256,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "num_attention_heads": 128,
        "vocab_size": 129280,
    },
    "moonshotai/Kimi-K2-Instruct": _DEEPSEEK_V3
    | {
        "model_type": "kimi_k2",
        "n_routed_experts": 384,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
        "first_k_dense_replace": 1,
        "num_attention_heads": 64,
        "vocab_size": 163840,
    },
    "mistralai/Mixtral-8x7B-Instruct-v0.1": {
        "model_type": "mixtral",
        "num_hidden_layers": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32000,
    },
}

# Published parameters, 10^9: model cards (gpt-oss: arXiv 2508.10925, table 1; Kimi-K2: "1 trillion").
PARAMETERS = {
    "openai/gpt-oss-120b": 116.8,
    "openai/gpt-oss-20b": 20.9,
    "Qwen/Qwen3-30B-A3B": 30.5,
    "Qwen/Qwen3-235B-A22B": 235,
    "deepseek-ai/DeepSeek-R1": 671,
    "moonshotai/Kimi-K2-Instruct": 1000,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": 46.7,
}

# Bits that a weight takes: mxfp4 has a scale of 8 bits for 32 values, fp8 one of 32 bits for 128 x 128.
BITS = {"bfloat16": 16.0, "fp8": 8.0 + 32 / 128**2, "mxfp4": 4.25}


def weights_gb(config: Config, weights: str) -> float:
    """All weights, 10^9 bytes: experts (and with fp8 every other matrix of a layer) as `weights`, the rest in
    16 bits. Norms and biases, below one in a thousand, are left out."""
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    dense_layers = config.get("first_k_dense_replace", 0)
    expert = 3 * hidden * config.get("moe_intermediate_size", config.get("intermediate_size"))
    experts = num_experts(config) + config.get("n_shared_experts", 0)
    moe = (layers - dense_layers) * experts * expert
    dense = dense_layers * 3 * hidden * config.get("intermediate_size", 0)
    others = layers * _attention(config) + dense
    embedding = 2 * config["vocab_size"] * hidden + (layers - dense_layers) * num_experts(config) * hidden
    if weights == "mxfp4":
        return (moe * BITS["mxfp4"] + (others + embedding) * 16) / 8e9
    return ((moe + others) * BITS[weights] + embedding * 16) / 8e9


def kv_bytes_per_token(config: Config, tensor: int) -> int:
    """Of the 16-bit KV cache, on each of `tensor` GPUs: the key-value heads are spread over the GPUs, each of
    which holds at least one; the compressed cache of DeepSeek is on all of them."""
    layers = int(config["num_hidden_layers"])
    if "kv_lora_rank" in config:
        return layers * 2 * (config["kv_lora_rank"] + config["qk_rope_head_dim"])
    heads = max(1, config["num_key_value_heads"] // tensor)
    return int(layers * 2 * 2 * heads * config["head_dim"])


def num_experts(config: Config) -> int:
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return int(next(config[name] for name in names if name in config))


def _attention(config: Config) -> int:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if "kv_lora_rank" not in config:
        return int(2 * hidden * config["head_dim"] * (heads + config["num_key_value_heads"]))
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    queries = config["q_lora_rank"] * (hidden + heads * (nope + rope))
    keys = hidden * (config["kv_lora_rank"] + rope) + config["kv_lora_rank"] * heads * (nope + value)
    return int(queries + keys + heads * value * hidden)
