"""One MoE layer on a GPU: time against the number of active experts, and with and without XShare.

    python benchmarks/moe_layer_gpu.py [--json PATH]

Written ahead of a run on a GPU. Shapes of gpt-oss-120b and Qwen3-235B-A22B, bf16, random weights, grouped
matrix products of torch. A layer is routing, sorting the rows by expert, two grouped products with SwiGLU
between them, and the weighted sum. Times are medians over replays of a captured graph of 4 layers with
weights of their own, so that no expert's weights are in L2 from the call before.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "gpu"))

from device_routing import Call, Inputs, Outputs, Settings  # noqa: E402
from gpu_report import time_graph, write_report  # noqa: E402

LAYERS, REPLAYS = 4, 31
BATCHES = (16, 4, 8, 32, 64)  # the paper's first: what is measured first is there when the time is up
NUM_ACTIVE = (8, 16, 32, 48, 64, 96, 128)
COVERAGE = 0.97
grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm


@dataclass(frozen=True)
class Shape:
    num_experts: int
    hidden: int
    intermediate: int
    routing: Settings  # without sharing

    def settings(self, coverage: float) -> Settings:
        return Settings(**self.routing.__dict__ | {"coverage": coverage})


SHAPES = {
    "gpt-oss-120b": Shape(128, 2880, 2880, Settings(4, "topk_softmax")),
    "qwen3-235b": Shape(128, 4096, 1536, Settings(8, "softmax_renorm")),
}


class Layer:
    """Weights of one MoE layer, [E, in, out]."""

    def __init__(self, shape: Shape) -> None:
        options = {"device": "cuda", "dtype": torch.bfloat16}
        self.shape = shape
        self.up = torch.randn(shape.num_experts, shape.hidden, 2 * shape.intermediate, **options) * 0.02
        self.down = torch.randn(shape.num_experts, shape.intermediate, shape.hidden, **options) * 0.02

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """hidden [T, H]; ids, weights [T, k]. Nothing waits for the host."""
        top_k = ids.shape[1]
        experts, order = ids.flatten().sort()
        edges = torch.arange(1, self.shape.num_experts + 1, device="cuda", dtype=torch.int32)
        ends = torch.searchsorted(experts, edges, out_int32=True)  # rows of experts up to each one
        rows = order // top_k
        gate, up = grouped_mm(hidden[rows], self.up, offs=ends).chunk(2, -1)
        products = grouped_mm(torch.nn.functional.silu(gate) * up, self.down, offs=ends)
        products = products * weights.flatten()[order].to(products.dtype)[:, None]
        return torch.zeros_like(hidden).index_add_(0, rows, products)


def time_per_layer(work: Callable[[], Any]) -> float:
    """Median microseconds of one layer; `work` runs LAYERS of them."""
    return time_graph(work, REPLAYS) / LAYERS


def time_of_experts(shape: Shape, layers: list[Layer], num_tokens: int, num_active: int) -> float:
    """Rows spread evenly over the first `num_active` experts."""
    top_k = shape.routing.top_k
    hidden = torch.randn(num_tokens, shape.hidden, device="cuda", dtype=torch.bfloat16)
    ids = (torch.arange(num_tokens * top_k, device="cuda", dtype=torch.int32) % num_active).view(-1, top_k)
    weights = torch.full((num_tokens, top_k), 1 / top_k, device="cuda")
    return time_per_layer(lambda: [layer(hidden, ids, weights) for layer in layers])


def time_with_routing(
    shape: Shape, layers: list[Layer], num_tokens: int, coverage: float
) -> dict[str, float]:
    """Routing included; independent random logits, the hardest case for sharing."""
    hidden = torch.randn(num_tokens, shape.hidden, device="cuda", dtype=torch.bfloat16)
    settings, calls = shape.settings(coverage), []
    for _ in layers:
        logits = 2 * torch.randn(num_tokens, shape.num_experts, device="cuda")
        outputs = Outputs(logits, settings.top_k, ("expert_ids", "expert_weights", "active_experts"))
        calls.append(Call(settings, Inputs(logits.bfloat16()), outputs))

    def work() -> None:
        for layer, call in zip(layers, calls, strict=True):
            call.enqueue()
            ids, weights = call.outputs.tensors[:2]
            layer(hidden, ids, weights)

    layer_us = time_per_layer(work)
    active = [int((call.outputs.tensors[3] == 1).sum()) for call in calls]
    return {"layer_us": layer_us, "active_experts": statistics.mean(active)}


def measure_batches(
    shape: Shape, layers: list[Layer], result: dict[str, Any], keep: Callable[[], None]
) -> None:
    for num_tokens in BATCHES:
        own = time_with_routing(shape, layers, num_tokens, 0.0)
        shared = time_with_routing(shape, layers, num_tokens, COVERAGE)
        result["by_batch"][num_tokens] = {"own": own, "xshare": shared, "coverage": COVERAGE}
        keep()
        print(
            f"  {num_tokens:2} rows: own routing {own['layer_us']:8.1f} us "
            f"({own['active_experts']:.0f} experts), XShare {shared['layer_us']:8.1f} us "
            f"({shared['active_experts']:.0f}), ratio {shared['layer_us'] / own['layer_us']:.2f}",
            flush=True,
        )


def measure_experts(
    shape: Shape, layers: list[Layer], result: dict[str, Any], keep: Callable[[], None]
) -> None:
    for num_active in NUM_ACTIVE:
        time = time_of_experts(shape, layers, 64, num_active)
        result["by_active_experts"][num_active] = time
        keep()
        rate = num_active * result["bytes_per_expert"] / time / 1e6
        print(
            f"  64 rows, {num_active:3} active experts: {time:8.1f} us, {rate:5.2f} TB/s of weights",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write the numbers, after each of them")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("moe_layer_gpu.py needs a GPU")
    if torch.cuda.get_device_capability() < (9, 0):
        raise SystemExit("moe_layer_gpu.py needs compute capability 9.0: torch's grouped product, in a graph")
    results: dict[str, Any] = {}

    def keep() -> None:
        if arguments.json:
            write_report(arguments.json, "python benchmarks/moe_layer_gpu.py --json", results)

    for name, shape in SHAPES.items():
        print(f"{name} on {torch.cuda.get_device_name()}")
        layers = [Layer(shape) for _ in range(LAYERS)]
        results[name] = {"bytes_per_expert": 3 * shape.hidden * shape.intermediate * 2}
        results[name] |= {"by_active_experts": {}, "by_batch": {}}
        measure_batches(shape, layers, results[name], keep)
        measure_experts(shape, layers, results[name], keep)
        del layers
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
