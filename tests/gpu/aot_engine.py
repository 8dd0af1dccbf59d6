"""Builds an engine that holds the routing's kernel, or runs it without the plugin:

    aot_engine.py build|run ENGINE

Two processes, so that the one that runs the engine knows nothing of how it was made. Needs TensorRT and GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import tensorrt as trt
import torch

from xshare_trtllm import RouterSpec, XShareConfig, route

SPEC = RouterSpec(64, 4, "sigmoid_bias", routed_scaling_factor=2.5)
CONFIG = XShareConfig(coverage=0.9, budget=12, request_budget=8)
MAX_ROWS = 64  # on SM90 a cluster of 4 blocks
INPUTS = (
    ("router_logits", "HALF", (-1, 64)),
    ("correction_bias", "FLOAT", (64,)),
    ("request_ids", "INT32", (-1,)),
    ("exempt", "BOOL", (-1,)),
)
OUTPUTS = ("expert_ids", "expert_weights", "active_experts")
LOGGER = trt.Logger(trt.Logger.WARNING)


def build(engine: Path) -> None:
    from xshare_trtllm.graph.aot_plugin import add_aot_routing

    builder = trt.Builder(LOGGER)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    profile = builder.create_optimization_profile()
    tensors = {}
    for name, dtype, shape in INPUTS:
        tensors[name] = network.add_input(name, getattr(trt.DataType, dtype), shape)
        if shape[0] == -1:
            profile.set_shape(name, *((rows, *shape[1:]) for rows in (1, 16, MAX_ROWS)))
    hopper = torch.cuda.get_device_capability() >= (9, 0)
    outputs = add_aot_routing(
        trt,
        network,
        SPEC,
        CONFIG,
        tensors,
        max_rows=MAX_ROWS,
        compute_capability="SM90" if hopper else "SM80",
    )
    for name, tensor in zip(OUTPUTS, outputs, strict=True):
        tensor.name = name
        network.mark_output(tensor)
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, "TensorRT built no engine; its log says why"
    engine.write_bytes(plan)


def run(engine: Path) -> None:
    names = {creator.name for creator in trt.get_plugin_registry().all_creators}
    assert not any("xshare" in name.lower() for name in names), names
    loaded = trt.Runtime(LOGGER).deserialize_cuda_engine(engine.read_bytes())
    contexts = [loaded.create_execution_context() for _ in range(2)]
    for rows in (1, 3, 16, MAX_ROWS):
        for context in contexts:
            _compare(context, rows)


def _compare(context: Any, rows: int) -> None:
    inputs = {
        "router_logits": torch.randn(rows, 64).half() * 2,
        "correction_bias": torch.randn(64) * 0.1,
        "request_ids": (torch.arange(rows) // 4 - (torch.arange(rows) == 1).int()).int(),
        "exempt": torch.arange(rows) % 7 == 5,
    }
    optional = {name: tensor for name, tensor in inputs.items() if name != "router_logits"}
    expected = route(inputs["router_logits"], SPEC, CONFIG, **optional)
    outputs = {name: torch.zeros_like(getattr(expected, name), device="cuda") for name in OUTPUTS}
    on_device = {name: tensor.cuda() for name, tensor in inputs.items()}
    for name, tensor in on_device.items():
        assert context.set_input_shape(name, tuple(tensor.shape))
    for name, tensor in (on_device | outputs).items():
        context.set_tensor_address(name, tensor.data_ptr())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    assert context.execute_async_v3(stream.cuda_stream)
    stream.synchronize()
    for name, tensor in outputs.items():
        assert torch.equal(tensor.cpu(), getattr(expected, name)), (name, rows)


if __name__ == "__main__":
    {"build": build, "run": run}[sys.argv[1]](Path(sys.argv[2]))
