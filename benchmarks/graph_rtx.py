"""What does the routing cost as native layers? TensorRT-RTX engines, built ahead of time without the GPUs.

    python benchmarks/graph_rtx.py

Per router and GPU: engine size and build time, from TensorRT's layers and from the ONNX model. Writes
benchmarks/results/graph_rtx.json. Needs tensorrt-rtx-cu13-libs, -bindings and onnx, no GPU.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import tensorrt_rtx_bindings as trt
from rich.table import Table

from xshare_trtllm import RouterSpec, XShareConfig
from xshare_trtllm.graph import GraphInputs, tensorrt_layers
from xshare_trtllm.graph.onnx_model import make_model
from xshare_trtllm.graph.routing import OUTPUT_NAMES
from xshare_trtllm.report import console, machine, write_json

GPUS = ("SM80", "SM86", "SM89", "SM120")
MAX_ROWS = 256
CASES = {
    "Mixtral 8, top 2": (RouterSpec(8, 2, "softmax_renorm"), XShareConfig(coverage=0.97), GraphInputs()),
    "gpt-oss-120b 128, top 4": (
        RouterSpec(128, 4, "topk_softmax"),
        XShareConfig(coverage=0.97, max_rows=48),
        GraphInputs(request_ids=True, exempt=True),
    ),
    "DeepSeek-V3 256, top 8, cap by coverage": (
        RouterSpec(256, 8, "sigmoid_bias", 8, 4, 2.5),
        XShareConfig(coverage=0.97, max_rows=128),
        GraphInputs(correction_bias=True, request_ids=True, exempt=True, expert_gpu=True),
    ),
    "DeepSeek-V3 256, top 8, all stages": (
        RouterSpec(256, 8, "sigmoid_bias", 8, 4, 2.5),
        XShareConfig(64, request_budget=16, gpu_budget=10, coverage=0.97, max_rows=128),
        GraphInputs(correction_bias=True, request_ids=True, exempt=True, expert_gpu=True),
    ),
}


def from_layers(case: str, logger: Any) -> tuple[Any, Any, Any]:
    spec, config, inputs = CASES[case]
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    tensors = tensorrt_layers.add_inputs(trt, network, spec, inputs, "bfloat16")
    outputs = tensorrt_layers.add_routing(trt, network, spec, config, tensors)
    for name, output in zip(OUTPUT_NAMES, outputs, strict=True):
        output.name = name
        network.mark_output(output)
    return builder, network, None


def from_onnx(case: str, logger: Any) -> tuple[Any, Any, Any]:
    spec, config, inputs = CASES[case]
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    model = make_model(spec, config, inputs, dtype="bfloat16")
    if not parser.parse(model.SerializeToString()):
        raise RuntimeError("; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
    return builder, network, parser


def measure(case: str, source: str, gpu: str) -> dict[str, Any]:
    logger = trt.Logger(trt.Logger.ERROR)
    start = time.perf_counter()
    builder, network, parser = {"layers": from_layers, "ONNX": from_onnx}[source](case, logger)
    layers = network.num_layers
    engine = tensorrt_layers.build_engine(trt, builder, network, MAX_ROWS, gpu)
    del parser  # the parser owns the weights of the network
    seconds = time.perf_counter() - start
    return {
        "case": case,
        "from": source,
        "gpu": gpu,
        "layers": layers,
        "bytes": len(engine),
        "seconds": seconds,
    }


@click.command()
@click.option(
    "--json",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path(__file__).parent / "results" / "graph_rtx.json",
    show_default=True,
)
def main(path: Path) -> None:
    table = Table(title=f"Routing in TensorRT-RTX {trt.__version__}, bf16 logits, up to {MAX_ROWS} rows")
    for column in ("router", "from", "GPU", "layers", "engine kB", "build s"):
        table.add_column(column, justify="left" if column in ("router", "from", "GPU") else "right")
    rows = [measure(case, source, gpu) for case in CASES for source in ("layers", "ONNX") for gpu in GPUS]
    for row in rows:
        table.add_row(
            row["case"],
            row["from"],
            row["gpu"],
            str(row["layers"]),
            f"{row['bytes'] / 1e3:.0f}",
            f"{row['seconds']:.2f}",
        )
    console().print(table)
    write_json(
        path, {"machine": machine(), "tensorrt_rtx": trt.__version__, "max_rows": MAX_ROWS, "engines": rows}
    )


if __name__ == "__main__":
    main()
