"""Every knob's checks, their words, and what `from_hf_config` reads from real model configurations."""

import subprocess
import sys

import pytest
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from xshare_trtllm import RouterSpec, XShareConfig
from xshare_trtllm.families import KNOWN_MODEL_TYPES

SPEC = RouterSpec(128, 4, "topk_softmax")
GROUPED = RouterSpec(256, 8, "sigmoid_bias", 8, 4, 2.5)


def refusal(call, *args, **kwargs):
    with pytest.raises(ValueError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def test_positional_construction():
    assert GROUPED.model_dump() == {
        "num_experts": 256,
        "top_k": 8,
        "scoring": "sigmoid_bias",
        "num_groups": 8,
        "top_k_groups": 4,
        "routed_scaling_factor": 2.5,
    }
    assert XShareConfig(24, 2, 12, 6, 0.9, 48, "affinity").model_dump() == {
        "budget": 24,
        "warmup": 2,
        "request_budget": 12,
        "gpu_budget": 6,
        "coverage": 0.9,
        "max_rows": 48,
        "utility": "affinity",
    }
    by_coverage = XShareConfig(coverage=0.97)
    assert (by_coverage.budget, by_coverage.warmup, by_coverage.utility) == (None, 1, "squared_weight")
    assert hash(SPEC) == hash(RouterSpec(128, 4, "topk_softmax"))


@pytest.mark.parametrize("value, field", [(SPEC, "top_k"), (XShareConfig(24), "budget")])
def test_immutable(value, field):
    with pytest.raises(ValueError, match="frozen"):
        setattr(value, field, 5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 1, "softmax"), "RouterSpec(num_experts=0): num_experts must be greater than or equal to 1"),
        ((513, 4, "softmax"), "RouterSpec(num_experts=513): num_experts must be less than or equal to 512"),
        ((64, 17, "softmax"), "RouterSpec(top_k=17): top_k must be less than or equal to 16"),
        ((8, 9, "softmax"), "RouterSpec(top_k=9): top_k must be at most num_experts=8"),
        ((8.5, 2, "softmax"), "RouterSpec(num_experts=8.5): num_experts must be a valid integer"),
        (
            (8, 2, "sofmax"),
            "RouterSpec(scoring='sofmax'): scoring must be "
            "'softmax', 'softmax_renorm', 'topk_softmax', 'sigmoid_bias', 'softmax_bias', "
            "'softmax_bias_renorm', 'topk_sigmoid' or 'sqrt_softplus_bias'",
        ),
        (
            (8, 2, "topk_softmax", 2),
            "RouterSpec(num_groups=2): topk_softmax has no expert groups, num_groups must be 1",
        ),
        ((8, 2, "softmax", 3), "RouterSpec(num_groups=3): num_groups must divide num_experts=8"),
        (
            (8, 1, "sigmoid_bias", 8),
            "RouterSpec(num_groups=8): sigmoid_bias scores a group by its best two experts, "
            "num_groups must be at most 4",
        ),
        (
            (8, 2, "softmax", 2, 3),
            "RouterSpec(top_k_groups=3): top_k_groups must be at most num_groups=2",
        ),
        (
            (8, 3, "softmax", 4, 1),
            "RouterSpec(top_k=3): top_k must be at most 2, the experts in top_k_groups=1 groups of 2",
        ),
        (
            (8, 2, "softmax", 1, 1, 0.0),
            "RouterSpec(routed_scaling_factor=0.0): routed_scaling_factor must be greater than 0",
        ),
        (
            (8, 2, "softmax", 1, 1, float("inf")),
            "RouterSpec(routed_scaling_factor=inf): routed_scaling_factor must be a finite number",
        ),
    ],
)
def test_router_refusals(arguments, message):
    assert refusal(RouterSpec, *arguments) == message


BUDGET = "budget must be a positive integer, or one positive integer per layer"

NOTHING = (
    "XShareConfig: nothing is limited; set coverage (0.97 = keep 97 % of what rows ask for), "
    "budget or gpu_budget"
)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"budget": 0}, f"XShareConfig(budget=0): {BUDGET}"),
        ({"budget": "24"}, f"XShareConfig(budget='24'): {BUDGET}"),
        ({"budget": True}, f"XShareConfig(budget=True): {BUDGET}"),
        ({"budget": []}, f"XShareConfig(budget=[]): {BUDGET}"),
        ({"budget": [24, -1]}, f"XShareConfig(budget=[24, -1]): {BUDGET}"),
        ({"budget": 8, "warmup": -1}, "XShareConfig(warmup=-1): warmup must be greater than or equal to 0"),
        (
            {"budget": 8, "request_budget": 0},
            "XShareConfig(request_budget=0): request_budget must be greater than or equal to 1",
        ),
        (
            {"budget": 8, "gpu_budget": 0},
            "XShareConfig(gpu_budget=0): gpu_budget must be greater than or equal to 1",
        ),
        (
            {"budget": 8, "coverage": 0},
            "XShareConfig(coverage=0): coverage must be greater than 0",
        ),
        (
            {"budget": 8, "coverage": 1.01},
            "XShareConfig(coverage=1.01): coverage must be less than or equal to 1",
        ),
        (
            {"coverage": float("nan")},
            "XShareConfig(coverage=nan): coverage must be less than or equal to 1",
        ),
        (
            {"coverage": 0.97, "utility": "frequency"},
            "XShareConfig(utility='frequency'): utility must be 'squared_weight' or 'affinity'",
        ),
        ({}, NOTHING),
        ({"warmup": 2, "request_budget": 8, "max_rows": 48}, NOTHING),
        (
            {"budget": 8, "max_rows": 0},
            "XShareConfig(max_rows=0): max_rows must be greater than or equal to 1",
        ),
    ],
)
def test_config_refusals(arguments, message):
    assert refusal(XShareConfig, **arguments) == message


@pytest.mark.parametrize(
    "config, spec, message",
    [
        (XShareConfig(budget=2), SPEC, "XShareConfig(budget=2): budget must be at least top_k=4"),
        (XShareConfig([4, 3]), SPEC, "XShareConfig(budget[1]=3): budget must be at least top_k=4"),
        (XShareConfig(24, warmup=5), SPEC, "XShareConfig(warmup=5): warmup must be at most top_k=4"),
        (
            XShareConfig(24, warmup=0),
            GROUPED,
            "XShareConfig(warmup=0): a group-limited router needs warmup of at least 1, "
            "or a row may find no expert",
        ),
    ],
)
def test_check_against_a_router(config, spec, message):
    assert refusal(config.check, spec) == message


def test_check_accepts_the_limits():
    XShareConfig(4, warmup=0).check(SPEC)
    XShareConfig((4, 200), warmup=4).check(SPEC)
    XShareConfig(coverage=1.0).check(GROUPED)
    XShareConfig(gpu_budget=1).check(GROUPED)


def test_for_layer():
    config = XShareConfig([8, 16], warmup=2, max_rows=32)
    assert config.for_layer(1) == XShareConfig(16, warmup=2, max_rows=32)
    assert XShareConfig(24).for_layer(93) == XShareConfig(24)
    assert XShareConfig(coverage=0.9).for_layer(93) == XShareConfig(coverage=0.9)
    assert refusal(config.for_layer, 2) == "XShareConfig.for_layer(2): budget names 2 layers, the last is 1"
    assert refusal(config.for_layer, -1) == "XShareConfig.for_layer(-1): layers count from 0"


def test_the_budget_of_a_layer():
    assert XShareConfig(24).layer_budget == 24
    assert XShareConfig(2**40).layer_budget == XShareConfig(coverage=0.9).layer_budget == 2**31 - 1
    with pytest.raises(ValueError, match=r"a layer needs its own configuration, config.for_layer\(i\)"):
        _ = XShareConfig([8, 16]).layer_budget


def test_off():
    assert XShareConfig.off(SPEC).is_off(SPEC)
    assert not XShareConfig(127).is_off(SPEC)
    assert not XShareConfig([128, 127]).is_off(SPEC)
    for limit in ({"request_budget": 8}, {"gpu_budget": 8}, {"coverage": 1.0}):
        assert not XShareConfig(128, **limit).is_off(SPEC)
    assert not XShareConfig(coverage=1.0).is_off(SPEC)
    assert not XShareConfig(gpu_budget=128).is_off(SPEC)


CONFIGS = [
    XShareConfig(24),
    XShareConfig([8, 12], warmup=0),
    XShareConfig(24, 2, 12, 6, 0.9, 48, "affinity"),
    XShareConfig(coverage=0.97),
    XShareConfig(gpu_budget=4),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_round_trips(config, tmp_path):
    assert XShareConfig.from_dict(config.to_dict()) == config
    assert XShareConfig.from_yaml(config.to_yaml()) == config
    path = tmp_path / "xshare.yaml"
    config.to_yaml(path)
    assert XShareConfig.from_yaml(path) == config
    assert XShareConfig.from_yaml(str(path)) == config


def test_dict_holds_plain_values_only():
    budgets = XShareConfig((8, 12)).to_dict()
    assert budgets == {"budget": [8, 12], "warmup": 1, "utility": "squared_weight"}


def test_from_dict_refusals():
    known = "budget, warmup, request_budget, gpu_budget, coverage, max_rows, utility"
    assert refusal(XShareConfig.from_dict, {"bugdet": 24}) == (
        f"XShareConfig: unknown key 'bugdet'; known are {known}"
    )
    assert refusal(XShareConfig.from_yaml, "budget: 24\nmin_coverage: 0.9") == (
        f"XShareConfig: unknown key 'min_coverage'; known are {known}"
    )
    assert refusal(XShareConfig.from_dict, {"warmup": 1}) == NOTHING
    assert refusal(XShareConfig.from_yaml, "24") == "XShareConfig: expected keys and values, got int"
    assert refusal(XShareConfig.from_yaml, "budget: [").startswith("XShareConfig: not valid YAML: ")
    assert refusal(XShareConfig.from_yaml, "budget: many").startswith("XShareConfig(budget='many'): ")


HF = [
    (GptOssConfig(num_local_experts=32, num_experts_per_tok=4), RouterSpec(32, 4, "topk_softmax")),
    (GraniteMoeConfig(num_local_experts=40, num_experts_per_tok=8), RouterSpec(40, 8, "topk_softmax")),
    (MixtralConfig(num_local_experts=8, num_experts_per_tok=2), RouterSpec(8, 2, "softmax_renorm")),
    (OlmoeConfig(num_experts=64, norm_topk_prob=False), RouterSpec(64, 8, "softmax")),
    (OlmoeConfig(num_experts=64, norm_topk_prob=True), RouterSpec(64, 8, "softmax_renorm")),
    (Qwen2MoeConfig(num_experts=60, norm_topk_prob=False), RouterSpec(60, 4, "softmax")),
    (Qwen3MoeConfig(num_experts=128, norm_topk_prob=True), RouterSpec(128, 8, "softmax_renorm")),
    (
        DeepseekV2Config(n_routed_experts=64, num_experts_per_tok=6, routed_scaling_factor=1.0),
        RouterSpec(64, 6, "softmax"),
    ),
    (
        DeepseekV2Config(
            n_routed_experts=160,
            num_experts_per_tok=6,
            topk_method="group_limited_greedy",
            n_group=8,
            topk_group=3,
            routed_scaling_factor=16.0,
        ),
        RouterSpec(160, 6, "softmax", 8, 3, 16.0),
    ),
    (DeepseekV3Config(), RouterSpec(256, 8, "sigmoid_bias", 8, 4, 2.5)),
    (Glm4MoeConfig(routed_scaling_factor=2.5), RouterSpec(128, 8, "sigmoid_bias", 1, 1, 2.5)),
]


@pytest.mark.parametrize("config, spec", HF, ids=lambda v: getattr(v, "model_type", None))
def test_from_hf_config(config, spec):
    assert RouterSpec.from_hf_config(config) == spec
    assert RouterSpec.from_hf_config(config.to_dict()) == spec


KIMI_K2 = {
    "model_type": "kimi_k2",
    "n_routed_experts": 384,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}


def test_kimi_k2_and_old_field_names():
    assert RouterSpec.from_hf_config(KIMI_K2) == RouterSpec(384, 8, "sigmoid_bias", 1, 1, 2.827)
    qwen = {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
    assert RouterSpec.from_hf_config(qwen) == RouterSpec(128, 8, "softmax_renorm")


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"model_type": "llama"},
            f"model_type 'llama' is not known; known are {', '.join(KNOWN_MODEL_TYPES)}",
        ),
        (
            {"model_type": "mixtral", "num_experts_per_tok": 2},
            "mixtral configuration lacks num_local_experts or num_experts",
        ),
        (
            {"model_type": "olmoe", "num_experts": 64, "num_experts_per_tok": 8},
            "olmoe configuration lacks norm_topk_prob",
        ),
        (
            KIMI_K2 | {"norm_topk_prob": False},
            "kimi_k2 with norm_topk_prob=False is not supported, only True",
        ),
        (
            KIMI_K2 | {"scoring_func": "softmax"},
            "kimi_k2 with scoring_func='softmax' is not supported, only 'sigmoid'",
        ),
        (
            DeepseekV2Config(norm_topk_prob=True),
            "deepseek_v2 with norm_topk_prob=True is not supported, only False",
        ),
        (
            DeepseekV2Config().to_dict() | {"topk_method": "noaux_tc"},
            "deepseek_v2 with topk_method='noaux_tc' is not supported, "
            "only 'greedy' or 'group_limited_greedy'",
        ),
        (
            DeepseekV3Config(norm_topk_prob=False),
            "deepseek_v3 with norm_topk_prob=False is not supported, only True",
        ),
    ],
)
def test_hf_refusals(config, message):
    assert refusal(RouterSpec.from_hf_config, config) == f"RouterSpec.from_hf_config: {message}"


def test_a_wrapped_text_model_is_read():
    qwen = {"model_type": "qwen3_vl_moe_text", "num_experts": 128, "num_experts_per_tok": 8}
    for outer in (
        {"model_type": "qwen3_vl_moe", "text_config": qwen},
        {"model_type": "qwen3_omni_moe", "thinker_config": {"model_type": "t", "text_config": qwen}},
        {"model_type": "internvl_chat", "llm_config": qwen},
    ):
        assert RouterSpec.from_hf_config(outer) == RouterSpec(128, 8, "softmax_renorm")
    assert RouterSpec.from_hf_config({"model_type": "kimi_k25", "text_config": KIMI_K2}).num_experts == 384


MISTRAL4 = {
    "model_type": "mistral4",
    "n_routed_experts": 128,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}


@pytest.mark.parametrize(
    "fields, spec",
    [
        (
            {"model_type": "hunyuan_v1_moe", "num_experts": 64, "moe_topk": [8, 8, 8]},
            RouterSpec(64, 8, "softmax_renorm"),
        ),
        (
            {
                "model_type": "mimo_v2_flash",
                **{
                    name: KIMI_K2[name]
                    for name in ("n_group", "topk_group", "norm_topk_prob", "scoring_func")
                },
                "n_routed_experts": 256,
                "num_experts_per_tok": 8,
                "routed_scaling_factor": None,
            },
            RouterSpec(256, 8, "sigmoid_bias"),
        ),
        (
            {
                "model_type": "kimi_linear",
                "num_experts": 256,
                "num_experts_per_token": 8,
                "moe_renormalize": True,
                "moe_router_activation_func": "sigmoid",
                "num_expert_group": 1,
                "topk_group": 1,
                "routed_scaling_factor": 2.446,
            },
            RouterSpec(256, 8, "sigmoid_bias", 1, 1, 2.446),
        ),
        (
            {
                "model_type": "dbrx",
                "ffn_config": {"moe_num_experts": 16, "moe_top_k": 4, "moe_normalize_expert_weights": 1},
            },
            RouterSpec(16, 4, "softmax_renorm"),
        ),
        (
            {"model_type": "cohere2_moe", "num_experts": 8, "num_experts_per_tok": 2}
            | {"expert_selection_fn": "sigmoid", "norm_topk_prob": True},
            RouterSpec(8, 2, "sigmoid_bias"),
        ),
        (MISTRAL4 | {"n_group": 4, "topk_group": 2}, RouterSpec(128, 4, "softmax_bias_renorm", 4, 2)),
        (
            MISTRAL4 | {"n_group": 4, "topk_group": 2, "norm_topk_prob": False},
            RouterSpec(128, 4, "softmax_bias", 4, 2),
        ),
        (MISTRAL4 | {"n_group": 1, "topk_group": 1}, RouterSpec(128, 4, "softmax_renorm")),
        (
            {"model_type": "ernie4_5_moe", "moe_num_experts": 64, "moe_k": 6},
            RouterSpec(64, 6, "softmax_bias_renorm"),
        ),
        (
            {
                "model_type": "llama4",
                "text_config": {
                    "model_type": "llama4_text",
                    "num_local_experts": 16,
                    "num_experts_per_tok": 1,
                },
            },
            RouterSpec(16, 1, "topk_sigmoid"),
        ),
        (
            {"model_type": "deepseek_v4", "n_routed_experts": 256, "num_experts_per_tok": 6}
            | {"norm_topk_prob": True, "scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5},
            RouterSpec(256, 6, "sqrt_softplus_bias", 1, 1, 1.5),
        ),
        (
            {"model_type": "kolibri1", "num_local_experts": 384, "num_experts_per_tok": 6},
            RouterSpec(384, 6, "topk_sigmoid"),
        ),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_fields_of_their_own(fields, spec):
    assert RouterSpec.from_hf_config(fields) == spec


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model_type": "longcat_flash"}, "longcat_flash is not supported: some of its experts hand"),
        (
            {"model_type": "kolibri1", "num_experts": 384, "num_experts_per_tok": 6, "norm_topk_prob": True},
            "kolibri1 with norm_topk_prob=True is not supported, only False",
        ),
        ({"model_type": "phimoe"}, "SparseMixer"),
        (
            {"model_type": "hunyuan_v1_moe", "num_experts": 64, "moe_topk": [8, 4]},
            "moe_topk that differs by layer is not supported",
        ),
        (
            {"model_type": "gemma4_text", "enable_moe_block": False},
            "gemma4_text with enable_moe_block=False is not supported, only True",
        ),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_what_no_scoring_function_expresses_is_refused_by_name(fields, message):
    assert message in refusal(RouterSpec.from_hf_config, fields)


def test_configuration_needs_no_torch():
    code = "import sys; import xshare_trtllm.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
