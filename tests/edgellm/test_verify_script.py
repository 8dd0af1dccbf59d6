"""The script that a user with a GPU runs: what of it can be tried without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

onnx = pytest.importorskip("onnx", reason="needs onnx")

from graphs import moe_graph, save  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "build_scripts/verify_edgellm.sh"
TOOL = """#!/bin/bash
# Contract: options and lines of TensorRT Edge-LLM's llm_build, llm_bench and llm_inference.
while [[ $# -gt 0 ]]; do
    case $1 in
        --onnxDir) [[ -f $2/model.onnx ]] || exit 5; shift 2 ;;
        --engineDir) engine=$2; shift 2 ;;
        --outputFile) out=$2; shift 2 ;;
        --mode) mode=$2; shift 2 ;;
        *) shift ;;
    esac
done
case ${0##*/} in
    llm_build) mkdir -p "$engine" ;;
    llm_bench) [[ -n $mode && -d $engine ]] && echo "Tokens/sec (E2E): ${#LD_PRELOAD}.5" ;;
    llm_inference)
        [[ -d $engine && -s requests.json ]] || exit 6
        echo '{"responses": [{"output_text": "'${ANSWER_OF_NO_LIMIT:-same}'"}]}' >"$out"
        [[ $engine == engine_no_limit ]] || echo '{"responses": [{"output_text": "same"}]}' >"$out"
        echo "Generation: 12.5 tokens/s, average acceptance length: 2.4" ;;
esac
"""


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """Stand-ins for the tools, the libraries and the exporter."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("llm_build", "llm_bench", "llm_inference"):
        (tools / name).write_text(TOOL)
        (tools / name).chmod(0o755)
    packages = tmp_path / "packages" / "tensorrt_edgellm"
    (packages / "scripts").mkdir(parents=True)
    for folder in (packages, packages / "scripts"):
        (folder / "__init__.py").touch()
    graph = save(tmp_path / "graph", moe_graph(layers=2)) / "model.onnx"
    exporter = f"import shutil, sys; shutil.copytree({str(graph.parent)!r}, sys.argv[2] + '/llm')"
    (packages / "scripts" / "export.py").write_text(exporter)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    empty = tmp_path / "library.so"
    subprocess.run(
        ["cc", "-shared", "-o", empty, "-x", "c", "-"], input="int nothing;", text=True, check=True
    )
    return {
        "EDGELLM_BIN": str(tools),
        "EDGELLM_PLUGIN_PATH": str(empty),
        "XSHARE_PLUGIN": str(empty),
        "PYTHON": sys.executable,
        "PYTHONPATH": f"{packages.parent}:{ROOT}",
        "BUILD_OPTIONS": "--maxBatchSize 4 --specBase",
    }


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | environment,
    )


def test_every_step_exists() -> None:
    listed = run("--list").stdout.split()
    text = SCRIPT.read_text()
    assert listed and all(f"\nstep_{name}() {{" in text for name in listed)


def test_contract(machine: dict[str, str], tmp_path: Path) -> None:
    done = run(str(tmp_path / "model"), str(tmp_path / "out"), **machine)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split(":")[0] for line in lines[:-1]] == [
        f"PASS {name}" for name in run("--list").stdout.split()
    ]
    said = {line.split(":")[0].split()[1]: line for line in lines[:-1]}
    assert "XShare" in (tmp_path / "out/rewrite.log").read_text()
    length = len(machine["XSHARE_PLUGIN"])
    assert f"batch 4: 0.5 tokens/s without XShare, {length}.5 with" in said["bench"], (
        "preloaded for ours alone"
    )
    assert f"16 verified rows: 0.5 tokens/s without XShare, {length}.5 with" in said["verify"]
    assert "12.5 tokens/s without XShare, 12.5 with, acceptance length: 2.4" in said["speed"]

    machine["ANSWER_OF_NO_LIMIT"] = "other"
    done = run(str(tmp_path / "model"), str(tmp_path / "out"), **machine)
    assert done.returncode == 1 and "FAIL same_answers: status 1" in done.stdout


@pytest.mark.parametrize(
    ("name", "said"),
    (
        ("XSHARE_PLUGIN", "nowhere is not there: build_scripts/build_plugin.sh all"),
        ("EDGELLM_BIN", "no llm_build: set EDGELLM_BIN"),
        ("EDGELLM_PLUGIN_PATH", "EDGELLM_PLUGIN_PATH does not name"),
    ),
)
def test_refused(machine: dict[str, str], tmp_path: Path, name: str, said: str) -> None:
    done = run(str(tmp_path / "model"), str(tmp_path / "out"), **machine | {name: "nowhere"})
    assert done.returncode == 2 and said in done.stderr and not (tmp_path / "out").exists()
    assert "has no config.json" in run(str(tmp_path)).stderr
