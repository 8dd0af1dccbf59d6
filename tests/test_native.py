"""The native tests of tests/native, built with AddressSanitizer and UndefinedBehaviorSanitizer and run."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("c++") is None, reason="needs cmake and a C++ compiler"
)


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    options = ["-DXSHARE_BUILD_TESTS=ON", "-DXSHARE_SANITIZE=address,undefined", "-DCMAKE_BUILD_TYPE=Release"]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["cmake", "-S", str(ROOT / "plugins"), "-B", str(folder), *generator, *options]
    for command in (configure, ["cmake", "--build", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "native_tests"


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("seed", (1, 2, 3))
def test_fuzz(build: Path, seed: int) -> None:
    output = run(str(build / "fuzz_route"), "20000", str(seed))
    counts = {text: int(count) for count, text in re.findall(r"(\d+) (.+)", output)}
    assert counts["no error"] > 4000, output  # most of what is accepted must have been run
    for kind in ("a struct", "a parameter", "a tensor", "the workspace"):
        assert any(text.startswith(kind) for text in counts), f"never refused {kind}: {output}"


def test_fuzz_experts(build: Path) -> None:
    output = run(str(build / "fuzz_experts"), "20000", "1")
    counts = {text: int(count) for count, text in re.findall(r"(\d+) (.+)", output)}
    assert counts["no error"] > 4000, output
    for kind in ("a struct", "a parameter", "a tensor", "the workspace"):
        assert any(text.startswith(kind) for text in counts), f"never refused {kind}: {output}"


def test_header_is_plain_c(build: Path) -> None:
    assert "no error" in run(str(build / "abi_check"))


def test_instruction_sets_agree(build: Path) -> None:
    if not (build / "compare_rows").exists():
        pytest.skip("built for one instruction set only")
    output = run(str(build / "compare_rows"))
    if output.startswith("skipped"):
        pytest.skip(output)
