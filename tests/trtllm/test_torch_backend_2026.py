"""XShare against what TensorRT-LLM's main had become by August 2026: torch_stand_in_2026/, which names the
files and commits. What did not change is tested in test_torch_backend.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from xshare_trtllm import RouterSpec, XShareConfig, mask_logits, route
from xshare_trtllm.trtllm import torch_backend, torch_rows
from xshare_trtllm.trtllm.torch_backend import enable
from xshare_trtllm.trtllm.torch_routing import XShareMoeRoutingMethod
from xshare_trtllm.trtllm.torch_support import router_spec

HERE = Path(__file__).parent
EXPERTS, TOP_K = 32, 4
DUMMY = 2**64 - 1
SMALL = XShareConfig(8, warmup=1)
BIAS = 0.1 * torch.randn(EXPERTS, generator=torch.Generator().manual_seed(1))


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def trtllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    monkeypatch.syspath_prepend(str(HERE / "torch_stand_in_2026"))
    forget()
    torch.manual_seed(0)
    yield SimpleNamespace(
        routing=import_module("tensorrt_llm._torch.moe.fused_moe.routing"),
        moe=import_module("tensorrt_llm._torch.moe.fused_moe.moe"),
        engine=import_module("tensorrt_llm._torch.pyexecutor.model_engine"),
        attention=import_module("tensorrt_llm._torch.attention.backends.interface"),
    )
    forget()


def layer_of(trtllm: Any, backend: str, method: Any = None, **kwargs: Any) -> Any:
    method = method or trtllm.routing.RenormalizeMoeRoutingMethod(TOP_K)
    unit = getattr(trtllm.moe, backend)
    return trtllm.moe.ConfigurableMoE(unit, routing_method=method, num_experts=EXPERTS, **kwargs)


def engine_of(trtllm: Any, *layers: Any, **kwargs: Any) -> Any:
    return trtllm.engine.PyTorchModelEngine(model=trtllm.engine.Model(*layers), **kwargs)


def expected(logits: Tensor, spec: RouterSpec | None = None, **arguments: Any) -> tuple[Tensor, Tensor]:
    routing = route(logits, spec or RouterSpec(EXPERTS, TOP_K, "topk_softmax"), SMALL, **arguments)
    return routing.expert_ids, routing.expert_weights


def assert_same(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


# ---- Routing methods ---------------------------------------------------------------------------------------

METHODS: dict[str, tuple[Callable[[Any], Any], RouterSpec, Tensor | None]] = {
    "SigmoidRenorm": (
        lambda r: r.SigmoidRenormMoeRoutingMethod(TOP_K, EXPERTS),
        RouterSpec(EXPERTS, TOP_K, "sigmoid_bias"),
        None,
    ),
    "MiniMaxM3": (
        lambda r: r.MiniMaxM3MoeRoutingMethod(TOP_K, EXPERTS, lambda: BIAS, 2.5),
        RouterSpec(EXPERTS, TOP_K, "sigmoid_bias", routed_scaling_factor=2.5),
        BIAS,
    ),
    "SqrtSoftplus": (
        lambda r: r.SqrtSoftplusMoeRoutingMethod(TOP_K, EXPERTS, lambda: BIAS),
        RouterSpec(EXPERTS, TOP_K, "sqrt_softplus_bias"),
        BIAS,
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_contract_new_methods_that_a_scoring_function_expresses(name: str, trtllm: Any) -> None:
    make, spec, bias = METHODS[name]
    method = make(trtllm.routing)
    assert router_spec(method, EXPERTS) == spec
    logits = torch.randn(24, EXPERTS)
    own_ids, own_weights = method.apply(logits)
    unlimited = XShareMoeRoutingMethod(method, EXPERTS, XShareConfig(EXPERTS, request_budget=EXPERTS))
    routing = unlimited.layer
    routing.config = XShareConfig(EXPERTS)
    ids, weights = unlimited.layer.route(logits)
    order, own_order = ids.argsort(), own_ids.argsort()
    assert torch.equal(ids.gather(1, order), own_ids.gather(1, own_order))
    torch.testing.assert_close(weights.gather(1, order), own_weights.gather(1, own_order), rtol=1e-5, atol=0)
    small = XShareMoeRoutingMethod(method, EXPERTS, SMALL)
    assert_same(small.apply(logits, None), expected(logits, spec, correction_bias=bias))


@pytest.mark.parametrize(
    ("make", "why"),
    (
        (
            lambda r: r.DeepSeekV4MoeRoutingMethod(4, 1, 1, 1.0, lambda: BIAS, lambda: BIAS),
            "DeepSeekV4.*in some layers it looks tokens up in a table",
        ),
        (
            lambda r: r.SigmoidRenormMoeRoutingMethod(4, 32, renormalize=False),
            "renormalize=False.*divided by",
        ),
        (
            lambda r: r.StaticMoeRoutingMethod(torch.zeros(1, 4, dtype=torch.int32)),
            "Static.*fixed beforehand",
        ),
        (lambda r: r.LoadBalancedMoeRoutingMethod(4), "LoadBalanced.*deals the experts out"),
    ),
)
def test_contract_new_methods_refused_by_name(make: Callable[[Any], Any], why: str, trtllm: Any) -> None:
    layer = layer_of(trtllm, "TrtllmCutlassUnquantizedImpl", make(trtllm.routing))
    with pytest.raises(ValueError, match=f"MoE layer 0: .*{why}"):
        enable(engine_of(trtllm, layer).model, SMALL)


def test_contract_apply_hands_on_input_ids(trtllm: Any) -> None:
    """Where XShare is off, the wrapped method gets all that the scheduler hands over."""
    seen: list[Any] = []

    class Watching(trtllm.routing.RenormalizeMoeRoutingMethod):  # type: ignore[misc,name-defined]
        def apply(self, router_logits: Tensor, input_ids: Tensor | None = None) -> Any:
            seen.append(input_ids)
            return super().apply(router_logits, input_ids)

    Watching.__name__ = "RenormalizeMoeRoutingMethod"
    layer = layer_of(trtllm, "TrtllmCutlassUnquantizedImpl", Watching(TOP_K))
    ids = torch.arange(6)
    for config in (XShareConfig(EXPERTS), SMALL):
        with enable(engine_of(trtllm, layer).model, config):
            layer(torch.ones(6, 4), torch.randn(6, EXPERTS), input_ids=ids)
    assert len(seen) == 1 and seen[0] is ids


# ---- Back ends ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "backend",
    (
        "TrtllmCutlassUnquantizedImpl",
        "DeepgemmCudaHopperFp8BlockScalesImpl",
        "TrtllmTrtllmGenNvfp4Impl",
        "MarlinFusedMoE",
        "MarlinCudaNvfp4Impl",
        "PrimsTSNvfp4FusedMoE",
    ),
)
def test_contract_leaf_classes(backend: str, trtllm: Any) -> None:
    """By what a class descends from or its descriptor says; the fused shortcut is not taken, and is back
    again afterwards."""
    layer = layer_of(trtllm, backend, layer_idx=0)
    engine = engine_of(trtllm, layer)
    logits = torch.randn(7, EXPERTS)
    with enable(engine.model, SMALL):
        engine.step(logits, [*range(70, 76), DUMMY])
    requests = torch.tensor([*range(6), -1], dtype=torch.int32)
    assert_same(layer.backend.calls[0], expected(logits, request_ids=requests))
    assert layer.routing_method is layer.backend.routing_method
    assert layer.backend.try_fused_route_quant.__func__ is type(layer.backend).try_fused_route_quant


def test_contract_the_exchange_in_the_kernel_cuts_padding_off(
    trtllm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_backend, "_attention_dp_group", lambda mapping: None)
    mapping = SimpleNamespace(**vars(trtllm.moe.SINGLE) | {"enable_attention_dp": True, "tp_size": 2})
    layer = layer_of(trtllm, "MegaMoEDeepGemm", mapping=mapping)
    logits = torch.randn(8, EXPERTS)
    with enable(engine_of(trtllm, layer).model, SMALL):
        layer(torch.ones(8, 4), logits, all_rank_num_tokens=[5, 8])
    assert_same(layer.backend.calls[0], expected(logits[:5]))


@pytest.mark.parametrize(
    ("backend", "why"),
    (
        ("DenseGemmNvfp4Impl", r"trtllm.cutedsl.dense_gemm.nvfp4\): not supported, it computes every expert"),
        ("UnheardOfImpl", r"someone.tilelang.grouped_gemm.none\): not supported, its technique is not known"),
    ),
)
def test_contract_leaf_classes_refused_by_name(backend: str, why: str, trtllm: Any) -> None:
    model = engine_of(trtllm, layer_of(trtllm, backend)).model
    with pytest.raises(ValueError, match=rf"MoE layer 0: MoE backend {backend} \({why}"):
        enable(model, SMALL)


def test_contract_triton_stays_a_layer_of_its_own(trtllm: Any) -> None:
    method = trtllm.routing.RenormalizeMoeRoutingMethod(TOP_K)
    experts = trtllm.moe.TritonFusedMoE(routing_method=method, num_experts=EXPERTS)
    block = import_module("tensorrt_llm._torch.models.modeling_gpt_oss").MLPBlock(experts, 0)
    engine = engine_of(trtllm, block)
    logits = torch.randn(6, EXPERTS)
    with enable(engine.model, SMALL) as enabled:
        assert len(enabled) == 1
        engine.step(logits, range(70, 76))
    spec = RouterSpec(EXPERTS, TOP_K, "topk_softmax")
    masked = mask_logits(logits, spec, SMALL, request_ids=torch.arange(6, dtype=torch.int32))
    assert torch.equal(experts.calls[0][0], masked.topk(TOP_K).indices.to(torch.int32))


# ---- Where things are --------------------------------------------------------------------------------------


def test_contract_attention_metadata_has_moved(trtllm: Any) -> None:
    with pytest.raises(ModuleNotFoundError):
        import_module("tensorrt_llm._torch.attention_backend.interface")
    assert torch_rows.attention_metadata_class() is trtllm.attention.AttentionMetadata


def test_contract_metadata_in_neither_home_changes_nothing(
    trtllm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_rows, "METADATA_MODULES", ("tensorrt_llm._torch.elsewhere",))
    layer = layer_of(trtllm, "TrtllmCutlassUnquantizedImpl")
    own = layer.routing_method
    with pytest.raises(RuntimeError, match=r"AttentionMetadata in none of tensorrt_llm\._torch\.elsewhere"):
        enable(engine_of(trtllm, layer).model, SMALL)
    assert layer.routing_method is own and "forward_impl" not in vars(layer)
    monkeypatch.undo()


def test_contract_a_home_that_misses_something_says_what(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An import error inside the module is not taken for the module's absence."""
    (tmp_path / "homeless.py").write_text("import surely_not_installed\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch_rows, "METADATA_MODULES", ("homeless",))
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        torch_rows.attention_metadata_class()
