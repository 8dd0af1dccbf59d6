"""Which layers have experts, shared experts, and multimodal configurations."""

import pytest

from xshare_trtllm.planning.shapes import CONFIGS, PREDICTED, ModelShape

QWEN = CONFIGS["qwen3-30b-a3b"] | {"intermediate_size": 6144}
DEEPSEEK = CONFIGS["deepseek-r1"]


@pytest.mark.parametrize(
    ("config", "moe_layers"),
    [
        (QWEN, 48),
        (QWEN | {"decoder_sparse_step": 2}, 24),
        (QWEN | {"mlp_only_layers": [0, 5]}, 46),
        (QWEN | {"mlp_layer_types": ["dense"] * 3 + ["sparse"] * 45}, 45),
        (DEEPSEEK, 58),
        (DEEPSEEK | {"moe_layer_freq": 1}, 58),
        (DEEPSEEK | {"moe_layer_freq": 2}, 29),  # layers 4, 6, ..., 60
        (DEEPSEEK | {"moe_layer_freq": [0] + [1] * 60}, 60),
    ],
)
def test_layers_with_experts(config, moe_layers):
    shape = ModelShape.from_hf_config(config)
    assert (shape.moe_layers, shape.layers) == (moe_layers, config["num_hidden_layers"])
    assert bool(shape.dense_parameters) == (shape.dense_layers > 0)


def test_a_multimodal_model_is_its_text_model():
    block = {"quant_method": "fp8"}
    text = QWEN | {"model_type": "qwen3_vl_moe_text"}
    outer = {"model_type": "qwen3_vl_moe", "text_config": text, "quantization_config": block}
    shape = ModelShape.from_hf_config(outer, "name")
    assert shape == ModelShape.from_hf_config(text | {"quantization_config": block}, "name")
    assert shape.expert_bytes == 1.0
    kimi = {"model_type": "kimi_k25", "text_config": CONFIGS["kimi-k2"]}
    assert ModelShape.from_hf_config(kimi, "name") == ModelShape.from_hf_config(CONFIGS["kimi-k2"], "name")


def test_hunyuan_has_lists_and_a_shared_expert():
    config = {
        "model_type": "hunyuan_v1_moe",
        "num_experts": 64,
        "moe_topk": [8] * 32,
        "hidden_size": 4096,
        "intermediate_size": 3072,
        "moe_intermediate_size": [3072] * 32,
        "num_shared_expert": [1] * 32,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128167,
        "torch_dtype": "bfloat16",
    }
    shape = ModelShape.from_hf_config(config)
    assert 80e9 < shape.total_parameters < 81e9  # Hunyuan-A13B: 80 B
    assert shape.shared_parameters == shape.expert_parameters


def test_ernie_and_kolibri_say_their_layers_in_their_own_way():
    ernie = {
        "model_type": "ernie4_5_moe",
        "vocab_size": 103424,
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "num_hidden_layers": 28,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 1536,
        "moe_k": 6,
        "moe_num_experts": 64,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "torch_dtype": "bfloat16",
    }
    shape = ModelShape.from_hf_config(ernie)
    assert (shape.moe_layers, shape.dense_layers) == (27, 1)
    assert shape.shared_parameters == 2 * shape.expert_parameters
    assert 21e9 < shape.total_parameters < 22.5e9  # ERNIE-4.5-21B-A3B
    every_other = ernie | {"moe_layer_interval": 2, "moe_layer_end_index": 20}
    assert ModelShape.from_hf_config(every_other).moe_layers == 10  # 1, 3, ..., 19
    kolibri = {
        "model_type": "kolibri1",
        "vocab_size": 128000,
        "hidden_size": 2560,
        "num_hidden_layers": 50,
        "num_attention_heads": 48,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "sliding_window": 513,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts": 384,
        "num_experts_per_tok": 6,
        "torch_dtype": "bfloat16",
    }
    shape = ModelShape.from_hf_config(kolibri)
    assert (shape.moe_layers, shape.dense_layers, shape.windowed_layers, shape.window) == (50, 0, 40, 513)


def test_families_whose_layers_are_not_described_are_refused():
    assert "qwen3_moe" in PREDICTED and "qwen3_next" not in PREDICTED
    config = QWEN | {"model_type": "qwen3_next"}
    with pytest.raises(ValueError, match="qwen3_next is not predicted: some of its layers have no attention"):
        ModelShape.from_hf_config(config)
