"""The `xshare` command."""

from __future__ import annotations

from pathlib import Path

import click

from xshare_trtllm import __version__


@click.group()
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

    Decodes held-out text of seven domains in batches of 16 on this machine's CPU: active experts, quality, tokens per
    second. Takes under three minutes on two cores.
    """
    from rich.console import Console

    try:
        from xshare_trtllm.evaluation.demo import run
    except ImportError as error:
        raise click.ClickException(f"{error}. The demo needs: pip install 'xshare-trtllm[demo]'") from error
    run(json_path, json_path.with_suffix(".png"), Console())
