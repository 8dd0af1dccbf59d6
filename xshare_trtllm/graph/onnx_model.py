"""The routing as an ONNX model of one node, xshare::XShareRouting, with a body of standard operators.

ONNX Runtime runs the body. The node carries the plugin's fields, name and namespace as attributes: with the
plugin loaded, TensorRT's parser takes it instead, from TensorRT 10.15 on. Earlier ones prefer a body that is
there: leave it out for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from xshare_trtllm import __version__
from xshare_trtllm.config import NO_LIMIT, RouterSpec, XShareConfig
from xshare_trtllm.graph import routing
from xshare_trtllm.graph.inputs import GraphInputs
from xshare_trtllm.graph.ops import Binary, DType, Unary
from xshare_trtllm.report import write_aside

# The version of the node's attributes, as the plugin's: one that reads others does not know this name and
# version, so it never misreads them.
DOMAIN, NAME, VERSION = "xshare", "XShareRouting", "2"
OPSET, IR_VERSION = 18, 9

_TYPES = {
    "float32": TensorProto.FLOAT,
    "bfloat16": TensorProto.BFLOAT16,
    "float16": TensorProto.FLOAT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}
LOGITS_DTYPES = ("float32", "bfloat16", "float16")
_INPUTS = {
    "correction_bias": ("float32", ["experts"]),
    "request_ids": ("int32", ["rows"]),
    "exempt": ("bool", ["rows"]),
    "expert_gpu": ("int32", ["experts"]),
}


def make_model(
    spec: RouterSpec,
    config: XShareConfig,
    inputs: GraphInputs | None = None,
    *,
    dtype: str = "float32",
    body: bool = True,
) -> onnx.ModelProto:
    """An ONNX model that routes one layer.

    Inputs are router_logits [rows, E] of `dtype` (float32, bfloat16 or float16) and those of `inputs`
    (default: what router and configuration need); outputs are expert_ids int32 [rows, k], expert_weights
    float32 [rows, k] and active_experts bool [E]. `coverage` is rounded to the float32 of an ONNX
    attribute. Without `body` only TensorRT with the plugin can run it.

    Raises ValueError where the arguments do not fit together.
    """
    if dtype not in LOGITS_DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be {', '.join(LOGITS_DTYPES)}")
    inputs = GraphInputs.needed_by(spec, config) if inputs is None else inputs
    inputs.check(spec, config)
    names = ["router_logits", *inputs.names()]
    attributes = plugin_attributes(spec, config, inputs)
    node = helper.make_node(
        NAME,
        names,
        list(routing.OUTPUT_NAMES),
        name=NAME,
        domain=DOMAIN,
        plugin_version=VERSION,
        plugin_namespace=DOMAIN,
        **attributes,
    )
    shapes: dict[str, int | str] = {"rows": "rows", "experts": spec.num_experts, "top_k": spec.top_k}
    graph = helper.make_graph(
        [node],
        NAME,
        [_value("router_logits", dtype, ["rows", "experts"], shapes)]
        + [_value(name, *_INPUTS[name], shapes) for name in inputs.names()],
        [
            _value("expert_ids", "int32", ["rows", "top_k"], shapes),
            _value("expert_weights", "float32", ["rows", "top_k"], shapes),
            _value("active_experts", "bool", ["experts"], shapes),
        ],
    )
    return helper.make_model(
        graph,
        functions=[_function(spec, config, names, list(node.attribute))] if body else [],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, int(VERSION))],
        ir_version=IR_VERSION,
        producer_name="xshare-trtllm",
        producer_version=__version__,
    )


def save_model(path: Path, model: onnx.ModelProto) -> None:
    """Checked, written aside and renamed."""
    onnx.checker.check_model(model)
    with write_aside(path) as aside:
        aside.write_bytes(model.SerializeToString())


def plugin_attributes(spec: RouterSpec, config: XShareConfig, inputs: GraphInputs) -> dict[str, Any]:
    """The fields of the TensorRT plugin: those that differ from the plugin's defaults or are required."""
    values: dict[str, Any] = {
        "num_experts": spec.num_experts,
        "top_k": spec.top_k,
        "scoring": spec.scoring,
        "utility": config.utility,
        "num_groups": spec.num_groups,
        "top_k_groups": spec.top_k_groups,
        "routed_scaling_factor": spec.routed_scaling_factor,
        "warmup": config.warmup,
        "has_active_experts": 1,
    }
    for name in ("budget", "request_budget", "gpu_budget", "max_rows", "coverage"):
        if (value := getattr(config, name)) is not None:
            values[name] = min(value, NO_LIMIT)
    return values | {f"has_{name}": 1 for name in inputs.names()}


def _value(name: str, dtype: str, dims: list[str], shapes: dict[str, int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, _TYPES[dtype], [shapes[dim] for dim in dims])


def _function(
    spec: RouterSpec, config: XShareConfig, names: list[str], attributes: list[onnx.AttributeProto]
) -> onnx.FunctionProto:
    ops = OnnxOps()
    outputs = routing.route(ops, spec, config, {name: name for name in names})
    for name, made in zip(routing.OUTPUT_NAMES, outputs, strict=True):
        ops.nodes.append(helper.make_node("Identity", [made], [name]))
    return helper.make_function(
        DOMAIN,
        NAME,
        names,
        list(routing.OUTPUT_NAMES),
        ops.nodes,
        [helper.make_opsetid("", OPSET)],
        attributes=[attribute.name for attribute in attributes],
    )


class OnnxOps:
    """`Ops` as ONNX nodes; a tensor is its name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def _add(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> list[str]:
        names = [f"{kind}_{len(self.nodes)}" + ("" if i == 0 else f"_{i}") for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names

    def constant(self, value: npt.NDArray[np.generic]) -> str:
        key = (str(value.dtype), value.shape, value.tobytes())
        if key not in self._constants:
            self._constants[key] = self._add("Constant", value=numpy_helper.from_array(value))[0]
        return self._constants[key]

    def _sizes(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def binary(self, kind: Binary, a: str, b: str) -> str:
        return self._add(kind, a, b)[0]

    def unary(self, kind: Unary, a: str) -> str:
        return self._add(kind, a)[0]

    def cast(self, a: str, dtype: DType) -> str:
        return self._add("Cast", a, to=_TYPES[dtype])[0]

    def where(self, condition: str, a: str, b: str) -> str:
        return self._add("Where", condition, a, b)[0]

    def reduce_max(self, a: str, axis: int) -> str:
        return self._add("ReduceMax", a, self._sizes(axis))[0]

    def reduce_sum(self, a: str, axis: int) -> str:
        return self._add("ReduceSum", a, self._sizes(axis))[0]

    def cumulative_sum(self, a: str, axis: int) -> str:
        return self._add("CumSum", a, self.constant(np.array(axis, np.int64)))[0]

    def top_k(self, a: str, k: int, axis: int) -> tuple[str, str]:
        values, indices = self._add("TopK", a, self._sizes(k), outputs=2, axis=axis)
        return values, self.cast(indices, "int32")

    def gather(self, a: str, indices: str, axis: int) -> str:
        return self._add("Gather", a, indices, axis=axis)[0]

    def gather_elements(self, a: str, indices: str) -> str:
        return self._add("GatherElements", a, indices, axis=1)[0]

    def scatter_elements(self, a: str, indices: str, updates: str) -> str:
        return self._add("ScatterElements", a, indices, updates, axis=1)[0]

    def reshape(self, a: str, shape: tuple[int, ...]) -> str:
        return self._add("Reshape", a, self._sizes(*shape))[0]

    def transpose(self, a: str) -> str:
        return self._add("Transpose", a, perm=[1, 0])[0]

    def matmul(self, a: str, b: str) -> str:
        return self._add("MatMul", a, b)[0]
