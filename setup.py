"""Builds plugins/ into xshare_trtllm/lib/libxshare.so with CMake. Everything else is in pyproject.toml.

The library is no Python extension (it is called through ctypes): one wheel serves every Python of a platform.
Without a compiler the package installs all the same and routes with its reference.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


class BuildLibrary(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "libxshare"
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        try:
            subprocess.run(["cmake", "-S", str(ROOT / "plugins"), "-B", str(build), *generator], check=True)
            subprocess.run(["cmake", "--build", str(build)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(
                f"libxshare.so was not built, routing will use the slow reference: {error}"
            ) from error
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(build / target.name, target)

    def copy_extensions_to_source(self) -> None:
        (ROOT / "xshare_trtllm" / "lib").mkdir(exist_ok=True)  # an editable install runs from the source tree
        super().copy_extensions_to_source()


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("xshare_trtllm.lib.libxshare", sources=[], optional=True)],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
