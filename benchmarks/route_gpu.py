"""Routing on a GPU: against plain top-k, a Triton softmax-top-k, and the algorithm in PyTorch.

    python benchmarks/route_gpu.py [--json PATH] [--quick]

Written ahead of a run on a GPU. Every time is a median over replays of a captured graph that holds 20 calls
over 4 input sets, so launch gaps of the host are out of it and the logits are in L2, as after a router's
GEMM. All ratios are within one run on one card. `floor` is the same graph with an empty kernel.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "gpu"))

from device_routing import Call, Inputs, Outputs, Settings  # noqa: E402
from gpu_machine import machine  # noqa: E402

CALLS_PER_GRAPH, INPUT_SETS, REPLAYS = 20, 4, 101
ROWS = (1, 4, 16, 32, 64, 128, 256)
SHAPES = {
    "E=32 k=4": (32, Settings(4, "softmax_renorm", budget=12)),
    "E=64 k=8": (64, Settings(8, "softmax", budget=24)),
    "E=128 k=4": (128, Settings(4, "topk_softmax", budget=32)),
    "E=128 k=8": (128, Settings(8, "softmax_renorm", budget=40)),
    "E=256 k=8 grouped": (256, Settings(8, "sigmoid_bias", 8, 4, 2.5, budget=64)),
    "E=384 k=8": (384, Settings(8, "sigmoid_bias", 1, 1, 2.827, budget=96)),
}
MANY_ROWS = (512, 4096, 16384)
Work = Callable[[int], Any]  # enqueues the call over one input set


# ---- What it is compared with -----------------------------------------------------------------------------


@triton.jit
def softmax_topk_kernel(
    logits, ids, weights, num_experts, top_k: tl.constexpr, renormalise: tl.constexpr, block: tl.constexpr
):
    """A row per program: softmax, then k times the maximum. The usual fused routing without sharing."""
    row = tl.program_id(0)
    experts = tl.arange(0, block)
    z = tl.load(logits + row * num_experts + experts, experts < num_experts, -float("inf")).to(tl.float32)
    e = tl.exp(z - tl.max(z, 0))
    scores = e / tl.sum(e, 0)
    total = 0.0
    for slot in tl.static_range(top_k):
        best, place = tl.max(scores, 0, return_indices=True)
        tl.store(ids + row * top_k + slot, place)
        tl.store(weights + row * top_k + slot, best)
        total += best
        scores = tl.where(experts == place, -1.0, scores)
    if renormalise:
        slots = tl.arange(0, 16)
        tl.debug_barrier()
        chosen = tl.load(weights + row * top_k + slots, slots < top_k, 0.0)
        tl.store(weights + row * top_k + slots, chosen / total, slots < top_k)


@triton.jit
def empty_kernel(anything):
    pass


def route_torch(logits: Tensor, bias: Tensor | None, s: Settings) -> tuple[Tensor, Tensor]:
    """Warm-up, budget and refinement in PyTorch operations; nothing waits for the host."""
    z = logits.float()
    affinity = torch.sigmoid(z) if s.scoring == "sigmoid_bias" else torch.softmax(z, -1)
    ranking = affinity if bias is None else affinity + bias
    if s.num_groups > 1:
        groups = ranking.view(len(z), s.num_groups, -1)
        best = groups.topk(2, -1).values.sum(-1).topk(s.top_k_groups, -1).indices
        kept = torch.zeros(len(z), s.num_groups, dtype=torch.bool, device=z.device).scatter_(1, best, True)
        ranking = ranking.masked_fill(~kept.repeat_interleave(groups.shape[-1], 1), -torch.inf)
    sums = (affinity * 2**20).round().long().sum(0)
    warm = torch.zeros_like(sums, dtype=torch.bool)
    warm = warm.index_fill(0, ranking.topk(s.warmup, -1).indices.flatten(), True)
    places = torch.where(warm, torch.iinfo(torch.int64).max, sums).argsort(descending=True).argsort()
    active = warm | ((places < s.budget) & (sums > 0))
    chosen = ranking.masked_fill(~active, -torch.inf).topk(s.top_k, -1)
    weights = affinity.gather(1, chosen.indices).masked_fill(chosen.values == -torch.inf, 0.0)
    if s.scoring != "softmax":
        weights = weights / weights.sum(-1, keepdim=True)
    return chosen.indices.int(), weights * s.routed_scaling_factor


# ---- Measuring --------------------------------------------------------------------------------------------


def time_in_graph(work: Work) -> float:
    """Median microseconds per call."""
    for i in range(INPUT_SETS):
        work(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS_PER_GRAPH):
            work(i % INPUT_SETS)
    for _ in range(5):
        graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / CALLS_PER_GRAPH)
    return statistics.median(times)


def native(settings: Settings, inputs: list[Inputs]) -> Work:
    outputs = [Outputs(i.router_logits, settings.top_k, ("expert_ids", "expert_weights")) for i in inputs]
    calls = [Call(settings, i, o) for i, o in zip(inputs, outputs, strict=True)]
    return lambda index: calls[index].enqueue()


def triton_topk(settings: Settings, inputs: list[Inputs]) -> Work:
    logits = [i.router_logits for i in inputs]
    num_tokens, num_experts = logits[0].shape
    outputs = Outputs(logits[0], settings.top_k, ("expert_ids", "expert_weights")).tensors
    block, renormalise = triton.next_power_of_2(num_experts), settings.scoring != "softmax"
    return lambda index: softmax_topk_kernel[(num_tokens,)](
        logits[index], *outputs[:2], num_experts, settings.top_k, renormalise, block, num_warps=1
    )


def in_torch(settings: Settings, inputs: list[Inputs], compiled: bool) -> Work:
    torch._dynamo.reset()  # each shape is compiled for itself
    function = torch.compile(route_torch, dynamic=False) if compiled else route_torch
    return lambda index: function(inputs[index].router_logits, inputs[index].correction_bias, settings)


def check_same_choice(settings: Settings, inputs: Inputs) -> None:
    """The PyTorch form chooses what the kernel chooses, but for ties."""
    outputs = Outputs(inputs.router_logits, settings.top_k, ("expert_ids", "expert_weights"))
    Call(settings, inputs, outputs).enqueue()
    ids, _ = route_torch(inputs.router_logits, inputs.correction_bias, settings)
    agreeing = (outputs.tensors[0].sort(-1).values == ids.sort(-1).values).float().mean().item()
    if agreeing < 0.9:
        raise SystemExit(f"the PyTorch form agrees on {agreeing:.1%} of the ids only: {settings}")


def measure(num_tokens: int, num_experts: int, settings: Settings, with_torch: bool) -> dict[str, float]:
    inputs = []
    for _ in range(INPUT_SETS):
        logits = torch.randn(num_tokens, num_experts, device="cuda").bfloat16()
        bias = 0.1 * torch.randn(num_experts, device="cuda") if settings.scoring == "sigmoid_bias" else None
        inputs.append(Inputs(logits, bias))
    plain = Settings(**settings.__dict__ | {"budget": num_experts})
    works = {
        "xshare_us": native(settings, inputs),
        "plain_us": native(plain, inputs),
        "floor_us": lambda index: empty_kernel[(1,)](inputs[index].router_logits),
    }
    if settings.scoring != "sigmoid_bias":
        works["triton_topk_us"] = triton_topk(settings, inputs)
    if with_torch:
        check_same_choice(settings, inputs[0])
        works["eager_us"] = in_torch(settings, inputs, compiled=False)
        works["compiled_us"] = in_torch(settings, inputs, compiled=True)
    times = {name: time_in_graph(work) for name, work in works.items()}
    times["xshare_again_us"] = time_in_graph(works["xshare_us"])  # the spread between two measurements
    baselines = ("plain_us", "triton_topk_us", "eager_us", "compiled_us")
    ratios = {f"over_{name[:-3]}": times["xshare_us"] / times[name] for name in baselines if name in times}
    size = inputs[0].router_logits.nbytes + num_tokens * settings.top_k * 8
    return times | ratios | {"bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--quick", action="store_true", help="PyTorch forms at 16 and 64 rows only")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("route_gpu.py needs a GPU")
    results = {}
    columns = ("xshare_us", "plain_us", "triton_topk_us", "eager_us", "compiled_us", "floor_us", "over_plain")
    print(f"{torch.cuda.get_device_name()}\n{'':30}" + "".join(f"{c:>16}" for c in columns))
    for name, (num_experts, settings) in SHAPES.items():
        for num_tokens in (*ROWS, *MANY_ROWS):
            with_torch = num_tokens in (16, 64) or (num_tokens in ROWS and not arguments.quick)
            row = measure(num_tokens, num_experts, settings, with_torch)
            results[f"T={num_tokens} {name}"] = row
            cells = "".join(f"{row[c]:16.2f}" if c in row else f"{'-':>16}" for c in columns)
            print(f"{f'T={num_tokens} {name}':30}{cells}", flush=True)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        command = "python benchmarks/route_gpu.py --json" + (" --quick" if arguments.quick else "")
        arguments.json.write_text(
            json.dumps({"command": command, "machine": machine(), "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
