"""Routing on a GPU: against plain top-k, public routing kernels, and the algorithm in PyTorch.

    python benchmarks/route_gpu.py [--json PATH] [--quick]

Written ahead of a run on a GPU. Every time is a median over replays of a captured graph that holds 20 calls
over 4 input sets, so launch gaps of the host are out of it and the logits are in L2, as after a router's
GEMM. All ratios are within one run on one card. `floor` is the same graph with an empty kernel. The columns
of flashinfer are there if it is installed.

Calls one after another have their instructions in the cache, and ours overlap their launches. `in_model`
is what a call adds to a graph in which it follows a product with 64 MB of weights and the router's own, as
in a model.
"""

from __future__ import annotations

import argparse
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
from gpu_report import time_graph, write_report  # noqa: E402
from route_baselines import FlashinferTopK, TritonTopK, route_torch  # noqa: E402

CALLS_PER_GRAPH, INPUT_SETS, REPLAYS = 20, 4, 101
ROWS = (1, 4, 16, 32, 64, 128, 256)
SHAPES = {
    "E=32 k=4": (32, Settings(4, "softmax_renorm", coverage=0.97)),
    "E=64 k=8": (64, Settings(8, "softmax", coverage=0.97)),
    "E=128 k=4": (128, Settings(4, "topk_softmax", coverage=0.97)),
    "E=128 k=8": (128, Settings(8, "softmax_renorm", coverage=0.97)),
    "E=256 k=8 grouped": (256, Settings(8, "sigmoid_bias", 8, 4, 2.5, coverage=0.97)),
    "E=384 k=8": (384, Settings(8, "sigmoid_bias", 1, 1, 2.827, coverage=0.97)),
}
MANY_ROWS = (512, 4096, 16384)
HIDDEN, LARGE = 4096, 8192  # of the products ahead of the call in a model
TIMES = ("xshare_us", "plain_us", "triton_topk_us", "flashinfer_us", "eager_us", "compiled_us", "floor_us")
IN_MODEL = ("in_model_us", "plain_in_model_us", "triton_topk_in_model_us")
COLUMNS = (*TIMES, "over_plain", "over_public", *IN_MODEL)
Work = Callable[[int], Any]  # enqueues the call over one input set


@dataclass(frozen=True)
class Target:
    """What a decode step is to reach: `column` at most `most`, at all shapes or at one."""

    what: str
    column: str
    most: float
    shape: str | None = None

    def judge(self, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
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
    calls = range(CALLS_PER_GRAPH)
    return time_graph(lambda: [work(call % INPUT_SETS) for call in calls], REPLAYS) / CALLS_PER_GRAPH


class Model:
    """What runs ahead of a call: a large product, and the router's, which writes the logits."""

    def __init__(self, inputs: list[Inputs]) -> None:
        options = {"dtype": torch.bfloat16, "device": "cuda"}
        num_tokens, num_experts = inputs[0].router_logits.shape
        self.inputs = inputs
        self.hidden = torch.randn(num_tokens, HIDDEN, **options)
        self.large = torch.randn(HIDDEN, LARGE, **options)
        self.router = torch.randn(HIDDEN, num_experts, **options) / HIDDEN**0.5

    def __call__(self, index: int) -> None:
        torch.mm(self.hidden, self.large)
        torch.mm(self.hidden, self.router, out=self.inputs[index].router_logits)

    def then(self, work: Work) -> Work:
        return lambda index: (self(index), work(index))


def native(settings: Settings, inputs: list[Inputs]) -> Work:
    outputs = [Outputs(i.router_logits, settings.top_k, ("expert_ids", "expert_weights")) for i in inputs]
    calls = [Call(settings, i, o) for i, o in zip(inputs, outputs, strict=True)]
    return lambda index: calls[index].enqueue()


def over(inputs: list[Inputs], route: Callable[..., Any], *more: Any) -> Work:
    return lambda index: route(inputs[index].router_logits, inputs[index].correction_bias, *more)


def check_choice(settings: Settings, inputs: Inputs, work: Work) -> None:
    """`work` over these inputs chooses what the kernel chooses, but for ties: bf16 has them, and one in a
    warm-up changes the set of all rows."""
    outputs = Outputs(inputs.router_logits, settings.top_k, ("expert_ids", "expert_weights"))
    Call(settings, inputs, outputs).enqueue()
    ids, _ = work(0)
    agreeing = (outputs.tensors[0].sort(-1).values == ids.sort(-1).values).float().mean().item()
    if len(ids) >= 16 and agreeing < 0.75:
        raise RuntimeError(f"agrees on {agreeing:.1%} of the ids only: {settings}")


def make_inputs(num_tokens: int, num_experts: int, settings: Settings) -> Inputs:
    logits = torch.randn(num_tokens, num_experts, device="cuda").bfloat16()
    bias = 0.1 * torch.randn(num_experts, device="cuda") if settings.scoring == "sigmoid_bias" else None
    return Inputs(logits, bias)


def measure(num_tokens: int, num_experts: int, settings: Settings, compiled: bool) -> dict[str, Any]:
    """A baseline that fails is left out, with what it said."""
    inputs = [make_inputs(num_tokens, num_experts, settings) for _ in range(INPUT_SETS)]
    plain = Settings(**settings.__dict__ | {"coverage": 0.0})
    logits, bias = inputs[0].router_logits, inputs[0].correction_bias
    ours = {"xshare_us": native(settings, inputs), "plain_us": native(plain, inputs)}
    public = {"triton_topk_us": over(inputs, TritonTopK(logits, plain))}
    if FlashinferTopK.takes(plain):
        public["flashinfer_us"] = over(inputs, FlashinferTopK(logits, bias, plain))
    in_torch = {"eager_us": over(inputs, route_torch, settings)}
    if compiled:
        torch._dynamo.reset()  # each shape is compiled for itself
        in_torch["compiled_us"] = over(inputs, torch.compile(route_torch, dynamic=False), settings)

    row: dict[str, Any] = {"rows": num_tokens, "bytes": logits.nbytes + num_tokens * settings.top_k * 8}
    for name, work in ours.items():
        row[name] = time_in_graph(work)
    row["xshare_again_us"] = time_in_graph(ours["xshare_us"])  # the spread between two measurements
    row["floor_us"] = time_in_graph(lambda index: empty_kernel[(1,)](inputs[index].router_logits))
    for name, work in (public | in_torch).items():
        try:
            check_choice(plain if name in public else settings, inputs[0], work)
            row[name] = time_in_graph(work)
        except Exception as error:  # whatever a library raises: the other columns are worth having
            row[name.replace("_us", "_error")] = str(error)[:300]
    if measured := [row[name] for name in public if name in row]:
        row["public_us"] = min(measured)
    for name in ("plain_us", "public_us", *in_torch):
        if name in row:
            row[f"over_{name[:-3]}"] = row["xshare_us"] / row[name]
    if num_tokens <= ROWS[-1]:
        model = Model(inputs)
        alone = time_in_graph(model)
        for name, work in (ours | public).items():
            if name in row:
                column = name.removeprefix("xshare_").replace("us", "in_model_us")
                row[column] = time_in_graph(model.then(work)) - alone
    return row


def judge(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    verdicts = [target.judge(results) for target in TARGETS]
    for verdict in verdicts:
        if not verdict["measured"]:
            print(f"{verdict['target']}: not measured")
            continue
        missed = verdict["missed"]
        outcome = f"MISSED at {len(missed)} of {verdict['measured']}" if missed else "met"
        print(f"{verdict['target']}: {outcome}, worst {verdict['worst']:.3g} at {verdict['worst_at']}")
    return verdicts


def width(column: str) -> int:
    return max(8, len(column) + 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write the numbers, after each row")
    parser.add_argument("--quick", action="store_true", help="compiled PyTorch at 16 and 64 rows only")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("route_gpu.py needs a GPU")
    command = "python benchmarks/route_gpu.py --json" + (" --quick" if arguments.quick else "")
    results: dict[str, dict[str, Any]] = {}
    print(f"{torch.cuda.get_device_name()}\n{'':30}" + "".join(f"{c:>{width(c)}}" for c in COLUMNS))
    for name, (num_experts, settings) in SHAPES.items():
        for num_tokens in (*ROWS, *MANY_ROWS):
            compiled = num_tokens in (16, 64) or (num_tokens in ROWS and not arguments.quick)
            row = measure(num_tokens, num_experts, settings, compiled)
            results[f"T={num_tokens} {name}"] = row
            cells = "".join(f"{row[c]:{width(c)}.2f}" if c in row else f"{'-':>{width(c)}}" for c in COLUMNS)
            print(f"{f'T={num_tokens} {name}':30}{cells}", flush=True)
            if arguments.json:
                write_report(arguments.json, command, results)
    verdicts = judge(results)
    if arguments.json:
        write_report(arguments.json, command, results, targets=verdicts)


if __name__ == "__main__":
    main()
