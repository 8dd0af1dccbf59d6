"""Routing on a GPU: against plain top-k, public routing kernels, and the algorithm in PyTorch.

    python benchmarks/route_gpu.py [--json PATH] [--rows deciding|rest|all] [--compiled]

Written ahead of a run on a GPU. Every time is a median over replays of a captured graph that holds 20 calls
over 4 input sets; each replay starts behind a busy GPU. So the host's launches are out of it, and the
logits are in L2, as after a router's GEMM. All ratios are within one run on one card. `floor` is the same
graph with a kernel that does nothing; `jit` is our kernel as Python takes it, compiled at first use (where
cuda-python is installed), while `xshare` and `plain` are the library's. Whatever a baseline raises costs
its own column alone. Rows that PATH has from this machine and commit are not measured again, but for
columns that are new.

Calls one after another have their instructions in the cache, and ours overlap their launches, as those of
`triton_pdl` do. `in_model` is what a call adds to a graph in which it follows a product with 64 MB of weights
and the router's own, as in a model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "gpu"))

from device_routing import Call, Inputs, Outputs, Settings, plan_launches  # noqa: E402
from gpu_report import read_results, time_graph, write_report  # noqa: E402
from route_baselines import FlashinferTopK, route_torch  # noqa: E402
from route_targets import DECIDING, describe, judge  # noqa: E402

try:
    from xshare_trtllm.kernels.compile import why_not
    from xshare_trtllm.kernels.launch import enqueue
except ImportError:
    why_not = None

try:
    import route_triton
except ImportError:
    route_triton = None

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
CASES = {f"T={rows} {name}": (rows, *shape) for name, shape in SHAPES.items() for rows in (*ROWS, *MANY_ROWS)}
COMPILED_ROWS = (16, 64)
HIDDEN, LARGE = 4096, 8192  # of the products ahead of the call in a model
PUBLIC = ("triton_us", "triton_pdl_us", "flashinfer_us")
TIMES = ("xshare_us", "jit_us", "plain_us", *PUBLIC, "eager_us", "compiled_us", "floor_us")
COLUMNS = (
    *(*TIMES, "over_plain", "over_public", "in_model_us", "jit_in_model_us"),
    *("in_model_over_plain", "in_model_over_public"),
)
Row = dict[str, Any]
Work = Callable[[int], Any]  # enqueues the call over one input set


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


def make_inputs(num_tokens: int, num_experts: int, settings: Settings) -> list[Inputs]:
    inputs = []
    for _ in range(INPUT_SETS):
        logits = torch.randn(num_tokens, num_experts, device="cuda").bfloat16()
        has_bias = settings.scoring == "sigmoid_bias"
        inputs.append(Inputs(logits, 0.1 * torch.randn(num_experts, device="cuda") if has_bias else None))
    return inputs


def native(settings: Settings, inputs: list[Inputs]) -> Work:
    outputs = [Outputs(i.router_logits, settings.top_k, ("expert_ids", "expert_weights")) for i in inputs]
    calls = [Call(settings, i, o) for i, o in zip(inputs, outputs, strict=True)]

    def enqueue(index: int) -> tuple[torch.Tensor, ...]:
        calls[index].enqueue()
        return outputs[index].tensors[0], outputs[index].tensors[1]

    return enqueue


def can_compile() -> bool:
    return why_not is not None and why_not() is None


def compiled_at_first_use(settings: Settings, inputs: list[Inputs]) -> Work:
    """The same calls by the kernels of xshare_trtllm/kernels."""
    outputs = [Outputs(i.router_logits, settings.top_k, ("expert_ids", "expert_weights")) for i in inputs]
    calls = [Call(settings, i, o) for i, o in zip(inputs, outputs, strict=True)]

    def run(index: int) -> tuple[torch.Tensor, ...]:
        call = calls[index]
        enqueue(call.params, call.tensors, inputs[index].router_logits.device, plan_launches)
        return outputs[index].tensors[0], outputs[index].tensors[1]

    run(0)  # loads them, ahead of the capture
    return run


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


def without_sharing(settings: Settings) -> Settings:
    return Settings(**settings.__dict__ | {"coverage": 0.0})


def contestants(settings: Settings, inputs: list[Inputs]) -> dict[str, Callable[[], Work]]:
    """What makes the work of each column; a baseline that is not installed has none."""
    plain = without_sharing(settings)
    logits, bias = inputs[0].router_logits, inputs[0].correction_bias
    made: dict[str, Callable[[], Work]] = {
        "xshare_us": lambda: native(settings, inputs),
        "plain_us": lambda: native(plain, inputs),
        "eager_us": lambda: over(inputs, route_torch, settings),
        "floor_us": lambda: lambda index: torch.cuda._sleep(0),
    }
    if can_compile():
        made["jit_us"] = lambda: compiled_at_first_use(settings, inputs)
    if route_triton is not None:
        made["triton_us"] = lambda: over(inputs, route_triton.TritonTopK(logits, plain))
        if route_triton.has_programmatic_launch() and torch.cuda.get_device_capability() >= (9, 0):
            made["triton_pdl_us"] = lambda: over(inputs, route_triton.TritonTopK(logits, plain, True))
    if FlashinferTopK.takes(plain):
        made["flashinfer_us"] = lambda: over(inputs, FlashinferTopK(logits, bias, plain))
    return made


def attempt(row: Row, column: str, measure: Callable[[], float]) -> bool:
    """Whatever a library raises stands in the row in place of its time, and costs no other column."""
    try:
        row[column] = measure()
    except Exception as error:
        row[column.removesuffix("_us") + "_error"] = f"{type(error).__name__}: {error}"[:300]
    return column in row


def measure_alone(row: Row, settings: Settings, inputs: list[Inputs]) -> dict[str, Work]:
    """Every contestant's time; the works of those that have one."""
    works: dict[str, Work] = {}
    for column, make in contestants(settings, inputs).items():

        def measure(column: str = column, make: Callable[[], Work] = make) -> float:
            works[column] = make()
            if column in PUBLIC or column in ("eager_us", "jit_us"):
                chosen_by = without_sharing(settings) if column in PUBLIC else settings
                check_choice(chosen_by, inputs[0], works[column])
            return time_in_graph(works[column])

        attempt(row, column, measure)
    if "xshare_us" in row:
        attempt(row, "xshare_again_us", lambda: time_in_graph(works["xshare_us"]))  # the spread
    return {column: work for column, work in works.items() if column in row}


def measure_in_model(row: Row, inputs: list[Inputs], works: dict[str, Work]) -> None:
    model = Model(inputs)
    if not attempt(row, "model_us", lambda: time_in_graph(model)):
        return
    for column, work in works.items():
        if column in ("xshare_us", "jit_us", "plain_us", *PUBLIC):
            name = column.removeprefix("xshare_").replace("us", "in_model_us")
            attempt(row, name, lambda work=work: time_in_graph(model.then(work)) - row["model_us"])
    attempt(row, "model_again_us", lambda: time_in_graph(model))


def add_ratios(row: Row) -> None:
    for ours, prefix, suffix in (("xshare_us", "", "_us"), ("in_model_us", "in_model_", "_in_model_us")):
        others = {name: row.get(name + suffix) for name in ("plain", "eager", "compiled")}
        public = [
            row[c.removesuffix("_us") + suffix] for c in PUBLIC if c.removesuffix("_us") + suffix in row
        ]
        others["public"] = min(public, default=None)
        for name, time in others.items():
            if ours in row and time is not None and time > 0:
                row[f"{prefix}over_{name}"] = row[ours] / time


def measure(case: str) -> Row:
    num_tokens, num_experts, settings = CASES[case]
    inputs = make_inputs(num_tokens, num_experts, settings)
    row: Row = {"rows": num_tokens, "bytes": inputs[0].router_logits.nbytes + num_tokens * settings.top_k * 8}
    works = measure_alone(row, settings, inputs)
    if num_tokens <= ROWS[-1]:
        measure_in_model(row, inputs, works)
    add_ratios(row)
    return row


def measure_compiled(row: Row, case: str) -> None:
    num_tokens, num_experts, settings = CASES[case]
    inputs = make_inputs(num_tokens, num_experts, settings)
    torch._dynamo.reset()  # each shape is compiled for itself
    work = over(inputs, torch.compile(route_torch, dynamic=False), settings)
    attempt(row, "compiled_us", lambda: time_in_graph(work))
    add_ratios(row)


def width(column: str) -> int:
    return max(8, len(column) + 2)


def show(case: str, row: Row) -> None:
    print(
        f"{case:28}"
        + "".join(f"{row[c]:{width(c)}.2f}" if c in row else f"{'-':>{width(c)}}" for c in COLUMNS)
    )
    for key, value in row.items():
        if key.endswith("_error"):
            print(f"    {key}: {value}")
    sys.stdout.flush()


def run(
    cases: list[str], compiled: bool, keep: Callable[[dict[str, Row]], None], results: dict[str, Row]
) -> None:
    """The rows of `cases` that are not there yet, each kept as soon as it is measured."""
    for case in cases:
        row = results.get(case, {})
        wants_compiled = compiled and CASES[case][0] in COMPILED_ROWS
        is_there = row and (any(c.startswith("jit") for c in row) or not can_compile())
        if is_there and not (wants_compiled and "compiled_us" not in row):
            continue
        if not is_there:
            results[case] = measure(case)
        if wants_compiled:
            measure_compiled(results[case], case)
        keep(results)
        show(case, results[case])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write the numbers, after each row")
    parser.add_argument("--rows", choices=("deciding", "rest", "all"), default="all", help="which to measure")
    parser.add_argument("--compiled", action="store_true", help="compiled PyTorch too, at 16 and 64 rows")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("route_gpu.py needs a GPU")
    rest = [case for case in CASES if case not in DECIDING]
    cases = {"deciding": list(DECIDING), "rest": rest, "all": [*DECIDING, *rest]}[arguments.rows]
    results = read_results(arguments.json) if arguments.json else {}

    def keep(rows: dict[str, Row]) -> None:
        if arguments.json:
            command = "python benchmarks/route_gpu.py --json" + " --compiled" * arguments.compiled
            write_report(arguments.json, command, rows, targets=judge(rows, list(rows)))

    print(f"{torch.cuda.get_device_name()}\n{'':28}" + "".join(f"{c:>{width(c)}}" for c in COLUMNS))
    run(cases, arguments.compiled, keep, results)
    print("\n".join(map(describe, judge(results, list(results)))))


if __name__ == "__main__":
    main()
