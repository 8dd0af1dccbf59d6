"""The plugin library on TensorRT's real plugin registry, which works without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import plugin_build
import pytest

from xshare_trtllm import __version__

HERE = Path(__file__).resolve().parent
REGISTRY_CHECKS = (
    "load_list_unload",
    "second_copy",
    "both_copies_work",
    "dlopen_only",
    "fields",
    "broken_collections",
    "tensors",
    "threads",
    "without_a_driver",
)


@pytest.fixture(scope="module")
def built() -> plugin_build.Built:
    return plugin_build.build()


def run_check(
    name: str, built: plugin_build.Built, copy: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(HERE / "registry_checks.py"),
        name,
        *map(str, (built.library, built.probe, copy)),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | environment
    )
    assert done.returncode == 0, f"{name} ended with {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", REGISTRY_CHECKS)
def test_on_the_real_registry(name: str, built: plugin_build.Built, tmp_path: Path) -> None:
    try:
        version("tensorrt-lean-cu13-bindings")
        version("tensorrt-lean-cu13-libs")
    except PackageNotFoundError as missing:
        pytest.skip(f"needs TensorRT's lean runtime: pip install {missing.name}==11.4.0.106")
    copy = tmp_path / "libnvinfer_plugin_xshare_copy.so"
    shutil.copyfile(built.library, copy)
    run_check(name, built, copy)


def test_headers_are_looked_for_in_order(built: plugin_build.Built, tmp_path: Path) -> None:
    """TENSORRT_ROOT, as a CMake variable and from the environment, comes before every other place."""
    root = tmp_path / "TensorRT"
    root.mkdir()
    (root / "include").symlink_to(built.headers)
    script = plugin_build.ROOT / "plugins" / "tensorrt" / "headers.cmake"
    plain = {name: value for name, value in os.environ.items() if name != "TENSORRT_ROOT"}
    for option, environment in (
        ([f"-DTENSORRT_ROOT={root}"], plain),
        ([], plain | {"TENSORRT_ROOT": str(root)}),
    ):
        done = subprocess.run(
            ["cmake", *option, "-P", script], capture_output=True, text=True, check=True, env=environment
        )
        assert f"headers from TENSORRT_ROOT: {root}/include" in done.stdout
    old = tmp_path / "old" / "include"
    old.mkdir(parents=True)
    (old / "NvInferRuntime.h").touch()
    (old / "NvInferVersion.h").write_text("#define NV_TENSORRT_MAJOR 8\n#define NV_TENSORRT_MINOR 6\n")
    command = ["cmake", f"-DTENSORRT_ROOT={old.parent}", "-P", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=plain)
    assert done.returncode != 0 and "TensorRT 10 or newer is needed" in done.stderr


def test_says_what_it_was_built_from(built: plugin_build.Built) -> None:
    version_lines = (built.headers / "NvInferVersion.h").read_text()
    script = (
        "import ctypes, sys; build = ctypes.CDLL(sys.argv[1]).xshare_plugin_build; "
        "build.restype = ctypes.c_char_p; print(build().decode())"
    )
    said = output(sys.executable, "-c", script, str(built.library)).strip()
    found = re.fullmatch(
        re.escape(__version__) + r", TensorRT (\d+)\.(\d+)\.(\d+) headers, code for (\d+-(?:real|virtual))",
        said,
    )
    assert found, said
    for part in found.groups()[:3]:
        assert re.search(rf"#define \w+(MAJOR|MINOR|PATCH)\w* {part}\b", version_lines)


def test_without_tensorrt(built: plugin_build.Built) -> None:
    done = run_check("without_tensorrt", built, built.library)
    assert "XShareRouting: createPlugin('layer'): top_k must be in 1..16, not 99" in done.stderr


@pytest.mark.parametrize("how", ("preloaded", "found_by_the_loader"))
def test_contract_registers_itself(how: str, built: plugin_build.Built) -> None:
    """In the TensorRT whose headers it was built with, here a stand-in, in the process before it or not."""
    preload = f"{built.fake}:{built.library}" if how == "preloaded" else str(built.library)
    done = subprocess.run(
        ["/bin/true"],
        capture_output=True,
        text=True,
        check=False,
        env={"LD_PRELOAD": preload, "LD_LIBRARY_PATH": str(built.fake.parent)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "registered XShareRouting in xshare\n", "")


def test_contract_logs_and_is_handed_over(built: plugin_build.Built) -> None:
    """Registered by preloading; getCreators, TensorRT's first call in load_library, takes that back."""
    done = run_check(
        "without_tensorrt",
        built,
        built.library,
        LD_PRELOAD=str(built.library),
        LD_LIBRARY_PATH=str(built.fake.parent),
    )
    registered, handed_over, logged = done.stdout.splitlines()
    assert registered == "registered XShareRouting in xshare" and handed_over == "deregistered"
    assert logged.startswith("logged XShareRouting: createPlugin('layer'): top_k must be in 1..16")
    assert done.stderr == ""


def test_preloading_without_tensorrt_is_silent(built: plugin_build.Built) -> None:
    environment = {"LD_PRELOAD": str(built.library), "LD_LIBRARY_PATH": "/nonexistent"}
    done = subprocess.run(["/bin/true"], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_dependencies_and_symbols(built: plugin_build.Built) -> None:
    """It needs the C library alone; it exports what TensorRT looks for, and what it was built from."""
    if shutil.which("readelf") is None or shutil.which("nm") is None:
        pytest.skip("needs readelf and nm (binutils)")
    dynamic = subprocess.run(
        ["readelf", "-d", built.library], capture_output=True, text=True, check=True
    ).stdout
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line}
    system = ("libc.", "libm.", "libdl.", "libpthread.", "librt.", "libgcc_s.", "libstdc++.", "ld-linux")
    assert all(name.startswith(system) for name in needed), needed
    symbols = output("nm", "-D", "--defined-only", str(built.library))
    exported = {line.split()[2] for line in symbols.splitlines()}
    assert exported == {"getCreators", "setLoggerFinder", "xshare_plugin_build"}


def test_engine_with_the_plugin(built: plugin_build.Built, tmp_path: Path) -> None:
    try:
        version("tensorrt")
    except PackageNotFoundError:
        pytest.skip("needs a full TensorRT to build an engine: pip install tensorrt")
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU to build and run an engine")
    for step in ("build", "run"):
        output(
            sys.executable, str(HERE / "engine_check.py"), step, str(built.library), str(tmp_path / "engine")
        )
