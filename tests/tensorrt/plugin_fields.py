"""Sets of plugin fields: those that are right, and those that are wrong with what must be said about them."""

from __future__ import annotations

from itertools import product
from typing import Any

from xshare_trtllm.config import RULES

INT64, FLOAT32, FLOAT64, INT32 = "int64", "float32", "float64", "int32"
Fields = dict[str, Any]  # a value, (type, values) for another type or length, None for a field without data

GPT_OSS: Fields = {"num_experts": 128, "top_k": 4, "scoring": "topk_softmax", "budget": 24}
DEEPSEEK: Fields = {
    "num_experts": 256,
    "top_k": 8,
    "scoring": "sigmoid_bias",
    "budget": 64,
    "num_groups": 8,
    "top_k_groups": 4,
    "routed_scaling_factor": 2.5,
    "has_correction_bias": 1,
}
EDGE: Fields = {
    "num_experts": 128,
    "top_k": 8,
    "scoring": "softmax_renorm",
    "coverage": 0.97,
    "output": "masked_logits",
    "mask_value": -1e30,
}
STEP_BIAS: Fields = EDGE | {"scoring": "sigmoid_bias", "output": "step_bias", "has_correction_bias": 1}


def legal() -> list[Fields]:
    """Every scoring with every combination of stages and optional tensors, and the limits of each number."""
    cases: list[Fields] = []
    for (scoring, rule), groups, stages, inputs in product(RULES.items(), (1, 4), range(16), range(8)):
        if groups > 1 and rule.group_best_of == 0:
            continue
        fields: Fields = {"num_experts": 32, "top_k": 4, "scoring": scoring, "budget": 8}
        if groups > 1:
            fields |= {"num_groups": groups, "top_k_groups": 2}
        for bit, option in enumerate(
            ({"request_budget": 6}, {"gpu_budget": 3}, {"coverage": 0.9}, {"max_rows": 48})
        ):
            fields |= option if stages >> bit & 1 else {}
        fields["has_request_ids"] = int("request_budget" in fields or inputs & 1)
        fields["has_expert_gpu"] = int("gpu_budget" in fields)
        if inputs >> 1 & 1 and rule.is_bounded:
            fields["utility"] = "affinity"
        fields["has_exempt"] = inputs >> 1 & 1
        fields["has_active_experts"] = inputs >> 2 & 1
        fields["has_correction_bias"] = int(rule.has_bias and inputs != 0)
        cases.append(fields)
    return [
        *cases,
        GPT_OSS,
        DEEPSEEK,
        EDGE,
        EDGE | {"coverage": 0.0, "gpu_budget": 8, "has_expert_gpu": 1},
        EDGE | {"scoring": "topk_softmax", "mask_value": -float("inf"), "has_exempt": 1},
        EDGE | {"scoring": "sigmoid_bias", "has_active_experts": 1},
        STEP_BIAS,
        STEP_BIAS | {"has_correction_bias": 0, "mask_value": 0.0, "output": "step_bias\0"},
        {"num_experts": 1, "top_k": 1, "scoring": "softmax", "budget": 1, "warmup": 0},
        {"num_experts": 512, "top_k": 16, "scoring": "softmax", "budget": 2**31 - 1, "warmup": 16},
        GPT_OSS | {"budget": (INT64, [24]), "coverage": (FLOAT32, [0.5]), "max_rows": 0},
        GPT_OSS | {"routed_scaling_factor": (FLOAT64, [1.5]), "scoring": "topk_softmax\0\0"},
        GPT_OSS | {"coverage": 1.0, "routed_scaling_factor": 1e-30, "max_rows": -5},
    ]


def illegal() -> list[tuple[Fields, str]]:
    """Fields, and a part of the message that they must get."""
    nan, inf = float("nan"), float("inf")
    one_by_one: list[tuple[Fields, str]] = [
        (GPT_OSS | {"num_experts": 0}, "num_experts must be in 1..512, not 0"),
        (GPT_OSS | {"num_experts": 513}, "num_experts must be in 1..512, not 513"),
        (GPT_OSS | {"num_experts": (INT64, [2**40])}, "num_experts does not fit an int32"),
        (GPT_OSS | {"top_k": 0}, "top_k must be in 1..16, not 0"),
        (GPT_OSS | {"top_k": 17}, "top_k must be in 1..16, not 17"),
        (GPT_OSS | {"num_experts": 3}, "top_k=4 is more than num_experts=3"),
        (GPT_OSS | {"scoring": "relu"}, "not 'relu'"),
        (GPT_OSS | {"scoring": "softmax_"}, "scoring must be softmax,"),
        (GPT_OSS | {"scoring": "\0"}, "not ''"),
        (GPT_OSS | {"scoring": "x" * 5000}, "scoring must be softmax,"),
        (GPT_OSS | {"scoring": 2}, "scoring must be characters"),
        (GPT_OSS | {"budget": 3}, "budget must be at least top_k=4, not 3"),
        (GPT_OSS | {"budget": -1}, "budget must be at least top_k=4, not -1"),
        (GPT_OSS | {"warmup": 5}, "warmup must be in 0..top_k=4, not 5"),
        (GPT_OSS | {"warmup": -1}, "warmup must be in 0..top_k=4, not -1"),
        (GPT_OSS | {"request_budget": -1, "has_request_ids": 1}, "request_budget must be positive"),
        (GPT_OSS | {"gpu_budget": -1, "has_expert_gpu": 1}, "gpu_budget must be positive"),
        (GPT_OSS | {"request_budget": 8}, "request_budget=8 needs request_ids"),
        (GPT_OSS | {"gpu_budget": 8}, "gpu_budget=8 needs expert_gpu"),
        (GPT_OSS | {"has_correction_bias": 1}, "correction_bias: topk_softmax scoring has none"),
        (GPT_OSS | {"coverage": 1.5}, "coverage must be in 0..1"),
        (GPT_OSS | {"utility": "squares"}, "utility must be squared_weight or affinity, not 'squares'"),
        (GPT_OSS | {"utility": 0}, "field utility must be characters"),
        (GPT_OSS | {"output": "logits"}, "output must be routing, masked_logits or step_bias, not 'logits'"),
        (GPT_OSS | {"mask_value": -1.0}, "mask_value needs output masked_logits or step_bias"),
        (GPT_OSS | {"min_coverage": 0.9}, "there is no field 'min_coverage'"),
        (GPT_OSS | {"output": "step_bias"}, "step_bias belongs to sigmoid_bias scoring alone"),
        (
            EDGE | {"mask_value": 1.0},
            "mask_value must be negative and exact in logits_dtype (0 = -inf), not 1",
        ),
        (EDGE | {"mask_value": nan}, "mask_value must be negative"),
        (EDGE | {"scoring": "softmax"}, "masked_logits would change the weights of softmax scoring"),
        (
            EDGE | {"scoring": "softmax_bias"},
            "masked_logits would change the weights of softmax_bias scoring",
        ),
        (
            EDGE | {"scoring": "sqrt_softplus_bias", "has_correction_bias": 1},
            "masked_logits cannot keep a correction bias from ranking what is masked",
        ),
        (GPT_OSS | {"scoring": "sqrt_softplus_bias", "utility": "affinity"}, "whose scores have no bound"),
        (STEP_BIAS | {"output": "masked_logits"}, "output step_bias can"),
        (STEP_BIAS | {"warmup": 0}, "step_bias needs a warmup of at least 1"),
        (STEP_BIAS | {"num_groups": 8, "top_k_groups": 4}, "step_bias cannot express num_groups=8"),
        (EDGE | {"coverage": 0.0}, "one of coverage, budget and gpu_budget must be set"),
        (GPT_OSS | {"coverage": -0.1}, "coverage must be in 0..1"),
        (GPT_OSS | {"coverage": nan}, "coverage must be in 0..1"),
        (GPT_OSS | {"routed_scaling_factor": inf}, "routed_scaling_factor must be finite"),
        (GPT_OSS | {"routed_scaling_factor": (FLOAT64, [1e300])}, "routed_scaling_factor must be finite"),
        (GPT_OSS | {"num_groups": 2}, "topk_softmax has no expert groups"),
        (DEEPSEEK | {"num_groups": 0}, "num_groups=0 must divide"),
        (DEEPSEEK | {"num_groups": 7}, "num_groups=7 must divide num_experts=256"),
        (DEEPSEEK | {"num_groups": 256}, "scores a group by its best 2 experts"),
        (DEEPSEEK | {"top_k_groups": 9}, "top_k_groups must be in 1..num_groups=8, not 9"),
        (DEEPSEEK | {"num_groups": 64, "top_k_groups": 1}, "is more than the 4 experts of top_k_groups=1"),
        (DEEPSEEK | {"warmup": 0}, "warmup must be at least 1 with num_groups=8"),
        (GPT_OSS | {"budgets": 24}, "there is no field 'budgets'"),
        (GPT_OSS | {"": 24}, "there is no field ''"),
        (GPT_OSS | {"top_k": (INT32, [4, 4])}, "field top_k must be one number, not 2"),
        (GPT_OSS | {"top_k": (INT32, [])}, "field top_k has no value"),
        (GPT_OSS | {"top_k": None}, "field top_k has no value"),
        (GPT_OSS | {"top_k": (FLOAT32, [4.0])}, "field top_k must be an int32 or int64"),
        (GPT_OSS | {"coverage": (INT32, [1])}, "field coverage must be a float32 or float64"),
        (GPT_OSS | {"top_k": "4"}, "field top_k must be an int32 or int64"),
        ({}, "field num_experts is missing"),
    ]
    for switch in ("correction_bias", "request_ids", "exempt", "expert_gpu", "active_experts"):
        one_by_one.append((GPT_OSS | {f"has_{switch}": 2}, f"field has_{switch} must be 0 or 1, not 2"))
    for needed in ("num_experts", "top_k", "scoring", "budget"):
        rest = {name: value for name, value in GPT_OSS.items() if name != needed}
        missing = (
            "one of coverage, budget and gpu_budget" if needed == "budget" else f"field {needed} is missing"
        )
        one_by_one.append((rest, missing))
    return one_by_one
