"""How the MoE plugins of TensorRT Edge-LLM route, and which of it XShare can limit without changing it.

Every one of them takes router logits [T, E] as input 0 and routes inside. What they compute was read from
their sources (cpp/kernels/moe/moeTopkSoftmaxKernels.cu, moeSigmoidGroupTopkKernels.cu, cpp/plugins/*Moe*) and
from tensorrt_edgellm 0.11.0, onnx/onnx_custom_schemas.py and experimental/builder/ops/functional/moe.py:

mode 0  softmax of logits (plus the bias, where there is one), top k, weights divided by their sum
mode 1  sigmoid of the logits; the best k of sigmoid plus bias, limited to the best groups; weights are the
        sigmoids of those, divided by their sum where `norm_topk_prob`, times `routed_scaling_factor`
mode 2  as mode 0 without a bias; the weights times the scale of each expert, which is in the bias' place

A logit of -inf takes an expert out of modes 0 and 2: its probability is exactly 0, and the others' weights
are divided by their own sum. In mode 1 sigmoid(-inf) + bias may still win, so the bias takes it out there.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from xshare_trtllm.config import NO_LIMIT, RouterSpec, XShareConfig

# Where each plugin has `e_score_correction_bias`; None = it has none.
BIAS_INPUT: dict[str, int | None] = {
    "Fp16MoePlugin": 4,
    "Int4MoePlugin": None,
    "Nvfp4MoePlugin": 10,
    "NvFP4MoEPluginGeforce": 10,
    "Nvfp4A16MoePlugin": 8,
    "Nvfp4A16BlackwellMoePlugin": 8,
}


# In place of -inf, which not every kernel may take. No router of theirs reaches it, since logits come from
# float16; exp(-1e30 - max) is 0 as exp(-inf) is; a sigmoid plus it is below every other sigmoid plus bias.
MASK_VALUE = -1e30


class Limit(Enum):
    """What keeps a plugin's rows inside the active experts: an output of XShareRouting, by its name."""

    LOGITS = "masked_logits"
    BIAS = "step_bias"


class MoeRouter(NamedTuple):
    """How one MoE layer routes, and how XShare limits it."""

    spec: RouterSpec
    limit: Limit


def moe_router(
    name: str, attributes: Mapping[str, Any], *, has_bias: bool, bias: npt.NDArray[np.floating[Any]] | None
) -> MoeRouter:
    """The router of a MoE plugin.

    name        of the node, for messages
    attributes  `num_experts`, `top_k` and, where the plugin has them, `norm_topk_prob`, `routing_mode`,
                `n_group`, `topk_group` and `routed_scaling_factor`
    has_bias    the plugin has `e_score_correction_bias`
    bias        its values [E] where they are constants, else None

    Raises ValueError for a router that cannot be limited exactly, with the node's name and why.
    """
    experts, top_k = int(attributes["num_experts"]), int(attributes["top_k"])
    mode, normalised = int(attributes.get("routing_mode", 0)), bool(attributes.get("norm_topk_prob", 1))
    if mode not in (0, 1, 2):
        raise ValueError(f"{name}: routing_mode {mode} is not known; known are 0, 1 and 2")
    if mode == 1:
        return MoeRouter(_sigmoid_spec(name, attributes, experts, top_k, has_bias), Limit.BIAS)
    if not normalised:
        raise ValueError(
            f"{name}: norm_topk_prob is 0: the softmax would give the experts that are left more weight, "
            "so the routing cannot be limited from outside"
        )
    if mode == 0 and has_bias and (bias is None or np.any(bias)):
        raise ValueError(
            f"{name}: e_score_correction_bias is added to the logits before the softmax and is not constant "
            "zeros, so the logits at the plugin's input are not what it routes by"
        )
    return MoeRouter(_spec(name, experts, top_k, "softmax_renorm"), Limit.LOGITS)


def _sigmoid_spec(
    name: str, attributes: Mapping[str, Any], experts: int, top_k: int, has_bias: bool
) -> RouterSpec:
    groups, top_groups = int(attributes.get("n_group", 1)), int(attributes.get("topk_group", 1))
    if top_groups < groups:
        raise ValueError(
            f"{name}: rows are limited to {top_groups} of {groups} expert groups, which the plugin picks by "
            "what is left of them: with experts left out it would pick other groups"
        )
    if not has_bias:
        raise ValueError(f"{name}: routing_mode 1 without the input e_score_correction_bias")
    scaling = float(attributes.get("routed_scaling_factor", 1.0))
    return _spec(name, experts, top_k, "sigmoid_bias", routed_scaling_factor=scaling)


def _spec(name: str, *arguments: Any, **options: Any) -> RouterSpec:
    try:
        return RouterSpec(*arguments, **options)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def check_config(name: str, config: XShareConfig, router: MoeRouter) -> None:
    """Raises ValueError where one layer's configuration does not fit its router, with the node's name."""
    try:
        config.check(router.spec)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if router.limit is Limit.BIAS and config.warmup == 0:
        raise ValueError(f"{name}: XShareConfig(warmup=0): a sigmoid router needs a warm-up of at least 1")


def plugin_fields(router: MoeRouter, config: XShareConfig) -> dict[str, int | float | str]:
    """The fields of the plugin XShareRouting for one layer: plugins/tensorrt/README.md."""
    spec = router.spec
    values: dict[str, int | float | str] = {
        "num_experts": spec.num_experts,
        "top_k": spec.top_k,
        "scoring": spec.scoring,
        "routed_scaling_factor": spec.routed_scaling_factor,
        "warmup": config.warmup,
        "utility": config.utility,
        "output": router.limit.value,
        "mask_value": MASK_VALUE,
        "has_request_ids": 1,
        "has_exempt": 1,
    }
    if router.limit is Limit.BIAS:
        values["has_correction_bias"] = 1
    for name in ("budget", "coverage", "request_budget", "max_rows"):
        if (value := getattr(config, name)) is not None:
            values[name] = min(value, NO_LIMIT)
    return values
