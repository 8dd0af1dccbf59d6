"""benchmarks/runtime_cpp: builds xshare_bench and checks what it counts and says, never how long it took."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xshare_trtllm import RouterSpec, XShareConfig, route
from xshare_trtllm.config import SCORINGS
from xshare_trtllm.planning import shapes

ROOT = Path(__file__).resolve().parents[2]
SOURCE, BUILD = ROOT / "benchmarks" / "runtime_cpp", ROOT / "build" / "runtime_cpp_tests"
PLUGIN = ROOT / "xshare_trtllm" / "lib" / "libnvinfer_plugin_xshare.so"
STEPS = 16  # kNumSteps in logits.h
SPEC = RouterSpec(64, 8, "softmax_renorm")  # the shipped model, xshare_bench's default
EXPERT_BYTES = 3 * 256 * 64 * 4
QUICK = ("--iterations", "2", "--warmup=0")


@pytest.fixture(scope="module")
def bench() -> Path:
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool} to build xshare_bench")
    ninja = ["-G", "Ninja"] if shutil.which("ninja") and not (BUILD / "Makefile").exists() else []
    # Built quickly rather than fast; the library that it measures is built as always.
    options = [f"-DPython3_EXECUTABLE={sys.executable}", "-DCMAKE_CXX_FLAGS_RELEASE=-O0"]
    for command in (
        ["cmake", "-S", SOURCE, "-B", BUILD, *options, *ninja],
        ["cmake", "--build", BUILD, "--target", "xshare_bench", "-j", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    return BUILD / "xshare_bench"


def run(bench: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(bench), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def report(bench: Path, path: Path, *arguments: object) -> dict[str, Any]:
    done = run(bench, *QUICK, "--json", path, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    read: dict[str, Any] = json.loads(path.read_text())
    return read


def refusal(bench: Path, *arguments: object) -> tuple[int, str]:
    """Exit code and message, which is one line and all that was written."""
    done = run(bench, *arguments)
    assert done.stdout == ""
    assert re.fullmatch(r"xshare_bench: [^\n]+\n", done.stderr), done.stderr
    return done.returncode, done.stderr


def by_rows(read: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {row["rows"]: row for row in read["results"][0]["by_rows"]}


def test_report(bench: Path, tmp_path: Path) -> None:
    options = ("--concurrency", "1,8,64", "--coverage=0", "--budget=16", "--warmup_experts", 0)
    read = report(bench, tmp_path / "a.json", *options, "--commit", 'a"\\\t')
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert read["command"].startswith("xshare_bench --iterations 2 --warmup=0 --json ")
    assert read["machine"]["commit"] == 'a"\\\t' and read["machine"]["gpu"] is None
    assert read["machine"]["cores"] == os.cpu_count()
    assert (read["backend"], read["iterations"], read["warmup"]) == ("cpu", 2, 0)
    rows = by_rows(read)
    assert list(rows) == [1, 8, 64] and rows[1]["active_experts_own"] == 8
    for row in rows.values():
        assert row["active_experts_xshare"] <= min(16, row["active_experts_own"])
        for setting in ("own", "xshare"):
            assert row[f"expert_bytes_{setting}"] == pytest.approx(
                EXPERT_BYTES * row[f"active_experts_{setting}"]
            )
            rate = row[f"expert_bytes_{setting}"] / row["layer"][f"{setting}_us"] / 1e3
            assert row[f"gigabytes_per_second_{setting}"] == pytest.approx(rate)
        for part in (row["route"], row["layer"]):
            assert 0 < part["own_us"] < float("inf")
            assert part["ratio"] == pytest.approx(part["xshare_us"] / part["own_us"])
            assert 0 < part["ratio_quartiles"][0] <= part["ratio_quartiles"][1]
    assert rows[64]["active_experts_xshare"] == 16 < 50 < rows[64]["active_experts_own"]


def test_table(bench: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    table = run(bench, *QUICK, "--model=xshare-moe-14m", "--concurrency=2,16", "--json", path)
    assert (
        "64 experts, top 8, hidden 256, intermediate 64, 4 layers; coverage 0.97, budget none, warm-up 1"
        in table.stdout
    )
    assert "logits: synthetic" in table.stdout
    lines = [line.split("|") for line in table.stdout.splitlines() if re.match(r" *\d+ \|", line)]
    rows = by_rows(json.loads(path.read_text()))
    assert [int(line[0]) for line in lines] == list(rows)
    for line, row in zip(lines, rows.values(), strict=True):
        counts = [row["active_experts_own"], row["active_experts_xshare"]]
        assert [float(x) for x in line[1].split()] == pytest.approx(counts, abs=0.051)
        layer = [row["layer"]["own_us"], row["layer"]["xshare_us"], row["layer"]["ratio"]]
        assert [float(x) for x in line[3].split()[:3]] == pytest.approx(layer, abs=0.051)


def test_a_budget_of_all_experts_changes_nothing(bench: Path, tmp_path: Path) -> None:
    options = ("--coverage=0", "--budget", 64, "--concurrency=1,4,32")
    for row in by_rows(report(bench, tmp_path / "a.json", *options)).values():
        assert row["active_experts_own"] == row["active_experts_xshare"]


@pytest.mark.parametrize(
    ("options", "config"),
    [
        (("--coverage=0", "--budget=13", "--warmup_experts=2"), XShareConfig(budget=13, warmup=2)),
        ((), XShareConfig(coverage=0.97)),
        (("--coverage=0.8", "--budget=20"), XShareConfig(coverage=0.8, budget=20)),
    ],
)
def test_dataset_is_routed_as_the_package_routes_it(
    bench: Path, tmp_path: Path, options: tuple[str, ...], config: XShareConfig
) -> None:
    """Steps of 6 of 10 documents, 3 layers where the model has 4: every index wraps around."""
    logits = torch.randn(3, 10, 5, 64, generator=torch.Generator().manual_seed(3)) * 1.5
    np.save(tmp_path / "a.npy", logits.numpy())
    dataset = ("--dataset", tmp_path / "a.npy", "--concurrency=6")
    read = report(bench, tmp_path / "a.json", *dataset, *options)
    assert read["results"][0]["logits"] == str(tmp_path / "a.npy")
    stats = []
    for step in range(STEPS):
        documents = [(step * 6 + row) % 10 for row in range(6)]
        for layer in (0, 1, 2, 0):
            rows = logits[layer, documents, step % 5].contiguous()
            stats.append(route(rows, SPEC, config).stats)
    row = by_rows(read)[6]
    assert row["active_experts_own"] == pytest.approx(sum(s.experts_before for s in stats) / len(stats))
    assert row["active_experts_xshare"] == pytest.approx(sum(s.experts_after for s in stats) / len(stats))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "4"], "there is no option --batch"),
        (["--iterations"], "--iterations needs a value"),
        (["--iterations="], "--iterations needs a value"),
        (["--iterations", "0"], "--iterations must be a whole number from 1"),
        (["--iterations", "5x"], "not '5x'"),
        (["--warmup", "-1"], "--warmup must be a whole number from 0"),
        (["--concurrency", "8,"], "--concurrency must be a whole number from 1 to 1024, not ''"),
        (["--concurrency", "2000"], "not '2000'"),
        (["--backend", "gpu"], "--backend must be cpu or tensorrt, not 'gpu'"),
        (["--model", "gpt-2"], "--model 'gpt-2' is not known; known are xshare-moe-14m, "),
        (["--coverage", "1.5"], "--coverage must be a number from 0 to 1, not '1.5'"),
        (["--coverage", "much"], "--coverage must be a number from 0 to 1, not 'much'"),
        (["--coverage=0"], "--coverage 0 needs a --budget"),
        (["--budget", "7"], "budget must be at least top_k=8, not 7"),
        (["--warmup_experts", "9"], "warmup must be in 0..top_k=8, not 9"),
        (["--dataset", "nowhere.npy"], "--dataset nowhere.npy: cannot be read"),
        (["--json", "no/where.json"], "--json no/where.json: the folder no/: No such file"),
    ],
)
def test_bad_options(bench: Path, arguments: list[str], message: str) -> None:
    code, line = refusal(bench, *arguments)
    assert code == 2 and message in line


def test_bad_datasets(bench: Path, tmp_path: Path) -> None:
    good = np.zeros((2, 3, 4, 64), np.float32)
    arrays = {
        "double": good.astype(np.float64),
        "columns": np.asfortranarray(good),
        "flat": good[0],
        "empty": good[:0],
    }
    path = tmp_path / "a.npy"
    for name, array in arrays.items():
        np.save(path, array)
        code, line = refusal(bench, "--dataset", path, "--concurrency", 1)
        assert code == 2 and "must be a .npy file of fp32 [layers, documents, positions, " in line, name
    np.save(path, good)
    whole = path.read_bytes()
    for spoiled in (whole[:-4], whole + b"1234", whole[:40], b"", b"x" + whole[1:]):
        path.write_bytes(spoiled)
        code, line = refusal(bench, "--dataset", path, "--concurrency", 1)
        assert code == 2 and "must be a .npy file" in line
    path.write_bytes(whole)
    assert (
        "has 3 documents, fewer than --concurrency 4"
        in refusal(bench, "--dataset", path, "--concurrency=1,4")[1]
    )
    code, line = refusal(bench, "--dataset", path, "--concurrency", 1, "--model", "gpt-oss-20b")
    assert code == 2 and "has 64 experts, but gpt-oss-20b has 32" in line


def test_a_failed_report_leaves_nothing(bench: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    done = run(bench, *QUICK, "--concurrency=1", "--json", tmp_path / "a.json")
    assert done.returncode == 1 and re.fullmatch(r"xshare_bench: --json .*: Is a directory\n", done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_shapes_are_those_of_the_cost_model() -> None:
    lines = re.findall(r"^ *\{\"(.*)\", (.*)\},$", (SOURCE / "models.cpp").read_text(), re.MULTILINE)
    assert len(lines) > 5
    for name, values in lines:
        experts, top_k, scoring, groups, top_k_groups, factor, hidden, width, size, _ = values.split(", ")
        spec = RouterSpec(
            int(experts),
            int(top_k),
            scoring.removeprefix("XSHARE_").lower(),
            int(groups),
            int(top_k_groups),
            float(factor.rstrip("f")),
        )
        assert spec.scoring in SCORINGS
        if name == "xshare-moe-14m":
            assert spec == SPEC and (hidden, width) == ("256", "64")
            continue
        shape = shapes.shape(name)
        assert spec == shape.router
        assert (int(hidden), 3 * int(hidden) * int(width)) == (shape.hidden, shape.expert_parameters)
        numerator, _, denominator = size.partition(" / ")
        assert float(numerator) / float(denominator or 1) == shape.expert_bytes


def test_trace_of_the_shipped_model(bench: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs transformers to run the shipped model")
    spec = importlib.util.spec_from_file_location("write_trace", SOURCE / "write_trace.py")
    assert spec is not None and spec.loader is not None
    write_trace = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(write_trace)
    path = tmp_path / "a.npy"
    assert write_trace.write(path, length=8, stride=4) == (4, 112, 2, 64)
    assert [each.name for each in tmp_path.iterdir()] == ["a.npy"]
    row = by_rows(report(bench, tmp_path / "a.json", "--dataset", path, "--concurrency=16"))[16]
    assert 20 < row["active_experts_xshare"] < 0.85 * row["active_experts_own"] < 54


def test_tensorrt(bench: Path, tmp_path: Path) -> None:
    """Without a device: one line that says so. With one: the same experts as on the host."""
    options = ("--concurrency=1,33", "--backend=tensorrt")
    if not torch.cuda.is_available():
        code, line = refusal(bench, *options, "--dynamicPlugins", PLUGIN)
        built = "XSHARE_TENSORRT_INCLUDE" in (BUILD / "CMakeCache.txt").read_text()
        wanted = "needs a GPU: " if PLUGIN.exists() else f"--dynamicPlugins {PLUGIN}: "
        assert code == 1 and (wanted if built else "not in this build") in line
        return
    if not PLUGIN.exists():
        pytest.skip(f"needs {PLUGIN}")
    on_gpu, on_host = (
        by_rows(report(bench, tmp_path / f"{name}.json", *options[:1], f"--backend={name}"))
        for name in ("tensorrt", "cpu")
    )
    for rows in (1, 33):
        for key in ("active_experts_own", "active_experts_xshare"):
            assert on_gpu[rows][key] == on_host[rows][key]
