"""Contract stand-in for `tensorrt` 11: the real network definition of TensorRT-RTX, with plugin layers.

TensorRT-RTX has none. Here one is its fields and inputs, noted down, and an identity of the tensor
that its output looks like, so that what is around it is a network of a real TensorRT, with its own checks.
"""

from __future__ import annotations

from typing import Any

import tensorrt_rtx_bindings as rtx
from tensorrt_rtx_bindings import *  # noqa: F403
from tensorrt_rtx_bindings import DataType, ILogger

float16, float32, int8, int32, int64 = (
    DataType.HALF,
    DataType.FLOAT,
    DataType.INT8,
    DataType.INT32,
    DataType.INT64,
)
uint8, bool, bfloat16, fp8 = DataType.UINT8, DataType.BOOL, DataType.BF16, DataType.FP8
THEIRS = ("Fp16MoePlugin", "Int4MoePlugin", "Nvfp4A16MoePlugin", "Nvfp4MoePlugin", "NvFP4MoEPluginGeforce")


class Plugin:
    def __init__(self, name: str, fields: dict[str, Any]) -> None:
        self.name, self.fields = name, fields

    @property
    def like(self) -> int:
        """The input that the output has the type and shape of."""
        if self.name != "XShareRouting":
            return 1  # hidden states
        return 1 if self.fields["output"] == "step_bias" else 0


class Creator:
    def __init__(self, name: str) -> None:
        self.name = name

    def create_plugin(self, name: str, field_collection: Any, phase: Any) -> Plugin:
        assert isinstance(phase, rtx.TensorRTPhase)
        return Plugin(self.name, {field.name: _value(field) for field in field_collection})


class Registry:
    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> Creator | None:
        known = {(name, "1", "") for name in THEIRS} | {("XShareRouting", "2", "xshare")}
        return Creator(type) if (type, version, plugin_namespace) in known else None


def get_plugin_registry() -> Registry:
    return Registry()


class Layer:
    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def get_output(self, index: int) -> Any:
        assert index == 0
        return self.layer.get_output(0)


class Log(ILogger):  # type: ignore[misc]
    def __init__(self) -> None:
        ILogger.__init__(self)

    def log(self, severity: Any, message: str) -> None:
        if severity in (ILogger.ERROR, ILogger.INTERNAL_ERROR) and "cudaError 35" not in message:
            raise RuntimeError(message)


class NetworkDefinition:
    """A real INetworkDefinition that takes plugin layers."""

    def __init__(self) -> None:
        self.log = Log()
        self.builder = rtx.Builder(self.log)
        self.real = self.builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self.plugins: list[tuple[Plugin, list[Any], Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def add_plugin_v3(self, inputs: list[Any], shape_inputs: list[Any], plugin: Plugin) -> Layer:
        assert shape_inputs == []
        layer = self.real.add_identity(inputs[plugin.like])
        self.plugins.append((plugin, inputs, layer.get_output(0)))
        return Layer(layer)


def _value(field: Any) -> Any:
    if field.type == rtx.PluginFieldType.CHAR:
        return field.data.tobytes().decode()
    return field.data.item()
