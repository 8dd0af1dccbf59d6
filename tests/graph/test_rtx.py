"""Engines of the routing, built ahead of time by TensorRT-RTX without a GPU, from layers and from ONNX."""

from __future__ import annotations

from typing import Any

import pytest

from xshare_trtllm import RouterSpec, XShareConfig
from xshare_trtllm.config import SCORINGS
from xshare_trtllm.graph import GraphInputs, tensorrt_layers
from xshare_trtllm.graph.routing import OUTPUT_NAMES

HOW = (
    "needs TensorRT-RTX: pip install tensorrt-rtx-cu13-libs==1.7.1.116 tensorrt-rtx-cu13-bindings==1.7.1.116"
)
trt: Any = pytest.importorskip("tensorrt_rtx_bindings", reason=HOW)

GPUS = ("SM80", "SM86", "SM89", "SM120")
STAGES = XShareConfig(8, request_budget=6, gpu_budget=3, max_rows=32)
CAPPED = XShareConfig(coverage=0.97, max_rows=32)  # with expert_gpu: by the coverage


class Log(trt.ILogger):  # type: ignore[misc]
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            self.errors.append(message)


def from_layers(
    spec: RouterSpec, config: XShareConfig, inputs: GraphInputs, log: Log, dtype: str = "float32"
) -> tuple[Any, Any]:
    builder = trt.Builder(log)
    network = builder.create_network(0)
    tensors = tensorrt_layers.add_inputs(trt, network, spec, inputs, dtype)
    outputs = tensorrt_layers.add_routing(trt, network, spec, config, tensors)
    for name, output in zip(OUTPUT_NAMES, outputs, strict=True):
        output.name = name
        network.mark_output(output)
    return builder, network


def check_outputs(network: Any, spec: RouterSpec) -> None:
    shapes = {"expert_ids": (-1, spec.top_k), "expert_weights": (-1, spec.top_k)}
    shapes["active_experts"] = (spec.num_experts,)
    types = {"expert_ids": trt.int32, "expert_weights": trt.float32, "active_experts": trt.bool}
    for index in range(network.num_outputs):
        tensor = network.get_output(index)
        assert tuple(tensor.shape) == shapes[tensor.name] and tensor.dtype == types[tensor.name]


@pytest.mark.parametrize(
    ("scoring", "gpu", "config"), list(zip(SCORINGS, GPUS * 2, (STAGES, CAPPED) * 4, strict=True))
)
def test_native_layers(scoring: str, gpu: str, config: XShareConfig) -> None:
    grouped = (4, 2) if scoring in ("softmax", "sigmoid_bias", "softmax_bias") else (1, 1)
    spec = RouterSpec(32, 4, scoring, *grouped)
    inputs = GraphInputs(spec.rule.has_bias, True, True, True)
    log = Log()
    builder, network = from_layers(spec, config, inputs, log, "bfloat16")
    check_outputs(network, spec)
    engine = tensorrt_layers.build_engine(trt, builder, network, 64, gpu)
    assert len(engine) > 10_000 and log.errors == []


@pytest.mark.parametrize(
    ("config", "dtype"),
    (
        (XShareConfig(32), "float32"),
        (XShareConfig(8, warmup=0), "float16"),
        (XShareConfig(coverage=0.95), "bfloat16"),
        (XShareConfig(coverage=1.0, utility="affinity"), "float32"),
    ),
    ids=repr,
)
def test_single_stages(config: XShareConfig, dtype: str) -> None:
    spec, log = RouterSpec(32, 4, "softmax_renorm"), Log()
    builder, network = from_layers(spec, config, GraphInputs(), log, dtype)
    assert tensorrt_layers.build_engine(trt, builder, network, 64, "SM80") and log.errors == []


@pytest.mark.parametrize(("gpu", "config"), list(zip(GPUS, (STAGES, CAPPED) * 2, strict=True)))
def test_onnx_body(gpu: str, config: XShareConfig) -> None:
    pytest.importorskip("onnx", reason="needs onnx")
    from xshare_trtllm.graph.onnx_model import make_model

    spec, log = RouterSpec(32, 4, "sigmoid_bias", 4, 2, 2.5), Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    model = make_model(spec, config, GraphInputs(True, True, True, True), dtype="float16")
    assert parser.parse(model.SerializeToString()), [
        parser.get_error(i).desc() for i in range(parser.num_errors)
    ]
    check_outputs(network, spec)
    assert tensorrt_layers.build_engine(trt, builder, network, 64, gpu) and log.errors == []


def test_a_gpu_that_it_cannot_build_for() -> None:
    log = Log()
    builder, network = from_layers(RouterSpec(8, 2, "softmax"), XShareConfig(4), GraphInputs(), log)
    with pytest.raises((RuntimeError, AttributeError)):
        tensorrt_layers.build_engine(trt, builder, network, 64, "SM90")
