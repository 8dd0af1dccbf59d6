"""What is installed on this machine, found without importing or running any of it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
ROOT = PACKAGE.parent
HOST, CUDA, PLUGIN = "libxshare.so", "libxshare_cuda.so", "libnvinfer_plugin_xshare.so"
NAMED_BY = {CUDA: "XSHARE_CUDA_LIBRARY", PLUGIN: "XSHARE_PLUGIN"}

# Adds `--plugin xshare` to trtllm-build; `python -m` this works whichever trtllm-build is first on PATH.
BUILD_MODULE = "xshare_trtllm.trtllm.build_command"


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The version of each distribution; None where it is not installed."""
    return {package: _version(package) for package in packages}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def find_library(name: str) -> Path | None:
    """The first of: what its environment variable names (even if no such file exists), xshare_trtllm/lib, the
    newest in the checkout's build folders. None where there is none."""
    named = os.environ.get(NAMED_BY.get(name, ""))
    if named:
        return Path(named)
    installed = PACKAGE / "lib" / name
    if installed.is_file():
        return installed
    built = [*ROOT.glob(f"build/*/{name}"), *ROOT.glob(f"build/{name}")]
    return max(built, key=lambda path: path.stat().st_mtime, default=None)


def find_trtllm_examples() -> Path | None:
    """A checkout of TensorRT-LLM: TRTLLM_ROOT, or that in NVIDIA's container. The wheel has no examples."""
    for root in (os.environ.get("TRTLLM_ROOT"), "/app/tensorrt_llm"):
        if root and (Path(root) / "examples").is_dir():
            return Path(root)
    return None
