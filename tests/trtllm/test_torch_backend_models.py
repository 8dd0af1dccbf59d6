"""Which layers of a model the search finds, on module trees with the names, gates and draft layers of the
models' own files (tensorrt_llm/_torch/models/, each with the commit that was read)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_torch_backend import BIAS, EXPERTS, TOP_K, renormalize, trtllm
from torch import nn

from xshare_trtllm import RouterSpec, XShareConfig
from xshare_trtllm.trtllm.torch_backend import Enabled, enable
from xshare_trtllm.trtllm.torch_routing import XShareMoeRoutingMethod

__all__ = ["trtllm"]  # a fixture
COVERAGE = XShareConfig(coverage=0.9)
DEEPSEEK = RouterSpec(EXPERTS, TOP_K, "sigmoid_bias", 8, 4, 2.5)
SIGMOID = RouterSpec(EXPERTS, TOP_K, "sigmoid_bias")


def holder(**children: Any) -> Any:
    """A module with these attributes, in this order."""
    made = nn.Module()
    for name, child in children.items():
        setattr(made, name, child)
    return made


def experts_of(t: Any, method: Any, layer_idx: int, num_experts: int = EXPERTS, mapping: Any = None) -> Any:
    """What `create_moe` gives."""
    mapping = mapping or t.moe.SINGLE
    return t.moe.CutlassFusedMoE(
        routing_method=method, num_experts=num_experts, layer_idx=layer_idx, mapping=mapping
    )


def dense() -> nn.Module:
    return nn.Linear(2, 2)


def with_drafts(model: Any, mtp_layers: list[Any]) -> Any:
    """SpecDecOneEngineForCausalLM (modeling_speculative.py at 00679c66c3) with multi-token prediction: the
    heads are in the draft model, in the epilogue and, once the model has extended its list, in its layers."""
    draft = holder(mtp_layers=nn.ModuleList(mtp_layers))
    model.model.layers.extend(draft.mtp_layers)
    model.epilogue = nn.ModuleList([draft, *draft.mtp_layers])
    model.draft_model = draft
    return model


def causal_lm(layers: list[Any], **config: Any) -> Any:
    values = {"num_hidden_layers": len(layers)} | config
    return holder(model=holder(layers=nn.ModuleList(layers)), config=SimpleNamespace(**values))


def gate_is_the_method(t: Any) -> Any:
    return t.routing.DeepseekV3Gate(16, EXPERTS, TOP_K, 8, 4, 2.5)


def gate_with_the_method(t: Any) -> Any:
    """modeling_deepseekv3.py after 1.0: the gate has the method as a child."""
    return holder(routing_method=t.routing.DeepSeekV3MoeRoutingMethod(TOP_K, 8, 4, 2.5, lambda: BIAS))


def nemotron_h(t: Any) -> tuple[Any, dict[str, RouterSpec]]:
    """modeling_nemotron_h.py at 00620eb025: `mixer` is Mamba, attention, MLP or NemotronHMOE, whose number of
    experts may differ by layer (Puzzle); an MTP head is a dictionary of sublayers with one layer_idx."""

    def layer(index: int, num_experts: int) -> Any:
        method = t.routing.DeepSeekV3MoeRoutingMethod(TOP_K, 1, 1, 2.5, lambda: torch.zeros(num_experts))
        experts = experts_of(t, method, index, num_experts)
        block = holder(shared_experts=dense(), gate=holder(routing_method=method), experts=experts)
        block.num_experts, block.layer_idx, block.mapping = num_experts, index, t.moe.SINGLE
        return holder(norm=dense(), mixer=block)

    layers = [holder(mixer=dense()), layer(1, EXPERTS), holder(mixer=dense()), layer(3, 16)]
    mtp = holder(layers=nn.ModuleDict({"0": holder(mixer=dense()), "1": layer(4, EXPERTS)}))
    specs = [RouterSpec(n, TOP_K, "sigmoid_bias", 1, 1, 2.5) for n in (EXPERTS, 16)]
    names = ("model.layers.1.mixer.experts", "model.layers.3.mixer.experts")
    return with_drafts(causal_lm(layers), [mtp]), dict(zip(names, specs, strict=True))


def deepseek_v3(t: Any) -> Any:
    """modeling_deepseekv3.py: a dense layer, then Deepseekv3MoE; DeepseekV3MTP is a layer behind the last."""

    def layer(index: int) -> Any:
        gate = gate_with_the_method(t)
        return holder(mlp=holder(gate=gate, experts=experts_of(t, gate.routing_method, index)))

    return with_drafts(causal_lm([holder(mlp=dense()), layer(1)]), [layer(2)])


def kimi_k25(t: Any) -> tuple[Any, dict[str, RouterSpec]]:
    """modeling_kimi_k25.py at 010373d3b4: a vision tower, and DeepseekV3ForCausalLM as `llm`, whose text
    config the model takes over; `model` and `draft_model` are properties."""

    class KimiK25(nn.Module):
        draft_model = property(lambda self: self.llm.draft_model)
        model = property(lambda self: self.llm.model)

    made = KimiK25()
    made.mm_encoder, made.llm = dense(), deepseek_v3(t)
    made.config = made.llm.config
    return made, {"llm.model.layers.1.mlp.experts": DEEPSEEK}


def glm_4_5(t: Any) -> tuple[Any, dict[str, RouterSpec]]:
    """modeling_glm.py at 0406f8aa75: the gate is its own routing method, and so has two parents."""

    def layer(index: int) -> Any:
        gate = gate_is_the_method(t)
        return holder(mlp=holder(gate=gate, experts=experts_of(t, gate, index)))

    model = with_drafts(causal_lm([holder(mlp=dense()), layer(1)]), [layer(2)])
    return model, {"model.layers.1.mlp.experts": DEEPSEEK}


def minimax_m2(t: Any) -> tuple[Any, dict[str, RouterSpec]]:
    """modeling_minimaxm2.py at 005927171b: the gate is a Linear, the bias a parameter of the block."""
    block = holder(gate=nn.Linear(2, EXPERTS), e_score_correction_bias=nn.Parameter(BIAS.clone()))
    method = t.routing.MiniMaxM2MoeRoutingMethod(TOP_K, EXPERTS, lambda: block.e_score_correction_bias)
    block.experts = experts_of(t, method, 0)
    return causal_lm([holder(block_sparse_moe=block)]), {"model.layers.0.block_sparse_moe.experts": SIGMOID}


def qwen3_next(t: Any) -> tuple[Any, dict[str, RouterSpec]]:
    """modeling_qwen3_next.py at 00022b0409, Qwen3.5 too (modeling_qwen3_5.py at 00620eb025): the gate makes
    a method anew whenever it is asked; the one MTP layer is a decoder layer."""

    class Gate(nn.Module):
        routing_method = property(lambda self: renormalize(t))

    def layer(index: int) -> Any:
        block = holder(gate=Gate(), shared_expert=dense(), shared_expert_gate=dense())
        block.experts = experts_of(t, block.gate.routing_method, index)
        return holder(linear_attn=dense(), mlp=block)

    model = with_drafts(causal_lm([layer(0), layer(1)]), [layer(2)])
    spec = RouterSpec(EXPERTS, TOP_K, "topk_softmax")
    return model, {f"model.layers.{index}.mlp.experts": spec for index in range(2)}


def a_drafter_of_its_own(t: Any) -> tuple[Any, dict[str, RouterSpec]]:
    """DRAFT_TARGET_ONE_MODEL and PARD at 00679c66c3: a checkpoint of its own with layers from 0 on, which the
    epilogue and the spec worker have too, before anything says that it drafts."""
    target = causal_lm([holder(mlp=holder(experts=experts_of(t, renormalize(t), 0)))])
    draft = causal_lm([holder(mlp=holder(experts=experts_of(t, renormalize(t), 0)))])
    made = holder(epilogue=nn.ModuleList([draft, holder(drafter=draft)]))
    made.model, made.draft_model = target.model, draft
    made.config = target.config
    return made, {"model.layers.0.mlp.experts": RouterSpec(EXPERTS, TOP_K, "topk_softmax")}


SHAPES = (nemotron_h, kimi_k25, glm_4_5, minimax_m2, qwen3_next, a_drafter_of_its_own)


def with_xshare(model: nn.Module) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "routing_method", None), XShareMoeRoutingMethod)
    }


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_contract_a_models_layers_and_only_them(shape: Callable[[Any], Any], trtllm: Any) -> None:
    model, specs = shape(trtllm)
    assert not with_xshare(model)
    with enable(model, COVERAGE) as enabled:
        assert with_xshare(model) == set(specs)
        assert [layer.routing.spec for layer in enabled._layers] == list(specs.values())
        for name, spec in specs.items():
            experts = model.get_submodule(name)
            experts(torch.ones(6, 4), torch.randn(6, spec.num_experts))
            assert len(experts.calls) == 1
        assert enabled.counters[:, 7].tolist() == [6] * len(specs)
    assert not with_xshare(model)


def refusals(t: Any) -> Iterator[tuple[Any, str]]:
    # modeling_gemma4.py at 00e7d1037d: a scale per expert on the weights.
    gemma4: Any = type("Gemma4MoeRoutingMethod", (t.routing.BaseMoeRoutingMethod,), {"top_k": TOP_K})()
    block = holder(router=dense(), experts=experts_of(t, gemma4, 0))
    yield causal_lm([holder(moe=block)]), "MoE layer 0: Gemma4Moe.*: not supported, it is not known"
    # Of modeling_llama_min_latency.py at 025b36c315: whatever the method, few rows are routed in its kernel.
    fast = type("Llama4MinLatencyFusedMoE", (t.moe.CutlassFusedMoE,), {})
    experts = fast(routing_method=renormalize(t), num_experts=EXPERTS)
    yield causal_lm([holder(feed_forward=holder(experts=experts))]), "Llama4MinLatencyFusedMoE: not supported"
    # Kimi-K3 (modeling_kimi_linear.py at 000a860db1), 896 experts.
    method = t.routing.DeepSeekV3MoeRoutingMethod(16, 1, 1, 2.5, lambda: torch.zeros(896))
    block = holder(gate=holder(routing_method=method), experts=experts_of(t, method, 0, 896))
    yield causal_lm([holder(block_sparse_moe=block)]), r"num_experts=896\): num_experts must be .* 512"
    # Kimi-K3's own block of before, with experts but no MoE module.
    block = holder(gate=dense(), expert_bank=dense())
    block.ep_size = 1
    yield causal_lm([holder(block_sparse_moe=block)]), "has no MoE layer with a routing_method"


def test_contract_models_that_are_refused(trtllm: Any) -> None:
    for model, why in refusals(trtllm):
        with pytest.raises(ValueError, match=why):
            Enabled(model, COVERAGE)
        assert not with_xshare(model)
