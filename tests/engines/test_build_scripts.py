"""build_scripts/{build_plugin,build_engine,quickstart}.sh: run for real where that ends in seconds.

quickstart.sh sets up an environment for minutes: `make`, the plugin's build and nvidia-smi are stand-ins that
say how they were called (contract test), or make only says what it would do."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "build_scripts"
MINE = ("build_plugin.sh", "build_engine.sh", "quickstart.sh")
RECIPE = "engines/Mixtral-8x7B.sm_80.yaml"


def run(
    script: Path, *arguments: str, path: str | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | variables | ({"PATH": path} if path else {})
    return subprocess.run(
        [str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
        cwd=ROOT,
    )


def refusal(script: str, *arguments: str, path: str | None = None, **variables: str) -> str:
    done = run(SCRIPTS / script, *arguments, path=path, **variables)
    assert done.returncode == 2, done.stdout + done.stderr
    return done.stderr


@pytest.mark.parametrize("name", MINE)
def test_scripts_parse_and_stop_at_the_first_error(name: str) -> None:
    script = SCRIPTS / name
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=10)
    assert "set -euo pipefail" in script.read_text()
    assert os.access(script, os.X_OK)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A PATH with nothing but what the scripts take for granted."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for command in ("bash", "env", "dirname", "head", "python3", "sed", "tr"):
        found = shutil.which(command)
        assert found is not None
        (folder / command).symlink_to(found)
    return folder


def test_build_plugin_says_what_is_missing(bare: Path) -> None:
    known = "sm_80 sm_86 sm_87 sm_89 sm_90 sm_100 sm_103 sm_110 sm_120 sm_121"
    for wrong in ("sm_70", "sm_90a", "edge"):
        refused = refusal("build_plugin.sh", wrong)
        assert f"unknown architecture '{wrong}': give all, or one of {known}" in refused
    assert "no cmake: pip install cmake ninja" in refusal("build_plugin.sh", path=str(bare))
    assert "no Python: set PYTHON" in refusal("build_plugin.sh", PYTHON="/nowhere/python")


def nothing_to_build() -> bool:
    build = ROOT / "build" / "plugin-default"
    if not (build / "build.ninja").is_file() or shutil.which("ninja") is None:
        return False
    dry = ["ninja", "-C", str(build), "-n", "xshare_cuda", "nvinfer_plugin_xshare"]
    return (
        "no work to do" in subprocess.run(dry, capture_output=True, text=True, timeout=30, check=False).stdout
    )


@pytest.mark.skipif(not nothing_to_build(), reason="needs a finished build_scripts/build_plugin.sh")
def test_build_plugin_again_compiles_nothing_and_installs_both() -> None:
    done = run(SCRIPTS / "build_plugin.sh", JOBS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Building" not in done.stdout
    assert "headers from" in done.stdout
    for name in ("libxshare_cuda.so", "libnvinfer_plugin_xshare.so"):
        built = (ROOT / "build" / "plugin-default" / name).read_bytes()
        assert (ROOT / "xshare_trtllm" / "lib" / name).read_bytes() == built
        assert f"{name}: {len(built)} bytes" in done.stdout


def test_build_engine_shows_a_recipe() -> None:
    done = run(SCRIPTS / "build_engine.sh", RECIPE, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "--plugin xshare" in done.stdout and "convert_checkpoint.py" in done.stdout


def test_build_engine_says_what_is_wrong() -> None:
    assert f" {RECIPE}" in refusal("build_engine.sh")
    assert "ends in .sm_80.yaml or .sm_90.yaml" in refusal("build_engine.sh", "engines/a.yaml")
    assert "engines/a.sm_80.yaml: no such file" in refusal("build_engine.sh", "engines/a.sm_80.yaml")


@pytest.mark.parametrize(
    ("capability", "calls", "last"),
    [
        (None, ["make demo"], "no GPU here"),
        ("7.5", ["make demo"], "no kernels for compute capability 7.5"),
        ("8.6", ["make .venv/ready", "xshare doctor"], "engines/Qwen3-30B-A3B.sm_80.yaml"),
        ("9.0", ["make .venv/ready", "xshare doctor"], "engines/gpt-oss-20b.sm_90.yaml"),
        ("12.0", ["make .venv/ready", "xshare doctor"], "a recipe of your own"),
    ],
)
def test_contract_quickstart_takes_the_way_that_fits(
    capability: str | None, calls: list[str], last: str, bare: Path, tmp_path: Path
) -> None:
    record = tmp_path / "calls"
    stand_in = f'#!/bin/bash\necho "${{0##*/}} $*" >>{record}\n'
    copy = tmp_path / "build_scripts"
    copy.mkdir()
    shutil.copy(SCRIPTS / "quickstart.sh", copy)
    texts = {bare / "make": stand_in, bare / "xshare": stand_in}
    if capability is not None:
        texts[bare / "nvidia-smi"] = f"#!/bin/bash\necho {capability}\n"
    for path, text in texts.items():
        path.write_text(text)
        path.chmod(0o755)
    done = run(copy / "quickstart.sh", path=str(bare))
    assert done.returncode == 0, done.stdout + done.stderr
    assert last in done.stdout
    assert record.read_text().splitlines() == calls
    for recipe in ("Qwen3-30B-A3B.sm_80", "gpt-oss-20b.sm_90"):
        assert (ROOT / "engines" / f"{recipe}.yaml").is_file()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a driver here")
def test_quickstart_without_a_gpu_is_the_demo() -> None:
    done = run(SCRIPTS / "quickstart.sh", MAKEFLAGS="n")
    assert done.returncode == 0, done.stderr
    assert ".venv/bin/xshare demo" in done.stdout
