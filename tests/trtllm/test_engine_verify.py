"""The script that a user with a GPU runs: what of it can be tried without one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "build_scripts"
SCRIPT = SCRIPTS / "verify_trtllm.sh"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | environment,
    )


def test_every_step_exists() -> None:
    assert subprocess.run(["bash", "-n", SCRIPT], check=True).returncode == 0
    listed = run("--list")
    steps = [line.split() for line in listed.stdout.splitlines()]
    assert listed.returncode == 0 and {part for part, _ in steps} == {"engine", "pytorch"}
    spec = importlib.util.spec_from_file_location("verify_trtllm", SCRIPTS / "verify_trtllm.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    methods = {name for name in vars(module.Step) if not name.startswith("_")}
    assert methods == {step for _, step in steps}


@pytest.mark.parametrize(
    ("arguments", "said"),
    ((("both",), "unknown part 'both': give engine, pytorch or all"), (("engine",), "needs a GPU and torch")),
)
def test_refused(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = run(*arguments, str(tmp_path / "out"), PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and said in done.stderr
    assert not list(tmp_path.glob("out/*"))


def test_contract_ends_with_a_table_to_paste(tmp_path: Path) -> None:
    """Python is a stand-in: one step fails, the others print a result with a bar in it."""
    python = tmp_path / "python"
    python.write_text(
        """#!/bin/bash
case $1 in
    -c) [[ $2 != *"sys.exit((int(major)"* ]] ;; # of a version without engines
    -) echo "xshare-trtllm 0.1.0, tensorrt_llm 1.2.1, torch 2.9.1, transformers 4.57.3 on NVIDIA H100" ;;
    *)
        echo "noise"
        if [[ $2 == torch_fewer_experts && $3 == mixtral ]]; then
            echo "AssertionError: no"
            echo "[TRT-LLM] at exit"
            exit 1
        fi
        [[ $2 == torch_dial && $3 == mixtral ]] && exec sleep 20
        echo "RESULT: fine | so far"
        echo "[TRT-LLM] at exit" ;;
esac
"""
    )
    python.chmod(0o755)
    done = run("all", str(tmp_path / "out"), PYTHON=str(python), XSHARE_VERIFY_SECONDS="2")
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    head = lines.index("| model | step | result | what |")
    assert lines[head - 2].startswith("xshare-trtllm 0.1.0, tensorrt_llm 1.2.1")
    rows = [line for line in lines[head + 2 :] if line.startswith("|")]
    assert len(rows) == 1 + 14 and sum("| PASS | fine / so far |" in row for row in rows) == 12
    assert "| all | engine | SKIP | engines end with TensorRT-LLM 1.2 |" in rows
    assert "| mixtral | torch_fewer_experts | FAIL (1) | AssertionError: no |" in rows
    assert "| mixtral | torch_dial | FAIL (124) | TimeoutError: more than 2 s |" in rows
    refused = run("engine", str(tmp_path / "out"), PYTHON=str(python))
    assert refused.returncode == 2 and "engines end with 1.2" in refused.stderr
