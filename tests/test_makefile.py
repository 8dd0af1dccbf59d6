"""What `make` does with the interpreter that it is given; the package keeps Python 3.10."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAKEFILE = ROOT / "Makefile"


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "-f", str(MAKEFILE), *arguments]
    return subprocess.run(
        command, cwd=folder, env={"PATH": "/usr/bin:/bin", **environment}, capture_output=True, text=True
    )


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_the_choice_of_an_interpreter_does_not_leak(tmp_path, by):
    print_it = r'--eval=leak: ; @echo "[$$PYTHON]"'
    if by == "argument":
        done = make(tmp_path, print_it, "leak", "PYTHON=python3.13")
    else:
        done = make(tmp_path, print_it, "leak", PYTHON="python3.13")
    assert done.stdout == "[]\n", done.stderr


def interpreter(path: Path, version: tuple[int, int, int]) -> None:
    """An executable that takes itself for another Python."""
    pretend = f"import sys; sys.version_info = {version}; exec(sys.argv[1])"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{pretend}" "$2"\n')
    path.chmod(0o755)


@pytest.mark.parametrize("where", ["old", ".venv/bin/python"])
def test_an_old_interpreter_is_refused_in_one_sentence(tmp_path, where):
    for name in ("pyproject.toml", "setup.py"):
        (tmp_path / name).touch()
    interpreter(tmp_path / where, (3, 10, 13))
    done = make(tmp_path, "demo", f"PYTHON={tmp_path / where}")
    assert done.returncode != 0
    sentence, _make = done.stderr.splitlines()
    assert sentence.startswith(
        "make demo and make test need Python 3.11 or newer (transformers does), this is 3.10"
    )
    assert not (tmp_path / ".venv" / "ready").exists()


def test_the_package_is_written_for_python_3_10():
    """Its syntax; mypy, which takes the same version from pyproject.toml, knows the standard library."""
    assert 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'python_version = "3.10"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for path in (ROOT / "xshare_trtllm").rglob("*.py"):
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10))
