"""Shapes of public models, from the fields of their config.json: what a decode step reads and multiplies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xshare_trtllm.config import RouterSpec
from xshare_trtllm.families import KNOWN_MODEL_TYPES, HFConfig
from xshare_trtllm.planning.weights import weight_bytes

Config = Mapping[str, Any]

_NO_ATTENTION = "some of its layers have no attention"
_SPARSE = "its attention reads a part of the cache that it chooses"
_WINDOWS = "its windowed layers have other heads"
# Families whose router is known and whose other matrices are not as computed here.
_OTHER_SHAPES = {
    "aria_text": "its layers are not described by the fields that are read here",
    "axk2": _SPARSE,
    "bailing_hybrid": _NO_ATTENTION,
    "cohere2_moe": "its first layers have MLPs of a width of their own",
    "dbrx": "its layers are not described by the fields that are read here",
    "deepseek_v32": _SPARSE,
    "deepseek_v4": _SPARSE,
    "diffusion_gemma_text": "its layers have a dense MLP beside the experts",
    "dots3_note_text": _SPARSE,
    "ernie4_5_vl_moe_text": "it has experts of another width for images",
    "gemma4_text": "its layers have a dense MLP beside the experts",
    "glm5_next_text": _NO_ATTENTION,
    "glm_moe_dsa": _SPARSE,
    "granitemoehybrid": _NO_ATTENTION,
    "hy_v4": _SPARSE,
    "hy_v4_vl_text": _SPARSE,
    "inkling2_loop_text": _WINDOWS,
    "inkling2_text": _WINDOWS,
    "jamba": _NO_ATTENTION,
    "jetmoe": "its attention is a mixture of experts too",
    "kimi_linear": _NO_ATTENTION,
    "laguna": _WINDOWS,
    "lfm2_moe": _NO_ATTENTION,
    "llama4_text": "most of its layers attend to chunks",
    "mimo_v2_flash": _WINDOWS,
    "minimax": _NO_ATTENTION,
    "minimax_m3_vl_text": _SPARSE,
    "mistral_large4_text": _SPARSE,
    "muse_spark_text": "its experts work in another width",
    "nemotron_h": _NO_ATTENTION,
    "qwen3_5_moe_text": _NO_ATTENTION,
    "qwen3_next": _NO_ATTENTION,
    "qwen4_exp_text": _NO_ATTENTION,
    "step3p5": _WINDOWS,
}
PREDICTED: tuple[str, ...] = tuple(name for name in KNOWN_MODEL_TYPES if name not in _OTHER_SHAPES)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """One MoE model. Parameters count weights of matrices; norms, biases and sinks are left out.

    name                  how it is called
    router                of every MoE layer
    moe_layers            layers with experts; all have attention, as have `dense_layers`
    dense_layers          layers with one dense MLP
    hidden                width of the residual stream
    expert_parameters     of one routed expert
    shared_parameters     of the experts of a layer that every token uses
    dense_parameters      of the MLP of a dense layer
    attention_parameters  of one layer's projections
    kv_values             cached per token and layer, 2 bytes each
    has_latent_cache      those are one latent vector for all heads, not keys and values per head
    window                tokens that a windowed layer attends to; None = no such layers
    windowed_layers       layers with that window
    head_parameters       of the output projection
    expert_bytes          per parameter of a routed or shared expert
    other_bytes           per parameter of attention and dense MLPs; the output projection has 2 bytes
    """

    name: str
    router: RouterSpec
    moe_layers: int
    dense_layers: int
    hidden: int
    expert_parameters: int
    shared_parameters: int
    dense_parameters: int
    attention_parameters: int
    kv_values: int
    has_latent_cache: bool
    window: int | None
    windowed_layers: int
    head_parameters: int
    expert_bytes: float
    other_bytes: float

    @property
    def layers(self) -> int:
        return self.moe_layers + self.dense_layers

    @property
    def bytes_per_expert(self) -> float:
        return self.expert_parameters * self.expert_bytes

    @property
    def total_parameters(self) -> int:
        """All matrices, the input embedding included: for comparison with the number in a model's name."""
        experts = self.router.num_experts * self.expert_parameters + self.shared_parameters
        return (
            self.moe_layers * (experts + self.hidden * self.router.num_experts)
            + self.dense_layers * self.dense_parameters
            + self.layers * self.attention_parameters
            + 2 * self.head_parameters
        )

    @classmethod
    def from_hf_config(
        cls, config: Config, name: str | None = None, *, weight_bits: float | None = None
    ) -> ModelShape:
        """From a config.json as a dict, of a multimodal model's text model where there is one.

        weight_bits  of every weight, in place of what the configuration says

        Raises ValueError for a router that `RouterSpec.from_hf_config` refuses, for a family whose other
        layers are not described here, for a missing field and for a quantisation that is not known.
        """
        router = RouterSpec.from_hf_config(config)
        config = {**config, **HFConfig(config).fields}
        other = _OTHER_SHAPES.get(config["model_type"])
        if other is not None:
            raise ValueError(f"config.json: {config['model_type']} is not predicted: {other}")
        hidden, layers = _need(config, "hidden_size"), _need(config, "num_hidden_layers")
        dense_layers = layers - _moe_layers(config, layers)
        expert_width = _one(config.get("moe_intermediate_size")) or _need(config, "intermediate_size")
        shared_width = _shared_width(config, expert_width)
        attention, kv_values = _attention(config, hidden)
        expert_bytes, other_bytes = weight_bytes(config, weight_bits)
        windowed = _windowed_layers(config, layers)
        return cls(
            name=name or str(config["model_type"]),
            router=router,
            moe_layers=layers - dense_layers,
            dense_layers=dense_layers,
            hidden=hidden,
            expert_parameters=3 * hidden * expert_width,  # gate, up and down
            shared_parameters=3 * hidden * shared_width,
            dense_parameters=3 * hidden * _need(config, "intermediate_size") if dense_layers else 0,
            attention_parameters=attention,
            kv_values=kv_values,
            has_latent_cache=bool(config.get("kv_lora_rank")),
            window=_need(config, "sliding_window") if windowed else None,
            windowed_layers=windowed,
            head_parameters=hidden * _need(config, "vocab_size"),
            expert_bytes=expert_bytes,
            other_bytes=other_bytes,
        )


def _need(config: Config, name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: {name} must be a positive integer, got {value!r}")
    return value


def _one(value: Any) -> Any:
    """The value, where a list has it for every layer."""
    return value[0] if isinstance(value, list) and len(set(value)) == 1 else value


def _moe_layers(config: Config, layers: int) -> int:
    """Layers with experts: what is no dense layer by any of the families' ways to say so."""
    kinds = config.get("mlp_layer_types")
    if kinds:
        return sum(kind == "sparse" for kind in kinds[:layers])
    first = config.get("first_k_dense_replace") or config.get("num_dense_layers") or 0
    if config["model_type"] == "ernie4_5_moe":
        last, every = config.get("moe_layer_end_index", -1), config.get("moe_layer_interval") or 1
        here = range(config.get("moe_layer_start_index", 1), (layers - 1 if last == -1 else last) + 1)
        return sum((layer + 1) % every == 0 for layer in here)
    frequency = config.get("moe_layer_freq") or 1
    if isinstance(frequency, list):  # per layer, 1 = experts
        return sum(map(bool, frequency[:layers]))
    step, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or ()
    return sum(
        layer >= first and layer % frequency == 0 and (layer + 1) % step == 0 and layer not in dense
        for layer in range(layers)
    )


def _shared_width(config: Config, expert_width: int) -> int:
    for name in ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"):
        if config.get(name):
            return _need(config, name)
    if config["model_type"] == "granitemoeshared":
        return _need(config, "shared_intermediate_size")
    for name in ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts"):
        if config.get(name):
            return int(_one(config[name])) * expert_width
    return 0


def _attention(config: Config, hidden: int) -> tuple[int, int]:
    """Parameters of a layer's projections, and values cached per token."""
    heads = _need(config, "num_attention_heads")
    if not config.get("kv_lora_rank"):
        size = config.get("head_dim") or hidden // heads
        kv_heads = config.get("num_key_value_heads") or heads
        return 2 * hidden * size * (heads + kv_heads), 2 * size * kv_heads
    # Multi-head latent attention (DeepSeek-V2): queries and keys are nope + rope wide, keys and values are
    # cached as one latent vector.
    latent, rope = _need(config, "kv_lora_rank"), _need(config, "qk_rope_head_dim")
    nope, value = _need(config, "qk_nope_head_dim"), _need(config, "v_head_dim")
    rank = config.get("q_lora_rank")
    query = rank * (hidden + heads * (nope + rope)) if rank else hidden * heads * (nope + rope)
    key_value = hidden * (latent + rope) + latent * heads * (nope + value)
    return query + key_value + heads * value * hidden, latent + rope


def _windowed_layers(config: Config, layers: int) -> int:
    kinds = config.get("layer_types")
    if kinds:
        return sum(kind == "sliding_attention" for kind in kinds)
    defaults = {"gpt_oss": layers // 2, "kolibri1": layers - layers // 5}  # all but every fifth
    return defaults.get(config["model_type"], 0)


def shape(name: str) -> ModelShape:
    """A shape of CONFIGS by its name, in any case. Raises ValueError, listing the known ones, for another."""
    config = CONFIGS.get(name.lower())
    if config is None:
        raise ValueError(f"model {name!r} is not known; known are {', '.join(CONFIGS)}")
    return ModelShape.from_hf_config(config, name.lower())


# The fields used here of the config.json files of openai/gpt-oss-{120b,20b}, Qwen/Qwen3-{30B-A3B,235B-A22B},
# deepseek-ai/DeepSeek-R1, moonshotai/Kimi-K2-Instruct, mistralai/Mixtral-8x7B-v0.1 and
# allenai/OLMoE-1B-7B-0924 on huggingface.co.
_GPT_OSS: Config = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_experts_per_tok": 4,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "sliding_window": 128,
    "vocab_size": 201088,
    "quantization_config": {"quant_method": "mxfp4"},
}
_QWEN3: Config = {
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "torch_dtype": "bfloat16",
}
_DEEPSEEK_V3: Config = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "quantization_config": {"quant_method": "fp8"},
}
CONFIGS: dict[str, Config] = {
    "gpt-oss-120b": {**_GPT_OSS, "num_hidden_layers": 36, "num_local_experts": 128},
    "gpt-oss-20b": {**_GPT_OSS, "num_hidden_layers": 24, "num_local_experts": 32},
    "qwen3-30b-a3b": {
        **_QWEN3,
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
    },
    "qwen3-235b-a22b": {
        **_QWEN3,
        "hidden_size": 4096,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
    },
    "deepseek-r1": {
        **_DEEPSEEK_V3,
        "model_type": "deepseek_v3",
        "n_routed_experts": 256,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "num_attention_heads": 128,
        "vocab_size": 129280,
    },
    "kimi-k2": {
        **_DEEPSEEK_V3,
        "model_type": "kimi_k2",
        "n_routed_experts": 384,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
        "first_k_dense_replace": 1,
        "num_attention_heads": 64,
        "vocab_size": 163840,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "torch_dtype": "bfloat16",
    },
    "olmoe-1b-7b": {
        "model_type": "olmoe",
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 50304,
        "torch_dtype": "bfloat16",
    },
}
