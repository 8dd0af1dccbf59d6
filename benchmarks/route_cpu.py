"""Routing on one CPU thread: how much faster than the reference, and what sharing costs over plain top-k.

    python benchmarks/route_cpu.py [--json]

Times are CPU times of the thread, medians of many; all ratios are within this run. The C ABI is called from a
C++ loop over 16 different batches (compiled here, so that neither Python nor a learned branch pattern is
measured). Heap is what malloc was asked for per call, outputs included, after the first call.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.table import Table

from xshare_trtllm import RouterSpec, XShareConfig, ops, reference
from xshare_trtllm.report import machine, write_json

ROOT = Path(__file__).resolve().parent.parent
NUM_BATCHES = 16  # 1 MiB of logits at the larger shape: they stay in the cache, as after a router's GEMM
NUM_REPEATS = 41
Timer = Callable[[], float]  # seconds per call
CASES = {
    "T=16 E=128 k=4 topk_softmax, coverage 0.97": (
        16,
        RouterSpec(128, 4, "topk_softmax"),
        XShareConfig(coverage=0.97),
    ),
    "T=64 E=256 k=8 sigmoid_bias 8 groups, coverage 0.97": (
        64,
        RouterSpec(256, 8, "sigmoid_bias", 8, 4, 2.5),
        XShareConfig(coverage=0.97),
    ),
}


def compile_loop(folder: Path) -> Path:
    loop = folder / "route_cpu_loop.so"
    source = ROOT / "benchmarks" / "route_cpu_loop.cpp"
    include = ROOT / "plugins" / "include"
    compiler = os.environ.get("CXX", "g++")
    subprocess.run(
        [compiler, "-O2", "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(loop)], check=True
    )
    return loop


class Batches:
    """16 random batches of a case, and the C structs that point to them and their outputs."""

    def __init__(self, num_tokens: int, spec: RouterSpec) -> None:
        generator = torch.Generator().manual_seed(0)
        self.logits = [
            torch.randn(num_tokens, spec.num_experts, generator=generator) for _ in range(NUM_BATCHES)
        ]
        self.bias = 0.1 * torch.randn(spec.num_experts, generator=generator)
        self.correction_bias = self.bias if spec.rule.has_bias else None
        self.outputs = ops._empty_outputs(num_tokens, spec.num_experts, spec.top_k)
        ids, weights, active, stats = (output.data_ptr() for output in self.outputs)
        bias = 0 if self.correction_bias is None else self.correction_bias.data_ptr()
        self.tensors = b"".join(
            ops._TENSORS.pack(
                ops._TENSORS.size, logits.data_ptr(), bias, 0, 0, 0, ids, weights, 0, active, stats, 0, 0
            )
            for logits in self.logits
        )


def c_abi(
    loop: ctypes.CDLL, batches: Batches, num_tokens: int, spec: RouterSpec, config: XShareConfig
) -> Timer:
    """xshare_route_cpu from C++."""
    params = ops.pack_params(num_tokens, spec.num_experts, torch.float32, ops.settings(spec, config))
    function = ctypes.cast(ops._library().xshare_route_cpu, ctypes.c_void_p)
    loop.time_route.restype = ctypes.c_double

    def seconds() -> float:
        rounds = 8
        elapsed: float = loop.time_route(function, params, batches.tensors, NUM_BATCHES, rounds)
        assert elapsed > 0, ops._library().xshare_last_error()
        return elapsed / (rounds * NUM_BATCHES)

    return seconds


def python(call: Callable[[torch.Tensor], Any], logits: list[torch.Tensor]) -> Timer:
    def seconds() -> float:
        start = time.thread_time()
        for each in logits:
            call(each)
        return (time.thread_time() - start) / len(logits)

    return seconds


def measure(loop: ctypes.CDLL, num_tokens: int, spec: RouterSpec, config: XShareConfig) -> dict[str, float]:
    """Median microseconds per call of each variant; they take turns, so that all see the same machine."""
    batches = Batches(num_tokens, spec)
    bias = batches.correction_bias
    off = XShareConfig.off(spec)
    values = ops.settings(spec, config)
    op = torch.ops.xshare.route.default
    logits = batches.logits
    timers = {
        "c_abi_us": c_abi(loop, batches, num_tokens, spec, config),
        "c_abi_plain_us": c_abi(loop, batches, num_tokens, spec, off),
        "ops_route_us": python(lambda z: ops.route(z, spec, config, bias), logits),
        "ops_route_plain_us": python(lambda z: ops.route(z, spec, off, bias), logits),
        "torch_op_us": python(lambda z: op(z, bias, None, None, None, *values), logits),
        "reference_us": python(lambda z: reference.route(z, spec, config, bias), logits[:4]),
        "reference_plain_us": python(lambda z: reference.route(z, spec, off, bias), logits[:4]),
    }
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(NUM_REPEATS):
        for name, timer in timers.items():
            times[name].append(timer())
    return {name: 1e6 * statistics.median(values) for name, values in times.items()}


def measure_heap(loop: ctypes.CDLL) -> dict[str, dict[str, float]]:
    """Bytes asked of malloc per call; only right in a process that has the loop preloaded."""
    counted = loop.heap_bytes_of_this_thread
    counted.restype = ctypes.c_int64
    result = {}
    for name, (num_tokens, spec, config) in CASES.items():
        batches = Batches(num_tokens, spec)
        params = ops.pack_params(num_tokens, spec.num_experts, torch.float32, ops.settings(spec, config))
        route = ops._library().xshare_route_cpu

        def from_c(route: Any = route, params: bytes = params, tensors: bytes = batches.tensors) -> None:
            route(params, tensors, None, 0)

        def op(
            z: Any = batches.logits[0], s: Any = spec, c: Any = config, b: Any = batches.correction_bias
        ) -> None:
            ops.route(z, s, c, b)

        result[name] = {}
        for label, call in (("c_abi_heap_bytes", from_c), ("ops_route_heap_bytes", op)):
            call()
            before = counted()
            for _ in range(100):
                call()
            result[name][label] = (counted() - before) / 100
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="write benchmarks/results/route_cpu.json")
    parser.add_argument("--heap", help=argparse.SUPPRESS)  # the preloaded child process
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.heap:
        print(json.dumps(measure_heap(ctypes.CDLL(arguments.heap))))
        return

    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = compile_loop(Path(folder))
        for name, case in CASES.items():
            results[name] = measure(ctypes.CDLL(str(path)), *case)
        child = [sys.executable, __file__, "--heap", str(path)]
        heap = subprocess.run(
            child, env=os.environ | {"LD_PRELOAD": str(path)}, check=True, capture_output=True, text=True
        )
    for name, extra in json.loads(heap.stdout).items():
        results[name].update(extra)
        r = results[name]
        r["reference_over_ops_route"] = r["reference_us"] / r["ops_route_us"]
        r["reference_over_c_abi"] = r["reference_us"] / r["c_abi_us"]
        r["c_abi_over_plain"] = r["c_abi_us"] / r["c_abi_plain_us"]
        r["reference_over_torch_op"] = r["reference_us"] / r["torch_op_us"]
        r["ops_route_over_plain"] = r["ops_route_us"] / r["ops_route_plain_us"]
    show(results)
    if arguments.json:
        head = {"command": "python benchmarks/route_cpu.py --json", "machine": machine()}
        write_json(ROOT / "benchmarks" / "results" / "route_cpu.json", head | {"results": results})


def show(results: dict[str, dict[str, float]]) -> None:
    table = Table(title="routing on one CPU thread, microseconds per call")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    for key in next(iter(results.values())):
        table.add_row(key, *(f"{r[key]:.2f}" for r in results.values()))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
