"""The ahead-of-time plugin without a GPU: its kernel's entry on the emulation, its registration in NVIDIA's
own `tensorrt.plugin` (aot_contract.py), its code as nvcc and ptxas build it.

The kernel is launched here as TensorRT launches it, from an array of the addresses of its arguments: inputs,
then the number of rows, then outputs. Every output must have the bits of the host library.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from xshare_trtllm import RouterSpec, XShareConfig, ops
from xshare_trtllm.graph import GraphInputs
from xshare_trtllm.graph.aot_plugin import MAX_ROWS, StepKernel, add_aot_routing, find_nvcc

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "tests" / "native"
TORCH = {"FLOAT": torch.float32, "BF16": torch.bfloat16, "HALF": torch.float16}
TYPES = {"correction_bias": "FLOAT", "request_ids": "INT32", "exempt": "BOOL", "expert_gpu": "INT32"}


def kernel(
    spec: RouterSpec, config: XShareConfig, logits: str, rows: int, capability: str, *inputs: str
) -> StepKernel:
    return StepKernel(spec, config, GraphInputs(**dict.fromkeys(inputs, True)), logits, rows, capability)


KERNELS = {
    "gpt-oss": kernel(
        RouterSpec(128, 4, "topk_softmax"), XShareConfig(24, warmup=2), "BF16", 64, "SM80", "exempt"
    ),
    "deepseek": kernel(
        RouterSpec(256, 8, "sigmoid_bias", 8, 4, 2.5),
        XShareConfig(40, request_budget=16, gpu_budget=7),
        "FLOAT",
        MAX_ROWS,
        "SM90",
        *TYPES,
    ),
    "mixtral": kernel(
        RouterSpec(8, 2, "softmax_renorm"), XShareConfig(coverage=0.97), "HALF", 33, "SM80", "request_ids"
    ),
    "deepseek-v2": kernel(
        RouterSpec(160, 6, "softmax", 8, 3, 16.0),
        XShareConfig(48, coverage=0.9, max_rows=20, utility="affinity"),
        "BF16",
        40,
        "SM90",
        "request_ids",
    ),
    "deepseek-v4": kernel(
        RouterSpec(256, 6, "sqrt_softplus_bias", routed_scaling_factor=1.5),
        XShareConfig(coverage=0.95),
        "BF16",
        40,
        "SM90",
        "correction_bias",
    ),
    "ernie": kernel(
        RouterSpec(64, 6, "softmax_bias_renorm"), XShareConfig(24), "FLOAT", 33, "SM80", "correction_bias"
    ),
    "off": kernel(RouterSpec(97, 5, "softmax"), XShareConfig(97), "FLOAT", 16, "SM90"),
    "largest": kernel(
        RouterSpec(512, 16, "sigmoid_bias", routed_scaling_factor=0.1),
        XShareConfig(coverage=0.9, warmup=0),  # with the experts' GPUs: their cap
        "HALF",
        48,
        "SM90",
        "expert_gpu",
        "exempt",
    ),
}

needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None or not ops.available(), reason="needs a C++ compiler and libxshare.so"
)
needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc in CUDACXX, PATH or /usr/local/cuda")


@cache
def compiled(name: str) -> str:
    return KERNELS[name].compile()


def run_well(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=os.environ | environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# ---- The entry on the emulation ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL]:
    folder = tmp_path_factory.mktemp("aot")

    def build(name: str) -> ctypes.CDLL:
        library = folder / f"{name}.so"
        run_well(
            *("c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden"),
            *("-Wall", "-Wextra", "-Werror", "-ffp-contract=off"),
            *KERNELS[name].macros(),
            *(f"-I{place}" for place in (NATIVE, ROOT / "plugins", ROOT / "plugins" / "include")),
            *(str(NATIVE / "emulate_aot.cpp"), str(NATIVE / "emulation" / "fibers.cpp"), "-o", str(library)),
        )
        return ctypes.CDLL(str(library))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(KERNELS, pool.map(build, KERNELS), strict=True))


@dataclass
class Step:
    """One step's inputs: as the device gets them, and as the host takes them."""

    given: dict[str, torch.Tensor]
    meant: dict[str, torch.Tensor] = field(default_factory=dict)


def random_logits(random: np.random.Generator, rows: int, experts: int) -> np.ndarray[Any, Any]:
    normal = random.standard_normal((rows, experts))
    kinds = {
        "normal": normal * 2,
        "ties": np.rint(normal),
        "zeros": np.where(normal > 0, 0.0, -0.0),
        "huge": normal * 1e4,
        "close": 1 + np.rint(normal * 4) * 2.0**-23,
        "low": normal - 40,
        "agreeing": normal + np.arange(experts) * 37 % 11,
        "banned": np.where(random.random((rows, experts)) < random.choice([0.1, 0.6, 0.97]), -np.inf, normal),
    }
    logits = random.choice(list(kinds.values()))
    if rows and random.random() < 0.3:
        logits[random.integers(rows), random.integers(experts)] = random.choice([np.nan, np.inf, -np.inf])
    return logits


def random_step(built: StepKernel, random: np.random.Generator, rows: int) -> Step:
    experts = built.spec.num_experts
    bias = torch.from_numpy(random.standard_normal(experts) * 0.3).float()
    ids = torch.from_numpy(random.integers(0, max(1, rows // 3), rows) * 1000003 % (2**31 - 1)).int()
    ids[torch.from_numpy(random.random(rows) < 0.15)] = -1
    everything = {
        "router_logits": torch.from_numpy(random_logits(random, rows, experts)).to(TORCH[built.logits_type]),
        "correction_bias": bias,
        "request_ids": ids,
        "exempt": torch.from_numpy(random.random(rows) < 0.2),
        "expert_gpu": torch.from_numpy(random.integers(0, 8, experts)).int(),
    }
    step = Step({name: everything[name] for name in built.input_names})
    step.meant = {name: tensor.clone() for name, tensor in step.given.items()}
    if random.random() < 0.3:
        spoil(step, random)
    return step


def spoil(step: Step, random: np.random.Generator) -> None:
    """What the host refuses and the device reads as xshare_cuda.h says."""
    if "correction_bias" in step.given:
        place = int(random.integers(len(step.given["correction_bias"])))
        step.given["correction_bias"][place], step.meant["correction_bias"][place] = float("nan"), 0.0
    if "request_ids" in step.given:
        step.given["request_ids"][step.given["request_ids"] == -1] = -(2**31)
    if "expert_gpu" in step.given:
        last = len(step.given["expert_gpu"]) - 1
        step.given["expert_gpu"][:2] = torch.tensor([-5, 2**31 - 1], dtype=torch.int32)
        step.meant["expert_gpu"][:2] = torch.tensor([0, last], dtype=torch.int32)


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, Callable[[], bool]]:
    """A poisoned tensor, and whether what surrounds it is untouched."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = torch.full((size + 128,), 0x5A, dtype=torch.uint8)
    inside = memory[64 : 64 + size].view(dtype).view(shape)
    return inside, lambda: bool((memory[:64] == 0x5A).all() and (memory[64 + size :] == 0x5A).all())


def launch(entry: ctypes.CDLL, built: StepKernel, step: Step, blocks: int, threads: int, seed: int) -> Any:
    """As TensorRT does: inputs, scalars, outputs."""
    rows, spec = len(step.given["router_logits"]), built.spec
    shapes = (
        ((rows, spec.top_k), torch.int32),
        ((rows, spec.top_k), torch.float32),
        ((spec.num_experts,), torch.bool),
    )
    outputs = [guarded(*shape) for shape in shapes]
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in step.given.values()]
    values: list[Any] = [*pointers, ctypes.c_int32(rows)]
    values += [ctypes.c_void_p(tensor.data_ptr()) for tensor, _ in outputs]
    sizes = (ctypes.c_int * 16)()
    assert entry.argument_sizes(sizes) == len(values)
    assert sizes[: len(values)] == [ctypes.sizeof(value) for value in values]
    arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    entry.launch(arguments, blocks, threads, ctypes.c_uint64(seed))
    assert all(untouched() for _, untouched in outputs), "memory outside an output was written"
    return [tensor for tensor, _ in outputs]


def planned(entry: ctypes.CDLL, rows: int, clusters: bool) -> tuple[int, int]:
    blocks, threads = ctypes.c_int(), ctypes.c_int()
    entry.plan(rows, int(clusters), ctypes.byref(blocks), ctypes.byref(threads))
    return blocks.value, threads.value


def threads_for(built: StepKernel, rows: int) -> int:
    return min(max(-(-rows // built.num_blocks) * 32, built.min_threads), built.max_threads)


@needs_compiler
@pytest.mark.parametrize("name", KERNELS)
def test_entry_equals_the_host_library(name: str, entries: dict[str, ctypes.CDLL]) -> None:
    built, random = KERNELS[name], np.random.default_rng(7)
    steps = min(60, 8000 // built.spec.num_experts)  # the emulation takes its time with 512 experts
    few = [int(rows) for rows in random.integers(1, min(built.max_rows, 20) + 1, steps)]
    for seed, rows in enumerate([0, 1, 2, built.max_rows, *few]):
        step = random_step(built, random, rows)
        got = launch(entries[name], built, step, built.num_blocks, threads_for(built, rows), seed)
        *expected, _ = ops.route(spec=built.spec, config=built.config, **step.meant)
        for output, (have, right) in zip(
            ["ids", "weights", "active"], zip(got, expected, strict=True), strict=True
        ):
            assert have.numpy().tobytes() == right.numpy().tobytes(), (output, rows, seed)


@needs_compiler
def test_python_and_the_kernels_agree_on_sizes(entries: dict[str, ctypes.CDLL]) -> None:
    for name, built in KERNELS.items():
        assert entries[name].step_rows() == MAX_ROWS
        assert entries[name].lanes() == built.experts_per_lane


# ---- Registration -----------------------------------------------------------------------------------------


def case_of(name: str) -> dict[str, Any]:
    built = KERNELS[name]
    inputs = {"router_logits": built.logits_type} | {name: TYPES[name] for name in built.inputs.names()}
    return {
        "spec": built.spec.model_dump(),
        "config": built.config.to_dict(),
        "inputs": inputs,
        "max_rows": built.max_rows,
        "compute_capability": built.compute_capability,
        "ptx": compiled(name) if find_nvcc() else "",
    }


@pytest.fixture(scope="module")
def contract(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What NVIDIA's `tensorrt.plugin` makes of every kernel, and of some that it must refuse."""
    try:
        version("tensorrt-lean-cu13-bindings")
        version("tensorrt-lean-cu13-libs")
    except PackageNotFoundError as missing:
        pytest.skip(f"needs TensorRT's lean runtime: pip install {missing.name}==11.4.0.106")
    cases = {name: case_of(name) for name in KERNELS}
    cases["again"] = cases["mixtral"]
    cases["fixed rows"] = cases["mixtral"] | {"rows": 16, "profile": 16}
    cases["long profile"] = cases["mixtral"] | {"profile": 34}
    folder = tmp_path_factory.mktemp("contract")
    (folder / "cases.json").write_text(json.dumps(cases))
    run_well(
        *(sys.executable, str(Path(__file__).with_name("aot_contract.py"))),
        *(str(folder / "cases.json"), str(folder / "results.json")),
        PYTHONPATH=str(ROOT),
    )
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


@pytest.mark.parametrize("name", KERNELS)
def test_contract_build(name: str, contract: dict[str, Any]) -> None:
    """Types, shapes, scalars and the kernel that would be in the engine."""
    built, made = KERNELS[name], contract[name]
    assert "error" not in made, made
    k, experts = built.spec.top_k, built.spec.num_experts
    assert made["types"] == ["INT32", "FLOAT", "BOOL"]
    assert made["shapes"] == [[7, k], [7, k], [experts]]
    assert made["plugin"] == ["xshare", built.name] and made["kernel"] == built.name
    assert made["ptx"] == (compiled(name) if find_nvcc() else "")
    assert made["scalars"] == [[rows] for rows in range(built.max_rows + 1)]
    for rows, sizes in enumerate(made["launches"]):
        assert sizes["grid_x"] == built.num_blocks and sizes["block_x"] == threads_for(built, rows)
        assert [sizes[f] for f in ("grid_y", "grid_z", "block_y", "block_z", "shared_mem")] == [1, 1, 1, 1, 0]


@needs_compiler
@pytest.mark.parametrize("name", KERNELS)
def test_contract_launch_is_the_librarys(
    name: str, contract: dict[str, Any], entries: dict[str, ctypes.CDLL]
) -> None:
    """The most rows decide on the cluster; blocks and threads are then those that the library would take."""
    built, compared = KERNELS[name], 0
    for rows, sizes in enumerate(contract[name]["launches"]):
        blocks, threads = planned(entries[name], rows, built.compute_capability == "SM90")
        if rows == built.max_rows:
            assert sizes["grid_x"] == blocks
        if sizes["grid_x"] == blocks:
            assert sizes["block_x"] == threads, rows
            compared += 1
    assert compared > 0


def test_contract_layers_share_a_plugin(contract: dict[str, Any]) -> None:
    assert contract["again"] == contract["mixtral"]
    assert contract["fixed rows"]["scalars"] == [[16]] * 17


def test_contract_a_longer_profile_is_refused(contract: dict[str, Any]) -> None:
    error = contract["long profile"]["error"]
    assert "the engine's profile allows 34 rows, but add_aot_routing was told max_rows=33" in error


# ---- What is refused before TensorRT is asked -------------------------------------------------------------


def tensor(dtype: str, *shape: int) -> Any:
    return SimpleNamespace(dtype=SimpleNamespace(name=dtype), shape=shape)


def refusals() -> Iterator[tuple[dict[str, Any], str]]:
    logits = tensor("FLOAT", -1, 128)
    yield {"max_rows": 257}, "max_rows=257: an ahead-of-time plugin takes 1 to 256 rows"
    yield {"max_rows": 0}, "max_rows=0"
    yield {"compute_capability": "SM70"}, "compute_capability='SM70' must be SM80 or SM90"
    yield (
        {"tensors": {"router_logits": tensor("FLOAT", 32, 128)}},
        r"\[up to max_rows=16, 128\], not \[32, 128\]",
    )
    yield {"tensors": {"router_logits": tensor("FLOAT", -1, 64)}}, r"not \[-1, 64\]"
    yield {"tensors": {"router_logits": tensor("INT8", -1, 128)}}, "FLOAT, BF16, HALF, not INT8"
    yield (
        {"tensors": {"router_logits": logits, "exempt": tensor("INT32", -1)}},
        "exempt: the type must be BOOL",
    )
    yield {"tensors": {"logits": logits}}, r"not \['logits'\]"
    yield {"tensors": {}}, "tensors must be router_logits"
    yield {"config": XShareConfig(24, gpu_budget=4)}, "needs expert_gpu"
    yield {"config": XShareConfig((24, 32))}, "one per layer"
    yield {"config": XShareConfig(2)}, "budget must be at least top_k=4"


@pytest.mark.parametrize(("change", "message"), [*refusals()])
def test_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "spec": RouterSpec(128, 4, "softmax"),
        "config": XShareConfig(24),
        "tensors": {"router_logits": tensor("FLOAT", -1, 128)},
        "max_rows": 16,
        "compute_capability": "SM90",
    }
    with pytest.raises(ValueError, match=message):
        add_aot_routing(None, None, **(arguments | change))


def test_refused_without_the_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, config, tensors = (
        RouterSpec(128, 4, "softmax"),
        XShareConfig(24),
        {"router_logits": tensor("HALF", -1, 128)},
    )
    old = ModuleType("old_tensorrt")
    with pytest.raises(RuntimeError, match="old_tensorrt has no Python plugins"):
        add_aot_routing(old, None, spec, config, tensors, max_rows=16, compute_capability="SM80")
    old.__path__, old.__version__ = [], "10.8.0"  # type: ignore[attr-defined]
    for name in ("old_tensorrt", "old_tensorrt.plugin"):
        monkeypatch.setitem(sys.modules, name, old)
    with pytest.raises(RuntimeError, match="has no ahead-of-time plugins; 10"):
        add_aot_routing(old, None, spec, config, tensors, max_rows=16, compute_capability="SM80")


def test_names_differ_where_kernels_do() -> None:
    assert len({built.name for built in KERNELS.values()}) == len(KERNELS)
    built = KERNELS["mixtral"]
    assert (
        built.name
        == kernel(built.spec, built.config, built.logits_type, built.max_rows, "SM80", "request_ids").name
    )


# ---- Built by nvcc ----------------------------------------------------------------------------------------


@needs_nvcc
@pytest.mark.parametrize("name", KERNELS)
def test_ptx_takes_what_tensorrt_passes(name: str) -> None:
    built, ptx = KERNELS[name], compiled(name)
    head = re.search(rf"\.visible \.entry {built.name}\((.*?)\)\n(.*?)\n\{{", ptx, re.DOTALL)
    assert head is not None and ptx.count(".entry") == 1
    parameters = re.findall(r"\.param \.(\w+)", head[1])
    assert parameters == ["u64"] * len(built.input_names) + ["u32"] + ["u64"] * 3
    cluster = re.search(r"\.reqnctapercluster (\d+)", head[2])
    assert (int(cluster[1]) if cluster else 1) == built.num_blocks
    assert f".maxntid {built.max_threads}" in head[2]
    assert ".extern .shared" not in ptx, "dynamic shared memory"
    assert not re.search(r"\bmad\.\S*f(32|64)|\b(add|mul|sub)\.f(32|64)", ptx), "may be contracted"
    fused = len(re.findall(r"\bfma\.", ptx))
    assert fused == 4 * ptx.count("rcp.approx.ftz.f32"), "fused where it is not refine_reciprocal"


@needs_nvcc
@pytest.mark.parametrize("name", KERNELS)
def test_ptxas_spills_nothing(name: str, tmp_path: Path) -> None:
    built = KERNELS[name]
    ptxas = Path(str(find_nvcc())).resolve().with_name("ptxas")
    (tmp_path / "aot.ptx").write_text(compiled(name))
    architecture = {"SM80": "sm_80", "SM90": "sm_90"}[built.compute_capability]
    command = (str(ptxas), "-v", f"-arch={architecture}", str(tmp_path / "aot.ptx"))
    report = run_well(*command, "-o", str(tmp_path / "aot.cubin"))
    print(f"{name} {architecture}:", report)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
    registers, shared = (int(re.findall(rf"(\d+) {unit}", report)[0]) for unit in ("registers", "bytes smem"))
    assert -(-registers // 8) * 8 * built.max_threads <= 65536 and shared <= 48 * 1024


@needs_nvcc
def test_a_compiler_error_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from xshare_trtllm.graph import aot_plugin

    with pytest.raises(RuntimeError, match="nvcc did not build the ahead-of-time plugin"):
        aot_plugin.compile_ptx(("-DXSHARE_AOT_BLOCKS=1",), 80)
    monkeypatch.setattr(aot_plugin, "find_nvcc", lambda: None)
    with pytest.raises(RuntimeError, match="no nvcc for the ahead-of-time plugin"):
        aot_plugin.compile_ptx(("-DA",), 80)
