"""XShare in what torch.compile makes of a model, and in the pieces of it that are captured as CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_torch_backend import DUMMY, EXPERTS, SMALL, TOP_K, cutlass, engine_of, renormalize, trtllm
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_module_simplified
from torch._subclasses.fake_tensor import FakeTensorMode

from xshare_trtllm import RouterSpec, XShareConfig, mask_logits, ops, route
from xshare_trtllm.trtllm.setting import Setting
from xshare_trtllm.trtllm.torch_backend import Enabled, enable

__all__ = ["trtllm"]  # a fixture
pytestmark = pytest.mark.skipif(not ops.available(), reason="libxshare.so is not built: pip install -e .")
SPEC = RouterSpec(EXPERTS, TOP_K, "topk_softmax")
TURNED = XShareConfig(6)


class Backend:
    """compilation/backend.py at 0c27136cb9: the graph after functionalisation, without what nobody uses."""

    def __init__(self) -> None:
        self.targets: list[str] = []

    def __call__(self, graph: Any, inputs: list[Any]) -> Any:
        return aot_module_simplified(graph, inputs, fw_compiler=self.optimize)

    def optimize(self, graph: Any, inputs: list[Any]) -> Any:
        graph.graph.eliminate_dead_code()
        self.targets += [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        graph.recompile()
        return graph


def output_of(layers: Any, routings: list[tuple[Tensor, Tensor]]) -> Tensor:
    output = torch.ones(())
    for layer, (ids, weights) in zip(layers, routings, strict=True):
        output = output * (layer.scale[ids.long()] * weights).sum(-1)
    return output


@pytest.mark.parametrize("backend", ("DeepGemmFusedMoE", "TritonFusedMoE"))
def test_contract_a_layer_is_one_operator_of_the_compiled_model(backend: str, trtllm: Any) -> None:
    """Rows, dial and statistics are those of every step, though the model is traced in the first."""
    unit = getattr(trtllm.moe, backend)
    layers = [unit(routing_method=renormalize(trtllm), num_experts=EXPERTS, layer_idx=i) for i in range(2)]
    compiler = Backend()
    engine = engine_of(trtllm, *layers, torch_compile_backend=compiler)
    enabled = Enabled(engine.model, SMALL, has_dial=True)
    assert enabled.dial is not None
    for requests, config in (
        ([70, 71, 72, DUMMY], SMALL),
        ([80, DUMMY, DUMMY, DUMMY], SMALL),
        ([90, 91, 92, 93], TURNED),
    ):
        enabled.dial.turn(Setting(config))
        enabled.counters.zero_()
        logits = torch.randn(4, EXPERTS)
        output = engine.step(logits, requests)
        ids = torch.tensor([-1 if r >= 2**63 else i for i, r in enumerate(requests)], dtype=torch.int32)
        made = route(logits, SPEC, config, request_ids=ids)
        routing = made.expert_ids, made.expert_weights
        if enabled.backends() == {"TritonFusedMoE (masked logits)": 2}:
            best, chosen = mask_logits(logits, SPEC, config, request_ids=ids).topk(TOP_K)
            routing = chosen, best.softmax(-1)
        real = ids >= 0
        torch.testing.assert_close(output[real, 0], output_of(layers, [routing] * 2)[real], rtol=1e-6, atol=0)
        assert torch.equal(enabled.counters, made.raw_stats.expand(2, 8))
    assert compiler.targets.count("trtllm.moe_custom_op.default") == 2
    enabled.disable()


class PrefillCompiledModel(nn.Module):
    """pyexecutor/model_engine.py since pyexecutor/engine/runners/ is there: prefill goes through what was
    compiled, any other does not, and names do not tell of it."""

    def __init__(self, eager_model: nn.Module, compiled_model: Any) -> None:
        super().__init__()
        self.eager_model = eager_model
        object.__setattr__(self, "compiled_model", compiled_model)
        self.is_prefill = False

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        yield from self.eager_model.named_modules(memo, prefix, remove_duplicate)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.compiled_model if self.is_prefill else self.eager_model)(*args, **kwargs)


class Outer(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, SimpleNamespace(num_hidden_layers=2)

    def forward(self, **kwargs: Any) -> Any:
        return self.model(**kwargs)


def test_contract_a_model_that_is_compiled_for_prefill_alone(trtllm: Any) -> None:
    """`is_torch_compiling` is true in a step of prefill alone (engine/model_call.py at 0790edf6d3)."""
    unit, compiler = trtllm.moe.DeepGemmFusedMoE, Backend()
    layers = [unit(routing_method=renormalize(trtllm), num_experts=EXPERTS, layer_idx=i) for i in range(2)]
    eager = trtllm.engine.Model(*layers)
    both = PrefillCompiledModel(eager, torch.compile(eager, backend=compiler, fullgraph=True))
    outer = Outer(both)
    outer.extra_attrs = eager.extra_attrs
    engine = trtllm.engine.PyTorchModelEngine(model=outer)
    set_compiling = import_module("tensorrt_llm._torch.utils").set_torch_compiling
    set_compiling(True)
    with enable(outer, SMALL) as enabled:
        assert len(enabled) == 2
        for is_prefill in (False, True, False, True):
            both.is_prefill = is_prefill
            set_compiling(is_prefill)
            enabled.counters.zero_()
            logits = torch.randn(6, EXPERTS)
            output = engine.step(logits, [70, 71, 72, 73], [3, 1, 1, 1], num_contexts=1)
            ids = torch.tensor([0, 0, 0, 1, 2, 3], dtype=torch.int32)
            made = route(logits, SPEC, SMALL, request_ids=ids, exempt=torch.arange(6) < 3)
            wanted = output_of(layers, [(made.expert_ids, made.expert_weights)] * 2)
            torch.testing.assert_close(output[:, 0], wanted, rtol=1e-6, atol=0)
            assert torch.equal(enabled.counters, made.raw_stats.expand(2, 8))
    assert compiler.targets.count("trtllm.moe_custom_op.default") == 2


def test_contract_layers_that_torch_compile_looks_into_are_refused(trtllm: Any) -> None:
    """As of 1.0.0rc4, or a layer without a number."""
    layer = cutlass(trtllm, layer_idx=0)
    unnumbered = trtllm.moe.DeepGemmFusedMoE(routing_method=renormalize(trtllm), num_experts=EXPERTS)
    for each in (layer, unnumbered):
        engine = engine_of(trtllm, each, torch_compile_backend="eager")
        with pytest.raises(ValueError, match=r"torch\.compile looks into the MoE layers of this version"):
            enable(engine.model, SMALL)
    with enable(engine_of(trtllm, layer).model, SMALL):
        pass


def test_the_operators_in_a_graph_without_breaks() -> None:
    """As the hook calls them: the dial is read anew, and the counters are known to be written to."""
    dial = torch.frombuffer(bytearray(ops.pack_dial(SMALL, "on")), dtype=torch.uint8)
    counters = torch.zeros(2, 8, dtype=torch.int64)
    ids = torch.tensor([0, 1, 2, 3, 4, -1], dtype=torch.int32)

    def layer(logits: Tensor) -> tuple[Tensor, ...]:
        chosen, weights, active, stats = ops.route(logits, SPEC, SMALL, request_ids=ids, dial=dial)
        counters[0].add_(stats)
        masked = ops.mask_logits(logits, SPEC, SMALL, request_ids=ids, dial=dial, counters=counters[1])
        return chosen, weights, active, masked

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    wanted = torch.zeros(8, dtype=torch.int64)
    for config in (SMALL, TURNED, XShareConfig(coverage=0.8)):
        dial.copy_(torch.frombuffer(bytearray(ops.pack_dial(config, "on")), dtype=torch.uint8))
        logits = torch.randn(6, EXPERTS)
        made = route(logits, SPEC, config, request_ids=ids)
        expected = (made.expert_ids, made.expert_weights, made.active_experts)
        *routing, masked = compiled(logits)
        assert all(torch.equal(a, b) for a, b in zip(routing, expected, strict=True))
        assert torch.equal(masked, mask_logits(logits, SPEC, config, request_ids=ids))
        wanted += made.raw_stats
        assert torch.equal(counters, wanted.expand(2, 8))


def test_contract_a_piece_that_was_captured_for_more_rows(trtllm: Any) -> None:
    """compilation/piecewise_optimizer.py at 05fff03d90: captured in a warm-up with the engine's own metadata,
    and replayed for every step of no more rows, prefill or not; rows behind the step are padding."""
    layer = trtllm.moe.DeepGemmFusedMoE(routing_method=renormalize(trtllm), num_experts=EXPERTS, layer_idx=0)
    engine = engine_of(trtllm, layer)
    with enable(engine.model, SMALL) as enabled:
        engine.step(torch.randn(16, EXPERTS), [DUMMY], [16], num_contexts=1)
        with trtllm.engine.model_extra_attrs(engine.model.extra_attrs):
            piece = trtllm.engine.make_fx(
                lambda logits: engine.model_forward(attn_metadata=engine.attn_metadata, router_logits=logits)
            )(torch.zeros(16, EXPERTS))
        enabled.counters.zero_()
        for lengths, num_contexts in (([3, 1, 1], 1), ([1, 1], 0), ([12, 4], 2)):
            metadata = engine.attn_metadata
            metadata.seq_lens, metadata.num_contexts = torch.tensor(lengths), num_contexts
            metadata.request_ids = list(range(70, 70 + len(lengths)))
            metadata.prepare()
            logits = torch.randn(16, EXPERTS)
            output = piece(logits)
            requests = torch.full((16,), -1, dtype=torch.int32)
            rows = sum(lengths)
            places = torch.arange(len(lengths), dtype=torch.int32)
            requests[:rows] = places.repeat_interleave(torch.tensor(lengths))
            prefill = torch.arange(16) < sum(lengths[:num_contexts])
            made = route(logits, SPEC, SMALL, request_ids=requests, exempt=prefill)
            wanted = output_of([layer], [(made.expert_ids, made.expert_weights)])
            assert torch.equal(output[:rows, 0], wanted[:rows])
        assert int(enabled.counters[0, 7] & 0xFFFFFFFF) == 5 + 2 + 16


@pytest.mark.parametrize("device", ("cuda", "cpu"))
def test_the_operators_have_no_shape_to_wait_for(device: str) -> None:
    with FakeTensorMode():
        logits = torch.empty(6, EXPERTS, dtype=torch.bfloat16, device=device)
        dial = torch.empty(ops.DIAL_BYTES, dtype=torch.uint8, device=device)
        chosen, weights, active, stats = ops.route(logits, SPEC, SMALL, dial=dial)
    assert (chosen.shape, weights.shape, active.shape, stats.shape) == ((6, 4), (6, 4), (EXPERTS,), (8,))
