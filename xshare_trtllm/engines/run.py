"""Carries steps out: a folder is made aside, renamed when it is whole, and reused while nothing changed."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xshare_trtllm.engines.steps import Step, shown
from xshare_trtllm.report import write_json

MANIFEST = "manifest.json"


class StepFailed(Exception):
    """A command ended with an error; its folder is as it was before."""


def is_current(step: Step, folder: Path) -> bool:
    """True where the folder was made from the same inputs and the files made then still have their sizes."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    inputs = json.loads(json.dumps(step.inputs))
    return bool(
        manifest.get("inputs") == inputs and manifest.get("files", {}).items() <= _sizes(folder).items()
    )


def run(steps: list[Step], output: Path, about: dict[str, Any], say: Callable[[str], None]) -> None:
    """Makes what is missing or changed below `output`, in order. Commands write to this process's terminal.

    about  what else the manifests shall say

    Raises StepFailed where a command fails and OSError where files cannot be written; no folder is ever
    half-written: it is the old one or the new one.
    """
    output.mkdir(parents=True, exist_ok=True)
    with _alone_in(output):
        for number, step in enumerate(steps, 1):
            folder = output / step.name
            heading = f"== {number}/{len(steps)} {folder}"
            if is_current(step, folder):
                say(f"{heading}: unchanged, reused")
                continue
            say(heading)
            start = time.monotonic()
            _make(step, folder, about, say)
            say(f"{heading}: made in {time.monotonic() - start:.0f} s")


def _make(step: Step, folder: Path, about: dict[str, Any], say: Callable[[str], None]) -> None:
    aside, old = (folder.with_name(f".{folder.name}.{state}") for state in ("new", "old"))
    for left_over in (aside, old):
        shutil.rmtree(left_over, ignore_errors=True)
    aside.mkdir()
    start = time.monotonic()
    try:
        step.files(aside)
        if step.command is not None:
            say(shown(step.command(folder)))
            _call(step.command(aside))
        manifest = {
            "step": step.name,
            **about,
            "inputs": step.inputs,
            "command": step.command(folder) if step.command else None,
            "seconds": round(time.monotonic() - start, 1),
            "files": _sizes(aside),
        }
        write_json(aside / MANIFEST, manifest)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
    finally:
        for left_over in (aside, old):
            shutil.rmtree(left_over, ignore_errors=True)


def _call(command: list[str]) -> None:
    sys.stdout.flush()
    try:
        code = subprocess.run(command, check=False).returncode
    except OSError as error:
        raise StepFailed(f"{command[0]} cannot be run: {error.strerror}; see: xshare doctor") from error
    if code != 0:
        raise StepFailed(f"exit code {code} of: {shown(command)}")


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


@contextmanager
def _alone_in(output: Path) -> Iterator[None]:
    """Two builds in one folder would take each other's files away."""
    with (output / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StepFailed(f"{output}: another build is under way there") from error
        yield
