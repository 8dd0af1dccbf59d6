"""Builds, saves, reloads and runs an engine that holds the plugin:  engine_check.py build|run LIBRARY ENGINE

Run as two processes, so that the one that reads the engine has not built it. Needs TensorRT and a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import plugin_probe
import tensorrt as trt
import torch
from plugin_fields import Fields

from xshare_trtllm import RouterSpec, XShareConfig, route

FIELDS: Fields = {
    "num_experts": 64,
    "top_k": 4,
    "scoring": "sigmoid_bias",
    "budget": 12,
    "coverage": 0.9,
    "request_budget": 8,
    "routed_scaling_factor": 2.5,
    "has_correction_bias": 1,
    "has_request_ids": 1,
    "has_exempt": 1,
    "has_active_experts": 1,
}
INPUTS = (
    ("router_logits", "HALF", (-1, 64)),
    ("correction_bias", "FLOAT", (64,)),
    ("request_ids", "INT32", (-1,)),
    ("exempt", "BOOL", (-1,)),
)
OUTPUTS = ("expert_ids", "expert_weights", "active_experts")
LOGGER = trt.Logger(trt.Logger.WARNING)


def build(library: str, engine: str) -> None:
    assert trt.get_plugin_registry().load_library(library) is not None
    builder = trt.Builder(LOGGER)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    profile = builder.create_optimization_profile()
    tensors = []
    for name, dtype, shape in INPUTS:
        tensors.append(network.add_input(name, getattr(trt.DataType, dtype), shape))
        if shape[0] == -1:
            profile.set_shape(name, *((rows, *shape[1:]) for rows in (1, 16, 256)))
    layer = network.add_plugin_v3(tensors, [], _plugin())
    for place, name in enumerate(OUTPUTS):
        layer.get_output(place).name = name
        network.mark_output(layer.get_output(place))
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    Path(engine).write_bytes(plan)


def _plugin() -> Any:
    creator = trt.get_plugin_registry().get_creator("XShareRouting", "2", "xshare")
    encoded = ((name, *plugin_probe.encode(name, value)) for name, value in FIELDS.items())
    fields = [trt.PluginField(name, data, trt.PluginFieldType(kind)) for name, kind, data in encoded]
    return creator.create_plugin("routing", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)


def run(library: str, engine: str) -> None:
    assert trt.get_plugin_registry().load_library(library) is not None
    loaded = trt.Runtime(LOGGER).deserialize_cuda_engine(Path(engine).read_bytes())
    contexts = [loaded.create_execution_context() for _ in range(2)]
    for rows in (1, 3, 16, 200):
        for context in contexts:
            _compare(context, rows)


def _compare(context: Any, rows: int) -> None:
    inputs = {
        "router_logits": torch.randn(rows, 64).half() * 2,
        "correction_bias": torch.randn(64) * 0.1,
        "request_ids": (torch.arange(rows) // 4 - (torch.arange(rows) == 1).int()).int(),
        "exempt": torch.arange(rows) % 7 == 5,
    }
    spec = RouterSpec(64, 4, "sigmoid_bias", routed_scaling_factor=2.5)
    config = XShareConfig(12, request_budget=8, coverage=0.9)
    logits = inputs.pop("router_logits")
    expected = route(logits, spec, config, **inputs)
    on_device = {name: tensor.cuda() for name, tensor in {"router_logits": logits, **inputs}.items()}
    outputs = {
        "expert_ids": torch.full((rows, 4), -7, dtype=torch.int32, device="cuda"),
        "expert_weights": torch.full((rows, 4), -7.0, device="cuda"),
        "active_experts": torch.ones(64, dtype=torch.bool, device="cuda"),
    }
    for name, tensor in on_device.items():
        assert context.set_input_shape(name, tuple(tensor.shape))
    for name, tensor in {**on_device, **outputs}.items():
        context.set_tensor_address(name, tensor.data_ptr())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    assert context.execute_async_v3(stream.cuda_stream)
    stream.synchronize()
    for name, tensor in outputs.items():
        assert torch.equal(tensor.cpu(), getattr(expected, name)), name


if __name__ == "__main__":
    {"build": build, "run": run}[sys.argv[1]](*sys.argv[2:])
