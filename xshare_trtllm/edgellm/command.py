"""`xshare edge`: XShare in a graph of TensorRT Edge-LLM, before its engine is built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from xshare_trtllm.config import UTILITIES, RouterSpec, XShareConfig

EXPORTER = "tensorrt-edgellm-export"


@click.command()
@click.option(
    "--onnx",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder with model.onnx that the exporter wrote: OUT/llm, or a draft model's.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="A new folder for the result, weights copied. Without it the graph is replaced.",
)
@click.option("--undo", is_flag=True, help="Give the original graph back.")
@click.option(
    "--direct",
    is_flag=True,
    help="Run tensorrt-edgellm-build with the arguments behind `--`, XShare in its network; no --onnx.",
)
@click.option(
    "--config",
    "config_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="YAML file instead of the options below.",
)
@click.option("--coverage", type=float, help="Share of the rows' utility that is enough, such as 0.97.")
@click.option("--budget", type=int, help="Experts that may be active in a layer.")
@click.option("--warmup", type=int, help="Experts that each row keeps whatever the batch says [1].")
@click.option("--request-budget", type=int, help="Experts that one request proposes: its draft's rows.")
@click.option("--max-rows", type=int, help="Steps with more rows than this are routed as the model does.")
@click.option("--utility", type=click.Choice(UTILITIES), help="What an expert is worth to a row.")
@click.argument("their_arguments", nargs=-1, type=click.UNPROCESSED)
def edge(
    folder: Path | None,
    out: Path | None,
    undo: bool,
    direct: bool,
    config_path: Path | None,
    their_arguments: tuple[str, ...],
    **options: Any,
) -> None:
    """Put XShare into an ONNX graph of TensorRT Edge-LLM.

    One node before every MoE plugin, with the facts about the rows taken from the graph's own inputs; prompts
    keep their own experts. Arguments behind `--` are those of tensorrt-edgellm-export, which then runs first.
    """
    try:
        if direct:
            if folder or out or undo:
                raise click.UsageError("--direct makes no graph: leave --onnx, --out and --undo out")
            return _build(_config(config_path, options), their_arguments)
        if folder is None:
            raise click.UsageError("name the folder with the graph: --onnx OUT/llm")
        if undo:
            return _undo(folder, [*their_arguments, *(["--out"] if out else [])], config_path, options)
        _rewrite(folder, _config(config_path, options), out, their_arguments)
    except ImportError as error:
        raise click.ClickException(f"{error}. It needs: pip install 'xshare-trtllm[onnx]'") from error
    except (ValueError, OSError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error


def _rewrite(folder: Path, config: XShareConfig, out: Path | None, arguments: tuple[str, ...]) -> None:
    from xshare_trtllm.edgellm.folder import rewrite_folder

    if arguments:
        _export(arguments)
    made = rewrite_folder(folder, config, out)
    for path, specs in made.items():
        click.echo(f"{path}: XShare in {len(specs)} MoE layers, {_routers(specs)}")
    click.echo("Build and run its engine with LD_PRELOAD=libnvinfer_plugin_xshare.so (docs/edge.md).")


def _undo(folder: Path, others: list[str], config_path: Path | None, options: dict[str, Any]) -> None:
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    others += [*given, *(["--config"] if config_path else [])]
    if others:
        raise click.UsageError(f"--undo takes --onnx alone: leave {others[0]} out")
    from xshare_trtllm.edgellm.folder import undo_folder

    for path in undo_folder(folder):
        click.echo(f"{path}: the original graph again")


def _build(config: XShareConfig, arguments: tuple[str, ...]) -> None:
    """Runs the direct builder in this process."""
    from importlib import import_module

    from xshare_trtllm.edgellm.builder import installed
    from xshare_trtllm.edgellm.plugin import load_creator

    trt: Any = import_module("tensorrt")
    main = import_module("experimental.builder.cli").main
    with installed(config, load_creator(trt)) as build:
        main(list(arguments))
    click.echo(f"XShare in {build.layers} MoE layers of the engine")


def _config(config_path: Path | None, options: dict[str, Any]) -> XShareConfig:
    given = {name: value for name, value in options.items() if value is not None}
    if config_path is None:
        return XShareConfig(**given)
    if given:
        raise click.UsageError(
            f"--config holds everything: leave --{next(iter(given)).replace('_', '-')} out"
        )
    return XShareConfig.from_yaml(config_path)


def _export(arguments: tuple[str, ...]) -> None:
    """Runs the exporter, of this Python's environment or of PATH. Raises ValueError where it fails."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    program = shutil.which(EXPORTER, path=path)
    if program is None:
        raise ValueError(
            f"{EXPORTER} is not there: pip install --no-deps tensorrt-edgellm onnxscript onnx-ir"
        )
    status = subprocess.run([program, *arguments], check=False).returncode
    if status != 0:
        raise ValueError(f"{EXPORTER} ended with status {status}; nothing was rewritten")


def _routers(specs: list[RouterSpec]) -> str:
    kinds = dict.fromkeys(f"{spec.num_experts} experts, top {spec.top_k}, {spec.scoring}" for spec in specs)
    return "; ".join(kinds)
