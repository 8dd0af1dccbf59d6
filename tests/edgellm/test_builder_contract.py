"""The direct builder of TensorRT Edge-LLM, its real code, on a stand-in for `tensorrt`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tensorrt_edgellm", reason="needs tensorrt-edgellm (pip install --no-deps), 200 MB")
pytest.importorskip("tensorrt_rtx_bindings", reason="needs tensorrt-rtx-cu13-bindings, for a real network")

CHECKS = (
    "softmax_layers",
    "sigmoid_layers",
    "budgets_per_layer",
    "refusals",
    "untouched_afterwards",
    "names",
)


@pytest.mark.parametrize("check", CHECKS)
def test_contract(check: str) -> None:
    script = Path(__file__).with_name("builder_contract.py")
    done = subprocess.run([sys.executable, script, check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
