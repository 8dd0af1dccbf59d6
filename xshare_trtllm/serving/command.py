"""`xshare triton`: a model repository for Triton Inference Server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_BACK_ENDS = ("tensorrtllm", "trtllm-torch", "cpu")


@click.command()
@click.option(
    "--repo",
    "path",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="The folder to write. One that this command wrote is replaced once the new one is complete.",
)
@click.option(
    "--engine",
    type=_FOLDER,
    help="tensorrtllm: engine folder; trtllm-torch: the model's folder; cpu: the shipped model, if left out.",
)
@click.option("--backend", type=click.Choice(_BACK_ENDS), default="cpu", show_default=True)
@click.option("--tokenizer", type=_FOLDER, help="Folder with tokenizer.json, where --engine has none.")
@click.option("--config", "config_path", type=_FILE, help="YAML file with XShare's budget and its options.")
@click.option("--budget", type=int, help="Experts that may be active, instead of --config.")
@click.option("--warmup", type=int, default=1, show_default=True, help="Experts that each token keeps.")
@click.option("--max-batch-size", type=int, default=16, show_default=True, help="Sequences decoded together.")
@click.option("--max-queue-size", type=int, default=128, show_default=True, help="Requests that may wait.")
@click.option("--max-input-len", type=int, default=512, show_default=True, help="Tokens of a prompt.")
@click.option("--max-output-len", type=int, default=512, show_default=True, help="Tokens of an answer.")
@click.option("--streaming/--no-streaming", default=True, show_default=True, help="Decoupled models.")
@click.option(
    "--ep-size", type=int, default=1, show_default=True, help="GPUs that the experts are spread over."
)
@click.option("--tp-size", type=int, default=1, show_default=True, help="GPUs of trtllm-torch.")
@click.option("--plugin", type=_FILE, help="libnvinfer_plugin_xshare.so, for tensorrtllm.")
def triton(
    path: Path,
    engine: Path | None,
    backend: str,
    tokenizer: Path | None,
    config_path: Path | None,
    budget: int | None,
    warmup: int,
    streaming: bool,
    ep_size: int,
    tp_size: int,
    plugin: Path | None,
    **limits: Any,
) -> None:
    """Write a Triton model repository with XShare: text in, text out, for three back ends.

    The models and their inputs are named as in TensorRT-LLM's own examples. `bash REPO/launch.sh` starts the
    server, on this machine only.
    """
    from xshare_trtllm.config import XShareConfig
    from xshare_trtllm.serving.generation import Limits
    from xshare_trtllm.serving.repository import LAUNCH, MODELS, Repository, write_repository

    if config_path is not None and budget is not None:
        raise click.UsageError("--config names the budget: leave --budget out")
    if engine is None:
        if backend != "cpu":
            raise click.UsageError(f"--backend {backend} needs --engine")
        from xshare_trtllm.evaluation.model import MODEL_DIR

        engine = MODEL_DIR
    try:
        config = XShareConfig.from_yaml(config_path) if config_path else None
        if budget is not None:
            config = XShareConfig(budget, warmup)
        repository = Repository(
            backend,
            engine,
            tokenizer or engine,
            config,
            Limits(**limits),
            streaming,
            ep_size,
            tp_size,
            plugin,
        )
        write_repository(repository, path)
    except (ValueError, OSError, ImportError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{path}: {', '.join(MODELS)}. Start it: bash {path / LAUNCH}")
