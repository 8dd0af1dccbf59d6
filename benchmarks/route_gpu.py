"""Routing on a GPU: against plain top-k, public routing kernels, and the algorithm in PyTorch.

    python benchmarks/route_gpu.py [--json PATH] [--quick]

Written ahead of a run on a GPU. Every time is a median over replays of a captured graph that holds 20 calls
over 4 input sets, so launch gaps of the host are out of it and the logits are in L2, as after a router's
GEMM. All ratios are within one run on one card. `floor` is the same graph with an empty kernel. The columns
of flashinfer are there if it is installed.
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
import triton

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "gpu"))

from device_routing import Call, Inputs, Outputs, Settings  # noqa: E402
from gpu_machine import write_report  # noqa: E402
from route_baselines import FlashinferTopK, TritonTopK, route_torch  # noqa: E402

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
PUBLIC = ("triton_topk_us", "flashinfer_us")
COLUMNS = (
    "xshare_us",
    "plain_us",
    *PUBLIC,
    "eager_us",
    "compiled_us",
    "floor_us",
    "over_plain",
    "over_public",
)
Work = Callable[[int], Any]  # enqueues the call over one input set


@dataclass(frozen=True)
class Target:
    """What a decode step is to reach: `column` at most `most`, at all shapes or at one."""

    what: str
    column: str
    most: float
    shape: str | None = None

    def judge(self, results: dict[str, dict[str, float]]) -> dict[str, Any]:
        rows = {
            name: row[self.column]
            for name, row in results.items()
            if self.column in row and (name == self.shape if self.shape else row["rows"] <= ROWS[-1])
        }
        if not rows:
            return {"target": self.what, "measured": 0}
        worst = max(rows, key=rows.__getitem__)
        missed = [name for name, value in rows.items() if value > self.most]
        return {
            "target": self.what,
            "measured": len(rows),
            "worst": rows[worst],
            "worst_at": worst,
            "missed": missed,
        }


TARGETS = (
    Target("at most 1.5x plain top-k", "over_plain", 1.5),
    Target("at most 1.5x the best public kernel", "over_public", 1.5),
    Target("at most 1/10 of PyTorch, eager", "over_eager", 1 / 10),
    Target("at most 1/3 of PyTorch, compiled", "over_compiled", 1 / 3),
    Target("at most 8 us at T=16, E=128, k=4", "xshare_us", 8.0, "T=16 E=128 k=4"),
)


@triton.jit
def empty_kernel(anything):
    pass


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


def over(inputs: list[Inputs], route: Callable[..., Any], *more: Any) -> Work:
    return lambda index: route(inputs[index].router_logits, inputs[index].correction_bias, *more)


def check_choice(name: str, settings: Settings, inputs: Inputs, work: Work) -> None:
    """`work` over these inputs chooses what the kernel chooses, but for ties."""
    outputs = Outputs(inputs.router_logits, settings.top_k, ("expert_ids", "expert_weights"))
    Call(settings, inputs, outputs).enqueue()
    ids, _ = work(0)
    agreeing = (outputs.tensors[0].sort(-1).values == ids.sort(-1).values).float().mean().item()
    if agreeing < 0.9:
        raise SystemExit(f"{name} agrees on {agreeing:.1%} of the ids only: {settings}")


def make_inputs(num_tokens: int, num_experts: int, settings: Settings) -> Inputs:
    logits = torch.randn(num_tokens, num_experts, device="cuda").bfloat16()
    bias = 0.1 * torch.randn(num_experts, device="cuda") if settings.scoring == "sigmoid_bias" else None
    return Inputs(logits, bias)


def measure(num_tokens: int, num_experts: int, settings: Settings, compiled: bool) -> dict[str, float]:
    inputs = [make_inputs(num_tokens, num_experts, settings) for _ in range(INPUT_SETS)]
    plain = Settings(**settings.__dict__ | {"budget": num_experts})
    logits, bias = inputs[0].router_logits, inputs[0].correction_bias
    without_sharing = {"triton_topk_us": over(inputs, TritonTopK(logits, plain))}
    if FlashinferTopK.takes(plain):
        without_sharing["flashinfer_us"] = over(inputs, FlashinferTopK(logits, bias, plain))
    in_torch = {"eager_us": over(inputs, route_torch, settings)}
    if compiled:
        torch._dynamo.reset()  # each shape is compiled for itself
        in_torch["compiled_us"] = over(inputs, torch.compile(route_torch, dynamic=False), settings)
    for chosen, works in ((plain, without_sharing), (settings, in_torch)):
        for name, work in works.items():
            check_choice(name, chosen, inputs[0], work)
    works = {
        "xshare_us": native(settings, inputs),
        "plain_us": native(plain, inputs),
        "floor_us": lambda index: empty_kernel[(1,)](inputs[index].router_logits),
        **without_sharing,
        **in_torch,
    }
    times = {name: time_in_graph(work) for name, work in works.items()}
    times["xshare_again_us"] = time_in_graph(works["xshare_us"])  # the spread between two measurements
    times["public_us"] = min(times[name] for name in without_sharing)
    baselines = ("plain_us", "public_us", *in_torch)
    ratios = {f"over_{name[:-3]}": times["xshare_us"] / times[name] for name in baselines}
    size = logits.nbytes + num_tokens * settings.top_k * 8
    return {"rows": num_tokens} | times | ratios | {"bytes": size}


def judge(results: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    verdicts = [target.judge(results) for target in TARGETS]
    for verdict in verdicts:
        if not verdict["measured"]:
            print(f"{verdict['target']}: not measured")
            continue
        missed = verdict["missed"]
        outcome = f"MISSED at {len(missed)} of {verdict['measured']}" if missed else "met"
        print(f"{verdict['target']}: {outcome}, worst {verdict['worst']:.3g} at {verdict['worst_at']}")
    return verdicts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write the numbers, after each shape")
    parser.add_argument("--quick", action="store_true", help="compiled PyTorch at 16 and 64 rows only")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("route_gpu.py needs a GPU")
    command = "python benchmarks/route_gpu.py --json" + (" --quick" if arguments.quick else "")
    results: dict[str, dict[str, float]] = {}
    print(f"{torch.cuda.get_device_name()}\n{'':30}" + "".join(f"{c:>16}" for c in COLUMNS))
    for name, (num_experts, settings) in SHAPES.items():
        for num_tokens in (*ROWS, *MANY_ROWS):
            compiled = num_tokens in (16, 64) or (num_tokens in ROWS and not arguments.quick)
            row = measure(num_tokens, num_experts, settings, compiled)
            results[f"T={num_tokens} {name}"] = row
            cells = "".join(f"{row[c]:16.2f}" if c in row else f"{'-':>16}" for c in COLUMNS)
            print(f"{f'T={num_tokens} {name}':30}{cells}", flush=True)
        if arguments.json:
            write_report(arguments.json, command, results)
    verdicts = judge(results)
    if arguments.json:
        write_report(arguments.json, command, results, targets=verdicts)


if __name__ == "__main__":
    main()
