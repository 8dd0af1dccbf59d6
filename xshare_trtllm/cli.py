"""The `xshare` command."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from xshare_trtllm import __version__
from xshare_trtllm.config import SCORINGS, RouterSpec, XShareConfig
from xshare_trtllm.options import xshare_options

_HF_CONFIG = "config.json of a Hugging Face model, instead of the numbers of the router."


# Commands with a home of their own, imported when asked for: `name: (module, attribute)`.
_ELSEWHERE: dict[str, tuple[str, str]] = {
    "build": ("engines.command", "build"),
    "calibrate": ("evaluation.command", "calibrate"),
    "doctor": ("doctor", "doctor"),
    "edge": ("edgellm.command", "edge"),
    "predict": ("planning.predict", "predict"),
    "triton": ("serving.command", "triton"),
    "trtllm": ("trtllm.command", "trtllm"),
}


class _Commands(click.Group):
    """The commands below and those elsewhere."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_ELSEWHERE])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _ELSEWHERE:
            return super().get_command(ctx, cmd_name)
        module, attribute = _ELSEWHERE[cmd_name]
        command: click.Command = getattr(import_module(f"xshare_trtllm.{module}"), attribute)
        return command


@click.group(cls=_Commands)
@click.version_option(__version__)
def main() -> None:
    """XShare: fewer active experts per decode step of an MoE model, without retraining."""


@main.command()
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("report.json"),
    show_default=True,
    help="Where to write the numbers; the picture goes beside it as .png.",
)
def demo(json_path: Path) -> None:
    """Run the shipped model with its own routing and with XShare, and compare.

    Decodes held-out text of seven domains in batches of 16 on this machine's CPU: active experts, quality,
    tokens per second. Takes under three minutes on two cores.
    """
    from xshare_trtllm.report import console

    try:
        from xshare_trtllm.evaluation.demo import run
    except ImportError as error:
        raise click.ClickException(f"{error}. The demo needs: pip install 'xshare-trtllm[demo]'") from error
    run(json_path, json_path.with_suffix(".png"), console())


@main.command()
@click.option(
    "--onnx",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="Where to write the model. A file that is there is replaced once the new one is complete.",
)
@click.option("--hf-config", type=click.Path(exists=True, dir_okay=False, path_type=Path), help=_HF_CONFIG)
@click.option("--experts", type=int, help="Routed experts of the layer.")
@click.option("--top-k", type=int, help="Experts per token.")
@click.option("--scoring", type=click.Choice(SCORINGS), help="What the router makes of its logits.")
@click.option("--num-groups", type=int, default=1, show_default=True, help="Expert groups of the router.")
@click.option("--top-k-groups", type=int, default=1, show_default=True, help="Groups that a token may use.")
@click.option("--scaling", type=float, default=1.0, show_default=True, help="Multiplies every expert weight.")
@xshare_options
@click.option("--layer", type=int, default=0, show_default=True, help="Which budget of a budget per layer.")
@click.option("--dtype", default="float32", show_default=True, help="Of the logits, or bfloat16 or float16.")
@click.option(
    "--request-ids", is_flag=True, help="Take request ids, -1 = padding, even without --request-budget."
)
@click.option("--exempt", is_flag=True, help="Take a mask of rows that keep their own top-k.")
@click.option(
    "--expert-gpu", is_flag=True, help="Take the GPU of each expert: --coverage then limits the fullest one."
)
@click.option(
    "--plugin-only", is_flag=True, help="Leave the body out: TensorRT before 10.15 prefers it to the plugin."
)
def export(
    path: Path,
    hf_config: Path | None,
    config: XShareConfig | None,
    layer: int,
    dtype: str,
    request_ids: bool,
    exempt: bool,
    expert_gpu: bool,
    plugin_only: bool,
    **numbers: Any,
) -> None:
    """Write one layer's routing as an ONNX model.

    Its one node, xshare::XShareRouting, has a body of standard operators that ONNX Runtime runs; a TensorRT
    with the plugin takes the plugin. The router is given by --experts, --top-k and --scoring or by
    --hf-config, what XShare may do by --coverage, --budget or --gpu-budget, or by --config.
    """
    try:
        from xshare_trtllm.graph import GraphInputs, onnx_model
    except ImportError as error:
        raise click.ClickException(f"{error}. The export needs: pip install 'xshare-trtllm[onnx]'") from error
    try:
        spec = _router(hf_config, numbers)
        if config is None:
            raise click.UsageError("give --coverage, --budget or --gpu-budget, or --config")
        config = config.for_layer(layer)
        needed = GraphInputs.needed_by(spec, config, exempt=exempt)
        inputs = replace(
            needed,
            request_ids=needed.request_ids or request_ids,
            expert_gpu=needed.expert_gpu or expert_gpu,
        )
        model = onnx_model.make_model(spec, config, inputs, dtype=dtype, body=not plugin_only)
        onnx_model.save_model(path, model)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    names = ", ".join(("router_logits", *inputs.names()))
    click.echo(f"{path}: {spec.num_experts} experts, top {spec.top_k}, {spec.scoring}; inputs {names}")


def _router(hf_config: Path | None, numbers: dict[str, Any]) -> RouterSpec:
    given = [option for option in ("experts", "top_k", "scoring") if numbers[option] is not None]
    if hf_config is not None:
        if given:
            raise click.UsageError(f"--hf-config names the router: leave --{given[0].replace('_', '-')} out")
        return RouterSpec.from_hf_config(json.loads(hf_config.read_text(encoding="utf-8")))
    if len(given) < 3:
        raise click.UsageError("give --experts, --top-k and --scoring, or --hf-config")
    groups = numbers["num_groups"], numbers["top_k_groups"]
    return RouterSpec(numbers["experts"], numbers["top_k"], numbers["scoring"], *groups, numbers["scaling"])
