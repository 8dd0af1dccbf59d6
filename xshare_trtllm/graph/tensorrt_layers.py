"""The routing as native TensorRT layers, for where no plugin can go: TensorRT-RTX, engines ahead of time.

TensorRT fuses operations and may contract a multiplication and an addition: affinities can differ from the
reference in the last bits, so experts whose utilities are that close may swap. `coverage` is rounded to
float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from xshare_trtllm.config import RouterSpec, XShareConfig
from xshare_trtllm.graph import routing
from xshare_trtllm.graph.inputs import GraphInputs
from xshare_trtllm.graph.ops import Binary, DType, Unary

_BINARY = {"Add": "SUM", "Mul": "PROD"}  # where TensorRT's name is not the same in capitals
INPUT_SHAPES = {
    "router_logits": ("rows", "experts"),
    "correction_bias": ("experts",),
    "request_ids": ("rows",),
    "exempt": ("rows",),
    "expert_gpu": ("experts",),
}
_INPUT_TYPES = {"correction_bias": "FLOAT", "request_ids": "INT32", "exempt": "BOOL", "expert_gpu": "INT32"}
_LOGITS_TYPES = {"float32": "FLOAT", "bfloat16": "BF16", "float16": "HALF"}


def add_routing(
    trt: Any, network: Any, spec: RouterSpec, config: XShareConfig, tensors: Mapping[str, Any]
) -> routing.Outputs:
    """Adds one layer's routing to a strongly typed network.

    trt      the TensorRT module: `tensorrt`, or `tensorrt_rtx_bindings`
    tensors  router_logits [T, E] (any float) and the optional inputs by name, as in `GraphInputs`

    Returns expert_ids [T, k] int32, expert_weights [T, k] float32 and active_experts [E] bool. Raises
    ValueError where they do not fit together.
    """
    return routing.route(TensorRTOps(trt, network), spec, config, tensors)


def add_inputs(
    trt: Any, network: Any, spec: RouterSpec, inputs: GraphInputs, dtype: str = "float32"
) -> dict[str, Any]:
    """Network inputs for `add_routing`, with a dynamic number of rows."""
    sizes = {"rows": -1, "experts": spec.num_experts}
    types = {"router_logits": _LOGITS_TYPES[dtype], **_INPUT_TYPES}
    return {
        name: network.add_input(
            name, getattr(trt.DataType, types[name]), tuple(sizes[dim] for dim in INPUT_SHAPES[name])
        )
        for name in ("router_logits", *inputs.names())
    }


def build_engine(trt: Any, builder: Any, network: Any, max_rows: int, compute_capability: str) -> bytes:
    """An engine of TensorRT-RTX for 1 to `max_rows` rows and a GPU that need not be there (`SM80`, ...).

    Raises RuntimeError where TensorRT refuses; why is in its log.
    """
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.shape[0] == -1:
            rest = tuple(tensor.shape)[1:]
            profile.set_shape(tensor.name, (1, *rest), (min(16, max_rows), *rest), (max_rows, *rest))
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, compute_capability), 0)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(f"TensorRT built no engine for {compute_capability}; its log says why")
    return bytes(plan)


class TensorRTOps:
    """`Ops` as layers of a network; a tensor is an ITensor."""

    def __init__(self, trt: Any, network: Any) -> None:
        self.trt, self.network = trt, network
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Any] = {}

    def _out(self, layer: Any, output: int = 0) -> Any:
        if layer is None:
            raise RuntimeError("TensorRT refused a layer of the routing; its log says why")
        return layer.get_output(output)

    def _type(self, dtype: DType) -> Any:
        names = {"float32": "FLOAT", "int32": "INT32", "int64": "INT64", "bool": "BOOL"}
        return getattr(self.trt.DataType, names[dtype])

    def constant(self, value: npt.NDArray[np.generic]) -> Any:
        key = (str(value.dtype), value.shape, value.tobytes())
        if key not in self._constants:
            weights = self.trt.Weights(np.ascontiguousarray(value))
            self._constants[key] = self._out(self.network.add_constant(value.shape, weights))
        return self._constants[key]

    def binary(self, kind: Binary, a: Any, b: Any) -> Any:
        operation = getattr(self.trt.ElementWiseOperation, _BINARY.get(kind, kind.upper()))
        return self._out(self.network.add_elementwise(a, b, operation))

    def unary(self, kind: Unary, a: Any) -> Any:
        return self._out(self.network.add_unary(a, getattr(self.trt.UnaryOperation, kind.upper())))

    def cast(self, a: Any, dtype: DType) -> Any:
        return self._out(self.network.add_cast(a, self._type(dtype)))

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        return self._out(self.network.add_select(condition, a, b))

    def reduce_max(self, a: Any, axis: int) -> Any:
        return self._out(self.network.add_reduce(a, self.trt.ReduceOperation.MAX, 1 << axis, True))

    def reduce_sum(self, a: Any, axis: int) -> Any:
        return self._out(self.network.add_reduce(a, self.trt.ReduceOperation.SUM, 1 << axis, True))

    def cumulative_sum(self, a: Any, axis: int) -> Any:
        place = self.constant(np.array(axis, np.int32))
        return self._out(
            self.network.add_cumulative(a, place, self.trt.CumulativeOperation.SUM, False, False)
        )

    def top_k(self, a: Any, k: int, axis: int) -> tuple[Any, Any]:
        layer = self.network.add_topk(a, self.trt.TopKOperation.MAX, k, 1 << axis)
        return self._out(layer), self._out(layer, 1)

    def gather(self, a: Any, indices: Any, axis: int) -> Any:
        return self._out(self.network.add_gather(a, indices, axis))

    def gather_elements(self, a: Any, indices: Any) -> Any:
        layer = self.network.add_gather_v2(a, indices, self.trt.GatherMode.ELEMENT)
        layer.axis = 1
        return self._out(layer)

    def scatter_elements(self, a: Any, indices: Any, updates: Any) -> Any:
        layer = self.network.add_scatter(a, indices, updates, self.trt.ScatterMode.ELEMENT)
        layer.axis = 1
        return self._out(layer)

    def reshape(self, a: Any, shape: tuple[int, ...]) -> Any:
        layer = self.network.add_shuffle(a)
        layer.reshape_dims = shape
        return self._out(layer)

    def transpose(self, a: Any) -> Any:
        layer = self.network.add_shuffle(a)
        layer.first_transpose = (1, 0)
        return self._out(layer)

    def matmul(self, a: Any, b: Any) -> Any:
        plain = self.trt.MatrixOperation.NONE
        return self._out(self.network.add_matrix_multiply(a, plain, b, plain))
