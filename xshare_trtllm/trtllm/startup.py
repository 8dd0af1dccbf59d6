"""How XShare gets into every process of a TensorRT-LLM server: a line in site-packages that acts only where
the environment variable TRTLLM_XSHARE names a configuration.

`xshare_startup.pth` is read by every interpreter that starts, whoever starts it: MPI, Ray, a shell, a spawned
pool, `python -I`. TensorRT-LLM hands variables that begin with TRTLLM on to the workers that it spawns
(llmapi/mpi_session.py) and all of them to Ray's (executor/ray_executor.py). Nothing is looked up by an
architecture's name, and nothing is pickled. What else was weighed: docs/pytorch_backend.md.

This module imports nothing of TensorRT-LLM, torch or pydantic: it runs when an interpreter starts.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

VARIABLE = "TRTLLM_XSHARE"
HOOK_FILE = "xshare_startup.pth"
HOOK_LINE = (
    f"import os; os.environ.get({VARIABLE!r}) and "
    "__import__('xshare_trtllm.trtllm.startup', fromlist=['install']).install()\n"
)

# What is changed in a module of TensorRT-LLM once it has been imported: `module: function of workers.py`.
PATCHES = {
    "tensorrt_llm._torch.pyexecutor.model_engine": "patch_model_engine",
    "tensorrt_llm.executor.executor": "patch_executor",
    "tensorrt_llm.serve.openai_server": "patch_openai_server",
}


def install() -> None:
    """Waits in this process for the modules of TensorRT-LLM; harmless when repeated."""
    if any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _AfterImport())
    for name in PATCHES:
        if name in sys.modules:
            _patch(sys.modules[name])


def _patch(module: ModuleType) -> None:
    from xshare_trtllm.trtllm import workers

    function: Callable[[ModuleType], None] = getattr(workers, PATCHES[module.__name__])
    function(module)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing by itself: lets the others find a module, and changes it when it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in PATCHES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _PatchingLoader(spec.loader)
        return spec


class _PatchingLoader(importlib.abc.Loader):
    def __init__(self, own: importlib.abc.Loader) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._own.exec_module(module)
        _patch(module)

    def __getattr__(self, name: str) -> object:  # get_source and the rest
        return getattr(self._own, name)


# ---- The file in site-packages ----------------------------------------------------------------------------


def hook_path() -> Path:
    """Where `xshare_startup.pth` belongs in this Python environment."""
    return Path(sysconfig.get_path("purelib")) / HOOK_FILE


def write_hook() -> Path:
    """Puts `xshare_startup.pth` there. Raises OSError where the folder cannot be written to."""
    from xshare_trtllm.report import write_aside

    path = hook_path()
    with write_aside(path) as aside:
        aside.write_text(HOOK_LINE, encoding="utf-8")
    return path


def check_hook() -> None:
    """Starts an interpreter as a worker would be started and looks whether XShare is in it.

    Raises RuntimeError, saying how to mend it, where it is not.
    """
    code = f"import sys; sys.exit({__name__!r} not in sys.modules)"
    environment = os.environ | {VARIABLE: os.devnull}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"no {HOOK_FILE} acts there"
        raise RuntimeError(
            f"XShare would not get into worker processes of {sys.executable} ({reason}): "
            f"pip install xshare-trtllm into this environment, or run `xshare trtllm --install`, which "
            f"writes {hook_path()}"
        )
