"""A real Triton server for tests and trials, from PyPI.

Run it: `python -m xshare_trtllm.serving.install_tritonserver`.

Puts tritonserver 2.51 with its Python back end (56 MB, of the package nvidia-pytriton) beside this Python,
into the folder `tritonserver` of its environment, with `tritonserver/bin/tritonserver` to start it. The
server's Python sees this environment's packages, but a numpy older than 2: its Python back end was built for
that, and with a newer one it reads garbage and sends empty outputs. In NVIDIA's containers there is a server
already.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from shlex import quote

FOLDER = Path(sys.prefix) / "tritonserver"
EXECUTABLE = FOLDER / "bin" / "tritonserver"
PACKAGES = ("nvidia-pytriton==0.7.0", "numpy<2")

_WRAPPER = """\
#!/bin/sh
export PATH={bin}:"$PATH"
export LD_LIBRARY_PATH={libraries}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}
exec {server} --backend-directory {backends} "$@"
"""


def _python_library(name: str) -> Path | None:
    """This Python as a shared library: where it is installed, or where Debian puts it."""
    folder = Path(sysconfig.get_config_var("LIBDIR"))
    found = (place / name for place in (folder, folder / (sysconfig.get_config_var("MULTIARCH") or "")))
    return next(filter(Path.exists, found), None)


def main() -> None:
    """Install it, or do it again."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if sys.version_info >= (3, 13):  # before pip builds an old numpy from source for it
        raise SystemExit(
            f"tritonserver's Python back end reads tensors wrongly with numpy 2, and {PACKAGES[1]} has no "
            f"wheel for Python {version}: use Python 3.12, or a Triton container"
        )
    library = _python_library(f"libpython{version}.so.1.0")
    if library is None:
        raise SystemExit(
            f"libpython{version}.so.1.0 is not there, and the server's Python back end needs it; on Debian: "
            f"apt-get install libpython{version}"
        )
    venv.create(FOLDER, with_pip=False, clear=True, symlinks=True)
    python = FOLDER / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", *PACKAGES], check=True)
    site = FOLDER / "lib" / f"python{version}" / "site-packages"
    parents = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (site / "parent_environment.pth").write_text(parents, encoding="utf-8")
    server = site / "pytriton" / "tritonserver"
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise SystemExit(f"{PACKAGES[0]} has no Python back end for Python {version}")
    shutil.copy2(stub, server / "backends" / "python")
    libraries = f"{site / 'nvidia_pytriton.libs'}:{library.parent}"
    text = _WRAPPER.format(
        bin=quote(str(FOLDER / "bin")),
        libraries=quote(libraries),
        server=quote(str(server / "bin" / "tritonserver")),
        backends=quote(str(server / "backends")),
    )
    EXECUTABLE.write_text(text, encoding="utf-8")
    EXECUTABLE.chmod(0o755)
    print(f"Installed: {EXECUTABLE}")


if __name__ == "__main__":
    main()
