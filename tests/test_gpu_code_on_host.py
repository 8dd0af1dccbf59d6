"""The code for a GPU that build_scripts/device_check.sh starts, on the host: tests/gpu and the GPU benchmarks
with the host library in the device's place (tests/device_stand_in), and with orders broken on purpose."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
GPU_TESTS, BENCHMARKS = ROOT / "tests" / "gpu", ROOT / "benchmarks"
HOST_LIBRARY = ROOT / "xshare_trtllm" / "lib" / "libxshare.so"
TARGETS = runpy.run_path(str(BENCHMARKS / "route_targets.py"))
needs_library = pytest.mark.skipif(
    not HOST_LIBRARY.exists(), reason="libxshare.so is not built: pip install -e ."
)


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> Any:
    """tests/gpu/chain.py on the host library."""
    monkeypatch.syspath_prepend(str(GPU_TESTS))
    monkeypatch.setenv("XSHARE_CUDA_LIBRARY", str(HOST_LIBRARY))
    import chain
    import device_routing

    device_routing.library.cache_clear()
    yield chain
    device_routing.library.cache_clear()


def in_order(calls: list[Any], order: list[int]) -> Callable[[], None]:
    return lambda: [calls[index].run_on_host() for index in order] and None


def with_last_row_late(chain: Any, calls: list[Any], late: int) -> Callable[[], None]:
    """The last row of one call's masked logits is written when the next call has read it."""

    def launch() -> None:
        for index, call in enumerate(calls):
            row = calls[late].outputs.tensors[chain.MASKED_LOGITS][-1]
            if index == late:
                before = row.clone()
                call.run_on_host()
                after = row.clone()
                row.copy_(before)
                continue
            call.run_on_host()
            if index == late + 1:
                row.copy_(after)

    return launch


@needs_library
@pytest.mark.parametrize(("model", "num_tokens"), [("gpt-oss", 16), ("kimi-k2", 64), ("gpt-oss", 256)])
def test_chain_sees_every_broken_order(chain: Any, model: str, num_tokens: int) -> None:
    made = chain.Chain(model, num_tokens, "cpu")
    usual = list(range(len(made.calls)))
    assert chain.wrong_repetitions(made, made.run_on_host, 5) == []
    everything = [0, 1, 2, 3, 4]
    for first in (0, 1, 3, 4, 6, 7):  # between 2 and 3, and 5 and 6, nothing is handed on
        swapped = usual.copy()
        swapped[first : first + 2] = [first + 1, first]
        assert chain.wrong_repetitions(made, in_order(made.calls, swapped), 5) == everything, (
            f"stale: {first}"
        )
        late = with_last_row_late(chain, made.calls, first)
        assert chain.wrong_repetitions(made, late, 5) == everything, f"one late row: {first}"
    overtaking = [0, 3, *(index for index in usual if index not in (0, 3))]  # A of the next turn before B
    assert chain.wrong_repetitions(made, in_order(made.calls, overtaking), 5) == everything


def run_on_host(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | variables | {"XSHARE_CUDA_LIBRARY": str(HOST_LIBRARY), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT / "tests" / "device_stand_in"), str(ROOT)))
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=120, check=False, env=environment
    )


TESTS = """
import sys
import cuda_on_host
import pytest
path, subset, wanted = sys.argv[1:]
options = ["-q", "-p", "no:cacheprovider", path]
sys.exit(pytest.main([*options, "--collect-only", "-k", subset]) or pytest.main([*options, "-k", wanted]))
"""


@needs_library
def test_gpu_tests_are_right_about_the_host() -> None:
    """Their own code, with the host library in the device's place; and what the subset of switches.py is."""
    subset = runpy.run_path(str(GPU_TESTS / "switches.py"))["SUBSET"]
    wanted = "(chain and -64]) or captured_graph or (equals_the_host and -16])"
    done = run_on_host("-c", TESTS, str(GPU_TESTS / "test_route_cuda.py"), subset, wanted)
    assert done.returncode == 0 and re.search(r"\b19 passed", done.stdout), done.stdout + done.stderr
    for name in ("chain_on_a_stream", "chain_in_a_graph", "first_call", "is_awaited", "captured_graph"):
        assert name in done.stdout, name
    for rows in (1, 16, 64, 100, 256, 700):
        assert f"::test_equals_the_host[gpt-oss-{rows}]" in done.stdout
    assert "equals_the_host[olmoe" not in done.stdout


BENCHMARK = """
import os, sys
import cuda_on_host
sys.path.insert(0, sys.argv[1])
import route_gpu

route_gpu.HIDDEN, route_gpu.LARGE, route_gpu.REPLAYS = 32, 32, 2
route_gpu.CASES = {n: c for n, c in route_gpu.CASES.items() if "E=128 k=4" in n and c[0] <= 16}
route_gpu.DECIDING = {"T=16 E=128 k=4": "", "T=1 E=128 k=4": ""}
route_torch = route_gpu.route_torch

def broken(*_):
    raise RuntimeError("no such operator")

folder = sys.argv[2]
runs = ("a", broken, "deciding", 0), ("b", route_torch, "all", 0), ("c", route_torch, "deciding", 1)
for name, eager, rows, late in runs:
    route_gpu.route_torch = eager
    os.environ["XSHARE_STAND_IN_LATE"] = str(late)
    path = f"{folder}/{name}.json"
    if name == "b":
        os.link(f"{folder}/a.json", path)
    sys.argv = ["route_gpu.py", "--rows", rows, "--json", path]
    route_gpu.main()
"""


@needs_library
def test_benchmark_on_the_host(tmp_path: Path) -> None:
    """First with a baseline that breaks; then the same rows and more; then with a host that is too slow."""
    done = run_on_host("-c", BENCHMARK, str(BENCHMARKS), str(tmp_path))
    assert done.returncode == 0, done.stderr
    first, then, late = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "abc")
    assert {"gpu", "torch", "commit", "time"} <= set(first["machine"])
    assert list(first["results"]) == ["T=16 E=128 k=4", "T=1 E=128 k=4"]
    row = first["results"]["T=16 E=128 k=4"]
    assert row["eager_error"] == "RuntimeError: no such operator" and "over_eager" not in row
    assert row["xshare_us"] == row["plain_us"] == row["over_plain"] == row["in_model_over_plain"] == 1.0
    assert list(then["results"]) == [*first["results"], "T=4 E=128 k=4"]
    assert then["results"]["T=16 E=128 k=4"] == row, "measured again"
    assert "eager_us" in then["results"]["T=4 E=128 k=4"]
    row = late["results"]["T=1 E=128 k=4"]
    assert "xshare_us" not in row and "the host is too slow to enqueue" in row["xshare_error"]


def test_six_rows_decide_and_exist() -> None:
    source = (BENCHMARKS / "route_gpu.py").read_text()
    assert len(TARGETS["DECIDING"]) == 6 and TARGETS["HEADLINE"] in TARGETS["DECIDING"]
    for name in TARGETS["DECIDING"]:
        rows, shape = name.removeprefix("T=").split(" ", 1)
        assert f'"{shape}":' in source and rows in re.findall(
            r"\d+", source.split("ROWS = ")[1].split(")")[0]
        )


def test_results_of_another_machine_are_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_report

    here = {"gpu": "a", "commit": "b", "time": "now"}
    monkeypatch.setattr(gpu_report, "machine", lambda: here)
    path = tmp_path / "report.json"
    gpu_report.write_report(path, "command", {"row": {"xshare_us": 1.0}})
    here = here | {"time": "later"}
    assert gpu_report.read_results(path) == {"row": {"xshare_us": 1.0}}
    here = here | {"commit": "c"}
    assert gpu_report.read_results(path) == {}
    path.write_text("{")
    assert gpu_report.read_results(path) == gpu_report.read_results(tmp_path / "none") == {}
