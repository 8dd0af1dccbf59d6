"""plugins/cuda/fixed.cu to machine code, by NVRTC, which needs neither nvcc nor a GPU."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from xshare_trtllm.kernels.setting import Setting

PACKAGE = Path(__file__).resolve().parent.parent
HOW_TO_INSTALL = "pip install 'xshare-trtllm[cuda]'"
HOW_TO_GET_NVRTC = (
    "a torch for CUDA brings it; or pip install nvidia-cuda-nvrtc (CUDA 12: nvidia-cuda-nvrtc-cu12)"
)
_OPTIONS = ("--std=c++17", "--fmad=false", "-default-device", "--ptxas-options=-v")
# What of the C headers the kernels take; NVRTC has none.
_C_HEADERS = {
    "stddef.h": "",
    "string.h": "",
    "stdint.h": "#define INT32_MAX 2147483647\n#define INT32_MIN (-INT32_MAX - 1)\n"
    + "".join(
        f"typedef {'unsigned' if sign else 'signed'} {kind} {'u' if sign else ''}int{bits}_t;\n"
        for bits, kind in ((8, "char"), (16, "short"), (32, "int"), (64, "long long"))
        for sign in (0, 1)
    )
    + "typedef unsigned long long uintptr_t;\n",
}


@cache
def why_not() -> str | None:
    """What is missing to compile kernels here, with the command that helps; None = nothing."""
    try:
        import cuda.bindings.driver  # noqa: F401

        compiler_version()
        source_folder()
    except ImportError:
        return f"cuda-python is not installed: {HOW_TO_INSTALL}"
    except RuntimeError as error:
        return str(error)
    return None


@cache
def source_folder() -> Path:
    """plugins/, in the package or in the checkout. Raises RuntimeError where neither has it."""
    for folder in (PACKAGE / "plugins", PACKAGE.parent / "plugins"):
        if (folder / "cuda" / "fixed.cu").is_file():
            return folder
    raise RuntimeError(f"the kernels' sources are missing from {PACKAGE}: install xshare-trtllm again")


@cache
def sources() -> dict[str, str]:
    """Every file that the kernels include, by the name that they include it by, and fixed.cu."""
    folder = source_folder()
    found = [*folder.glob("core/*.h"), *folder.glob("cuda/*.h"), *folder.glob("cuda/*.cuh")]
    files = {path.relative_to(folder).as_posix(): path for path in (*found, folder / "cuda" / "fixed.cu")}
    files |= {f"xshare/{path.name}": path for path in (folder / "include" / "xshare").glob("*.h")}
    return _C_HEADERS | {name: path.read_text(encoding="utf-8") for name, path in sorted(files.items())}


@cache
def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as missing:
        raise RuntimeError(f"cuda-python is not installed: {HOW_TO_INSTALL}") from missing
    return nvrtc


def _ask(function: str, *arguments: Any) -> Any:
    """What an NVRTC function gives. Raises RuntimeError with its error's name."""
    status, *values = getattr(_nvrtc(), function)(*arguments)
    if status != _nvrtc().nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"{function}: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


@cache
def compiler_version() -> tuple[int, int]:
    """Of NVRTC. Raises RuntimeError where there is none."""
    nvrtc = _nvrtc()
    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except Exception as missing:  # of cuda.pathfinder, whose class has changed its place
        reason = str(missing).splitlines()[0]
        raise RuntimeError(f"NVRTC is not installed: {HOW_TO_GET_NVRTC} ({reason})") from missing
    return major, minor


@cache
def find_architecture(capability: tuple[int, int]) -> str:
    """The architecture to compile for: the GPU's own, or the newest of its family that NVRTC knows.

    Raises RuntimeError for a GPU before 8.0 and for one that this NVRTC knows nothing of.
    """
    major, minor = capability
    if major < 8:
        raise RuntimeError(f"compute capability {major}.{minor}: XShare's kernels need 8.0 or newer")
    compiler = ".".join(map(str, compiler_version()))
    known = [number for number in _ask("nvrtcGetSupportedArchs") if number // 10 == major]
    fitting = [number for number in known if number % 10 <= minor]
    if not fitting:
        raise RuntimeError(
            f"NVRTC {compiler} does not know compute capability {major}.{minor}: install a newer one "
            f"(pip install -U nvidia-cuda-nvrtc{'-cu12' if compiler.startswith('12.') else ''})"
        )
    return f"sm_{max(fitting)}"


def identity(kernel: str, setting: Setting, architecture: str) -> str:
    """What tells one kernel's machine code from another's: sources, options, compiler."""
    parts = (sources(), _OPTIONS, setting.macros(kernel), architecture, compiler_version())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def compile_kernel(kernel: str, setting: Setting, architecture: str) -> tuple[bytes, str]:
    """The cubin of one kernel, and what ptxas reports of its registers.

    architecture  `sm_90` and the like, from `find_architecture`

    Raises RuntimeError with the compiler's messages.
    """
    headers = {name: text for name, text in sources().items() if name != "cuda/fixed.cu"}
    program = _ask(
        "nvrtcCreateProgram",
        sources()["cuda/fixed.cu"].encode(),
        b"fixed.cu",
        len(headers),
        [text.encode() for text in headers.values()],
        [name.encode() for name in headers],
    )
    macros = [f"-D{name}={value}" for name, value in setting.macros(kernel).items()]
    options = [option.encode() for option in (f"--gpu-architecture={architecture}", *_OPTIONS, *macros)]
    try:
        (status,) = _nvrtc().nvrtcCompileProgram(program, len(options), options)
        report = _read(program, "nvrtcGetProgramLog").decode(errors="replace").rstrip("\0")
        if status != _nvrtc().nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"the kernel {kernel} for {architecture} was not compiled: {report}")
        return _read(program, "nvrtcGetCUBIN"), report
    finally:
        _ask_nothing(program)


def _read(program: Any, function: str) -> bytes:
    text = bytes(_ask(f"{function}Size", program))
    _ask(function, program, text)
    return text


def _ask_nothing(program: Any) -> None:
    _nvrtc().nvrtcDestroyProgram(program)
