"""XShare in the direct builder of TensorRT Edge-LLM (`tensorrt-edgellm-build`, experimental there).

It makes the network through TensorRT's Python; every MoE layer goes through `operation(name, inputs, ...)` of
experimental/builder/ops/functional/moe.py (0.11.0). That function is replaced by one that puts an
XShareRouting layer before it. Nothing else of the builder is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from xshare_trtllm.config import XShareConfig
from xshare_trtllm.edgellm.moe import BIAS_INPUT, Limit, MoeRouter, check_config, moe_router, plugin_fields
from xshare_trtllm.edgellm.rows import CONTEXTS, LENGTHS, OFFSETS
from xshare_trtllm.graph.tensorrt_layers import TensorRTOps

MODULE = "experimental.builder.ops.functional.moe"
PLUGINS = {  # of an operation: experimental/builder/ops/backend.py
    "fp16_moe": "Fp16MoePlugin",
    "int4_moe": "Int4MoePlugin",
    "nvfp4_a16_moe": "Nvfp4A16MoePlugin",
    "nvfp4_moe": "Nvfp4MoePlugin",
    "nvfp4_moe_sm12x": "NvFP4MoEPluginGeforce",
}
_FIELD_TYPES = {int: np.int32, float: np.float64, str: np.int8}
_BIAS = ".e_score_correction_bias"


@contextmanager
def installed(config: XShareConfig, creator: Any) -> Iterator[DirectBuild]:
    """XShare in this process' direct builder until the end of the `with`.

    creator  of the plugin XShareRouting, from TensorRT's registry

    Raises ValueError where the build made no MoE layer, or another number than `config` has budgets; and,
    while it runs, for a router that cannot be limited exactly.
    """
    module: Any = import_module(MODULE)
    build = DirectBuild(config, creator, module.operation, module.parameter)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(module, "operation", build.operation))
        stack.enter_context(mock.patch.object(module, "parameter", build.parameter))
        yield build
    build.check_layers()


class DirectBuild:
    """The MoE layers of one build."""

    def __init__(self, config: XShareConfig, creator: Any, operation: Any, parameter: Any) -> None:
        self.config, self.layers = config, 0
        self._creator, self._operation, self._parameter = creator, operation, parameter
        self._biases: list[tuple[Any, npt.NDArray[Any] | None]] = []  # tensors, and their values if known
        self._networks: dict[int, _Rows] = {}

    def parameter(self, name: str, value: Any, consumer: str, **options: Any) -> Any:
        """In place of theirs: remembers the biases of routers."""
        tensor = self._parameter(name, value, consumer, **options)
        if name.endswith(_BIAS):
            self._biases.append((tensor, value if isinstance(value, np.ndarray) else None))
        return tensor

    def operation(self, name: str, inputs: Any, **attributes: Any) -> Any:
        """In place of theirs: the same MoE operation behind an XShareRouting layer."""
        given = list(inputs)
        label = f"{name} of MoE layer {self.layers}"
        if name not in PLUGINS:
            raise ValueError(f"{label}: is not known; known are {', '.join(PLUGINS)}")
        place = BIAS_INPUT[PLUGINS[name]]
        has_bias = place is not None and place < len(given)
        bias = given[place] if has_bias and place is not None else None
        values = next((values for tensor, values in self._biases if tensor is bias), None)
        router = moe_router(label, attributes, has_bias=has_bias, bias=values)
        config = self.config.for_layer(self.layers)
        check_config(label, config, router)
        self.layers += 1
        made = self._add(router, config, given[0], bias)
        given[place if router.limit is Limit.BIAS and place is not None else 0] = made
        return self._operation(name, given, **attributes)

    def check_layers(self) -> None:
        """Raises ValueError where the build had no MoE layer, or not as many as there are budgets."""
        if self.layers == 0:
            raise ValueError("the build made no MoE layer, so there was nothing to limit")
        budgets = self.config.budget
        if isinstance(budgets, tuple) and len(budgets) != self.layers:
            raise ValueError(f"XShareConfig(budget=): names {len(budgets)} MoE layers, built {self.layers}")

    def _add(self, router: MoeRouter, config: XShareConfig, logits: Any, bias: Any) -> Any:
        """A layer's output: masked logits [T, E], or the step's bias [E]."""
        trt: Any = import_module("tensorrt")
        net = import_module("experimental.builder.ops.scope").current_net()
        tensor_class = type(logits)
        rows = self._networks.get(id(net.network))
        if rows is None:
            rows = self._networks[id(net.network)] = _Rows(trt, net.network, net._unwrap(logits))
        tensors = [logits, *([bias] if router.limit is Limit.BIAS else [])]
        inputs = [*map(net._unwrap, tensors), rows.request_ids, rows.exempt]
        layer = net.network.add_plugin_v3(inputs, [], self._plugin(trt, router, config))
        if layer is None:
            raise RuntimeError("TensorRT refused the XShareRouting layer; its log says why")
        layer.name = f"xshare_routing_{self.layers}"
        return tensor_class(layer.get_output(0))

    def _plugin(self, trt: Any, router: MoeRouter, config: XShareConfig) -> Any:
        fields = []
        for name, value in plugin_fields(router, config).items():
            data = np.frombuffer(value.encode(), np.int8) if isinstance(value, str) else np.array([value])
            data = data.astype(_FIELD_TYPES[type(value)])
            kinds = {"i": "INT32", "d": "FLOAT64", "b": "CHAR"}
            kind = getattr(trt.PluginFieldType, kinds[data.dtype.char])
            fields.append(trt.PluginField(name, data, kind))
        collection = trt.PluginFieldCollection(fields)
        plugin = self._creator.create_plugin("xshare_routing", collection, trt.TensorRTPhase.BUILD)
        if plugin is None:
            raise RuntimeError("the XShare plugin refused its fields; TensorRT's log says which")
        return plugin


class _Rows(TensorRTOps):
    """`rows.add_rows` as layers of a network: request_ids [T] int32 and exempt [T] bool."""

    def __init__(self, trt: Any, network: Any, logits: Any) -> None:
        super().__init__(trt, network)
        self._arrays: list[npt.NDArray[np.generic]] = []  # TensorRT reads them when the engine is built
        inputs = {tensor.name: tensor for tensor in map(network.get_input, range(network.num_inputs))}
        missing = [name for name in (OFFSETS, LENGTHS, CONTEXTS) if name not in inputs]
        if missing:
            raise ValueError(f"the network has no input {missing[0]}, which says what its rows are")
        lengths, contexts = inputs[LENGTHS], inputs[CONTEXTS]
        row = self.reshape(self._range(self._size(logits)), (-1, 1))
        sequence = self.reshape(self._range(self._size(lengths)), (1, -1))
        start = self.reshape(self.gather(inputs[OFFSETS], self.reshape(sequence, (-1,)), 0), (1, -1))
        end = self.binary("Add", start, self.reshape(lengths, (1, -1)))
        inside = self.binary(
            "And", self.unary("Not", self.binary("Less", row, start)), self.binary("Less", row, end)
        )
        none = self.constant(np.array([[-1]], np.int32))
        self.request_ids = self.reshape(self.reduce_max(self.where(inside, sequence, none), 1), (-1,))
        self.exempt = self.binary("Less", self.request_ids, self.cast(self._size(contexts), "int32"))

    def constant(self, value: npt.NDArray[np.generic]) -> Any:
        self._arrays.append(value)
        return super().constant(value)

    def _size(self, tensor: Any) -> Any:
        """Of the first dimension, int64 [1]."""
        shape = self._out(self.network.add_shape(tensor))
        return self._out(self.network.add_slice(shape, (0,), (1,), (1,)))

    def _range(self, size: Any) -> Any:
        layer = self.network.add_fill((0,), self.trt.FillOperation.LINSPACE, self.trt.DataType.INT32)
        start, step = (self.constant(np.array(value, np.int32)) for value in (0, [1]))
        for place, tensor in enumerate((size, start, step)):
            layer.set_input(place, tensor)
        return self._out(layer)
