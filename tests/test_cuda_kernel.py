"""The CUDA kernels without a GPU: run on the host against xshare_route_cpu, and built by nvcc if it is there.

The host run (tests/native/emulate_route.cpp) executes the kernels' own source, a fiber per CUDA thread, on
random and adversarial calls; every output must have the same bits. Under ThreadSanitizer only barriers order
the fibers, so that a race is reported in whatever order they ran. XSHARE_ALL_KERNELS=1 makes nvcc build every
kernel instead of the usual ones.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLUGINS = ROOT / "plugins"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def run_well(*command: str) -> str:
    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# ---- On the host ------------------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("c++") is None, reason="needs cmake and a C++ compiler"
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emulation")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    run_well("cmake", "-S", str(PLUGINS), "-B", str(folder), *generator, "-DXSHARE_BUILD_TESTS=ON")
    return folder


def emulation(tree: Path, name: str) -> str:
    run_well("cmake", "--build", str(tree), "--target", name)
    return str(tree / "native_tests" / name)


@needs_compiler
def test_equals_the_host_implementation(tree: Path) -> None:
    program = emulation(tree, "emulate_route")
    for seed in ("1", "2"):
        assert "3000 calls agree" in run_well(program, "3000", seed)


@needs_compiler
def test_reciprocals_are_rounded_once(tree: Path) -> None:
    assert run_well(emulation(tree, "emulate_route"), "reciprocal") == "0 reciprocals are wrong\n"


@needs_compiler
def test_touches_no_memory_it_should_not(tree: Path) -> None:
    program = emulation(tree, "emulate_route_asan")
    assert "500 calls agree" in run_well(program, "500", "3")


@needs_compiler
def test_has_no_races(tree: Path) -> None:
    program = emulation(tree, "emulate_route_tsan")
    assert "200 calls agree" in run_well(program, "200", "4")
    faulty = run(program, "race")
    assert faulty.returncode != 0 and "data race" in faulty.stderr, "a planted race was not seen"


@needs_compiler
def test_notices_lanes_that_miss_a_barrier(tree: Path) -> None:
    faulty = run(emulation(tree, "emulate_route"), "divergence")
    assert faulty.returncode != 0 and "a barrier that not all threads reach" in faulty.stderr


# ---- Launched on a runtime that only says what it was asked -----------------------------------------------


@pytest.fixture(scope="module")
def fake_runtime(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Runs plugins/cuda/route.cpp for a device's major version, an image's PTX version, a largest cluster and
    numbers of rows."""
    nvcc = find_nvcc()
    if nvcc is None or shutil.which("c++") is None:
        pytest.skip("needs CUDA's headers (nvcc) and a C++ compiler")
    program = tmp_path_factory.mktemp("runtime") / "fake_runtime"
    headers = (Path(nvcc).resolve().parents[1] / "include", Path("/usr/local/cuda/include"))
    includes = (ROOT / "tests" / "native", PLUGINS, PLUGINS / "include", *headers)
    sources = (ROOT / "tests" / "native" / "fake_runtime.cpp", PLUGINS / "cuda" / "route.cpp")
    options = ("-std=c++17", "-Wall", "-Wextra", "-Werror", *(f"-I{folder}" for folder in includes))
    run_well("c++", *options, *map(str, sources), "-o", str(program))

    def launches(*arguments: int, **environment: str) -> list[str]:
        command = [str(program), *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | environment
        )
        return done.stdout.splitlines()

    return launches


ASKED = f"asked={3 * 9}"  # every kernel, once: any later call may be captured


def test_contract_hopper_has_clusters_and_overlaps(fake_runtime: Callable[..., list[str]]) -> None:
    assert fake_runtime(9, 90, 16, 1, 16, 17, 256, 300) == [
        f"block_softmax blocks=1 threads=128 cluster=1 programmatic=1 {ASKED}",
        f"block_softmax blocks=1 threads=512 cluster=1 programmatic=1 {ASKED}",
        f"team_softmax blocks=4 threads=160 cluster=4 programmatic=1 {ASKED}",
        f"team_softmax blocks=16 threads=512 cluster=16 programmatic=1 {ASKED}",
        "memset 1",
        f"gather_rows blocks=38 threads=256 cluster=1 programmatic=0 {ASKED}",
        f"refine_rows blocks=38 threads=256 cluster=1 programmatic=1 {ASKED}",
    ]


@pytest.mark.parametrize(("major", "ptx"), ((8, 80), (9, 80), (12, 80)))
def test_contract_code_for_ampere_has_neither(
    fake_runtime: Callable[..., list[str]], major: int, ptx: int
) -> None:
    """Also where a newer device runs it, made from PTX: such code waits for nothing."""
    lines = fake_runtime(major, ptx, 16, 16, 32, 33)
    assert [line.split(" ")[0] for line in lines] == [
        *("block_softmax", "block_softmax", "memset", "gather_rows", "refine_rows")
    ]
    assert not any("cluster=2" in line or "programmatic=1" in line for line in lines)


@pytest.mark.parametrize("most", (8, 4, 2, 1))
def test_contract_the_largest_cluster_that_there_is_room_for(
    fake_runtime: Callable[..., list[str]], most: int
) -> None:
    first = fake_runtime(10, 100, most, 200)[0]
    assert first.startswith(f"team_softmax blocks={most} " if most > 1 else "memset")


def test_contract_switches_of_the_environment(fake_runtime: Callable[..., list[str]]) -> None:
    switches = {"XSHARE_CLUSTER_SIZE": "2", "XSHARE_PROGRAMMATIC_LAUNCH": "0"}
    assert "blocks=2 threads=512 cluster=2 programmatic=0" in fake_runtime(9, 90, 16, 100, **switches)[0]
    assert "programmatic=1" in fake_runtime(9, 90, 16, 100, XSHARE_PROGRAMMATIC_LAUNCH="1")[0]


# ---- Built by nvcc ----------------------------------------------------------------------------------------

# Experts per lane and architecture: 128 experts, 384 (which come closest to the registers there are), or all.
BUILDS = [(4, "80"), (12, "90")]
if os.environ.get("XSHARE_ALL_KERNELS") == "1":
    BUILDS = [(experts, sm) for experts in (1, 2, 4, 8, 12, 16) for sm in ("80", "90", "100", "120")]
MAX_STATIC_SHARED = 48 * 1024
STEP_KERNELS = {
    f"route_{size}{variant}" for size in ("block", "team") for variant in ("", "_softmax", "_sigmoid")
}
KERNELS = STEP_KERNELS | {
    "gather_rows",
    "place_requests",
    "order_rows",
    "sum_requests",
    "propose",
    "refine_rows",
    "tally_rows",
}


class Usage(NamedTuple):
    registers: int
    shared: int
    stack: int
    spilled: int


def find_nvcc() -> str | None:
    for candidate in (os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if candidate and shutil.which(candidate):
            return candidate
    return None


def parse_usage(report: str) -> dict[str, Usage]:
    """Per kernel, from what `ptxas -v` prints: one entry function after another."""
    usages = {}
    for part in report.split("Compiling entry function")[1:]:
        name = re.search(r"'\S*?\d([a-z_]+)_kernel", part)
        registers = re.search(r"Used (\d+) registers", part)
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        assert name and registers and stack, part
        shared = re.search(r"(\d+) bytes smem", part)
        frame, stores, loads = map(int, stack.groups())
        usages[name[1]] = Usage(int(registers[1]), int(shared[1]) if shared else 0, frame, stores + loads)
    return usages


def max_threads(kernel: str, experts_per_lane: int) -> int:
    """Of plugins/cuda/args.h; two blocks of the other kernels fit a multiprocessor."""
    if kernel not in STEP_KERNELS:
        return 2 * 256
    return 512 if experts_per_lane <= 8 else 384


@pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc in CUDACXX, PATH or /usr/local/cuda")
@pytest.mark.parametrize(("experts", "architecture"), BUILDS)
def test_nvcc_builds_it_without_spills(experts: int, architecture: str, tmp_path: Path) -> None:
    report = run_well(
        str(find_nvcc()),
        *("-std=c++17", "-O3", "--fmad=false", "-Werror=all-warnings", "-Xptxas=-v"),
        "-Xcompiler=-Wall,-Wextra,-ffp-contract=off",
        *(f"-gencode=arch=compute_{architecture},code=sm_{architecture}",),
        *(f"-DXSHARE_EXPERTS_PER_LANE={experts}", f"-I{PLUGINS}", f"-I{PLUGINS / 'include'}"),
        *("-c", str(PLUGINS / "cuda" / "kernels.cu"), "-o", str(tmp_path / "kernels.o")),
    )
    usages = parse_usage(report)
    assert set(usages) == KERNELS, report
    for kernel, usage in usages.items():
        print(f"sm_{architecture} V={experts} {kernel}: {usage}")
        assert usage.spilled == 0 and usage.stack == 0, (kernel, usage)
        assert usage.shared <= MAX_STATIC_SHARED, (kernel, usage)
        granules = -(-usage.registers // 8) * 8
        assert granules * max_threads(kernel, experts) <= 65536, (kernel, usage)
