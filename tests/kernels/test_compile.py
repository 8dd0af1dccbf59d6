"""The kernels for one setting as NVRTC builds them: the real compiler, no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xshare_trtllm import RouterSpec, XShareConfig, ops
from xshare_trtllm.config import SCORINGS
from xshare_trtllm.kernels import compile as compiling
from xshare_trtllm.kernels import launch
from xshare_trtllm.kernels.setting import KERNELS, POINTERS, TENSORS, Setting

ROOT = Path(__file__).resolve().parents[2]
needs_nvrtc = pytest.mark.skipif(compiling.why_not() is not None, reason=str(compiling.why_not()))

ROUTE = ("expert_ids", "expert_weights", "active_experts", "stats")
MAX_STATIC_SHARED = 48 * 1024


def setting_of(
    spec: RouterSpec, config: XShareConfig, *has: str, dtype: torch.dtype = torch.bfloat16
) -> Setting:
    params = ops.pack_params(16, spec.num_experts, dtype, ops.settings(spec, config))
    addresses = [64 * (name in has) for name in POINTERS]
    return Setting.of_call(params, TENSORS.pack(TENSORS.size, 64, *addresses))


GPT_OSS = setting_of(RouterSpec(128, 4, "topk_softmax"), XShareConfig(coverage=0.97), *ROUTE)
DEEPSEEK = setting_of(
    RouterSpec(256, 8, "sigmoid_bias", 8, 4, 2.5),
    XShareConfig(48, request_budget=16, gpu_budget=8, coverage=0.97, max_rows=64),
    *(*ROUTE, "correction_bias", "request_ids", "exempt", "expert_gpu", "dial"),
    dtype=torch.float32,
)
LARGEST = setting_of(
    RouterSpec(512, 16, "softmax"), XShareConfig(64, utility="affinity"), "masked_logits", dtype=torch.float16
)


def usage(report: str) -> tuple[int, int, int]:
    """Registers, bytes of shared memory, bytes of spills and stack."""
    registers = re.search(r"Used (\d+) registers", report)
    shared = re.search(r"(\d+) bytes smem", report)
    stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert registers and stack, report
    return int(registers[1]), int(shared[1]) if shared else 0, sum(map(int, stack.groups()))


# Every architecture once, every kernel once; benchmarks/route_sass.py has the rest.
BUILDS = [
    (GPT_OSS, "route_block", "sm_90"),
    (GPT_OSS, "route_team", "sm_100"),
    (GPT_OSS, "route_block", "sm_80"),
    (GPT_OSS, "refine_rows", "sm_86"),
    (GPT_OSS, "gather_rows", "sm_120"),
    (DEEPSEEK, "route_team", "sm_90"),
    (DEEPSEEK, "propose", "sm_103"),
    (DEEPSEEK, "place_requests", "sm_110"),
    (DEEPSEEK, "order_rows", "sm_121"),
    (DEEPSEEK, "tally_rows", "sm_89"),
    (LARGEST, "route_block", "sm_90"),
]


@needs_nvrtc
@pytest.mark.parametrize(("setting", "kernel", "architecture"), BUILDS)
def test_builds_without_spills(setting: Setting, kernel: str, architecture: str) -> None:
    cubin, report = compiling.compile_kernel(kernel, setting, architecture)
    assert cubin.startswith(b"\x7fELF")
    registers, shared, spilled = usage(report)
    print(f"{kernel} {architecture}: {registers} registers, {shared} bytes shared, {len(cubin)} bytes")
    assert spilled == 0 and shared <= MAX_STATIC_SHARED
    threads = int(setting.macros(kernel)["XSHARE_FIXED_THREADS"])
    assert -(-registers // 8) * 8 * threads <= 65536


@needs_nvrtc
def test_what_is_known_makes_less_code() -> None:
    """A step without statistics, requests and a dial, against one with all stages."""
    everything = setting_of(
        RouterSpec(128, 4, "topk_softmax"),
        XShareConfig(48, request_budget=16, gpu_budget=8, coverage=0.97, max_rows=64),
        *(name for name in POINTERS if name not in ("step_bias", "correction_bias")),
    )
    plain = setting_of(RouterSpec(128, 4, "topk_softmax"), XShareConfig(coverage=0.97), *ROUTE[:3])
    sizes = [len(compiling.compile_kernel("route_block", each, "sm_90")[0]) for each in (plain, everything)]
    assert 3 * sizes[0] < 2 * sizes[1]


@needs_nvrtc
def test_a_compiler_error_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = compiling.sources() | {"cuda/fixed.cu": '#include "cuda/kernel.cuh"\nint missing = nothing;\n'}
    monkeypatch.setattr(compiling, "sources", lambda: broken)
    with pytest.raises(RuntimeError, match=r"(?s)route_block for sm_90 was not compiled.*nothing"):
        compiling.compile_kernel("route_block", GPT_OSS, "sm_90")


@needs_nvrtc
def test_architecture_is_the_gpus_or_the_newest_of_its_family() -> None:
    for capability, right in {(8, 0): 80, (8, 6): 86, (9, 0): 90, (10, 3): 103, (12, 1): 121}.items():
        assert compiling.find_architecture(capability) == f"sm_{right}"
    assert compiling.find_architecture((12, 9)) == "sm_121"
    with pytest.raises(RuntimeError, match=r"7\.5: XShare's kernels need 8\.0 or newer"):
        compiling.find_architecture((7, 5))
    with pytest.raises(RuntimeError, match=r"does not know compute capability 99\.0: install a newer one"):
        compiling.find_architecture((99, 0))


@needs_nvrtc
def test_kernels_are_kept_by_all_that_makes_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XSHARE_CACHE", str(tmp_path))
    made: list[str] = []

    def compile_kernel(kernel: str, setting: Setting, architecture: str) -> tuple[bytes, str]:
        made.append(kernel)
        return kernel.encode(), ""

    monkeypatch.setattr(launch, "compile_kernel", compile_kernel)
    for _ in range(2):
        assert launch._cubin("route_block", GPT_OSS, "sm_90") == b"route_block"
    others = [
        ("route_team", GPT_OSS, "sm_90"),
        ("route_block", DEEPSEEK, "sm_90"),
        ("route_block", GPT_OSS, "sm_80"),
    ]
    for other in others:
        launch._cubin(*other)
    assert len(made) == 4 == len(list(tmp_path.iterdir()))
    changed = compiling.sources() | {"core/limits.h": "// another version"}
    monkeypatch.setattr(compiling, "sources", lambda: changed)
    launch._cubin("route_block", GPT_OSS, "sm_90")
    assert len(made) == 5, "sources have changed"


def test_a_settings_kernels() -> None:
    assert GPT_OSS.kernels(has_clusters=True) == (
        *("route_block", "route_team", "gather_rows", "refine_rows", "tally_rows"),
    )
    assert DEEPSEEK.kernels(has_clusters=True) == KERNELS
    assert LARGEST.kernels(has_clusters=False) == ("route_block", "gather_rows", "refine_rows")
    budgets = [XShareConfig(24), XShareConfig(48), XShareConfig(48, warmup=2)]
    first, second, third = (setting_of(RouterSpec(128, 4, "softmax"), config, *ROUTE) for config in budgets)
    assert first == second != third, "a budget is an argument"


def test_codes_and_sources() -> None:
    folder = compiling.source_folder()
    header = (folder / "include" / "xshare" / "xshare.h").read_text()
    scorings = header.split("typedef enum xshare_scoring")[1].split("}")[0]
    assert [code.lower() for code in re.findall(r"XSHARE_(\w+) = \d+", scorings)] == list(SCORINGS)
    plan = (folder / "include" / "xshare" / "xshare_plan.h").read_text()
    names = re.findall(r"XSHARE_KERNEL_(\w+) = (\d+)", plan)
    assert [int(number) for _, number in names] == list(range(len(KERNELS)))
    assert [kernel.removeprefix("route_").upper() for kernel in KERNELS] == [name for name, _ in names]


def test_a_wheel_has_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    monkeypatch.setattr(compiling, "PACKAGE", tmp_path / "xshare_trtllm")
    functions = (compiling.source_folder, compiling.sources)
    checkouts = compiling.sources()
    try:
        for function in functions:
            function.cache_clear()
        assert compiling.source_folder().is_relative_to(tmp_path)
        assert compiling.sources() == checkouts
        assert (compiling.source_folder() / "tensorrt" / "routing_plugin.cpp").is_file()
        shutil.rmtree(tmp_path / "xshare_trtllm" / "plugins")
        compiling.source_folder.cache_clear()
        with pytest.raises(RuntimeError, match=r"sources are missing .* install xshare-trtllm again"):
            compiling.source_folder()
    finally:
        for function in functions:
            function.cache_clear()


@needs_nvrtc
def test_without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuda.pathfinder's error is a RuntimeError with the file's name alone."""

    class NotFound(RuntimeError):
        pass

    def version() -> None:
        raise NotFound('Failure finding "libnvrtc.so.13"\nmore')

    monkeypatch.setattr(compiling._nvrtc(), "nvrtcVersion", version)
    for function in (compiling.why_not, compiling.compiler_version):
        function.cache_clear()
    try:
        said = str(compiling.why_not())
        assert said.startswith("NVRTC is not installed: a torch for CUDA brings it; or pip install")
        assert said.endswith('(Failure finding "libnvrtc.so.13")')
    finally:
        for function in (compiling.why_not, compiling.compiler_version):
            function.cache_clear()


def test_without_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    compiling.why_not.cache_clear()
    try:
        assert compiling.why_not() == "cuda-python is not installed: pip install 'xshare-trtllm[cuda]'"
    finally:
        compiling.why_not.cache_clear()
