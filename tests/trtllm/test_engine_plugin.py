"""The plugin object, from the fields that the engine path makes, in TensorRT's real registry."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tensorrt"))
import plugin_build  # noqa: E402


def test_fields_make_a_plugin(tmp_path: Path) -> None:
    """In a process of its own: a crash in a shared library would end pytest's."""
    try:
        version("tensorrt-lean-cu13-bindings")
        version("tensorrt-lean-cu13-libs")
    except PackageNotFoundError as missing:
        pytest.skip(f"needs TensorRT's lean runtime: pip install {missing.name}==11.4.0.106")
    built = plugin_build.build()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(plugin_build.ROOT), str(HERE.parent / "tensorrt")))
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "engine_plugin_checks.py"), str(built.library), str(built.probe)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )
    assert (done.returncode, done.stdout) == (0, "all good\n"), done.stdout + done.stderr
