"""`xshare triton`: a model repository for Triton Inference Server."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Any

import click
from click.core import ParameterSource

from xshare_trtllm.config import MODES, XShareConfig
from xshare_trtllm.options import xshare_options

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_COUNT = click.IntRange(min=1)
_BACK_ENDS = ("tensorrtllm", "trtllm-torch", "cpu")
_CONTRACTS = ("llmapi", "inflight_batcher_llm")
_LENGTH = 512  # tokens of a prompt and of an answer on the CPU


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
@xshare_options
@click.option(
    "--max-batch-size", type=_COUNT, default=16, show_default=True, help="Sequences decoded together."
)
@click.option("--max-queue-size", type=int, default=128, show_default=True, help="Requests that may wait.")
@click.option("--max-input-len", type=int, help="Tokens of a prompt.  [default: the model's, cpu: 512]")
@click.option("--max-output-len", type=int, help="Tokens of an answer.  [default: the model's, cpu: 512]")
@click.option(
    "--contract",
    type=click.Choice(_CONTRACTS),
    help="Names of the text model and its inputs.  [default: llmapi; tensorrtllm: inflight_batcher_llm]",
)
@click.option("--streaming/--no-streaming", default=True, show_default=True, help="Decoupled models.")
@click.option(
    "--mode",
    type=click.Choice(MODES),
    default="on",
    show_default=True,
    help="shadow: the model's own routing, counted as XShare's would be.",
)
@click.option("--control", is_flag=True, help="Requests may turn XShare's dial (cpu, trtllm-torch).")
@click.option(
    "--ep-size", type=_COUNT, default=1, show_default=True, help="GPUs that the experts are spread over."
)
@click.option("--tp-size", type=_COUNT, default=1, show_default=True, help="GPUs of trtllm-torch.")
@click.option("--plugin", type=_FILE, help="libnvinfer_plugin_xshare.so, for tensorrtllm.")
@click.option("--recipe", type=_FILE, help="trtllm-torch: a file of engines/, for sizes, limits and options.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="A parameter of the C++ back end, or an argument of LLM by its dotted name; kept on rewriting.",
)
def triton(path: Path, engine: Path | None, backend: str, config: XShareConfig | None, **given: Any) -> None:
    """Write a Triton model repository with XShare: text in, text out, for three back ends.

    The text model and its inputs are named as in TensorRT-LLM's own examples. `bash REPO/launch.sh` starts
    the server, on this machine only.
    """
    from xshare_trtllm.serving.repository import LAUNCH, write_repository

    if engine is None:
        if backend != "cpu":
            raise click.UsageError(f"--backend {backend} needs --engine")
        from xshare_trtllm.evaluation.model import MODEL_DIR

        engine = MODEL_DIR
    try:
        repository = _repository(engine, backend, config, given)
        write_repository(repository, path)
    except (ValueError, OSError, ImportError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{path}: {', '.join(repository.models)}. Start it: bash {quote(str(path / LAUNCH))}")


def _repository(engine: Path, backend: str, config: XShareConfig | None, given: dict[str, Any]) -> Any:
    from xshare_trtllm.serving.repository import Repository

    settings = dict(_setting(text) for text in given["settings"])
    if given["recipe"] is not None:
        config = _apply_recipe(given, backend, config, settings)
    contract = "inflight_batcher_llm" if backend == "tensorrtllm" else "llmapi"
    if given["contract"] not in (None, contract) and backend == "tensorrtllm":
        raise click.UsageError(f"--contract {given['contract']}: an engine has {contract}")
    return Repository(
        back_end=backend,
        engine=engine,
        tokenizer=given["tokenizer"] or engine,
        config=config,
        limits=_limits(engine, backend, given),
        contract=given["contract"] or contract,
        settings=settings,
        **{name: given[name] for name in ("mode", "streaming", "control", "ep_size", "tp_size", "plugin")},
    )


def _limits(engine: Path, backend: str, given: dict[str, Any]) -> Any:
    """Lengths that are not given are the model's; on the CPU, where a cache is allocated for them, 512."""
    from xshare_trtllm.serving.generation import Limits
    from xshare_trtllm.serving.text import read_json

    longest = _LENGTH
    if backend == "trtllm-torch" and (engine / "config.json").is_file():
        longest = read_json(engine / "config.json").get("max_position_embeddings", _LENGTH)
    return Limits(
        given["max_batch_size"],
        given["max_queue_size"],
        given["max_input_len"] or longest,
        given["max_output_len"] or longest,
    )


def _setting(text: str) -> tuple[str, Any]:
    import yaml  # type: ignore[import-untyped,unused-ignore]

    name, equals, value = text.partition("=")
    if not name or not equals:
        raise click.UsageError(f"--set {text}: must be NAME=VALUE")
    try:
        return name, yaml.safe_load(value) if value else ""
    except yaml.YAMLError:
        raise click.UsageError(f"--set {text}: the value is not YAML") from None


def _apply_recipe(
    given: dict[str, Any], backend: str, config: XShareConfig | None, settings: dict[str, Any]
) -> XShareConfig:
    """A recipe's sizes, limits and options into `given` and `settings`, where the command names no other; the
    configuration to use."""
    from xshare_trtllm.engines.recipe import load_recipe

    recipe = load_recipe(given["recipe"])
    if backend != "trtllm-torch" or recipe.path != "pytorch":
        raise click.UsageError("--recipe: is for --backend trtllm-torch and a recipe with `path: pytorch`")
    sizes = {
        "tp_size": recipe.parallel.tensor,
        "ep_size": recipe.parallel.expert,
        "max_batch_size": recipe.limits.max_batch_size,
    }
    source_of = click.get_current_context().get_parameter_source
    given |= {name: size for name, size in sizes.items() if source_of(name) is ParameterSource.DEFAULT}
    own = {
        "pipeline_parallel_size": recipe.parallel.pipeline,
        "max_num_tokens": recipe.limits.max_num_tokens,
        "max_seq_len": recipe.limits.max_seq_len,
        **recipe.options,
    }
    for name, value in own.items():
        settings.setdefault(name, value)
    return config or recipe.config
