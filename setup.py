"""Builds plugins/ into xshare_trtllm/lib/libxshare.so with CMake. Everything else is in pyproject.toml.

The library is no Python extension (it is called through ctypes): one wheel serves every Python of a platform.
Without a compiler the package installs all the same and routes with its reference. XSHARE_CUDA=1 asks for
libxshare_cuda.so as well, which needs nvcc.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
WITH_CUDA = os.environ.get("XSHARE_CUDA", "") not in ("", "0")
CUDA_LIBRARY = "libxshare_cuda.so"


class BuildLibrary(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "libxshare"
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        try:
            options = [*generator, f"-DXSHARE_CUDA={'ON' if WITH_CUDA else 'OFF'}"]
            subprocess.run(["cmake", "-S", str(ROOT / "plugins"), "-B", str(build), *options], check=True)
            subprocess.run(["cmake", "--build", str(build)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(
                f"libxshare.so was not built, routing will use the slow reference: {error}"
            ) from error
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(build / target.name, target)
        if not WITH_CUDA:
            return
        if not (build / CUDA_LIBRARY).exists():
            raise CompileError(f"XSHARE_CUDA is set, but {CUDA_LIBRARY} was not built: is there an nvcc?")
        shutil.copyfile(build / CUDA_LIBRARY, target.with_name(CUDA_LIBRARY))

    def copy_extensions_to_source(self) -> None:
        source = ROOT / "xshare_trtllm" / "lib"
        source.mkdir(exist_ok=True)  # an editable install runs from the source tree
        super().copy_extensions_to_source()
        built = Path(self.build_lib, "xshare_trtllm", "lib", CUDA_LIBRARY)
        if WITH_CUDA and built.exists():
            shutil.copyfile(built, source / CUDA_LIBRARY)


class BuildPython(build_py):
    """Also puts the line into site-packages that takes XShare into TensorRT-LLM's worker processes, and the
    kernels' and the plugin's sources into the package."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        hook = runpy.run_path(str(ROOT / "xshare_trtllm" / "trtllm" / "startup.py"))
        Path(self.build_lib, hook["HOOK_FILE"]).write_text(hook["HOOK_LINE"])
        package = Path(self.build_lib, "xshare_trtllm", "plugins")
        shutil.copytree(ROOT / "plugins", package, dirs_exist_ok=True)


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("xshare_trtllm.lib.libxshare", sources=[], optional=True)],
    cmdclass={"build_ext": BuildLibrary, "build_py": BuildPython, "bdist_wheel": PlatformWheel},
)
