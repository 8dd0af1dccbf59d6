"""The machine code of the step kernels: registers, shared memory, spills, instructions and size.

    python benchmarks/route_sass.py [--plugins FOLDER]
    python benchmarks/route_sass.py --all [SM ...]

Needs no GPU, but NVRTC and cuda-python (pip install cuda-bindings nvidia-cuda-nvrtc), nvdisasm (PATH,
/usr/local/cuda or the package triton), and for the library's kernels nvcc (CUDACXX, PATH, /usr/local/cuda).
`library` is a kernel of libxshare_cuda.so, which takes every setting of up to 32 V experts; `_softmax` and
`_sigmoid` are those for steps without requests, GPUs, statistics and a dial. `compiled` is built for the
setting when it is first used, as Python does. --all compiles every kernel of every scoring for every
architecture, and fails where one spills. `--plugins` measures another version's library.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from xshare_trtllm import RouterSpec, XShareConfig, ops
from xshare_trtllm.config import SCORINGS
from xshare_trtllm.kernels.compile import compile_kernel
from xshare_trtllm.kernels.setting import POINTERS, TENSORS, Setting

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = {"E=128": 4, "E=256": 8}  # experts per lane
SPECS = {
    "E=128 k=4 topk_softmax": RouterSpec(128, 4, "topk_softmax"),
    "E=256 k=8 softmax_renorm": RouterSpec(256, 8, "softmax_renorm"),
    "E=256 k=8 sigmoid_bias, 8 groups": RouterSpec(256, 8, "sigmoid_bias", 8, 4, 2.5),
}
STEP = ("expert_ids", "expert_weights", "active_experts")


def find_tool(name: str) -> str:
    folders = [Path("/usr/local/cuda/bin")]
    for entry in map(Path, sys.path):
        folders.append(entry / "triton" / "backends" / "nvidia" / "bin")
    for candidate in (os.environ.get("CUDACXX") if name == "nvcc" else None, shutil.which(name)):
        if candidate:
            return candidate
    for folder in folders:
        if (folder / name).is_file():
            return str(folder / name)
    raise SystemExit(f"route_sass.py needs {name}: install the CUDA toolkit, or triton for nvdisasm")


def setting_of(spec: RouterSpec, config: XShareConfig, has: tuple[str, ...], dtype: torch.dtype) -> Setting:
    if "bias" in spec.scoring:
        has = ("correction_bias", *has)
    params = ops.pack_params(16, spec.num_experts, dtype, ops.settings(spec, config))
    addresses = [64 * (name in has) for name in POINTERS]
    return Setting.of_call(params, TENSORS.pack(TENSORS.size, 64, *addresses))


def compile_library(plugins: Path, experts_per_lane: int, sm: str, cubin: Path) -> str:
    """Returns what ptxas reports."""
    command = [find_tool("nvcc"), "-std=c++17", "-O3", "--fmad=false", "-Xptxas=-v", "-cubin"]
    command += [f"-arch=sm_{sm}", f"-I{plugins}", f"-I{plugins / 'include'}"]
    command += [f"-DXSHARE_EXPERTS_PER_LANE={experts_per_lane}", str(plugins / "cuda" / "kernels.cu")]
    done = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stdout + done.stderr)
    return done.stdout + done.stderr


def parse_usage(report: str) -> dict[str, tuple[int, int, int]]:
    """Registers, bytes of shared memory and of spills, by the kernel's mangled name."""
    usages = {}
    for part in report.split("Compiling entry function")[1:]:
        name = re.match(r"\s*'(\w+)'", part)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        assert name and spills and registers, part
        spilled = int(spills[1]) + int(spills[2])
        usages[name[1]] = (int(registers[1]), int(shared[1]) if shared else 0, spilled)
    return usages


def count_instructions(cubin: Path) -> dict[str, int]:
    """By the kernel's mangled name, without the padding behind its end."""
    command = [find_tool("nvdisasm"), "-c", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = {}
    for section in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)[1:]:
        instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", section, flags=re.MULTILINE)
        counts[section.split(",", 1)[0]] = sum(not each.startswith("NOP") for each in instructions)
    return counts


def print_row(name: str, sm: str, usage: tuple[int, int, int], count: int) -> None:
    registers, shared, spilled = usage
    print(f"{name:56}{sm:>5}{registers:11}{shared:8}{spilled:8}{count:14}{count / 64:7.1f}", flush=True)


def measure_library(plugins: Path, cubin: Path) -> None:
    for name, lanes in LIBRARY.items():
        for sm in ("80", "90"):
            usages = parse_usage(compile_library(plugins, lanes, sm, cubin))
            for kernel, count in count_instructions(cubin).items():
                step = re.search(r"\d(route_[a-z_]+)_kernel", kernel)
                if step and not ("team" in step[1] and sm == "80"):
                    print_row(f"library, {name}, {step[1]}", sm, usages[kernel], count)


def measure_compiled(cubin: Path) -> None:
    for name, spec in SPECS.items():
        for sm in ("80", "90"):
            for kernel in ("route_block", "route_team")[: 1 + (sm != "80")]:
                for outputs, has in {"": STEP, ", with statistics": (*STEP, "stats")}.items():
                    setting = setting_of(spec, XShareConfig(coverage=0.97), has, torch.float32)
                    code, report = compile_kernel(kernel, setting, f"sm_{sm}")
                    cubin.write_bytes(code)
                    (count,) = count_instructions(cubin).values()
                    (usage,) = parse_usage(report).values()
                    print_row(f"compiled, {name}, {kernel}{outputs}", sm, usage, count)


def every_setting() -> Iterator[tuple[str, Setting]]:
    dtypes = itertools.cycle((torch.float32, torch.bfloat16, torch.float16))
    for scoring in SCORINGS:
        for experts, top_k in ((32, 2), (64, 6), (128, 4), (256, 8), (384, 8), (512, 16)):
            spec = RouterSpec(experts, top_k, scoring)
            everything = XShareConfig(experts, request_budget=8, coverage=0.97, gpu_budget=8, max_rows=64)
            outputs = tuple(each for each in POINTERS if each not in ("correction_bias", "step_bias"))
            for config, has in ((XShareConfig(coverage=0.97), STEP), (everything, outputs)):
                dtype = next(dtypes)
                name = f"{scoring} E={experts} k={top_k} {str(dtype).removeprefix('torch.')}"
                yield f"{name} {'step' if has is STEP else 'all'}", setting_of(spec, config, has, dtype)


def all_architectures() -> list[str]:
    text = (ROOT / "plugins" / "cuda" / "architectures.cmake").read_text()
    known = re.search(r"XSHARE_ALL_ARCHITECTURES (.*)\)", text)
    assert known
    return known[1].split()


def compile_all(architectures: list[str]) -> int:
    """Every kernel of every setting; prints the worst of each architecture. Returns how many spill."""
    failures = 0
    for sm in architectures or all_architectures():
        worst: dict[str, tuple[int, str]] = {}
        compiled = 0
        for name, setting in every_setting():
            for kernel in setting.kernels(has_clusters=int(sm) >= 90):
                _, report = compile_kernel(kernel, setting, f"sm_{sm}")
                ((registers, _, spilled),) = parse_usage(report).values()
                worst[kernel] = max(worst.get(kernel, (0, "")), (registers, name))
                failures += spilled > 0
                compiled += 1
        most = ", ".join(f"{kernel} {registers}" for kernel, (registers, _) in worst.items())
        print(f"sm_{sm}: {compiled} kernels, {failures} spill; most registers: {most}", flush=True)
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plugins", type=Path, default=ROOT / "plugins", help="the library's sources")
    parser.add_argument(
        "--all", nargs="*", metavar="SM", help="compile everything for these, or all (10 minutes each)"
    )
    options = parser.parse_args()
    if options.all is not None:
        sys.exit(compile_all(options.all))
    print(f"{'':56}{'sm':>5}{'registers':>11}{'shared':>8}{'spills':>8}{'instructions':>14}{'KiB':>7}")
    with tempfile.TemporaryDirectory() as folder:
        measure_library(options.plugins, Path(folder) / "step.cubin")
        measure_compiled(Path(folder) / "step.cubin")


if __name__ == "__main__":
    main()
