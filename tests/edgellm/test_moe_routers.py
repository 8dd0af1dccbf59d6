"""Which routers of TensorRT Edge-LLM's MoE plugins can be limited, and that limiting them is exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx", reason="needs onnx")

from plugins import choose
from xshare_trtllm import RouterSpec, XShareConfig, mask_logits, route
from xshare_trtllm.edgellm.moe import BIAS_INPUT, MASK_VALUE, Limit, moe_router

EXPERTS, TOP_K = 32, 4
SOFTMAX = {"num_experts": EXPERTS, "top_k": TOP_K, "norm_topk_prob": 1, "routing_mode": 0}
ZEROS, ONES = np.zeros(EXPERTS, np.float32), np.ones(EXPERTS, np.float32)
SIGMOID = SOFTMAX | {"routing_mode": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5}


@pytest.mark.parametrize(
    ("attributes", "bias", "limit", "scoring"),
    (
        ({"num_experts": EXPERTS, "top_k": TOP_K}, None, Limit.LOGITS, "softmax_renorm"),  # Int4MoePlugin
        (SOFTMAX, None, Limit.LOGITS, "softmax_renorm"),
        (SOFTMAX, ZEROS, Limit.LOGITS, "softmax_renorm"),
        (SOFTMAX | {"routing_mode": 2}, ONES * 3, Limit.LOGITS, "softmax_renorm"),
        (SIGMOID, ONES, Limit.BIAS, "sigmoid_bias"),
        (SIGMOID | {"norm_topk_prob": 0}, ONES, Limit.BIAS, "sigmoid_bias"),
        (SIGMOID | {"n_group": 4, "topk_group": 4}, ONES, Limit.BIAS, "sigmoid_bias"),
    ),
)
def test_taken(attributes: dict[str, Any], bias: Any, limit: Limit, scoring: str) -> None:
    router = moe_router("layer", attributes, has_bias=bias is not None, bias=bias)
    assert (router.limit, router.spec.scoring) == (limit, scoring)
    assert (router.spec.num_experts, router.spec.top_k) == (EXPERTS, TOP_K)


@pytest.mark.parametrize(
    ("attributes", "has_bias", "bias", "message"),
    (
        (SOFTMAX | {"norm_topk_prob": 0}, False, None, "layer: norm_topk_prob is 0"),
        (SOFTMAX, True, ONES, "layer: e_score_correction_bias is added to the logits"),
        (SOFTMAX, True, None, "not constant zeros"),
        (SIGMOID | {"n_group": 4, "topk_group": 2}, True, ONES, "limited to 2 of 4 expert groups"),
        (SIGMOID, False, None, "without the input e_score_correction_bias"),
        (SOFTMAX | {"routing_mode": 3}, False, None, "routing_mode 3 is not known"),
    ),
)
def test_refused(attributes: dict[str, Any], has_bias: bool, bias: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moe_router("layer", attributes, has_bias=has_bias, bias=bias)


def test_every_plugin_of_theirs_is_known() -> None:
    schemas = pytest.importorskip(
        "tensorrt_edgellm.onnx.onnx_custom_schemas", reason="needs tensorrt-edgellm"
    )
    moe = {schema.name: schema for schema in schemas._ALL_CUSTOM_SCHEMAS if "moe" in schema.name.lower()}
    assert set(moe) == set(BIAS_INPUT)
    for name, place in BIAS_INPUT.items():
        inputs = [each.name for each in moe[name].inputs]
        assert inputs[0] == "router_logits"
        found = inputs.index("e_score_correction_bias") if "e_score_correction_bias" in inputs else None
        assert found == place


@pytest.mark.parametrize("value", (MASK_VALUE, -np.inf))
@pytest.mark.parametrize("mode", (0, 2))
def test_masked_logits_give_what_route_gives(mode: int, value: float) -> None:
    """Choice and weights of a softmax router behind masked logits, in every bit of the choice."""
    spec = RouterSpec(EXPERTS, TOP_K, "softmax_renorm")
    random = torch.Generator().manual_seed(mode)
    scale = np.random.default_rng(3).uniform(0.5, 2, EXPERTS).astype(np.float32)
    for coverage in (0.99, 0.9, 0.6):
        logits = torch.randn(13, EXPERTS, generator=random) * 3
        right = route(logits, spec, XShareConfig(coverage=coverage))
        masked = mask_logits(logits, spec, XShareConfig(coverage=coverage)).numpy()
        masked = np.where(np.isneginf(masked), np.float32(value), masked)
        attributes = SOFTMAX | {"routing_mode": mode}
        ids, weights = choose(masked, attributes, scale if mode == 2 else None)
        assert np.array_equal(ids, right.expert_ids.numpy())
        expected = right.expert_weights.numpy() * (scale[ids] if mode == 2 else 1)
        np.testing.assert_allclose(weights, expected, rtol=1e-5)  # they round otherwise


def test_a_step_bias_gives_what_route_gives() -> None:
    spec = RouterSpec(EXPERTS, TOP_K, "sigmoid_bias", routed_scaling_factor=2.5)
    random = torch.Generator().manual_seed(5)
    bias = torch.randn(EXPERTS, generator=random) * 0.3
    for coverage in (0.99, 0.9, 0.6):
        logits = torch.randn(13, EXPERTS, generator=random) * 2
        right = route(logits, spec, XShareConfig(coverage=coverage), correction_bias=bias)
        assert int(right.active_experts.sum()) < EXPERTS
        step_bias = np.where(right.active_experts, bias, np.float32(MASK_VALUE))
        ids, weights = choose(logits.numpy(), SIGMOID, step_bias)
        assert np.array_equal(ids, right.expert_ids.numpy())
        np.testing.assert_allclose(weights, right.expert_weights.numpy(), rtol=1e-5)
