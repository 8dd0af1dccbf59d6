"""tensorrt_llm/network.py of 1.0: Network, net_guard; tools/onnx_utils.py: what `to_onnx` reads."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorrt as trt

from tensorrt_llm import _common
from tensorrt_llm.plugin import PluginConfig


class Network:
    def __init__(self) -> None:
        self._trt_network = trt.NetworkDefinition()
        self._inputs: dict[str, Any] = {}
        self._plugin_config = PluginConfig()
        self._names: set[str] = set()

    @property
    def trt_network(self) -> Any:
        return self._trt_network

    @property
    def plugin_config(self) -> PluginConfig:
        return self._plugin_config

    @plugin_config.setter
    def plugin_config(self, cfg: PluginConfig) -> None:
        self._plugin_config = cfg

    def _add_input(self, tensor: Any, name: str, dtype: Any, shape: Any, dim_range: Any = None) -> None:
        tensor.trt_tensor = self.trt_network.add_input(name=name, shape=shape, dtype=dtype)
        self._inputs[name] = tensor

    def _set_layer_name(self, layer: Any) -> None:
        kind = str(layer.type).split(".")[-1]
        layer.name = f"{kind}_{len(self._names)}"
        self._names.add(layer.name)
        for index in range(layer.num_outputs):
            layer.get_output(index).name = f"{layer.name}_output_{index}"

    def get_inputs(self) -> Iterable[Any]:
        return self._inputs.values()

    def to_onnx(self, path: str) -> None:
        """Notes every layer with its inputs' and outputs' names, as the real one makes a node of each."""
        lines = []
        for index in range(self.trt_network.num_layers):
            layer = self.trt_network.get_layer(index)
            inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
            names = [tensor.name for tensor in inputs if tensor is not None]
            outputs = [layer.get_output(i).name for i in range(layer.num_outputs)]
            lines.append(json.dumps([layer.name, str(layer.type), names, outputs]))
        Path(path).write_text("\n".join(lines))


@contextlib.contextmanager
def net_guard(network: Network) -> Iterator[None]:
    old = _common.net
    _common.set_network(network)
    yield
    _common.set_network(old)
