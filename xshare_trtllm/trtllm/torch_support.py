"""What of TensorRT-LLM's PyTorch backend XShare works with, by routing method and by MoE back end.

`enable` asks this module about the layers of a loaded model, `xshare doctor` about the classes of an
installed version: one answer for both. Nothing here imports tensorrt_llm or torch.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from xshare_trtllm.config import RULES, RouterSpec

# ---- Routing methods ---------------------------------------------------------------------------------------

# By class and not by routing_method_type: a model's own subclass may share the type and compute otherwise
# (SqrtSoftplus is a MiniMaxM2 there, DeepSeekV4 says that it is DeepSeekV3).
SCORING = {
    "DefaultMoeRoutingMethod": "softmax",
    "RenormalizeMoeRoutingMethod": "topk_softmax",
    "RenormalizeNaiveMoeRoutingMethod": "topk_softmax",  # its apply() is a softmax over the chosen logits too
    "DeepSeekV3MoeRoutingMethod": "sigmoid_bias",
    "DeepseekV3Gate": "sigmoid_bias",  # a gate that is its own routing method, in 1.0
    "MiniMaxM2MoeRoutingMethod": "sigmoid_bias",
    "MiniMaxM3MoeRoutingMethod": "sigmoid_bias",
    "SigmoidRenormMoeRoutingMethod": "sigmoid_bias",
    "Llama4RenormalizeMoeRoutingMethod": "topk_sigmoid",
    "SqrtSoftplusMoeRoutingMethod": "sqrt_softplus_bias",
}
REFUSED_METHODS = {
    "SparseMixerMoeRoutingMethod": "it chooses one expert after the other, each with a softmax of its own",
    "DeepSeekV4MoeRoutingMethod": "in some layers it looks tokens up in a table",
    "StaticMoeRoutingMethod": "its choice is fixed beforehand",
    "LoadBalancedMoeRoutingMethod": "it deals the experts out in turn",
}
# Of those whose scoring may have a bias, the ones without.
_WITHOUT_BIAS = ("SigmoidRenormMoeRoutingMethod", "Llama4RenormalizeMoeRoutingMethod")
RENORMALIZING = ("RenormalizeMoeRoutingMethod", "RenormalizeNaiveMoeRoutingMethod")


def method_problem(name: str) -> str | None:
    """Why routing methods of this class are refused, by its name; None where they are supported."""
    if name in SCORING:
        return None
    why = REFUSED_METHODS.get(name, "it is not known")
    return f"{name}: not supported, {why}; supported are {', '.join(sorted(SCORING))}"


def router_spec(routing_method: Any, num_experts: int) -> RouterSpec:
    """What a routing method of TensorRT-LLM computes over `num_experts` experts.

    Raises ValueError, by the name of its class, for a method that no scoring function here expresses.
    """
    name = type(routing_method).__name__
    problem = method_problem(name)
    if problem is not None:
        raise ValueError(problem)
    scoring = SCORING[name]
    if not getattr(routing_method, "renormalize", True):
        raise ValueError(
            f"{name}(renormalize=False): not supported, its weights are not divided by their sum"
        )
    if name.startswith(("DeepSeek", "Deepseek")):
        groups = getattr(routing_method, "routing_impl", None)
        if groups is None:
            raise ValueError(f"{name}: not supported before TensorRT-LLM 1.0, it does not say its groups")
        return RouterSpec(
            num_experts,
            groups.top_k,
            scoring,
            groups.n_group,
            groups.topk_group,
            groups.routed_scaling_factor,
        )
    scale = float(getattr(routing_method, "routed_scaling_factor", 1.0))
    return RouterSpec(
        num_experts, int(routing_method.experts_per_token), scoring, routed_scaling_factor=scale
    )


def has_bias(routing_method: Any) -> bool:
    """Whether the method adds an `e_score_correction_bias` to what it ranks by."""
    name = type(routing_method).__name__
    return name in SCORING and RULES[SCORING[name]].has_bias and name not in _WITHOUT_BIAS


# ---- Back ends of the MoE layer ----------------------------------------------------------------------------

Kind = Literal["applies", "scheduled", "trtllm_gen", "triton"]

# Names of classes: of 1.0 to 1.3, and of the bases that the leaf classes of August 2026 have.
#   applies      calls `routing_method.apply` itself
#   scheduled    is handed the choice, but only by ConfigurableMoE's scheduler
#   trtllm_gen   routes inside its kernel unless it is asked not to
#   triton       routes inside its kernel
BACKENDS: dict[str, Kind] = {
    "CutlassFusedMoE": "applies",
    "CutlassFusedMoEBase": "applies",
    "CuteDslFusedMoE": "applies",
    "CuteDslB12xFusedMoE": "applies",
    "DeepGemmFusedMoE": "applies",
    "VanillaMoE": "applies",
    "WideEPMoE": "applies",
    "MarlinFusedMoE": "scheduled",
    "MegaMoEDeepGemm": "scheduled",
    "MegaMoECuteDsl": "scheduled",
    "TRTLLMGenFusedMoE": "trtllm_gen",
    "TrtllmGenFusedMoEBase": "trtllm_gen",
    "TritonFusedMoE": "triton",
}
REFUSED_BACKENDS = {
    "DenseGEMMFusedMoE": "it computes every expert anyway",
    # modeling_llama_min_latency.py at 025b36c315: CUTLASS, but for 8 rows and fewer
    "Llama4MinLatencyFusedMoE": "it routes few rows in a kernel of its own",
}
# `descriptor.identity` of a leaf class: a kernel's name decides before the technique.
_KERNELS: dict[str, Kind] = {"mega_moe": "scheduled", "vanilla": "applies"}
_TECHNIQUES: dict[str, Kind] = {
    "cutlass": "scheduled",
    "cutedsl": "scheduled",
    "cuda_cpp": "scheduled",
    "cuda": "scheduled",
    "trtllm_gen": "trtllm_gen",
    "triton": "triton",
}
_DENSE = "dense_gemm"


def backend_kind(cls: type) -> Kind:
    """How a back end's class comes by its choice of experts, by its descriptor or its bases.

    Raises ValueError, by name, for one that is refused or not known.
    """
    identity = getattr(getattr(cls, "descriptor", None), "identity", None)
    if identity is not None:
        return _kind_of_identity(cls, identity)
    for base in cls.__mro__:
        if base.__name__ in REFUSED_BACKENDS:
            raise ValueError(f"MoE backend {cls.__name__}: not supported, {REFUSED_BACKENDS[base.__name__]}")
        if base.__name__ in BACKENDS:
            return BACKENDS[base.__name__]
    raise ValueError(
        f"MoE backend {cls.__name__}: not supported, it is not known; supported are "
        f"{', '.join(sorted(BACKENDS))} and what derives from them"
    )


def _kind_of_identity(cls: type, identity: Any) -> Kind:
    technique, kernel = str(identity.technique), str(identity.kernel_name)
    name = f"MoE backend {cls.__name__} ({identity.provider}.{technique}.{kernel}.{identity.quant})"
    if kernel == _DENSE:
        raise ValueError(f"{name}: not supported, it computes every expert anyway")
    kind = _KERNELS.get(kernel) or _TECHNIQUES.get(technique)
    if kind is None:
        raise ValueError(f"{name}: not supported, its technique is not known")
    return kind


@dataclass(frozen=True)
class Plan:
    """How XShare enters a layer. masks: by masked logits, else by the routing method's `apply`."""

    backend: str
    masks: bool


def layer_plan(moe: Any, block: Any = None) -> Plan:
    """How XShare enters a loaded MoE layer.

    moe    the MoE module of a model, the outermost
    block  the module of the model that holds it: it may gather the rows of all ranks before its gate

    Raises ValueError for a back end that is not known, and where neither way would give XShare's routing.
    """
    backend = getattr(moe, "backend", moe)
    kind, name = backend_kind(type(backend)), type(backend).__name__
    spread = bool(moe.use_dp and moe.parallel_size > 1)
    if _is_scheduled(moe):
        return Plan(name, masks=False)
    if kind == "scheduled":
        raise ValueError(f"MoE backend {name}: not supported outside of ConfigurableMoE: it may route itself")
    if kind == "applies":
        return Plan(name, masks=False)
    if spread:
        _check_spread(kind, name, type(backend), block)
        return Plan(name, masks=False)
    method = type(moe.routing_method).__name__
    if method not in RENORMALIZING:
        raise ValueError(
            f"{name} routes inside its kernel, where masked logits would not do for {method}: set "
            "moe_config.backend to CUTLASS or DEEPGEMM"
        )
    return Plan(name, masks=True)


def _is_scheduled(moe: Any) -> bool:
    """Whether a scheduler around the back end calls `apply` when the routing method asks for it."""
    has_backend = getattr(moe, "backend", None) is not None
    return has_backend and hasattr(moe.routing_method, "requires_separated_routing")


def _check_spread(kind: Kind, name: str, cls: type, block: Any) -> None:
    """Attention data parallelism without that scheduler: the rows that are routed have to be this rank's."""
    use = "use CUTLASS"
    if kind == "triton":
        raise ValueError(f"{name} with attention data parallelism: not supported, {use}")
    if "routing_method.apply(" not in _source(cls):
        raise ValueError(f"{name} with attention data parallelism: this version routes in its kernel, {use}")
    if block is not None and "allgather(" in _source(type(block)):
        raise ValueError(
            f"{name} with attention data parallelism: {type(block).__name__} may gather all ranks' rows "
            f"before its gate, {use}"
        )


def _source(cls: type) -> str:
    """Of the class and all that it derives from, as far as it can be found."""
    found = []
    for base in cls.__mro__:
        with suppress(OSError, TypeError):
            found.append(inspect.getsource(base))
    return "\n".join(found)
