"""The machine code of the step kernel: registers, shared memory, spills, instructions and size.

    python benchmarks/route_sass.py [--plugins FOLDER]

Needs no GPU, but nvcc (CUDACXX, PATH or /usr/local/cuda) and nvdisasm (PATH, /usr/local/cuda or the package
triton). `library` is the kernel of libxshare_cuda.so, which takes every setting of up to 32 V experts;
`constant` is the same source with one shape and a coverage as constants, as an ahead-of-time plugin has it.
`--plugins` measures another version's sources.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "90a")
LIBRARY = {"E=128": 4, "E=256": 8}  # experts per lane
# scoring, groups, groups of a row
CONSTANT = {
    "E=128 k=4 topk_softmax": (128, 4, 2, 1, 1),
    "E=256 k=8 softmax_renorm": (256, 8, 1, 1, 1),
    "E=256 k=8 sigmoid_bias, 8 groups": (256, 8, 3, 8, 4),
}


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


def macros(experts: int, top_k: int, scoring: int, groups: int, top_k_groups: int) -> dict[str, object]:
    """Of plugins/cuda/aot.cu, for fp32 logits, ids and weights, a coverage of 0.97 and a warm-up of 1."""
    values: dict[str, object] = {
        "NAME": "route_step_kernel",
        "NUM_EXPERTS": experts,
        "EXPERTS_PER_LANE": experts // 32,
        "TOP_K": top_k,
        "SCORING": scoring,
        "NUM_GROUPS": groups,
        "TOP_K_GROUPS": top_k_groups,
        "ROUTED_SCALING_FACTOR": "1.0f",
        "LOGITS_DTYPE": 0,
        "BUDGET": experts,
        "WARMUP": 1,
        "REQUEST_BUDGET": 0,
        "GPU_BUDGET": 0,
        "MAX_ROWS": -1,
        "COVERAGE": 0.97,
        "MIN_COVERAGE": 0.97,  # its earlier name
        "UTILITY": 0,
        "THREADS": 512,
        "BLOCKS": 1,
        "HAS_CORRECTION_BIAS": int(scoring == 3),
    }
    return values | {f"HAS_{name}": 0 for name in ("REQUEST_IDS", "EXEMPT", "EXPERT_GPU")}


def compile_cubin(plugins: Path, source: str, defines: dict[str, object], sm: str, cubin: Path) -> str:
    """Returns what ptxas reports."""
    command = [find_tool("nvcc"), "-std=c++17", "-O3", "--fmad=false", "-Xptxas=-v", "-cubin"]
    command += [f"-arch=sm_{sm}", f"-I{plugins}", f"-I{plugins / 'include'}", str(plugins / "cuda" / source)]
    command += [f"-D{name}={value}" for name, value in defines.items()]
    done = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stdout + done.stderr)
    return done.stdout + done.stderr


def parse_usage(report: str) -> tuple[int, int, int]:
    """Registers, bytes of shared memory and of spills of the step kernel."""
    for part in report.split("Compiling entry function")[1:]:
        if "route_step_kernel" not in part.splitlines()[0]:
            continue
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        assert spills and registers and shared, part
        return int(registers[1]), int(shared[1]), int(spills[1]) + int(spills[2])
    raise AssertionError(report)


def count_instructions(cubin: Path) -> int:
    """Of the step kernel, without the padding behind its end."""
    command = [find_tool("nvdisasm"), "-c", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sections = re.split(r"^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)
    code = next(section for section in sections[1:] if "route_step_kernel" in section.split(",", 1)[0])
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", code, flags=re.MULTILINE)
    return sum(not each.startswith("NOP") for each in instructions)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plugins", type=Path, default=ROOT / "plugins", help="the sources")
    plugins = parser.parse_args().plugins
    builds: dict[str, tuple[str, dict[str, object]]] = {}
    for name, lanes in LIBRARY.items():
        builds[f"library, {name}"] = ("kernels.cu", {"XSHARE_EXPERTS_PER_LANE": lanes})
    for name, shape in CONSTANT.items():
        defines = {f"XSHARE_AOT_{macro}": value for macro, value in macros(*shape).items()}
        builds[f"constant, {name}"] = ("aot.cu", defines)
    print(f"{'':48}{'sm':>5}{'registers':>11}{'shared':>8}{'spills':>8}{'instructions':>14}{'KiB':>7}")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "step.cubin"
        for name, (source, defines) in builds.items():
            for sm in ARCHITECTURES:
                registers, shared, spilled = parse_usage(compile_cubin(plugins, source, defines, sm, cubin))
                count = count_instructions(cubin)
                row = f"{name:48}{sm:>5}{registers:11}{shared:8}{spilled:8}{count:14}{count / 64:7.1f}"
                print(row, flush=True)


if __name__ == "__main__":
    main()
