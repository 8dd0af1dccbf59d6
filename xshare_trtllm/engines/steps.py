"""A recipe's steps: which folders are made, from what, by which commands."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xshare_trtllm.engines import environment
from xshare_trtllm.engines.recipe import Recipe
from xshare_trtllm.trtllm.build_command import find_build_command
from xshare_trtllm.trtllm.startup import VARIABLE

CONFIG = "xshare.yaml"
OPTIONS = "options.yaml"
HASHED_WHOLE = 1 << 20
Options = dict[str, str | int | bool]
_VERSIONED = ("xshare-trtllm", "tensorrt-llm", "tensorrt", "torch", "transformers")


@dataclass(frozen=True)
class Step:
    """One folder below the output folder.

    name      of the folder
    inputs    everything that decides what is in it, as JSON: the folder is reused while they are the same
    files     writes what the command reads into the folder
    command   makes the rest of it, given the folder; None: the files are all
    """

    name: str
    inputs: dict[str, Any]
    files: Callable[[Path], None] = field(default=lambda folder: None)
    command: Callable[[Path], list[str]] | None = None


def plan(recipe: Recipe, checkpoint: str, output: Path) -> list[Step]:
    """The steps of a recipe, in order.

    checkpoint  folder of the Hugging Face checkpoint; its id will do for path pytorch, and to show commands
    """
    if recipe.path == "pytorch":
        return [_options_step(recipe, checkpoint, output)]
    return [_convert_step(recipe, checkpoint), _build_step(recipe, checkpoint, output)]


def serve_command(recipe: Recipe, checkpoint: str, output: Path) -> list[str]:
    """What serves the finished folder. An engine needs the plugin in the process before it is loaded."""
    if recipe.path == "engine":
        preload = f"LD_PRELOAD={environment.find_library(environment.PLUGIN) or environment.PLUGIN}"
        options: Options = {"backend": "tensorrt", "tokenizer": checkpoint}
        return ["env", preload, "trtllm-serve", str(output / "engine"), *as_arguments(options)]
    limits, parallel, hardware = recipe.limits, recipe.parallel, recipe.hardware
    folder = (output / "serve").resolve()
    options = {
        "backend": "pytorch",
        "tp_size": parallel.tensor,
        "pp_size": parallel.pipeline,
        "ep_size": parallel.expert,
        **limits.model_dump(),
        "extra_llm_api_options": str(folder / OPTIONS),
    }
    config = str(folder / CONFIG)
    command = ["xshare", "trtllm", "--config", config, "trtllm-serve", checkpoint, *as_arguments(options)]
    if hardware.gpus <= hardware.per_node:
        return command
    tasks: Options = {"ntasks": hardware.gpus, "ntasks-per-node": hardware.per_node, "mpi": "pmix"}
    launch = ["srun", *as_arguments(tasks), "trtllm-llmapi-launch"]
    return ["env", f"{VARIABLE}={config}", *launch, *command]


def as_arguments(options: Options) -> list[str]:
    """`--name value` for each option, `--name` alone for True, nothing for False."""
    arguments = []
    for name, value in options.items():
        if value is not False:
            arguments += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return arguments


def shown(command: list[str]) -> str:
    """A command line as it is typed, an option per line."""
    words = [shlex.quote(word) for word in command]
    return " ".join(f"\\\n    {word}" if word.startswith("--") else word for word in words)


def digest(value: object) -> str:
    """SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def fingerprint(folder: Path) -> dict[str, str]:
    """What is in a checkpoint, by file: SHA-256 below 1 MiB, else size and time of modification, since nobody
    wants to read hundreds of gigabytes to learn that they are the same."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): _fingerprint(path) for path in files}


def _fingerprint(path: Path) -> str:
    status = path.stat()
    if status.st_size < HASHED_WHOLE:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{status.st_size} bytes, {status.st_mtime_ns} ns"


def _checkpoint_inputs(checkpoint: str) -> dict[str, Any]:
    folder = Path(checkpoint)
    return {"checkpoint": str(checkpoint), "files": fingerprint(folder) if folder.is_dir() else None}


# ---- PyTorch backend --------------------------------------------------------------------------------------


def _options_step(recipe: Recipe, checkpoint: str, output: Path) -> Step:
    inputs = {
        "versions": environment.versions(_VERSIONED),
        "xshare": recipe.config.to_dict(),
        "options": recipe.options,
        "serve": serve_command(recipe, checkpoint, output),
    }
    return Step("serve", inputs, lambda folder: _write_options(recipe, folder))


def _write_options(recipe: Recipe, folder: Path) -> None:
    """options.yaml for TensorRT-LLM, xshare.yaml for XShare."""
    import yaml  # type: ignore[import-untyped,unused-ignore]

    options = yaml.safe_dump(recipe.options, sort_keys=False)
    (folder / OPTIONS).write_text(options, encoding="utf-8")
    _write_config(recipe, folder)


# ---- Engine path ------------------------------------------------------------------------------------------


def _convert_step(recipe: Recipe, checkpoint: str) -> Step:
    assert recipe.convert is not None
    script = _script(recipe.convert.script)
    parallel = recipe.parallel
    sizes: Options = {"tp_size": parallel.tensor, "pp_size": parallel.pipeline}
    if parallel.expert > 1:  # quantize.py has no such options
        sizes |= {"moe_tp_size": parallel.tensor // parallel.expert, "moe_ep_size": parallel.expert}
    arguments = as_arguments(recipe.convert.options | sizes)

    def command(folder: Path) -> list[str]:
        return [
            *(sys.executable, str(script), "--model_dir", checkpoint, "--output_dir", str(folder)),
            *arguments,
        ]

    inputs = _checkpoint_inputs(checkpoint) | {
        "versions": environment.versions(_VERSIONED[1:]),
        "script": {"path": str(script), "sha256": _fingerprint(script) if script.is_file() else None},
        "arguments": arguments,
    }
    return Step("checkpoint", inputs, command=command)


def _build_step(recipe: Recipe, checkpoint: str, output: Path) -> Step:
    arguments = as_arguments(recipe.limits.model_dump() | recipe.build)
    _, is_ours = find_build_command()
    start = ["trtllm-build"] if is_ours else [sys.executable, "-m", environment.BUILD_MODULE]
    plugin = environment.find_library(environment.PLUGIN)

    def command(folder: Path) -> list[str]:
        return [
            *(*start, "--plugin", "xshare", "--xshare_config", str(folder / CONFIG)),
            *("--checkpoint_dir", str(output / "checkpoint"), "--output_dir", str(folder)),
            *arguments,
        ]

    inputs = {
        "checkpoint": digest(_convert_step(recipe, checkpoint).inputs),
        "versions": environment.versions(_VERSIONED),
        "plugin": {"path": str(plugin), "file": _fingerprint_whole(plugin)},
        "xshare": recipe.config.to_dict(),
        "arguments": arguments,
    }
    return Step("engine", inputs, lambda folder: _write_config(recipe, folder), command)


def _write_config(recipe: Recipe, folder: Path) -> None:
    recipe.config.to_yaml(folder / CONFIG)


def _fingerprint_whole(path: Path | None) -> str | None:
    if path is None or not path.is_file():
        return None
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _script(name: str) -> Path:
    root = environment.find_trtllm_examples()
    return (root or Path("TensorRT-LLM")) / name
