"""Builds the TensorRT plugin library and the two C++ helpers of its tests, once, in build/tensorrt."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "tensorrt"


@dataclass(frozen=True)
class Built:
    """library: the plugin; probe: plugin_probe.cpp; fake: libnvinfer.so.<major> from fake_tensorrt.cpp;
    headers: TensorRT's."""

    library: Path
    probe: Path
    fake: Path
    headers: Path


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@cache
def build() -> Built:
    """Skips the test, with what is missing, where the plugin cannot be built on this machine."""
    for tool, found in (("cmake", shutil.which("cmake")), ("c++", shutil.which("c++")), ("nvcc", nvcc())):
        if found is None:
            pytest.skip(f"needs {tool} to build the TensorRT plugin")
    configured = _run(
        ["cmake", "-S", str(ROOT / "plugins"), "-B", str(BUILD), "-DXSHARE_CUDA=ON", "-DXSHARE_TENSORRT=ON"]
        + [f"-DPython3_EXECUTABLE={sys.executable}"]
        + _architectures()
        + (["-G", "Ninja"] if shutil.which("ninja") else [])
    )
    if "No TensorRT headers" in configured.stderr:
        pytest.skip("needs TensorRT headers: pip install --no-deps kernel-lens==2.0.1")
    assert configured.returncode == 0, configured.stdout + configured.stderr
    assert re.search(r"TensorRT [\d.]+ headers from .*: /", configured.stdout), configured.stdout
    built = _run(["cmake", "--build", str(BUILD), "--target", "nvinfer_plugin_xshare"])
    assert built.returncode == 0, built.stdout + built.stderr

    cache_text = (BUILD / "CMakeCache.txt").read_text()
    include = re.findall(r"^XSHARE_TENSORRT_INCLUDE:PATH=(.*)$", cache_text, re.MULTILINE)[0]
    version = (Path(include) / "NvInferVersion.h").read_text()
    major = re.findall(r"define (?:NV_TENSORRT|TRT)_MAJOR\w* (\d+)", version)[0]
    fake = BUILD / "fake" / f"libnvinfer.so.{major}"
    fake.parent.mkdir(exist_ok=True)
    probe = BUILD / "plugin_probe.so"
    _compile("plugin_probe.cpp", probe, include)
    _compile("fake_tensorrt.cpp", fake, include)
    return Built(BUILD / "libnvinfer_plugin_xshare.so", probe, fake, Path(include))


def _compile(source: str, target: Path, include: str) -> None:
    flags = ["-std=c++17", "-shared", "-Xcompiler=-O1,-Wall,-Wextra,-Werror,-fPIC,-fvisibility=hidden"]
    paths = ["-I", str(ROOT / "plugins"), "-isystem", include]
    done = _run([str(nvcc()), *flags, *paths, str(HERE / source), "-o", str(target), "-ldl"])
    assert done.returncode == 0, done.stderr


def _architectures() -> list[str]:
    """That of the GPU; PTX alone, which is built in a quarter of the time, where there is none."""
    import torch

    has_gpu = torch.cuda.is_available()
    wanted = "{}{}-real".format(*torch.cuda.get_device_capability()) if has_gpu else "80-virtual"
    return [f"-DCMAKE_CUDA_ARCHITECTURES={wanted}"]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUDACXX": str(nvcc())}  # counts at the first configuration only
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
