"""Kernels for one setting as they are loaded and launched, without a GPU.

The setting's kernels run on the emulation (tests/native/emulate_fixed.cpp), with the macros that NVRTC gets;
the driver is a stand-in with the names and arguments of cuda.bindings 13.5, and the launch configurations are
that package's own objects. Every output must have the bits of the host library.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from xshare_trtllm import RouterSpec, XShareConfig, ops, warm_up
from xshare_trtllm.kernels import launch
from xshare_trtllm.kernels.setting import KERNELS, TENSORS, Setting

driver = pytest.importorskip("cuda.bindings.driver", reason="needs cuda-python: pip install cuda-bindings")

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "tests" / "native"
STREAM = 4711
HOPPER, AMPERE = (9, 0), (8, 0)

GPT_OSS = RouterSpec(128, 4, "topk_softmax")
DEEPSEEK = RouterSpec(64, 6, "sigmoid_bias", 8, 4, 2.5)


@pytest.fixture(scope="session")
def emulations(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Builds the library of a setting's kernels."""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("fixed")

    @cache
    def build(setting: Setting) -> ctypes.CDLL:
        library = folder / f"{abs(hash(setting))}.so"
        macros = setting.macros("route_block")
        kept = (n for n in macros if n not in ("XSHARE_FIXED_NAME", "XSHARE_FIXED_KERNEL_ID"))
        options = ("-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-fvisibility=hidden")
        command = ["c++", *options, *(f"-D{name}={macros[name]}" for name in kept), f"-I{NATIVE}"]
        command += [f"-I{ROOT / 'plugins'}", f"-I{ROOT / 'plugins' / 'include'}", "-o", str(library)]
        sources = [str(NATIVE / "emulate_fixed.cpp"), str(NATIVE / "emulation" / "fibers.cpp")]
        done = subprocess.run([*command, *sources], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(library))

    return build


class Driver:
    """The driver's functions that are called, on host memory.

    most_blocks  of a cluster that there is room for
    """

    def __init__(self, build: Any, most_blocks: int = 16) -> None:
        self.build, self.most_blocks = build, most_blocks
        self.setting: Setting | None = None
        self.version = 99000
        self.calls: list[str] = []
        self.launches: list[tuple[str, int, int, int, bool]] = []

    def find(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            return getattr(self, name)(*arguments)

        return call

    def cuCtxGetCurrent(self) -> Any:
        return driver.CUresult.CUDA_SUCCESS, driver.CUcontext(1)

    def cuModuleLoadData(self, image: bytes) -> Any:
        return driver.CUresult.CUDA_SUCCESS, image.decode()

    def cuModuleGetFunction(self, module: str, name: bytes) -> Any:
        if name.decode() != f"xshare_{module}":
            return driver.CUresult.CUDA_ERROR_NOT_FOUND, None
        return driver.CUresult.CUDA_SUCCESS, module

    def cuFuncSetAttribute(self, function: str, attribute: Any, value: int) -> Any:
        return (driver.CUresult.CUDA_SUCCESS,)

    def cuOccupancyMaxActiveClusters(self, function: str, config: Any) -> Any:
        if config.gridDimX > self.most_blocks:
            return driver.CUresult.CUDA_ERROR_INVALID_CLUSTER_SIZE, 0
        return driver.CUresult.CUDA_SUCCESS, 1

    def cuMemsetD8Async(self, address: int, value: int, size: int, stream: int) -> Any:
        assert stream == STREAM and address % 64 == 0
        ctypes.memset(address, value, size)
        return (driver.CUresult.CUDA_SUCCESS,)

    def cuLaunchKernelEx(self, config: Any, function: str, arguments: int, extra: int) -> Any:
        assert int(config.hStream) == STREAM and config.numAttrs == len(config.attrs)
        ids = driver.CUlaunchAttributeID
        cluster, programmatic = 1, False
        for attribute in config.attrs:
            if attribute.id == ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION:
                size = attribute.value.clusterDim
                assert (size.y, size.z) == (1, 1)
                cluster = size.x
            if attribute.id == ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION:
                programmatic = attribute.value.programmaticStreamSerializationAllowed == 1
        self.launches.append((function, config.gridDimX, config.blockDimX, cluster, programmatic))
        shape = (config.gridDimX, config.blockDimX, cluster)
        self.build(self.setting).launch(KERNELS.index(function), ctypes.c_void_p(arguments), *shape)
        return (driver.CUresult.CUDA_SUCCESS,)

    def cuDriverGetVersion(self) -> Any:
        return driver.CUresult.CUDA_SUCCESS, self.version

    def cuGetErrorString(self, status: Any) -> Any:
        return driver.CUresult.CUDA_SUCCESS, b"what the driver says"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, emulations: Any) -> Iterator[Driver]:
    """An H100, as far as the launches see one."""
    made = Driver(emulations)

    def cubin(kernel: str, setting: Setting, architecture: str) -> bytes:
        made.setting = setting
        return kernel.encode()

    monkeypatch.setattr(launch, "_function", made.find)
    monkeypatch.setattr(launch, "_cubin", cubin)
    monkeypatch.setattr(launch, "_loaded", {})
    monkeypatch.setattr(launch, "_calls", {})
    monkeypatch.setattr(launch, "_contexts", SimpleNamespace())
    monkeypatch.setattr(ops, "_prebuilt", lambda: None)
    use_gpu(monkeypatch, HOPPER)
    yield made


def use_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    for name, value in {
        "device": lambda device: nullcontext(),
        "current_stream": lambda device: SimpleNamespace(cuda_stream=STREAM),
        "get_device_capability": lambda ordinal: capability,
        "get_device_properties": lambda ordinal: SimpleNamespace(multi_processor_count=132),
        "is_current_stream_capturing": lambda: False,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


def logits(rows: int, spec: RouterSpec, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(rows, spec.num_experts, generator=generator)


def assert_as_on_the_host(arguments: tuple[Any, ...], spec: RouterSpec, config: XShareConfig) -> None:
    values = ops.settings(spec, config)
    names = ("expert_ids", "expert_weights", "active_experts", "stats")
    expected = ops._route_cpu(*arguments, *values)
    for name, got, right in zip(names, ops._route_cuda(*arguments, *values), expected, strict=True):
        assert torch.equal(got, right), name


def test_contract_a_step_on_hopper(gpu: Driver) -> None:
    config = XShareConfig(coverage=0.9)
    for seed, rows in enumerate((1, 16, 17, 64, 100, 300)):
        nothing: list[None] = [None] * 4
        assert_as_on_the_host((logits(rows, GPT_OSS, seed).bfloat16(), *nothing), GPT_OSS, config)
    assert gpu.launches == [
        ("route_block", 1, 128, 1, True),
        ("route_block", 1, 512, 1, True),
        ("route_team", 4, 160, 4, True),
        ("route_team", 8, 256, 8, True),
        ("route_team", 16, 224, 16, True),
        ("gather_rows", 38, 256, 1, False),  # behind the memset
        ("refine_rows", 38, 256, 1, True),
        ("tally_rows", 1, 256, 1, True),
    ]
    assert gpu.calls.count("cuModuleLoadData") == 5, "each kernel is loaded once"


def test_contract_all_stages_on_ampere(gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    use_gpu(monkeypatch, AMPERE)
    config = XShareConfig(30, request_budget=12, gpu_budget=5, coverage=0.95, max_rows=400)
    generator = torch.Generator().manual_seed(7)
    for rows in (5, 32, 40):
        ids = torch.randint(-1, 6, (rows,), generator=generator, dtype=torch.int32)
        exempt = torch.rand(rows, generator=generator) < 0.1
        bias = 0.1 * torch.randn(64, generator=generator)
        placed = torch.arange(64, dtype=torch.int32) // 8
        assert_as_on_the_host((logits(rows, DEEPSEEK, rows), bias, ids, exempt, placed), DEEPSEEK, config)
    kinds = [kernel for kernel, *_ in gpu.launches]
    assert kinds[:2] == ["route_block"] * 2
    assert kinds[2:] == [kernel for kernel in KERNELS[2:] if kernel != "sum_requests"], "no request is long"
    assert all(cluster == 1 and not programmatic for *_, cluster, programmatic in gpu.launches)


def test_contract_a_dial_and_masked_logits(gpu: Driver) -> None:
    spec, config = GPT_OSS, XShareConfig(coverage=0.97)
    given = logits(24, spec, 3).half()
    for mode, coverage in (("on", 0.8), ("shadow", 0.9), ("off", 0.9)):
        turned = bytearray(ops.pack_dial(XShareConfig(coverage=coverage), mode))
        dial = torch.frombuffer(turned, dtype=torch.uint8)
        counted, expected = torch.zeros(2, 8, dtype=torch.int64)
        rest = (None, None, None, None, *ops.settings(spec, config), dial)
        masked = ops._mask_logits_cuda(given, *rest, counted)
        assert torch.equal(masked, ops._mask_logits_cpu(given, *rest, expected)), mode
        assert torch.equal(counted, expected) and counted[0] > 0, mode


@pytest.mark.parametrize("most", (8, 4, 2, 1))
def test_contract_takes_the_largest_cluster_that_there_is_room_for(gpu: Driver, most: int) -> None:
    gpu.most_blocks = most
    assert_as_on_the_host((logits(100, GPT_OSS, 1), *[None] * 4), GPT_OSS, XShareConfig(coverage=0.9))
    kernel, blocks, _, cluster, _ = gpu.launches[0]
    assert (kernel, blocks, cluster) == (("route_team", most, most) if most > 1 else ("gather_rows", 13, 1))


def test_contract_switches_of_the_environment(gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XSHARE_PROGRAMMATIC_LAUNCH", "0")
    monkeypatch.setenv("XSHARE_CLUSTER_SIZE", "2")
    assert_as_on_the_host((logits(100, GPT_OSS, 1), *[None] * 4), GPT_OSS, XShareConfig(coverage=0.9))
    assert gpu.launches[0] == ("route_team", 2, 512, 2, False)


def test_contract_a_capture_needs_loaded_kernels(gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    given, config = logits(16, GPT_OSS, 1), XShareConfig(coverage=0.9)
    values = ops.settings(GPT_OSS, config)
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match=r"is being captured.* xshare_trtllm\.warm_up"):
            ops._route_cuda(given, None, None, None, None, *values)
        assert not gpu.launches and not gpu.calls.count("cuModuleLoadData")
    ops._route_cuda(given, None, None, None, None, *values)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for rows in (1, 40, 300):  # one call was enough for any number of rows
        ops._route_cuda(logits(rows, GPT_OSS, rows), None, None, None, None, *values)


def test_contract_a_thread_without_a_context_takes_torchs(gpu: Driver) -> None:
    entered: list[Any] = []
    gpu.cuCtxGetCurrent = lambda: (0, driver.CUcontext(0))  # type: ignore[method-assign]
    gpu.cuDeviceGet = lambda ordinal: (0, 3)  # type: ignore[attr-defined]
    gpu.cuDevicePrimaryCtxRetain = lambda device: (0, f"primary of {device}")  # type: ignore[attr-defined]
    gpu.cuCtxSetCurrent = lambda context: (entered.append(context) or 0,)  # type: ignore[attr-defined]
    for _ in range(2):
        ops._route_cuda(
            logits(4, GPT_OSS, 1), *[None] * 4, *ops.settings(GPT_OSS, XShareConfig(coverage=0.9))
        )
    assert entered == ["primary of 3"]


def test_contract_errors_name_the_call(gpu: Driver) -> None:
    failed = driver.CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU
    gpu.cuModuleLoadData = lambda image: (failed, None)  # type: ignore[method-assign]
    values = ops.settings(GPT_OSS, XShareConfig(coverage=0.9))
    with pytest.raises(
        RuntimeError,
        match="cuModuleLoadData: CUDA_ERROR_NO_BINARY_FOR_GPU, what the driver says",
    ):
        ops._route_cuda(logits(4, GPT_OSS, 1), *[None] * 4, *values)


def test_contract_a_driver_older_than_the_compiler(gpu: Driver) -> None:
    gpu.version = 12080
    values = ops.settings(GPT_OSS, XShareConfig(coverage=0.9))
    with pytest.raises(RuntimeError, match=r"driver is of CUDA 12 and NVRTC of CUDA 1[3-9].*nvrtc-cu12"):
        ops._route_cuda(logits(4, GPT_OSS, 1), *[None] * 4, *values)
    assert not gpu.calls.count("cuModuleLoadData")


def test_contract_no_rows_are_the_same_setting(gpu: Driver) -> None:
    """torch gives tensors without elements no address."""
    config = XShareConfig(coverage=0.9)
    for rows in (4, 0, 4):
        ids = torch.zeros(rows, dtype=torch.int32)
        assert_as_on_the_host((logits(rows, GPT_OSS, 1), None, ids, None, None), GPT_OSS, config)
    assert gpu.calls.count("cuModuleLoadData") == 5


def test_contract_a_call_that_is_refused_compiles_nothing(gpu: Driver) -> None:
    refused = {
        "num_experts": (
            torch.zeros(4, 600),
            (4, "topk_softmax", 1, 1, 1.0, 24, 1, 0, 0, -1, "squared_weight", 0.0),
        ),
        "budget": (
            torch.zeros(4, 128),
            (4, "topk_softmax", 1, 1, 1.0, 2, 1, 0, 0, -1, "squared_weight", 0.0),
        ),
        "expert_gpu": (
            torch.zeros(4, 128),
            (4, "topk_softmax", 1, 1, 1.0, 24, 1, 0, 3, -1, "squared_weight", 0.0),
        ),
    }
    for name, (given, values) in refused.items():
        with pytest.raises(ValueError, match=name):
            ops._route_cuda(given, None, None, None, None, *values)
    dial = torch.zeros(20, dtype=torch.uint8)[4:]
    with pytest.raises(ValueError, match="dial: must be aligned to 8 bytes"):
        ops._route_cuda(
            logits(4, GPT_OSS, 1), *[None] * 4, *ops.settings(GPT_OSS, XShareConfig(coverage=0.9)), dial
        )
    assert not gpu.calls


def test_plan_refuses_what_does_not_fit_together() -> None:
    params = ops.pack_params(4, 128, torch.float32, ops.settings(GPT_OSS, XShareConfig(24, gpu_budget=3)))
    tensors = TENSORS.pack(TENSORS.size, 64, *[0] * 11)
    with pytest.raises(ValueError, match="expert_gpu"):
        ops._plan_launches(params, tensors, launch._GPU.pack(launch._GPU.size, 132, 8))


def test_plan_sums_long_requests_up_first() -> None:
    config = XShareConfig(24, request_budget=8)
    tensors = TENSORS.pack(TENSORS.size, 64, 0, 64, *[0] * 9)
    for rows, count in ((256, 5), (257, 6)):
        params = ops.pack_params(rows, 128, torch.float32, ops.settings(GPT_OSS, config))
        plan = ops._plan_launches(params, tensors, launch._GPU.pack(launch._GPU.size, 108, 1))
        _, number, size, cleared, *launches = launch._PLAN.unpack(plan)
        assert (number, KERNELS.index("sum_requests") in launches[::4]) == (count, count == 6)
        assert size > cleared > 0


def test_warm_up_on_the_host_is_a_call() -> None:
    warm_up(logits(4, GPT_OSS, 1), GPT_OSS, XShareConfig(coverage=0.9))
    with pytest.raises(ValueError, match="request_ids"):
        warm_up(logits(4, GPT_OSS, 1), GPT_OSS, XShareConfig(24, request_budget=8))
