"""`xshare doctor`: what is installed, what would run with it, and the command that mends what would not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from xshare_trtllm.engines import environment
from xshare_trtllm.kernels import store
from xshare_trtllm.kernels.compile import HOW_TO_INSTALL, compiler_version, why_not

PACKAGES = (
    *("torch", "transformers", "onnx", "tensorrt-llm", "tensorrt", "cuda-bindings"),
    *("nvidia-pytriton", "tritonclient"),
)
ENGINE_PATH = "TensorRT-LLM 1.0 to 1.2"
_HOOK = "tensorrt_llm, imported"
_WORKERS = "worker processes"
_OTHER = "another version, back end or model: docs/pytorch_backend.md"
_TRTLLM = "pip install tensorrt-llm==1.2.1, or run in NVIDIA's container tensorrt-llm/release:1.2.1"
_PLUGIN = "build_scripts/build_plugin.sh"
_INSTALL = {
    "torch": "pip install torch",
    "transformers": "pip install 'xshare-trtllm[demo]'",
    "onnx": "pip install 'xshare-trtllm[onnx]'",
    "tensorrt-llm": _TRTLLM,
    "tensorrt": _TRTLLM,
    "cuda-bindings": HOW_TO_INSTALL,
    "nvidia-pytriton": "pip install nvidia-pytriton==0.7.0, or run in NVIDIA's container tritonserver",
    "tritonclient": "pip install 'tritonclient[grpc]'",
}
_BUILD = {
    environment.HOST: "pip install -e . (needs a C++17 compiler)",
    environment.CUDA: _PLUGIN,
    environment.PLUGIN: _PLUGIN,
}
_PROBE_SECONDS = 20.0
_INSPECTION = "xshare_trtllm.trtllm.inspection"
_INSPECTION_SECONDS = 300.0  # TensorRT-LLM imports for a minute
# What --need asks for, by the name of its path in the report.
PATHS = {
    "demo": "xshare demo, route() on the host",
    "export": "xshare export --onnx",
    "trtllm-build": "trtllm-build --plugin xshare",
    "trtllm-serve": "trtllm-serve with XShare",
}
# Loads one library in a process of its own: a library that crashes takes only that process with it.
_PROBE = """
import ctypes, json, sys
library = ctypes.CDLL(sys.argv[1])
def text(name):
    function = getattr(library, name, None)
    if function is None:
        return None
    function.restype = ctypes.c_char_p
    return function().decode()
has = lambda name: hasattr(library, name)
print(json.dumps({
    "version": text("xshare_version"), "build": text("xshare_plugin_build"),
    "architectures": text("xshare_cuda_architectures"),
    "device": has("xshare_route_cuda"), "plugin": has("getCreators"), "host": has("xshare_route_cpu"),
}))
"""
COMPILED = "compiled kernels"
_JETSONS = ((8, 7), (11, 0))  # Orin and Thor
_SYMBOLS = {environment.HOST: "host", environment.CUDA: "device", environment.PLUGIN: "plugin"}


@dataclass(frozen=True)
class Check:
    """One line of the report. mend: the command that helps, where it is not ok."""

    group: str
    name: str
    ok: bool
    found: str
    mend: str = ""


def examine() -> list[Check]:
    """Everything, in under three seconds on a machine that is well, and as long as TensorRT-LLM takes to
    import where it is installed."""
    probes = _start_probes()
    packages = _packages()
    inspection = _start_inspection() if _by_name(packages)["tensorrt-llm"].ok else None
    gpus = _gpus()
    libraries = [_library(name, *probe) for name, probe in probes.items()]
    inside = [] if inspection is None else _inspected(inspection)
    libraries.append(_compiling())
    images = [image for library in libraries for gpu in gpus for image in _images(library, gpu)]
    commands = [_trtllm_build()] if inspection is None else [_trtllm_build(), _workers()]
    known = [*packages, *libraries, *commands, *gpus, *images, *inside]
    return [*packages, *libraries, *commands, *gpus, *images, *inside, *_paths(known)]


def _by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


# ---- TensorRT-LLM, imported -------------------------------------------------------------------------------


def _start_inspection() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", _INSPECTION]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _inspected(process: subprocess.Popen[str]) -> list[Check]:
    """A line that says whether XShare knows this version, then its names, methods, back ends and models."""
    problem, findings = "", []
    try:
        output, errors = process.communicate(timeout=_INSPECTION_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        problem = f"does not import within {_INSPECTION_SECONDS:.0f} s"
    else:
        if process.returncode != 0:
            problem = (
                f"does not import: {errors.strip().splitlines()[-1] if errors.strip() else 'it crashed'}"
            )
        else:
            findings = json.loads(output.splitlines()[-1])
    checks = [Check(f["group"], f["name"], f["ok"], f["found"], "" if f["ok"] else _OTHER) for f in findings]
    missing = [check.name for check in checks if check.group == "name" and not check.ok]
    if missing:
        problem = f"has no {', '.join(missing)} where XShare looks"
    found = problem or "XShare knows what it takes hold of"
    return [Check("version", _HOOK, not problem, found, _TRTLLM if problem else ""), *checks]


# ---- What is there ----------------------------------------------------------------------------------------


def _packages() -> list[Check]:
    return [_package(name, number) for name, number in environment.versions(PACKAGES).items()]


def _package(name: str, number: str | None) -> Check:
    if number is None:
        return Check("package", name, False, "not installed", _INSTALL[name])
    return Check("package", name, True, number)


def _start_probes() -> dict[str, tuple[Path | None, subprocess.Popen[str] | None]]:
    probes: dict[str, tuple[Path | None, subprocess.Popen[str] | None]] = {}
    for name in _SYMBOLS:
        path = environment.find_library(name)
        process = None
        if path is not None and path.is_file():
            command = [sys.executable, "-I", "-S", "-c", _PROBE, str(path.resolve())]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        probes[name] = path, process
    return probes


def _library(name: str, path: Path | None, process: subprocess.Popen[str] | None) -> Check:
    mend = _BUILD[name]
    if path is None or process is None:
        return Check("library", name, False, f"no file {path}" if path else "not built", mend)
    path = Path(os.path.relpath(path)) if path.is_relative_to(Path.cwd()) else path
    try:
        output, errors = process.communicate(timeout=_PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return Check("library", name, False, f"{path}: does not load within {_PROBE_SECONDS:.0f} s", mend)
    if process.returncode != 0:
        reason = errors.strip().splitlines()[-1] if errors.strip() else f"exit code {process.returncode}"
        return Check("library", name, False, f"{path}: does not load: {reason}", mend)
    facts = json.loads(output)
    if not facts[_SYMBOLS[name]]:
        return Check("library", name, False, f"{path}: loads, but is another library", mend)
    known = facts["build"] or facts["version"]
    if facts["architectures"]:
        known += f", code for {facts['architectures']}"
    if name == environment.PLUGIN and not facts["build"]:
        known = "does not say with which TensorRT headers it was built"
    return Check("library", name, True, f"{path}: {known}")


def _compiling() -> Check:
    """Kernels that need no library: compiled when a layer's setting is first used."""
    problem = why_not()
    if problem is not None:
        return Check("library", COMPILED, False, problem, HOW_TO_INSTALL)
    compiler = ".".join(map(str, compiler_version()))
    return Check("library", COMPILED, True, f"by NVRTC {compiler} at first use, kept in {store.folder()}")


def _images(library: Check, gpu: Check) -> list[Check]:
    """Whether a library has code for a GPU: one line, or none where there is nothing to compare."""
    _, has_images, architectures = library.found.partition(", code for ")
    _, is_known, capability = gpu.found.partition("compute capability ")
    if not (library.ok and has_images and gpu.ok and is_known):
        return []
    major, minor = _numbers(capability.split(",")[0])
    found = find_image(architectures.split(), (major, minor))
    mend = "" if found else f"{_PLUGIN} sm_{major}{minor}"
    return [Check("image", f"{library.name} on {gpu.name}", bool(found), found or "no code for it", mend)]


def find_image(architectures: list[str], capability: tuple[int, int]) -> str:
    """What of a library's images a GPU runs: "" = none.

    architectures  as CMake has them: `90-real` is machine code for 9.0, `90-virtual` PTX of it, `90` both
    """
    named = [(re.match(r"(\d+)", name), name.rpartition("-")[2]) for name in architectures]
    numbers = [(divmod(int(number[1]), 10), kind) for number, kind in named if number]
    real = [version for version, kind in numbers if kind != "virtual" and version[0] == capability[0]]
    # Machine code runs on later GPUs of its family, but not from a desktop to a Jetson.
    fitting = [v for v in real if v == capability or (v < capability and capability not in _JETSONS)]
    if fitting:
        return "machine code for {}.{}".format(*max(fitting))
    ptx = [version for version, kind in numbers if kind != "real" and version <= capability]
    return "PTX of {}.{}, of which the driver makes code at first use".format(*max(ptx)) if ptx else ""


def _trtllm_build() -> Check:
    from xshare_trtllm.trtllm.build_command import find_build_command

    path, is_ours = find_build_command()
    if path is None:
        return Check("command", "trtllm-build", False, "not on PATH", _TRTLLM)
    if not is_ours:
        mend = f"python -m {environment.BUILD_MODULE} --xshare_install"
        found = f"{path}: TensorRT-LLM's own, without --plugin xshare"
        return Check("command", "trtllm-build", False, found, mend)
    return Check("command", "trtllm-build", True, f"{path}: knows --plugin xshare")


def _workers() -> Check:
    """Whether XShare gets into TensorRT-LLM's worker processes."""
    from xshare_trtllm.trtllm.startup import check_hook, hook_path

    try:
        check_hook()
    except RuntimeError:
        found = f"XShare does not get into them: no {hook_path()} acts"
        return Check("command", _WORKERS, False, found, "xshare trtllm --install")
    return Check("command", _WORKERS, True, "XShare gets into them")


def _gpus() -> list[Check]:
    """One line per GPU, as nvidia-smi sees them."""
    driver = "install NVIDIA's driver; in a container: docker run --gpus all"
    command = shutil.which("nvidia-smi")
    if command is None:
        return [Check("GPU", "GPU", False, "no nvidia-smi, so no driver", driver)]
    query = ["--query-gpu=name,compute_cap,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run([command, *query], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [Check("GPU", "GPU", False, f"nvidia-smi: {error}", driver)]
    lines = [line.split(", ") for line in done.stdout.splitlines() if line.count(", ") == 3]
    if done.returncode != 0 or not lines:
        return [Check("GPU", "GPU", False, f"nvidia-smi: {(done.stdout + done.stderr).strip()}", driver)]
    return [_gpu(number, *line) for number, line in enumerate(lines)]


def _gpu(number: int, name: str, capability: str, driver: str, memory: str) -> Check:
    found = f"{name}, compute capability {capability}, {memory}, driver {driver}"
    is_new_enough = _numbers(capability) >= (8,)
    mend = "" if is_new_enough else "XShare's kernels need compute capability 8.0 or newer: another GPU"
    return Check("GPU", f"GPU {number}", is_new_enough, found, mend)


# ---- What would run ---------------------------------------------------------------------------------------


def _paths(checks: list[Check]) -> list[Check]:
    by_name = {check.name: check for check in checks}
    gpu = next((check for check in checks if check.group == "GPU" and check.ok), None)
    gpu = gpu or next(check for check in checks if check.group == "GPU")
    torch, trtllm = by_name["torch"], by_name["tensorrt-llm"]
    plugin = by_name.get(f"{environment.PLUGIN} on {gpu.name}", by_name[environment.PLUGIN])
    engine = [_engine_version(trtllm), plugin, gpu]
    backend = [by_name.get(_HOOK, trtllm), _kernels(by_name), gpu]
    if trtllm.ok:
        backend.append(by_name[_WORKERS])
    return [
        _path(PATHS["demo"], [torch, by_name["transformers"]], _host(by_name)),
        _path(PATHS["export"], [torch, by_name["onnx"]], "exports"),
        _path(PATHS["trtllm-build"], engine, f"{ENGINE_PATH}, one GPU of 8.0 or newer"),
        _path(PATHS["trtllm-serve"], backend, "PyTorch backend"),
    ]


def _kernels(by_name: dict[str, Check]) -> Check:
    """Of the library that is named, or compiled, or else of the one that is built."""
    compiled = by_name[COMPILED]
    is_named = environment.NAMED_BY[environment.CUDA] in os.environ
    if not is_named and compiled.ok and by_name[environment.HOST].ok:
        return compiled
    images = (check for check in by_name.values() if check.name.startswith(f"{environment.CUDA} on "))
    return next(images, by_name[environment.CUDA])


def _host(by_name: dict[str, Check]) -> str:
    return "native library" if by_name[environment.HOST].ok else "reference only, 20 to 50 times slower"


def _engine_version(trtllm: Check) -> Check:
    """TensorRT-LLM as the engine path needs it: an engine builder went with 1.3."""
    if trtllm.ok and not (1, 0) <= _numbers(trtllm.found)[:2] <= (1, 2):
        return Check("", trtllm.name, False, f"{trtllm.found}, needs {ENGINE_PATH}", _TRTLLM)
    return trtllm


def _path(name: str, needs: list[Check], with_what: str) -> Check:
    lacking = [need for need in needs if not need.ok]
    if not lacking:
        return Check("path", name, True, with_what)
    reasons = "; ".join(f"{need.name}: {need.found}" for need in lacking)
    return Check("path", name, False, reasons, lacking[0].mend)


def _numbers(version: str) -> tuple[int, ...]:
    """(1, 2) of 1.2.1rc3: what of it are whole numbers."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


# ---- Report -----------------------------------------------------------------------------------------------


@click.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option("--need", type=click.Choice(list(PATHS)), help="Exit with 0 only if this would run.")
@click.option("--model", help="With --need trtllm-serve: and only for this architecture (GptOssForCausalLM).")
@click.option(
    "--serving", metavar="URL|PID|FILE", help="Look at a server that runs, instead of this machine."
)
@click.pass_context
def doctor(
    ctx: click.Context, as_json: bool, need: str | None, model: str | None, serving: str | None
) -> None:
    """Say what is installed, what would run, and how to mend what would not.

    The exit code is 0 if one of the paths would run, or the one that --need names. With --serving: 0 if every
    rank of the server routes by XShare.
    """
    if serving is not None:
        ctx.exit(_serving(serving, as_json))
    checks = examine()
    if as_json:
        click.echo(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        _print(checks)
    paths = [check for check in checks if check.group == "path" and need in (None, _NEEDS.get(check.name))]
    would_run = any(check.ok for check in paths)
    if model is not None:
        would_run = would_run and any(c.ok for c in checks if (c.group, c.name) == ("model", model))
    ctx.exit(0 if would_run else 1)


_NEEDS = {name: option for option, name in PATHS.items()}


def _serving(server: str, as_json: bool) -> int:
    """Prints the ranks of a server; the exit code."""
    from xshare_trtllm.trtllm.serving import find, judge

    try:
        status = find(server)
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error
    ranks = judge(status)
    if as_json:
        click.echo(json.dumps(status | {"judged": [asdict(rank) for rank in ranks]}, indent=1))
    else:
        _print([Check("rank", f"rank {rank.rank}", rank.ok, rank.found) for rank in ranks])
    problem = status["problem"]
    if problem is not None:
        click.echo(problem, err=True)
    return 0 if problem is None and all(rank.ok for rank in ranks) else 1


def _print(checks: list[Check]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from xshare_trtllm.report import console

    table = Table(title="xshare doctor", title_justify="left")
    columns: list[tuple[str, dict[str, Any]]] = [
        ("", {}),
        ("what", {"no_wrap": True}),
        ("ok", {}),
        ("found", {"overflow": "fold"}),
        ("mend it with", {"overflow": "fold"}),
    ]
    for title, options in columns:
        table.add_column(title, **options)
    group = ""
    for check in checks:
        if check.group != group:
            table.add_section()
        mark = "[green]yes[/green]" if check.ok else "[red]no[/red]"
        shown_group = check.group if check.group != group else ""
        table.add_row(shown_group, escape(check.name), mark, escape(check.found), escape(check.mend))
        group = check.group
    console().print(table)
