"""With a budget that binds nothing the output is the model's own: held against the transformers routers."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV4Config,
    Ernie4_5_MoeConfig,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    Kolibri1Config,
    Mistral4Config,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4TopKRouter
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeTopKRouter
from transformers.models.kolibri1.modeling_kolibri1 import Kolibri1TopKRouter
from transformers.models.mistral4.modeling_mistral4 import Mistral4TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from xshare_trtllm import RouterSpec, XShareConfig, mask_logits, route
from xshare_trtllm.config import UTILITIES
from xshare_trtllm.reference.route import score

HIDDEN = 24
ROUTED = {"n_routed_experts": 32, "num_experts_per_tok": 6, "routed_scaling_factor": 2.5}
GROUPS = {"n_group": 8, "topk_group": 3}

ROUTERS = {
    "gpt_oss": (GptOssTopKRouter, GptOssConfig(num_local_experts=32, num_experts_per_tok=4)),
    "granitemoe": (GraniteMoeTopKRouter, GraniteMoeConfig(num_local_experts=40, num_experts_per_tok=8)),
    "mixtral": (MixtralTopKRouter, MixtralConfig(num_local_experts=8, num_experts_per_tok=2)),
    "olmoe": (OlmoeTopKRouter, OlmoeConfig(num_experts=64, norm_topk_prob=False)),
    "olmoe, renormalised": (OlmoeTopKRouter, OlmoeConfig(num_experts=64, norm_topk_prob=True)),
    "qwen2_moe": (Qwen2MoeTopKRouter, Qwen2MoeConfig(num_experts=60, num_experts_per_tok=4)),
    "qwen3_moe": (Qwen3MoeTopKRouter, Qwen3MoeConfig(num_experts=128, norm_topk_prob=True)),
    "deepseek_v2, greedy": (DeepseekV2TopkRouter, DeepseekV2Config(**ROUTED, topk_method="greedy")),
    "deepseek_v2, groups": (
        DeepseekV2TopkRouter,
        DeepseekV2Config(**ROUTED, **GROUPS, topk_method="group_limited_greedy"),
    ),
    "deepseek_v3": (DeepseekV3TopkRouter, DeepseekV3Config(**ROUTED, **GROUPS)),
    "deepseek_v3, one group": (DeepseekV3TopkRouter, DeepseekV3Config(**ROUTED, n_group=1, topk_group=1)),
    "deepseek_v4": (DeepseekV4TopKRouter, DeepseekV4Config(num_experts_per_tok=6, n_routed_experts=32)),
    "ernie4_5_moe": (Ernie4_5_MoeTopKRouter, Ernie4_5_MoeConfig(moe_num_experts=64, moe_k=6)),
    "kolibri1": (Kolibri1TopKRouter, Kolibri1Config(num_experts=48, num_experts_per_tok=6)),
    "mistral4, groups": (Mistral4TopkRouter, Mistral4Config(**ROUTED, **GROUPS, norm_topk_prob=True)),
    "mistral4, groups, as they are": (
        Mistral4TopkRouter,
        Mistral4Config(**ROUTED, **GROUPS, norm_topk_prob=False),
    ),
    "glm4_moe": (Glm4MoeTopkRouter, Glm4MoeConfig(**ROUTED, **GROUPS)),
}


SCORE_IN_THEIR_OWN_DTYPE = ("deepseek_v4", "mistral4")  # and choose between scores that it made equal


def random_router(name, seed, dtype):
    """The model's own router with random weights, its description, and its correction bias if it has one."""
    router_class, config = ROUTERS[name]
    config.hidden_size = HIDDEN
    router = router_class(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
        holder = getattr(router, "moe_statics", router)
        bias = getattr(holder, "e_score_correction_bias", None)
        if bias is not None:
            bias.copy_(torch.randn(bias.shape, generator=generator) / 8)
    return router, RouterSpec.from_hf_config(config), None if bias is None else bias.flatten()


def clear_rows(logits, spec, bias, gap):
    """Rows whose k-th and next ranking scores, and last and next groups, differ by more than rounding.

    In the others the model's own choice between equals is an accident of its top-k kernel.
    """
    ranking = score(logits.float(), bias, spec)[1]
    best = ranking.sort(dim=-1, descending=True).values
    clear = (best[:, spec.top_k - 1] - best[:, spec.top_k]) > gap
    if spec.num_groups == 1:
        return clear
    free = RouterSpec(spec.num_experts, spec.top_k, spec.scoring)
    groups = score(logits.float(), bias, free)[1].view(len(logits), spec.num_groups, -1)
    best = groups.topk(spec.rule.group_best_of, dim=-1).values.sum(dim=-1)
    best = best.sort(dim=-1, descending=True).values
    return clear & ((best[:, spec.top_k_groups - 1] - best[:, spec.top_k_groups]) > gap)


def by_id(ids, weights):
    """Rows as (ids ascending, their weights): some of the models' routers return no particular order."""
    ids, order = ids.long().sort(dim=-1)
    return ids, weights.float().gather(-1, order)


def assert_own_routing(router, spec, bias, config, dtype, seed, **arguments):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(16, HIDDEN, generator=generator).to(dtype)
    with torch.no_grad():
        logits, weights, ids = router(hidden)
    result = route(logits, spec, config, correction_bias=bias, backend="reference", **arguments)
    clear = clear_rows(logits, spec, bias, gap=1e-6)
    assert clear.sum() >= 8

    expected_ids, expected_weights = by_id(ids, weights)
    got_ids, got_weights = by_id(result.expert_ids, result.expert_weights)
    assert torch.equal(got_ids[clear], expected_ids[clear])
    # fp32: a softmax of another summation order; bf16: gpt-oss and others round their weights to bf16.
    tolerance = 2e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(got_weights[clear], expected_weights[clear], rtol=tolerance, atol=tolerance)
    return logits, result


@pytest.mark.parametrize("name", ROUTERS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_off_is_the_models_own_routing(name, seed, dtype):
    assume(dtype == torch.float32 or not name.startswith(SCORE_IN_THEIR_OWN_DTYPE))
    router, spec, bias = random_router(name, seed, dtype)
    _, result = assert_own_routing(router, spec, bias, XShareConfig.off(spec), dtype, seed + 1)
    assert result.stats.stood_aside


@pytest.mark.parametrize("utility", UTILITIES)
@pytest.mark.parametrize("name", ROUTERS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_limits_that_bind_nothing_change_nothing(name, utility, seed):
    """Through every stage, not by standing aside."""
    router, spec, bias = random_router(name, seed, torch.float32)
    if utility == "affinity" and not spec.rule.is_bounded:
        with pytest.raises(ValueError, match="no bound"):
            XShareConfig(spec.num_experts, utility=utility).check(spec)
        return
    n = spec.num_experts
    arguments = {"expert_gpu": torch.arange(n) % 4, "request_ids": torch.arange(16) // 2}
    every_limit = XShareConfig(n, gpu_budget=n, request_budget=n, coverage=1.0, utility=utility)
    for config, told in (
        (every_limit, arguments),
        (XShareConfig(coverage=1.0, utility=utility), {}),
        (XShareConfig(coverage=1.0, utility=utility), arguments),
    ):
        _, result = assert_own_routing(router, spec, bias, config, torch.float32, seed + 1, **told)
        assert not result.stats.stood_aside
        assert result.stats.kept_utility == 1.0


@pytest.mark.parametrize("name", ["gpt_oss", "granitemoe", "mixtral", "olmoe, renormalised", "qwen3_moe"])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_the_models_router_on_masked_logits_gives_the_same_routing(name, seed):
    """An identity as hidden states' projection lets the model's own router read our masked logits."""
    router, spec, _ = random_router(name, seed, torch.float32)
    logits = torch.randn(16, spec.num_experts, generator=torch.Generator().manual_seed(seed))
    config = XShareConfig(spec.top_k + 4)
    result = route(logits, spec, config, backend="reference")
    masked = mask_logits(logits, spec, config, backend="reference")
    router.weight.data = torch.eye(spec.num_experts)
    router.hidden_dim = spec.num_experts
    if hasattr(router, "bias"):
        router.bias.data.zero_()
    with torch.no_grad():  # -1e9 stands for -inf: 0 * inf inside the projection is NaN
        _, weights, ids = router(masked.clamp(min=-1e9))
    expected_ids, expected_weights = by_id(ids, weights)
    got_ids, got_weights = by_id(result.expert_ids, result.expert_weights)
    assert torch.equal(got_ids, expected_ids)
    torch.testing.assert_close(got_weights, expected_weights, rtol=2e-6, atol=2e-6)
