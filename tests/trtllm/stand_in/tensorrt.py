"""Contract stand-in for `tensorrt` 10: the real network definition of TensorRT-RTX, and a plugin registry.

TensorRT-RTX has no plugin layers. Here one is its fields and inputs, noted down, and the same routing in
native layers in its place, so that what is built around it is a network of a real TensorRT.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import tensorrt_rtx_bindings as rtx
from tensorrt_rtx_bindings import *  # noqa: F403
from tensorrt_rtx_bindings import ILogger, PluginFieldCollection, TensorRTPhase

from xshare_trtllm import RouterSpec, XShareConfig
from xshare_trtllm.graph import tensorrt_layers

__version__ = "10.14.1"
INPUTS = ("correction_bias", "request_ids", "exempt", "expert_gpu")


class Log(ILogger):  # type: ignore[misc]
    """Keeps errors, but the one that says that there is no GPU."""

    def __init__(self) -> None:
        ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity in (ILogger.ERROR, ILogger.INTERNAL_ERROR) and "cudaError 35" not in message:
            self.errors.append(message)


class Plugin:
    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields


class Creator:
    name, plugin_version, plugin_namespace = "XShareRouting", "2", "xshare"

    def create_plugin(
        self, name: str, field_collection: PluginFieldCollection, phase: TensorRTPhase
    ) -> Plugin | None:
        assert isinstance(phase, TensorRTPhase)
        return Plugin({field.name: _value(field) for field in field_collection})


class Registry:
    """`load_library` returns None where a library of one name is loaded already, as TensorRT's does."""

    def __init__(self) -> None:
        self.creator: Creator | None = None

    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> Creator | None:
        wanted = (type, version, plugin_namespace)
        return self.creator if wanted == ("XShareRouting", "2", "xshare") else None

    def load_library(self, plugin_path: str) -> object | None:
        if self.creator is not None or not Path(plugin_path).is_file():
            return None
        self.creator = Creator()
        return ctypes.CDLL(plugin_path)


_registry = Registry()


def get_plugin_registry() -> Registry:
    return _registry


class PluginV3Layer:
    def __init__(self, name: str, outputs: list[Any]) -> None:
        self.name, self.type, self._outputs = name, "LayerType.PLUGIN_V3", outputs

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    def get_output(self, index: int) -> Any:
        return self._outputs[index]


class NetworkDefinition:
    """A real INetworkDefinition that takes plugin layers."""

    def __init__(self) -> None:
        self.log = Log()
        self.builder = rtx.Builder(self.log)
        self.real = self.builder.create_network(0)
        self.plugins: list[dict[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def add_plugin_v3(self, inputs: list[Any], shape_inputs: list[Any], plugin: Plugin) -> PluginV3Layer:
        assert shape_inputs == []
        fields = plugin.fields
        present = [name for name in INPUTS if fields.get(f"has_{name}")]
        tensors = dict(zip(("router_logits", *present), inputs, strict=True))
        self.plugins.append(fields | {"inputs": [tensor.name for tensor in inputs]})
        made = tensorrt_layers.add_routing(rtx, self.real, *_arguments(fields), tensors)
        return PluginV3Layer(f"plugin_{len(self.plugins)}", [made.expert_ids, made.expert_weights])


def _arguments(fields: dict[str, Any]) -> tuple[RouterSpec, XShareConfig]:
    spec = RouterSpec(
        fields["num_experts"],
        fields["top_k"],
        fields["scoring"],
        fields["num_groups"],
        fields["top_k_groups"],
        fields["routed_scaling_factor"],
    )
    names = ("budget", "warmup", "request_budget", "gpu_budget", "max_rows", "coverage", "utility")
    return spec, XShareConfig(**{name: fields[name] for name in names if name in fields})


def _value(field: Any) -> Any:
    if field.type == rtx.PluginFieldType.CHAR:
        return field.data.tobytes().decode()
    return field.data.item()
