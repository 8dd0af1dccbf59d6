"""Context rows, padding and request ids: the graph in ONNX Runtime against a plain statement of packing, and
as layers of a real TensorRT."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xshare_trtllm.trtllm.engine_rows import packed_rows, padded_rows

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
ort = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install onnxruntime")
from xshare_trtllm.graph.onnx_model import IR_VERSION, OPSET, OnnxOps  # noqa: E402

EXPERTS = 4


class RowNodes(OnnxOps):
    """`RowOps` as ONNX nodes."""

    def size(self, a: str, axis: int) -> str:
        whole = self.cast(self._add("Shape", a)[0], "int32")
        return self._add("Slice", whole, self._sizes(axis), self._sizes(axis + 1))[0]

    def arange(self, length: str) -> str:
        scalar = self._add("Squeeze", length)[0]
        start, step = (self.constant(np.array(value, np.int32)) for value in (0, 1))
        return self._add("Range", start, scalar, step)[0]


def session(kind: str, *, request_ids: bool = True) -> Any:
    """An ONNX Runtime session of one of the graphs: packed, speculative or padded."""
    ops, helper, types = RowNodes(), onnx.helper, onnx.TensorProto
    rank = 3 if kind == "padded" else 2
    inputs = {"logits": (types.FLOAT, rank), "context_lengths": (types.INT32, 1)}
    if kind == "padded":
        rows = padded_rows(ops, "logits", "context_lengths")
    else:
        generation = "generation_lengths" if kind == "speculative" else None
        if generation:
            inputs[generation] = (types.INT32, 1)
        rows = packed_rows(ops, "logits", "context_lengths", generation, request_ids=request_ids)
    made = [name for name in rows if name is not None]
    names = ["exempt", "request_ids"][: len(made)]
    for name, output in zip(names, made, strict=True):
        ops.nodes.append(helper.make_node("Identity", [output], [name]))
    graph = helper.make_graph(
        ops.nodes,
        "rows",
        [helper.make_tensor_value_info(n, t, [None] * r) for n, (t, r) in inputs.items()],
        [
            helper.make_tensor_value_info(n, types.BOOL if n == "exempt" else types.INT32, [None])
            for n in names
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


PACKED, SPECULATIVE, PADDED = (session(kind) for kind in ("packed", "speculative", "padded"))

chunks = st.lists(st.integers(1, 40), max_size=5)
prompts = st.lists(st.integers(1, 200_000), max_size=12)


def run(which: Any, rows: int, **lengths: list[int]) -> list[np.ndarray]:
    feed = {name: np.array(values, np.int32) for name, values in lengths.items()}
    made: list[np.ndarray] = which.run(None, {"logits": np.zeros((rows, EXPERTS), np.float32), **feed})
    return made


@settings(deadline=None, max_examples=200)
@given(chunks, prompts)
def test_packed(contexts: list[int], prompts: list[int]) -> None:
    """Context requests with their chunks, then generation requests of a row each with their prompts."""
    if not contexts and not prompts:
        return
    kind = [True] * sum(contexts) + [False] * len(prompts)
    while contexts and contexts[-1] == 1:  # cannot be told from a generation request, and need not be
        contexts, prompts = contexts[:-1], [1, *prompts]
        kind[sum(contexts)] = False
    exempt, request_ids = run(PACKED, len(kind), context_lengths=contexts + prompts)
    assert exempt.tolist() == kind
    assert request_ids.tolist() == list(range(len(kind)))


def test_a_full_batch_of_long_prompts() -> None:
    """The lengths add up to more than an int32 holds."""
    exempt, _ = run(PACKED, 4096, context_lengths=[1_000_000] * 4096)
    assert not exempt.any()
    exempt, _ = run(PACKED, 5000 + 4000, context_lengths=[3000, 2000] + [1_000_000] * 4000)
    assert exempt.tolist() == [True] * 5000 + [False] * 4000


def test_without_request_ids() -> None:
    (exempt,) = run(session("packed", request_ids=False), 5, context_lengths=[3, 7, 9])
    assert exempt.tolist() == [True] * 3 + [False] * 2


@settings(deadline=None, max_examples=200)
@given(chunks, st.lists(st.integers(1, 6), max_size=8), prompts)
def test_speculative(contexts: list[int], generated: list[int], prompts: list[int]) -> None:
    """Generation requests with a number of rows of their own each; the row's request is its place there."""
    rows = sum(contexts) + sum(generated)
    lengths = contexts + (prompts + [50] * len(generated))[: len(generated)]
    exempt, request_ids = run(SPECULATIVE, rows, context_lengths=lengths, generation_lengths=generated)
    assert exempt.tolist() == [True] * sum(contexts) + [False] * sum(generated)
    own = [request for request, count in enumerate(generated) for _ in range(count)]
    assert request_ids[sum(contexts) :].tolist() == own
    assert (request_ids >= 0).all()  # -1 would say padding


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.booleans())
def test_padded(lengths: list[int], is_context: bool) -> None:
    length = max(lengths) if is_context else 1
    logits = np.zeros((len(lengths), length, EXPERTS), np.float32)
    feed = {"logits": logits, "context_lengths": np.array(lengths, np.int32)}
    exempt, request_ids = PADDED.run(None, feed)
    wanted = [b if place < own else -1 for b, own in enumerate(lengths) for place in range(length)]
    assert request_ids.tolist() == wanted
    assert exempt.tolist() == [length > 1 and request >= 0 for request in wanted]


@pytest.mark.parametrize("kind", ("packed", "speculative", "padded"))
def test_layers_of_a_real_tensorrt(kind: str) -> None:
    """Built into an engine for a GPU that need not be there."""
    trt: Any = pytest.importorskip(
        "tensorrt_rtx_bindings",
        reason="needs TensorRT-RTX: pip install tensorrt-rtx-cu13-libs==1.7.1.116 "
        "tensorrt-rtx-cu13-bindings==1.7.1.116",
    )
    from xshare_trtllm.trtllm.engine import _RowLayers

    errors: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR) and "cudaError 35" not in message:
                errors.append(message)

    builder = trt.Builder(log := Log())
    network = builder.create_network(0)
    profile = builder.create_optimization_profile()

    def add_input(name: str, dtype: Any, *smallest: int) -> Any:
        profile.set_shape(name, smallest, *[[4 if size < 4 else size for size in smallest]] * 2)
        return network.add_input(name, dtype, [-1 if size < 4 else size for size in smallest])

    shape = (1, 1, EXPERTS) if kind == "padded" else (1, EXPERTS)
    logits = add_input("logits", trt.DataType.FLOAT, *shape)
    lengths = add_input("context_lengths", trt.DataType.INT32, 1)
    ops = _RowLayers(trt, network)
    if kind == "padded":
        rows = padded_rows(ops, logits, lengths)
    else:
        generation = add_input("generation", trt.DataType.INT32, 0) if kind == "speculative" else None
        rows = packed_rows(ops, logits, lengths, generation, request_ids=True)
    for name, dtype, tensor in zip(("exempt", "request_ids"), (trt.bool, trt.int32), rows, strict=True):
        assert tensor.dtype == dtype and tuple(tensor.shape) == (-1,)
        tensor.name = name
        network.mark_output(tensor)
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM80, 0)
    assert builder.build_serialized_network(network, config) is not None, errors
    assert errors == [] and log is not None
