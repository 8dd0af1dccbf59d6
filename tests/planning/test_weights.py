"""Bytes per parameter of the quantisation blocks that people serve, in the forms that tools write."""

import pytest

from xshare_trtllm.planning.weights import weight_bytes

# The block of moonshotai/Kimi-K2-Thinking on huggingface.co, without the fields that are not read.
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
KIMI = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4}},
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    ],
}
FP8_CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}


def compressed(weights, ignore=("lm_head",), targets=("Linear",)):
    groups = {"group_0": {"targets": list(targets), "weights": weights}}
    return {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": list(ignore)}


@pytest.mark.parametrize(
    ("block", "expert_bits", "other_bits"),
    [
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}, 4.25, 16),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8, 8),
        ({"quant_method": "fp8", "modules_to_not_convert": ["self_attn", "lm_head"]}, 8, 16),
        (KIMI, 4.5, 16),
        (compressed(FP8_CHANNEL), 8, 8),
        (compressed(NVFP4, ignore=["re:.*self_attn", "lm_head"]), 4.5, 16),
        (compressed(INT4 | {"group_size": 128}, targets=["re:.*mlp.experts.*"]), 4.125, 16),
        (compressed(INT4, ignore=["model.layers.4.self_attn.q_proj"]), 4.5, 16),
        (compressed(INT4, ignore=["model.layers.0.self_attn.q_proj"]), 4.5, 4.5),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
            4 + 20 / 128,
            4 + 20 / 128,
        ),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": ["self_attn"]},
            4 + 20 / 128,
            16,
        ),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, 4, 4),
        (
            {"quant_method": "gptq", "bits": 8, "group_size": 64, "dynamic": {"-:.*attn.*": {}}},
            8 + 24 / 64,
            16,
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 64, "dynamic": {".*attn.*": {"bits": 8}}},
            4 + 20 / 64,
            8 + 24 / 64,
        ),
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {
                    "model.layers.4.mlp.experts": {"quant_algo": "NVFP4"},
                    "model.layers.4.self_attn.q_proj": {"quant_algo": "FP8"},
                },
            },
            4.5,
            8,
        ),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}, 8, 8),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["model.layers.4.self_attn*"]},
            4.5,
            16,
        ),
        (
            {"quant_method": "modelopt_fp4", "quantization": {"quant_algo": "NVFP4", "exclude_modules": []}},
            4.5,
            4.5,
        ),
    ],
)
def test_bits_of_experts_and_of_the_rest(block, expert_bits, other_bits):
    got = weight_bytes({"num_hidden_layers": 8, "quantization_config": block})
    assert (8 * got.expert, 8 * got.other) == pytest.approx((expert_bits, other_bits))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"quant_method": "quanto"}, "quant_method='quanto' is not known; .*give --weight-bits"),
        ({"quant_method": "modelopt", "quant_algo": "INT3"}, "quant_algo='INT3' is not known"),
        ({"quant_method": "gptq"}, "lacks bits"),
        ("awq", "must be a block"),
    ],
)
def test_what_is_not_known_is_refused_and_may_be_said(block, message):
    config = {"quantization_config": block}
    with pytest.raises(ValueError, match=message):
        weight_bytes(config)
    assert weight_bytes(config, 6) == (0.75, 0.75)
