"""The ahead-of-time plugin on a GPU: its kernel by the driver alone, then in an engine of TensorRT."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "graph"))

import numpy as np  # noqa: E402
from test_aot_plugin import KERNELS, Step, compiled, needs_nvcc, random_step, threads_for  # noqa: E402

from xshare_trtllm import ops  # noqa: E402
from xshare_trtllm.graph.aot_plugin import StepKernel  # noqa: E402

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


def driver(function: str, *arguments: Any) -> None:
    code = getattr(ctypes.CDLL("libcuda.so.1"), function)(*arguments)
    assert code == 0, f"{function} returned {code}"


def launch(function: ctypes.c_void_p, built: StepKernel, step: Step) -> list[torch.Tensor]:
    """cuLaunchKernel: no launch attributes, the cluster is in the kernel."""
    rows, spec = len(step.given["router_logits"]), built.spec
    on_device = [tensor.cuda() for tensor in step.given.values()]
    outputs = [
        torch.full((rows, spec.top_k), -7, dtype=torch.int32, device="cuda"),
        torch.full((rows, spec.top_k), -7.0, device="cuda"),
        torch.ones(spec.num_experts, dtype=torch.bool, device="cuda"),
    ]
    values: list[Any] = [ctypes.c_void_p(tensor.data_ptr()) for tensor in on_device]
    values += [ctypes.c_int32(rows), *(ctypes.c_void_p(tensor.data_ptr()) for tensor in outputs)]
    arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    grid, block = (built.num_blocks, 1, 1), (threads_for(built, rows), 1, 1)
    driver("cuLaunchKernel", function, *grid, *block, 0, stream, arguments, None)
    torch.cuda.synchronize()
    return [tensor.cpu() for tensor in outputs]


@needs_nvcc
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_launched_by_the_driver(name: str) -> None:
    built, random = KERNELS[name], np.random.default_rng(11)
    if built.compute_capability == "SM90" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    torch.zeros(1, device="cuda")  # makes the context
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    driver("cuModuleLoadData", ctypes.byref(module), compiled(name).encode())
    driver("cuModuleGetFunction", ctypes.byref(function), module, built.name.encode())
    for rows in (0, 1, 2, 16, built.max_rows, *random.integers(1, built.max_rows + 1, 100)):
        step = random_step(built, random, int(rows))
        got = launch(function, built, step)
        *expected, _ = ops.route(spec=built.spec, config=built.config, **step.meant)
        for have, right in zip(got, expected, strict=True):
            assert have.numpy().tobytes() == right.numpy().tobytes(), rows
    driver("cuModuleUnload", module)


@needs_nvcc
def test_engine_runs_without_the_plugin(tmp_path: Path) -> None:
    try:
        version("tensorrt")
    except PackageNotFoundError:
        pytest.skip("needs a full TensorRT to build an engine: pip install tensorrt")
    for step in ("build", "run"):
        command = [sys.executable, str(HERE / "aot_engine.py"), step, str(tmp_path / "engine")]
        subprocess.run(command, check=True, timeout=300)
