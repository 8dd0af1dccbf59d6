"""`xshare calibrate`: the coverage for a model, from its own quality on the user's text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


class Percentage(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A share of 1, written as `0.5%` or `0.005`."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            share = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 < share < 1:
            self.fail(f"{value!r} must be a share above 0 and below 1, such as 0.5% or 0.005", param, ctx)
        return share


@click.command()
@click.option("--model", "folder", required=True, help="Folder of a transformers MoE model, or its name.")
@click.option(
    "--text", "texts", multiple=True, required=True, type=_FILE, help="Text, or .jsonl with `text`."
)
@click.option(
    "--batch", "batches", multiple=True, type=click.IntRange(1, 1024), default=(4, 8, 16), show_default=True,
    help="Rows of a decode step.",
)  # fmt: skip
@click.option(
    "--coverage", "coverages", multiple=True, type=click.FloatRange(0, 1, min_open=True),
    help="To try; default: 0.99 to 0.90.",
)  # fmt: skip
@click.option(
    "--max-loss", type=Percentage(), default="0.5%", show_default=True,
    help="How much the cross-entropy loss may rise, with 95 % confidence, at every batch size.",
)  # fmt: skip
@click.option(
    "--length", type=click.IntRange(8, 8192), default=256, show_default=True, help="Tokens of a piece."
)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("xshare.yaml"), show_default=True,
    help="The configuration; the numbers go beside it as .json and .png.",
)  # fmt: skip
def calibrate(
    folder: str,
    texts: tuple[Path, ...],
    batches: tuple[int, ...],
    coverages: tuple[float, ...],
    max_loss: float,
    length: int,
    out: Path,
) -> None:
    """Choose the coverage for a model by measuring it on text like that of its users.

    Every position of the text is routed as the decode step that it would be, in batches of mixed pieces, with
    the model's own routing and with each coverage. The smallest coverage whose loss stays within --max-loss
    is written; with too little text nothing is, and the exit status is 1.
    """
    try:
        points, pieces = _measure(folder, texts, batches, coverages, length)
    except (ValueError, OSError, ImportError) as error:
        raise click.ClickException(str(error)) from error
    from xshare_trtllm.evaluation.calibrate import choose, write_config, write_report
    from xshare_trtllm.report import console

    choice = choose(points, len(pieces), max_loss)
    console().print(_table(points, folder))
    json_path = out.with_suffix(".json")
    write_report(json_path, folder, pieces, points, choice, max_loss)
    click.echo(f"Written: {json_path} and {json_path.with_suffix('.png')}")
    if choice.coverage is None:
        raise click.ClickException(choice.reason)
    write_config(out, folder, pieces, points, choice.coverage)
    click.echo(f"{choice.reason}. Written: {out}")


def _measure(
    folder: str, texts: tuple[Path, ...], batches: tuple[int, ...], coverages: tuple[float, ...], length: int
) -> tuple[list[Any], Any]:
    import torch
    from rich.progress import Progress

    from xshare_trtllm.evaluation import calibrate as module
    from xshare_trtllm.report import console

    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError(f"{error}. Calibration needs: pip install 'xshare-trtllm[demo]'") from error
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = module.read_pieces(texts, tokenizer, length)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto" if torch.cuda.is_available() else torch.float32
    )
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    tried = tuple(sorted(set(coverages), reverse=True)) or module.COVERAGES
    with Progress(console=console()) as progress:
        task = progress.add_task("decode-shaped quality", total=len(batches) * (1 + len(tried)))
        points = module.calibrate(
            model, pieces, tuple(sorted(set(batches))), tried, advance=lambda: progress.advance(task)
        )
    return points, pieces


def _table(points: list[Any], model: str) -> Any:
    from rich.table import Table

    table = Table(title=model, caption="changes are relative to the model's own routing, intervals 95 %")
    for name in ("coverage", "batch", "active experts", "change", "loss", "interval", "accuracy"):
        table.add_column(name, justify="right")
    for p in points:
        low, high = p.interval
        table.add_row(
            f"{p.coverage}",
            f"{p.batch}",
            f"{p.active:.1f}",
            f"{p.active / p.own - 1:+.1%}",
            f"{p.loss:+.2%}",
            f"{low:+.2%} to {high:+.2%}",
            f"{p.accuracy:+.2%}",
        )
    return table
