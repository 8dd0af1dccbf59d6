"""Draft trees on the shipped model: what verifying 8 to 60 rows per request costs, and a coverage takes off.

    python benchmarks/speculative_trees.py [--json PATH]      (about 10 minutes on 2 cores)

Trees come from what followed the last tokens in the prompts and in the other held-out texts, and have a
fixed size, as in an engine; no draft model is shipped, so they accept less than one would. Every setting
decodes the same prompts in turn within one round, the order turned from round to round; ratios are medians of
pairs. Seconds are of the processor, not of the clock.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import mean, median

import click
import torch
from rich.progress import track
from rich.table import Table
from torch import nn

from xshare_trtllm import XShareConfig
from xshare_trtllm.evaluation import agreement, held_out, load_model, token_batches
from xshare_trtllm.evaluation.measure import one_thread
from xshare_trtllm.hf import Decoder, attach
from xshare_trtllm.hf.speculative import Speculation
from xshare_trtllm.hf.trees import NgramTrees, tree_decode
from xshare_trtllm.planning.cost import GPUS, Predictor
from xshare_trtllm.planning.shapes import shape
from xshare_trtllm.planning.speculation import Draft, SpeculativePredictor
from xshare_trtllm.report import console, machine, write_aside, write_json

SIZES = (1, 8, 16, 32, 60)  # rows per request; 1 is plain decoding
BATCHES = (1, 4)
COVERAGES = (None, 0.97, 0.95, 0.9)
PROMPT, STEPS, LENGTH = 96, 24, 256
# Of 32 rows between its neighbours.
ACCEPTED = {8: Draft(8, 2.2, 3), 16: Draft(16, 2.52, 7), 32: Draft(32, 2.9, 8), 60: Draft(60, 3.2, 8)}


@dataclass(frozen=True, slots=True)
class Point:
    """One setting. speedup: tokens per second over those of plain decoding with the model's own routing, of
    the same prompts. agreement: share of a sequence before its first token that the own routing would not
    make. Experts are per layer and step."""

    batch: int
    rows_per_request: int
    coverage: float | None
    tokens_per_second: float
    speedup: float
    tokens_per_step: float
    experts_before: float
    experts_after: float
    agreement: float


def measure(model: nn.Module, texts: list[list[int]], batch: int, rounds: int) -> list[Point]:
    """All sizes and coverages, on `rounds` times `batch` texts."""
    decoder = Decoder(model, PROMPT + STEPS * max(SIZES) + 1)
    settings = [(size, coverage) for size in SIZES for coverage in COVERAGES]
    runs: dict[tuple[int, float | None], list[Speculation]] = {setting: [] for setting in settings}
    experts: dict[tuple[int, float | None], list[tuple[float, float]]] = {each: [] for each in settings}
    for number in track(range(rounds), description=f"batch {batch}", console=console()):
        mine = slice(number * batch, (number + 1) * batch)
        prompts = torch.tensor([text[:PROMPT] for text in texts[mine]])
        drafts = NgramTrees([*texts[: mine.start], *texts[mine.stop :], *prompts.tolist()])
        for size, coverage in settings[:: 1 if number % 2 else -1]:
            if coverage is None:
                runs[size, None].append(tree_decode(decoder, prompts, STEPS, drafts, size))
                continue
            with attach(decoder, XShareConfig(coverage=coverage)) as attached:
                runs[size, coverage].append(tree_decode(decoder, prompts, STEPS, drafts, size, attached))
                before, after = (
                    mean(getattr(layer, name) for layer in attached.stats)
                    for name in ("experts_before", "experts_after")
                )
            experts[size, coverage].append((before, after))
    return [_point(batch, setting, runs, experts) for setting in settings]


def _point(
    batch: int,
    setting: tuple[int, float | None],
    runs: dict[tuple[int, float | None], list[Speculation]],
    experts: dict[tuple[int, float | None], list[tuple[float, float]]],
) -> Point:
    size, coverage = setting
    made, plain, own = runs[setting], runs[1, None], runs[size, None]
    rates, plain_rates = ([run.new_tokens / run.seconds for run in each] for each in (made, plain))
    counted = experts[size, coverage or COVERAGES[1]]
    before = mean(pair[0] for pair in counted)
    return Point(
        batch,
        size,
        coverage,
        median(rates),
        median(rate / other for rate, other in zip(rates, plain_rates, strict=True)),
        mean(run.tokens_per_step for run in made),
        before,
        before if coverage is None else mean(pair[1] for pair in counted),
        mean(_agreement(a, b) for a, b in zip(made, own, strict=True)),
    )


def _agreement(run: Speculation, own: Speculation) -> float:
    """With the model's own routing a tree of any size decodes the same tokens, if not as many."""
    shares = []
    for a, b in zip(run.tokens, own.tokens, strict=True):
        length = min(len(a), len(b))
        shares.append(agreement(torch.tensor([a[:length]]), torch.tensor([b[:length]])))
    return mean(shares)


def print_table(points: list[Point]) -> None:
    table = Table(title=f"Draft trees on the shipped model, {STEPS} steps behind prompts of {PROMPT} tokens")
    for name in (
        "batch",
        "rows per\nrequest",
        "coverage",
        "experts",
        "tokens/\nstep",
        "tokens/s",
        "speed-up",
        "agrees",
    ):
        table.add_column(name, justify="right")
    for point in points:
        saved = point.experts_after / point.experts_before - 1
        table.add_row(
            str(point.batch),
            str(point.rows_per_request),
            "" if point.coverage is None else f"{point.coverage}",
            f"{point.experts_after:.1f}" + ("" if point.coverage is None else f" ({saved:+.0%})"),
            f"{point.tokens_per_step:.2f}",
            f"{point.tokens_per_second:.0f}",
            f"{point.speedup:.2f}",
            f"{point.agreement:.0%}",
        )
    console().print(table)


def plot(points: list[Point], path: Path) -> None:
    """Above what was measured; below what `xshare predict` makes of trees on an edge machine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(BATCHES), figsize=(10, 7.5), constrained_layout=True, sharex=True)
    for column, batch in enumerate(BATCHES):
        above, below = axes[0, column], axes[1, column]
        for coverage in COVERAGES:
            curve = [p for p in points if (p.batch, p.coverage) == (batch, coverage)]
            label = "own routing" if coverage is None else f"coverage {coverage}"
            style = {"color": "black", "linestyle": "--"} if coverage is None else {}
            x = [p.rows_per_request for p in curve]
            above.plot(x, [p.experts_after for p in curve], marker="o", markersize=4, label=label, **style)
            y = [1.0, *(predicted(batch, size, coverage) for size in SIZES[1:])]
            below.plot(SIZES, y, marker="o", markersize=4, label=label, **style)
        above.set_title(f"{batch} request{'s' if batch > 1 else ''}")
        below.axhline(1, color="grey", linewidth=1)
        below.set_xlabel("verified rows per request (1 = plain decoding)")
    axes[0, 0].set_ylabel("measured: active experts of 64\nper layer, shipped model")
    axes[1, 0].set_ylabel("predicted: tokens per second over plain\nQwen3-30B-A3B in bf16, Jetson AGX Thor")
    axes[0, 0].legend(fontsize=8)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    with write_aside(path) as aside:
        figure.savefig(aside, dpi=120)
    pyplot.close(figure)


def predicted(batch: int, size: int, coverage: float | None) -> float:
    """Speed-up with the tokens accepted per step that SpecForge issue 339 reports for such trees."""
    step = _thor().at(batch, ACCEPTED[size], XShareConfig(coverage=coverage or COVERAGES[1]))
    return step.own_speedup if coverage is None else step.shared_speedup


@cache
def _thor() -> SpeculativePredictor:
    return SpeculativePredictor(Predictor(shape("qwen3-30b-a3b"), GPUS["thor"]))


@click.command()
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Where to write.")
@click.option("--rounds", default=6, show_default=True, help="Of every setting, each on other texts.")
def main(json_path: Path | None, rounds: int) -> None:
    """Measure trees of 8, 16, 32 and 60 rows."""
    model, tokenizer = load_model()
    batches = token_batches(held_out(), tokenizer, LENGTH, 1)
    texts = [tokens[0].tolist() for tokens in batches]
    points = []
    with one_thread():
        for batch in BATCHES:
            points += measure(model, texts, batch, rounds)
    print_table(points)
    if json_path:
        report = {
            "machine": machine(),
            "steps": STEPS,
            "prompt": PROMPT,
            "points": [asdict(p) for p in points],
        }
        write_json(json_path, report)
        plot(points, json_path.with_suffix(".png"))


if __name__ == "__main__":
    main()
