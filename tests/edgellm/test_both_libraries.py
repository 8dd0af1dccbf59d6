"""Our plugin library beside TensorRT Edge-LLM's in one process, on TensorRT's real registry."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tensorrt"))

import plugin_build  # noqa: E402

pytest.importorskip("tensorrt_lean_bindings", reason="needs tensorrt-lean-cu13-bindings, the real registry")


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Ours, and a stand-in for theirs."""
    built = plugin_build.build()
    theirs = tmp_path_factory.mktemp("theirs") / "libNvInfer_edgellm_plugin.so"
    flags = ["-std=c++17", "-shared", "-Xcompiler=-fPIC,-fvisibility=hidden", "-isystem", str(built.headers)]
    source = HERE / "other_library.cpp"
    command = [str(plugin_build.nvcc()), *flags, str(source), "-o", str(theirs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return built.library, theirs


def _runtime() -> Path:
    spec = importlib.util.find_spec("tensorrt_lean_libs")
    assert spec is not None and spec.submodule_search_locations is not None
    return next(Path(spec.submodule_search_locations[0]).glob("libnvinfer_lean.so.*"))


def _major() -> str:
    """Of the headers that the library was built with: in the name of the stand-in for TensorRT."""
    return plugin_build.build().fake.name.rsplit(".", 1)[1]


@pytest.mark.parametrize("order", ("preloaded", "ours first", "theirs first"))
def test_both_are_registered(order: str, libraries: tuple[Path, Path], tmp_path: Path) -> None:
    ours, theirs = map(str, libraries)
    preload = {}
    if (
        order == "preloaded"
    ):  # it then loads the libnvinfer.so of its own major version: here the real runtime
        (tmp_path / f"libnvinfer.so.{_major()}").symlink_to(_runtime())
        preload = {"LD_PRELOAD": ours, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(HERE / "both_libraries.py"), order, ours, theirs],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | preload,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "must be set" in done.stderr or "is missing" in done.stderr  # why our creator refused
