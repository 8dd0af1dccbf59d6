"""Runs `trtllm-build` of the stand-in, with XShare, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LIBRARY = (
    ROOT / "xshare_trtllm" / "lib" / "libxshare.so"
)  # stands for the plugin library: the stand-in loads any
COMMAND = (sys.executable, "-m", "xshare_trtllm.trtllm.build_command")
MIXTRAL = {"num_experts": 8, "top_k": 2, "normalization_mode": 1}


def environment(**more: str) -> dict[str, str]:
    if not LIBRARY.is_file():
        pytest.skip("needs the native library: pip install -e .")
    path = f"{HERE / 'stand_in'}{os.pathsep}{ROOT}"
    return os.environ | {"PYTHONPATH": path, "XSHARE_PLUGIN": str(LIBRARY), "OMP_NUM_THREADS": "1"} | more


def checkpoint(folder: Path, moe: dict[str, Any] | None = None, layers: int = 2, **more: Any) -> str:
    values = {"architecture": "MixtralForCausalLM", "num_hidden_layers": layers, "moe": moe or MIXTRAL}
    (folder / "config.json").write_text(json.dumps(values | more))
    return str(folder)


def run(
    *arguments: object, command: tuple[str, ...] = COMMAND, **more: str
) -> subprocess.CompletedProcess[str]:
    pytest.importorskip(
        "tensorrt_rtx_bindings",
        reason="needs TensorRT-RTX: pip install tensorrt-rtx-cu13-libs==1.7.1.116 "
        "tensorrt-rtx-cu13-bindings==1.7.1.116",
    )
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment(**more),
    )


def build(folder: Path, *arguments: object, **more: str) -> list[dict[str, Any]]:
    """Builds into `folder`; what the stand-in noted down of each rank's network."""
    done = run("--checkpoint_dir", folder, "--output_dir", folder / "engine", *arguments, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    notes = [json.loads(path.read_text()) for path in sorted((folder / "engine").glob("rank*.json"))]
    assert all(note["errors"] == [] for note in notes), notes
    return notes


def refusal(folder: Path, *arguments: object) -> str:
    """What a build says that must not leave anything in the engine's folder."""
    done = run("--checkpoint_dir", folder, "--output_dir", folder / "engine", *arguments)
    assert done.returncode != 0
    assert not list((folder / "engine").glob("*")), done.stderr
    return done.stderr.strip().splitlines()[-1]
