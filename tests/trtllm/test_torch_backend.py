"""XShare in a model of the PyTorch backend, against the stand-in for TensorRT-LLM in torch_stand_in/."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xshare_trtllm import RouterSpec, XShareConfig, mask_logits, ops, route
from xshare_trtllm.trtllm import XShareMoeRoutingMethod, router_spec, torch_backend
from xshare_trtllm.trtllm.torch_backend import enable

STAND_IN = Path(__file__).parent / "torch_stand_in"
EXPERTS, TOP_K = 32, 4
DUMMY = 2**64 - 1
SMALL = XShareConfig(8, warmup=1)


@pytest.fixture(autouse=True)
def trtllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The stand-in's modules, fresh for each test."""
    monkeypatch.syspath_prepend(str(STAND_IN))
    ours = [name for name in sys.modules if name.partition(".")[0] == "tensorrt_llm"]
    for name in ours:
        monkeypatch.delitem(sys.modules, name)
    torch.manual_seed(0)
    yield SimpleNamespace(
        routing=import_module("tensorrt_llm._torch.modules.fused_moe.routing"),
        moe=import_module("tensorrt_llm._torch.modules.fused_moe.moe"),
        engine=import_module("tensorrt_llm._torch.pyexecutor.model_engine"),
        attention=import_module("tensorrt_llm._torch.attention_backend.interface"),
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]


BIAS = 0.1 * torch.randn(EXPERTS, generator=torch.Generator().manual_seed(1))
METHODS: dict[str, tuple[Callable[[Any], Any], RouterSpec]] = {
    "Default": (
        lambda r: r.DefaultMoeRoutingMethod(TOP_K),
        RouterSpec(EXPERTS, TOP_K, "softmax"),
    ),
    "Renormalize": (
        lambda r: r.RenormalizeMoeRoutingMethod(TOP_K),
        RouterSpec(EXPERTS, TOP_K, "topk_softmax"),
    ),
    "RenormalizeNaive": (
        lambda r: r.RenormalizeNaiveMoeRoutingMethod(TOP_K),
        RouterSpec(EXPERTS, TOP_K, "topk_softmax"),
    ),
    "DeepSeekV3": (
        lambda r: r.DeepSeekV3MoeRoutingMethod(TOP_K, 8, 4, 2.5, lambda: BIAS),
        RouterSpec(EXPERTS, TOP_K, "sigmoid_bias", 8, 4, 2.5),
    ),
    "DeepseekV3Gate": (
        lambda r: r.DeepseekV3Gate(16, EXPERTS, TOP_K, 8, 4, 2.5),
        RouterSpec(EXPERTS, TOP_K, "sigmoid_bias", 8, 4, 2.5),
    ),
    "MiniMaxM2": (
        lambda r: r.MiniMaxM2MoeRoutingMethod(TOP_K, EXPERTS, lambda: BIAS),
        RouterSpec(EXPERTS, TOP_K, "sigmoid_bias"),
    ),
    "Llama4Renormalize": (
        lambda r: r.Llama4RenormalizeMoeRoutingMethod(TOP_K),
        RouterSpec(EXPERTS, TOP_K, "topk_sigmoid"),
    ),
}


def bias_of(method: Any) -> Tensor | None:
    return getattr(method, "e_score_correction_bias", None)


def cutlass(trtllm: Any, **kwargs: Any) -> Any:
    method = kwargs.pop("routing_method", None) or trtllm.routing.RenormalizeMoeRoutingMethod(TOP_K)
    return trtllm.moe.CutlassFusedMoE(routing_method=method, num_experts=EXPERTS, **kwargs)


def engine_of(trtllm: Any, *layers: nn.Module, **kwargs: Any) -> Any:
    return trtllm.engine.PyTorchModelEngine(model=trtllm.engine.Model(*layers), **kwargs)


def expected(logits: Tensor, config: XShareConfig = SMALL, **arguments: Any) -> tuple[Tensor, Tensor]:
    routing = route(logits, RouterSpec(EXPERTS, TOP_K, "topk_softmax"), config, **arguments)
    return routing.expert_ids, routing.expert_weights


def assert_same(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


# ---- Routing methods ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_contract_every_method(name: str, trtllm: Any) -> None:
    """Off: the wrapped method's own output. On: `route` with the spec that its fields say, which without a
    limit is the wrapped method's routing."""
    make, spec = METHODS[name]
    method = make(trtllm.routing)
    logits = torch.randn(24, EXPERTS)
    own_ids, own_weights = method.apply(logits)
    assert router_spec(method, EXPERTS) == spec

    off = XShareMoeRoutingMethod(method, EXPERTS, XShareConfig(EXPERTS))
    assert_same(off.apply(logits), (own_ids, own_weights))
    unlimited = XShareMoeRoutingMethod(method, EXPERTS, XShareConfig(EXPERTS, coverage=1.0))
    ids, weights = unlimited.apply(logits)
    order, own_order = ids.argsort(), own_ids.argsort()
    assert torch.equal(ids.gather(1, order), own_ids.gather(1, own_order))
    # exp and division differ from torch's in the last bits
    torch.testing.assert_close(weights.gather(1, order), own_weights.gather(1, own_order), rtol=1e-5, atol=0)

    small = XShareMoeRoutingMethod(method, EXPERTS, SMALL)
    routing = route(logits, spec, SMALL, correction_bias=bias_of(method))
    assert_same(small.apply(logits), (routing.expert_ids, routing.expert_weights))
    assert len(small.apply(logits)[0].unique()) < len(own_ids.unique())


@pytest.mark.parametrize("name", METHODS)
def test_contract_is_the_wrapped_method_in_all_else(name: str, trtllm: Any) -> None:
    method = METHODS[name][0](trtllm.routing)
    made: Any = XShareMoeRoutingMethod(method, EXPERTS, SMALL)
    assert isinstance(made, type(method)) and isinstance(made, trtllm.routing.BaseMoeRoutingMethod)
    assert made.experts_per_token == made.get_experts_per_token() == made.top_k == TOP_K
    assert made.routing_method_type is method.routing_method_type
    assert made.requires_separated_routing
    assert dict(made.named_parameters()).keys() == dict(method.named_parameters()).keys()
    if name == "DeepSeekV3":
        assert made.routing_impl is method.routing_impl and made.e_score_correction_bias is BIAS


@pytest.mark.parametrize(
    ("make", "why"),
    (
        (lambda r: r.SparseMixerMoeRoutingMethod(2, 0.1), "SparseMixer.*: not supported, it chooses one"),
        (lambda r: r.BaseMoeRoutingMethod(), "BaseMoeRoutingMethod: not supported, it is not known"),
        (lambda r: type("DeepSeekV3MoeRoutingMethod", (), {"top_k": 4})(), "does not say its groups"),
    ),
)
def test_contract_refuses_methods_by_name(make: Callable[[Any], Any], why: str, trtllm: Any) -> None:
    with pytest.raises(ValueError, match=why):
        XShareMoeRoutingMethod(make(trtllm.routing), EXPERTS, SMALL)


def test_contract_weights_have_the_methods_dtype(trtllm: Any) -> None:
    method = trtllm.routing.RenormalizeMoeRoutingMethod(TOP_K, output_dtype=torch.bfloat16)
    assert (
        XShareMoeRoutingMethod(method, EXPERTS, SMALL).apply(torch.randn(4, EXPERTS))[1].dtype
        == torch.bfloat16
    )


# ---- Rows --------------------------------------------------------------------------------------------------


def test_contract_padding_and_prefill_rows(trtllm: Any) -> None:
    """Prefill sequences of 3 and 2 rows keep their own top-k, four decode rows share, the last is padding."""
    layer = cutlass(trtllm)
    engine = engine_of(trtllm, layer)
    logits = torch.randn(10, EXPERTS)
    with enable(engine.model, SMALL):
        engine.step(logits, [70, 71, 72, 73, 74, 75, DUMMY], [3, 2, 1, 1, 1, 1, 1], num_contexts=2)
    (call,) = layer.calls
    exempt = torch.arange(10) < 5
    requests = torch.tensor([0, 0, 0, 1, 1, 2, 3, 4, 5, -1], dtype=torch.int32)
    assert_same(call, expected(logits, exempt=exempt, request_ids=requests))
    own = layer.routing_method.apply(logits[:5])[0]
    assert torch.equal(call[0][:5].sort().values, own.sort().values)
    assert torch.count_nonzero(call[1][9]) == 0 and torch.isin(call[0][9], call[0][:9]).all()


@pytest.mark.parametrize("drafts", (0, 2))
def test_contract_drafts_that_are_filed_under_prefill(drafts: int, trtllm: Any) -> None:
    """`num_contexts` may count sequences with draft tokens, behind the prefill; they are not exempt."""
    layer = cutlass(trtllm)
    engine = engine_of(trtllm, layer)
    logits = torch.randn(12, EXPERTS)
    config = XShareConfig(10, request_budget=5)
    with enable(engine.model, config):
        engine.step(logits, [5, 6, 7], [4, 4, 4], num_contexts=1 + drafts, drafts=drafts)
    requests = torch.arange(3, dtype=torch.int32).repeat_interleave(4)
    assert_same(layer.calls[0], expected(logits, config, exempt=torch.arange(12) < 4, request_ids=requests))


def test_contract_a_rank_without_requests(trtllm: Any) -> None:
    """Request 0 is the dummy of an idle rank under attention data parallelism, and only there."""
    for is_spread in (False, True):
        layer = cutlass(trtllm)
        mapping = SimpleNamespace(enable_attention_dp=is_spread)
        engine = engine_of(trtllm, layer, mapping=mapping)
        with enable(engine.model, SMALL):
            engine.step(torch.randn(2, EXPERTS), [0, 8])
        assert bool(layer.calls[0][1][0].any()) is not is_spread


def test_contract_rows_behind_the_step_are_padding(trtllm: Any) -> None:
    """Attention data parallelism pads every rank's rows to the same number, beyond max_num_tokens even."""
    layer = cutlass(trtllm)
    engine = engine_of(trtllm, layer)
    logits = torch.randn(80, EXPERTS)
    with enable(engine.model, SMALL):
        engine.step(logits, [70, 71, 72])
    requests = torch.full((80,), -1, dtype=torch.int32)
    requests[:3] = torch.arange(3)
    assert_same(layer.calls[0], expected(logits, request_ids=requests))


def test_contract_rows_left_out_by_the_model_keep_their_own(trtllm: Any) -> None:
    layer = cutlass(trtllm)
    engine = engine_of(trtllm, layer)
    logits = torch.randn(3, EXPERTS)
    with enable(engine.model, XShareConfig(8, request_budget=6)):
        engine.step(logits, [70, 71, 72, 73])  # three rows of four
    assert_same(layer.calls[0], expected(logits, XShareConfig(EXPERTS)))


@pytest.mark.parametrize("length", (1, 3))
def test_contract_captured_graph_reads_the_rows_of_the_replayed_step(length: int, trtllm: Any) -> None:
    layer = cutlass(trtllm)
    engine = engine_of(trtllm, layer)
    config = XShareConfig(9, request_budget=6)
    with enable(engine.model, config):
        engine.step(torch.randn(2, EXPERTS), [1, 2])
        for requests in ([70, 71, 72, DUMMY], [80, DUMMY - 3, DUMMY - 3, DUMMY - 3], [90, 91, 92, 93]):
            logits = torch.randn(4 * length, EXPERTS)
            output = engine.step(logits, requests, [length] * 4, cuda_graph=True)
            places = torch.tensor(
                [-1 if r >= 2**63 else i for i, r in enumerate(requests)], dtype=torch.int32
            )
            ids, weights = expected(logits, config, request_ids=places.repeat_interleave(length))
            assert torch.equal(output[:, 0], (layer.scale[ids.long()] * weights).sum(-1))
    ((_, metadata, _),) = engine.graphs.values()
    assert vars(metadata)["xshare_rows"][0] is not vars(engine.attn_metadata)["xshare_rows"][0]


def test_contract_nothing_is_read_back_from_the_device(trtllm: Any) -> None:
    """Tracing with fake tensors fails where a value would have to be known on the host."""
    engine = engine_of(trtllm, cutlass(trtllm))
    trace = trtllm.engine.make_fx
    trtllm.engine.make_fx = lambda function: trace(function, tracing_mode="fake", _allow_non_fake_inputs=True)
    with enable(engine.model, XShareConfig(9, request_budget=6)):
        engine.step(torch.randn(4, EXPERTS), [70, 71, 72, DUMMY], cuda_graph=True)
    assert "xshare.route" in engine.graphs[4][0].code


def test_contract_chunks_know_their_rows(trtllm: Any) -> None:
    layer = cutlass(trtllm, moe_max_num_tokens=5)
    engine = engine_of(trtllm, layer)
    logits = torch.randn(12, EXPERTS)
    requests = [*range(70, 81), DUMMY]
    with enable(engine.model, SMALL):
        engine.step(logits, requests)
        engine.step(logits, requests)  # counts from 0 again
    assert [len(ids) for ids, _ in layer.calls] == [4, 4, 4] * 2
    places = torch.tensor([*range(11), -1], dtype=torch.int32)
    for call, rows in zip(layer.calls, [slice(0, 4), slice(4, 8), slice(8, 12)] * 2, strict=True):
        assert_same(call, expected(logits[rows], request_ids=places[rows]))


def test_contract_a_chunk_that_stands_in_is_padding(trtllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank with too few rows takes all turns, with the first chunk again; that output is dropped."""
    monkeypatch.setattr(torch_backend, "_attention_dp_group", lambda mapping: None)
    mapping = SimpleNamespace(**vars(trtllm.moe.SINGLE) | {"enable_attention_dp": True, "tp_size": 2})
    layer = cutlass(trtllm, mapping=mapping, moe_max_num_tokens=5)
    layer.split_chunk = lambda rows, chunks: [rows, 0]
    engine = engine_of(trtllm, layer, mapping=mapping)
    with enable(engine.model, SMALL):
        output = engine.step(torch.randn(3, EXPERTS), [70, 71, 72])
    assert [bool(weights.any()) for _, weights in layer.calls] == [True, False] and len(output) == 3


def test_contract_a_step_beyond_max_num_tokens(trtllm: Any) -> None:
    engine = engine_of(trtllm, cutlass(trtllm))
    with enable(engine.model, SMALL), pytest.raises(ValueError, match="65 rows in a step, more than max_num"):
        engine.step(torch.randn(65, EXPERTS), range(70, 135))


def test_contract_a_step_that_was_not_seen_is_refused(trtllm: Any) -> None:
    engine = engine_of(trtllm, cutlass(trtllm))
    attributes = import_module("tensorrt_llm._torch.utils").model_extra_attrs
    logits = torch.randn(4, EXPERTS)
    with enable(engine.model, SMALL):
        engine.model(attn_metadata=None, router_logits=logits)  # outside of the engine all rows are real
        with attributes({}), pytest.raises(RuntimeError, match="was not prepared by"):
            engine.model(attn_metadata=None, router_logits=logits)
        with attributes({}), pytest.raises(RuntimeError, match="was not prepared by"):
            engine.model_forward(attn_metadata=engine.attn_metadata, router_logits=logits)
    assert_same(engine.model.layers[0].calls[0], expected(logits))


def test_contract_beams_have_no_request_each(trtllm: Any) -> None:
    layer = cutlass(trtllm)
    engine = engine_of(trtllm, layer)
    logits = torch.randn(4, EXPERTS)
    with enable(engine.model, SMALL):
        engine.step(logits, [70, DUMMY], [1, 1, 1, 1])
    assert_same(layer.calls[0], expected(logits))


# ---- Backends ----------------------------------------------------------------------------------------------


def renormalize(trtllm: Any) -> Any:
    return trtllm.routing.RenormalizeMoeRoutingMethod(TOP_K)


@pytest.mark.parametrize("backend", ("TritonFusedMoE", "TRTLLMGenFusedMoE"))
@pytest.mark.parametrize("naive", (False, True))
def test_contract_masked_logits(backend: str, naive: bool, trtllm: Any) -> None:
    """A kernel that routes by itself chooses what `route` chooses; the routing method stays as it was."""
    method = METHODS["RenormalizeNaive" if naive else "Renormalize"][0](trtllm.routing)
    layer = getattr(trtllm.moe, backend)(routing_method=method, num_experts=EXPERTS)
    engine = engine_of(trtllm, layer)
    logits = torch.randn(9, EXPERTS)
    requests = [*range(70, 78), DUMMY]
    with enable(engine.model, SMALL):
        engine.step(logits, requests, num_contexts=1)
        assert layer.routing_method is method
    (call,) = layer.calls
    arguments = {
        "exempt": torch.arange(9) < 1,
        "request_ids": torch.tensor([*range(8), -1], dtype=torch.int32),
    }
    masked = mask_logits(logits, RouterSpec(EXPERTS, TOP_K, "topk_softmax"), SMALL, **arguments)
    assert_same(call, layer.kernel_routing(masked))
    ids, weights = expected(logits, **arguments)
    assert torch.equal(call[0][:8], ids[:8])
    torch.testing.assert_close(call[1][:8], weights[:8], rtol=1e-5, atol=0)  # another exp
    assert torch.isin(call[0][8], ids[:8]).all()


def test_contract_off_hands_on_the_logits_themselves(trtllm: Any) -> None:
    layer = trtllm.moe.TritonFusedMoE(routing_method=renormalize(trtllm), num_experts=EXPERTS)
    logits = torch.randn(9, EXPERTS)
    with enable(engine_of(trtllm, layer).model, XShareConfig(EXPERTS)):
        layer(torch.ones(9, 4), logits)
    assert_same(layer.calls[0], layer.kernel_routing(logits))


@pytest.mark.parametrize("name", ("Default", "DeepSeekV3", "MiniMaxM2"))
@pytest.mark.parametrize("backend", ("TritonFusedMoE", "TRTLLMGenFusedMoE"))
def test_contract_refuses_masks_that_would_be_wrong(backend: str, name: str, trtllm: Any) -> None:
    method = METHODS[name][0](trtllm.routing)
    layer = getattr(trtllm.moe, backend)(routing_method=method, num_experts=EXPERTS)
    with pytest.raises(ValueError, match=f"MoE layer 0: {backend} routes inside .* set moe_config.backend"):
        enable(engine_of(trtllm, layer).model, SMALL)


def test_contract_refuses_backends_by_name(trtllm: Any) -> None:
    layer = trtllm.moe.MarlinFusedMoE(routing_method=renormalize(trtllm), num_experts=EXPERTS)
    with pytest.raises(ValueError, match="MoE layer 1: MoE backend MarlinFusedMoE: not supported outside"):
        enable(engine_of(trtllm, cutlass(trtllm), layer).model, SMALL)


def test_contract_trtllm_gen_applies_where_rows_are_spread(
    trtllm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_backend, "_attention_dp_group", lambda mapping: None)
    mapping = SimpleNamespace(**vars(trtllm.moe.SINGLE) | {"enable_attention_dp": True, "tp_size": 2})
    method, spec = METHODS["DeepSeekV3"][0](trtllm.routing), METHODS["DeepSeekV3"][1]
    layer = trtllm.moe.TRTLLMGenFusedMoE(routing_method=method, num_experts=EXPERTS, mapping=mapping)
    logits = torch.randn(6, EXPERTS)
    engine = engine_of(trtllm, layer)
    with enable(engine.model, SMALL):
        engine.step(logits, range(70, 76))
    routing = route(logits, spec, SMALL, correction_bias=BIAS)
    assert_same(layer.calls[0], (routing.expert_ids, routing.expert_weights))
    triton = trtllm.moe.TritonFusedMoE(
        routing_method=renormalize(trtllm), num_experts=EXPERTS, mapping=mapping
    )
    with pytest.raises(ValueError, match="TritonFusedMoE with attention data parallelism"):
        enable(engine_of(trtllm, triton).model, SMALL)


@pytest.mark.parametrize("name", ("Renormalize", "DeepSeekV3"))
def test_contract_later_versions_are_asked_to_route_separately(name: str, trtllm: Any) -> None:
    """A layer around a backend: both have the routing method, and the kernel's shortcut is not taken."""
    if name == "Renormalize":
        method = trtllm.routing.LaterRenormalize(TOP_K)
    else:
        method = trtllm.routing.LaterDeepSeekV3(TOP_K, 8, 4, 2.5, lambda: BIAS)
    layer = trtllm.moe.ConfigurableMoE(
        trtllm.moe.TRTLLMGenFusedMoE, routing_method=method, num_experts=EXPERTS, layer_idx=0
    )
    engine = engine_of(trtllm, layer)
    logits = torch.randn(6, EXPERTS)
    with enable(engine.model, SMALL) as enabled:
        assert len(enabled) == 1
        assert isinstance(layer.backend.routing_method, XShareMoeRoutingMethod)
        engine.step(logits, range(70, 76))
    routing = route(logits, METHODS[name][1], SMALL, correction_bias=bias_of(method))
    assert_same(layer.backend.calls[0], (routing.expert_ids, routing.expert_weights))
    assert layer.routing_method is layer.backend.routing_method is method
    assert layer.backend.try_fused_kimi_route_quant.__func__  # its own again


def test_contract_a_block_that_gathers_before_its_gate_is_refused(trtllm: Any) -> None:
    """modeling_deepseekv3.py at 000561d (1.0) and others: with TRTLLM-gen and attention data parallelism, the
    rows of all ranks are gathered before the gate, and a rank would take them for its own."""

    class Block(nn.Module):
        def __init__(self, experts: Any) -> None:
            super().__init__()
            self.experts = experts

        def forward(self, x: Tensor, router_logits: Tensor) -> Tensor:
            def allgather(rows: Tensor) -> Tensor:
                return rows

            output: Tensor = self.experts(allgather(x), router_logits)
            return output

    class Derived(Block):
        """As modeling_exaone_moe.py at 0d30bf1243 derives its block from Deepseekv3MoE."""

    mapping = SimpleNamespace(**vars(trtllm.moe.SINGLE) | {"enable_attention_dp": True, "tp_size": 2})
    layer = trtllm.moe.TRTLLMGenFusedMoE(
        routing_method=renormalize(trtllm), num_experts=EXPERTS, mapping=mapping
    )
    for block in (Block, Derived):
        with pytest.raises(
            ValueError, match=rf"layer 0: TRTLLMGen.*: {block.__name__} may gather all ranks' rows"
        ):
            enable(engine_of(trtllm, block(layer)).model, SMALL)

    class KernelOnly(nn.Module):
        """fused_moe_trtllm_gen.py of 1.0: nothing of it calls `apply`."""

    KernelOnly.__name__ = "TRTLLMGenFusedMoE"
    bare: Any = KernelOnly()
    vars(bare).update({key: value for key, value in vars(layer).items() if key != "forward_impl"})
    with pytest.raises(
        ValueError, match=r"MoE layer 0: TRTLLMGenFusedMoE .*routes in its kernel, use CUTLASS"
    ):
        enable(engine_of(trtllm, bare).model, SMALL)


# ---- Expert parallelism ------------------------------------------------------------------------------------


def test_contract_experts_of_a_rank_are_a_slice(trtllm: Any) -> None:
    mapping = SimpleNamespace(**vars(trtllm.moe.SINGLE) | {"moe_ep_size": 4})
    layer = cutlass(trtllm, mapping=mapping)
    engine = engine_of(trtllm, layer)
    logits = torch.randn(12, EXPERTS)
    config = XShareConfig(EXPERTS, warmup=0, gpu_budget=2)
    with enable(engine.model, config):
        engine.step(logits, range(70, 82))
    assert_same(layer.calls[0], expected(logits, config, expert_gpu=torch.arange(EXPERTS) // 8))
    assert all(len(torch.unique(layer.calls[0][0][layer.calls[0][0] // 8 == gpu])) <= 2 for gpu in range(4))


@pytest.mark.parametrize(
    ("change", "ranks", "why"),
    (
        (lambda moe: setattr(moe, "num_slots", 40), 4, "expert load balancer moves experts"),
        (lambda moe: setattr(moe, "layer_load_balancer", object()), 4, "expert load balancer moves"),
        (lambda moe: None, 3, "32 experts on 3 ranks is uneven"),
    ),
)
def test_contract_refuses_gpu_budgets(
    change: Callable[[Any], None], ranks: int, why: str, trtllm: Any
) -> None:
    mapping = SimpleNamespace(**vars(trtllm.moe.SINGLE) | {"moe_ep_size": ranks})
    layer = cutlass(trtllm, mapping=mapping)
    change(layer)
    model = engine_of(trtllm, layer).model
    with pytest.raises(ValueError, match=rf"XShareConfig\(gpu_budget=4\): .*{why}"):
        enable(model, XShareConfig(16, gpu_budget=4))
    enable(model, XShareConfig(16)).disable()  # without a budget per GPU nobody asks where experts are


# ---- Models ------------------------------------------------------------------------------------------------


def state(model: nn.Module) -> list[tuple[str, Any]]:
    return [
        (f"{name}.{key}", value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    ]


def test_contract_disable_leaves_no_trace(trtllm: Any) -> None:
    layers = [
        cutlass(trtllm),
        trtllm.moe.DeepGemmFusedMoE(routing_method=renormalize(trtllm), num_experts=EXPERTS),
        trtllm.moe.TritonFusedMoE(routing_method=renormalize(trtllm), num_experts=EXPERTS),
    ]
    layers[0].forward = layers[0].forward  # somebody else has wrapped it
    model = engine_of(trtllm, *layers).model
    methods = [layer.routing_method for layer in layers]
    before = [(name, id(value)) for name, value in state(model)]
    keys = list(model.state_dict())
    prepares = [
        vars(kind)["prepare"]
        for kind in (trtllm.attention.AttentionMetadata, trtllm.attention.TrtllmAttentionMetadata)
    ]
    enabled = enable(model, SMALL)
    assert list(model.state_dict()) == keys
    assert vars(trtllm.attention.AttentionMetadata)["prepare"] is not prepares[0]
    enabled.disable()
    enabled.disable()
    assert [(name, id(value)) for name, value in state(model)] == before
    assert [layer.routing_method for layer in layers] == methods
    assert [
        vars(kind)["prepare"]
        for kind in (trtllm.attention.AttentionMetadata, trtllm.attention.TrtllmAttentionMetadata)
    ] == prepares


def test_contract_enable_twice_is_refused(trtllm: Any) -> None:
    for layer in (
        cutlass(trtllm),
        trtllm.moe.TritonFusedMoE(routing_method=renormalize(trtllm), num_experts=EXPERTS),
    ):
        model = engine_of(trtllm, layer).model
        with (
            enable(model, SMALL),
            pytest.raises(ValueError, match=r"has XShare already; disable\(\) it first"),
        ):
            enable(model, SMALL)
        enable(model, SMALL).disable()


def test_contract_two_models_at_once(trtllm: Any) -> None:
    first, second = engine_of(trtllm, cutlass(trtllm)), engine_of(trtllm, cutlass(trtllm))
    one, two = enable(first.model, SMALL), enable(second.model, SMALL)
    one.disable()
    logits = torch.randn(4, EXPERTS)
    second.step(logits, [70, 71, 72, DUMMY])
    assert not second.model.layers[0].calls[0][1][3].any()
    two.disable()


def test_contract_budgets_per_layer(trtllm: Any) -> None:
    """Layers for draft tokens behind the model's last, and the backend inside a layer, are not counted."""
    later = trtllm.routing.LaterRenormalize(TOP_K)
    layers = [
        cutlass(trtllm, layer_idx=1),
        trtllm.moe.ConfigurableMoE(
            trtllm.moe.TRTLLMGenFusedMoE, routing_method=later, num_experts=EXPERTS, layer_idx=2
        ),
        trtllm.moe.ConfigurableMoE(
            trtllm.moe.TRTLLMGenFusedMoE, routing_method=later, num_experts=EXPERTS, layer_idx=3
        ),
    ]
    model = trtllm.engine.Model(*layers, num_hidden_layers=3)
    engine = trtllm.engine.PyTorchModelEngine(model=model)
    logits = torch.randn(16, EXPERTS)
    with enable(model, XShareConfig((6, 12))) as enabled:
        assert len(enabled) == 2 and layers[2].routing_method is later
        engine.step(logits, range(70, 86))
    for calls, budget in ((layers[0].calls, 6), (layers[1].backend.calls, 12)):
        assert_same(calls[0], expected(logits, XShareConfig(budget)))
    with pytest.raises(ValueError, match=r"XShareConfig\(budget=\): names 3 layers, the model has 2 MoE"):
        enable(model, XShareConfig((6, 12, 6)))


def test_contract_gpt_oss_block(trtllm: Any) -> None:
    """Its MoE module is `experts`; the block, which holds the routing method too, is none."""
    block = import_module("tensorrt_llm._torch.models.modeling_gpt_oss").MLPBlock(cutlass(trtllm), 0)
    engine = engine_of(trtllm, block)
    logits = torch.randn(6, EXPERTS)
    own = block.routing_method
    with enable(engine.model, SMALL) as enabled:
        assert len(enabled) == 1 and block.routing_method is own
        engine.step(logits, range(70, 76))
    assert_same(block.experts.calls[0], expected(logits))


def test_contract_layers_of_a_draft_model_inside_the_model(trtllm: Any) -> None:
    """Eagle3 and MTP in one engine: `SpecDecOneEngineForCausalLM.draft_model` (modeling_speculative.py at
    00679c66c3); a vision model keeps the number of layers in `config.text_config`."""
    model = engine_of(trtllm, cutlass(trtllm, layer_idx=0)).model
    model.draft_model = trtllm.engine.Model(cutlass(trtllm, layer_idx=0))
    with enable(model, SMALL) as enabled:
        assert len(enabled) == 1
        assert not isinstance(model.draft_model.layers[0].routing_method, XShareMoeRoutingMethod)
    vision = engine_of(trtllm, cutlass(trtllm, layer_idx=0), cutlass(trtllm, layer_idx=1)).model
    vision.config = SimpleNamespace(text_config=SimpleNamespace(num_hidden_layers=1))
    with enable(vision, SMALL) as enabled:
        assert len(enabled) == 1


def test_contract_metadata_of_a_vision_tower_is_none_of_ours(trtllm: Any) -> None:
    """Qwen3-VL and others prepare metadata without a KV cache, for more rows than it says it takes."""
    layer = cutlass(trtllm)
    engine = engine_of(trtllm, layer)
    tower = trtllm.attention.TrtllmAttentionMetadata(max_num_requests=1, max_num_tokens=4)
    tower.seq_lens, tower.request_ids = torch.tensor([100]), [1]
    logits = torch.randn(4, EXPERTS)
    with enable(engine.model, SMALL):
        tower.prepare()
        engine.step(logits, range(70, 74))
    assert tower.prepared == 1 and "xshare_rows" not in vars(tower)
    assert_same(layer.calls[0], expected(logits))


def test_contract_refusals_change_nothing(trtllm: Any) -> None:
    bad = cutlass(trtllm, routing_method=trtllm.routing.SparseMixerMoeRoutingMethod(2, 0.1))
    model = engine_of(trtllm, cutlass(trtllm), bad).model
    before = [(name, id(value)) for name, value in state(model)]
    with pytest.raises(ValueError, match="MoE layer 1: SparseMixerMoeRoutingMethod: not supported"):
        enable(model, SMALL)
    with pytest.raises(ValueError, match=r"MoE layer 0: XShareConfig\(budget=3\): budget must be at least"):
        enable(model, XShareConfig(3))
    mapping = SimpleNamespace(**vars(trtllm.moe.SINGLE) | {"pp_size": 2})
    with pytest.raises(ValueError, match="not with pipeline parallelism"):
        enable(engine_of(trtllm, cutlass(trtllm, mapping=mapping)).model, XShareConfig((8,)))
    with pytest.raises(ValueError, match="Linear has no MoE layer"):
        enable(nn.Linear(2, 2), SMALL)
    assert [(name, id(value)) for name, value in state(model)] == before
    assert vars(trtllm.attention.AttentionMetadata)["prepare"].__name__ == "prepare"


def test_contract_llm_in_this_process(trtllm: Any) -> None:
    """Graphs that were captured before `enable` know nothing of XShare and are released."""
    engine = engine_of(trtllm, cutlass(trtllm))
    engine.step(torch.randn(4, EXPERTS), [1, 2, 3, 4], cuda_graph=True)
    llm = SimpleNamespace(_executor=SimpleNamespace(engine=SimpleNamespace(model_engine=engine)))
    assert engine.graphs
    with enable(llm, SMALL) as enabled:
        assert len(enabled) == 1 and not engine.graphs
    for elsewhere in (SimpleNamespace(_executor=object()), SimpleNamespace(), object()):
        with pytest.raises(ValueError, match="its model is not in this process; call use"):
            enable(elsewhere, SMALL)


def test_contract_a_gpu_needs_the_library(trtllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "_device", lambda module: torch.device("cuda"))
    monkeypatch.setattr(ops, "why_no_cuda", lambda: "kernels cannot be compiled here")
    with pytest.raises(RuntimeError, match=r"^XShare: kernels cannot be compiled here"):
        enable(engine_of(trtllm, cutlass(trtllm)).model, SMALL)
