"""Speculative decoding on the shipped model: what budgets for the batch, and for each request, cost and gain.

Quality is teacher-forced: four texts at a time, four positions of each as one step, as in the verification of
three right drafts. Speed is end to end: prompt-lookup drafts, verification, roll-back, greedy choice; every
setting decodes the same prompts in turn within one round, and ratios are medians of pairs.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median

import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from xshare_trtllm import RouterSpec, XShareConfig
from xshare_trtllm.evaluation import (
    Quality,
    agreement,
    greedy_decode,
    held_out,
    load_model,
    teacher_forced,
    token_batches,
    token_bytes,
)
from xshare_trtllm.evaluation.measure import one_thread
from xshare_trtllm.hf import Decoder, attach
from xshare_trtllm.hf.speculative import Speculation, speculative_decode
from xshare_trtllm.report import console, machine, write_aside, write_json

BATCH, DRAFT_LEN = 4, 3
LENGTH = 256  # tokens of a text for quality
PROMPT, STEPS = 128, 40  # tokens of a prompt; verification passes after it
BUDGETS = (16, 20, 24, 28, 32, 36, 40)
REQUEST_BUDGETS = (12, 16, 20, 24)
WARMUP = 2
PLAIN, OWN = "plain decoding", "speculation, own routing"


@dataclass(frozen=True, slots=True)
class Point:
    """Quality of one setting; changes are to the model's own routing, intervals 95 % over the texts."""

    budget: int
    request_budget: int | None
    active_experts: float
    kept_utility: float
    bits_per_byte: float
    accuracy: float
    accuracy_change: float
    accuracy_interval: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Speed:
    """Speed of one setting; `ratio` is to speculation with the model's own routing, paired."""

    name: str
    budget: int | None
    request_budget: int | None
    tokens_per_second: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    tokens_per_step: float
    acceptance: float
    active_experts: float | None
    rows: float
    agreement: float


def quality_curve(model: nn.Module, spec: RouterSpec, batches: list[Tensor], sizes: Tensor) -> list[Point]:
    """The model's own routing first, then flat and hierarchical budgets."""
    configs = [XShareConfig.off(spec)]
    for budget in BUDGETS:
        for request_budget in (None, *REQUEST_BUDGETS):
            configs.append(XShareConfig(budget, warmup=WARMUP, request_budget=request_budget))
    points, base = [], None
    with Progress(console=console()) as progress:
        for config in progress.track(configs, description="quality, teacher-forced"):
            with attach(model, config, prefill="stepwise", step_tokens=1 + DRAFT_LEN) as attached:
                quality = teacher_forced(model, batches, sizes)
                stats = attached.stats
            base = base or quality
            points.append(
                Point(
                    config.budget,
                    config.request_budget,
                    mean(layer.experts_after for layer in stats),
                    mean(layer.kept_utility for layer in stats),
                    quality.bits_per_byte,
                    quality.accuracy,
                    quality.accuracy / base.accuracy - 1,
                    interval(quality, base, batches),
                )
            )
    return points


def interval(quality: Quality, base: Quality, batches: list[Tensor]) -> tuple[float, float]:
    """95 % bootstrap interval over texts of the relative change of accuracy."""
    targets = torch.cat([tokens[:, 1:].flatten() for tokens in batches])
    hits, base_hits = (
        (side.predictions == targets).view(-1, LENGTH).float().mean(1) for side in (quality, base)
    )
    picks = torch.randint(len(hits), (2000, len(hits)), generator=torch.Generator().manual_seed(0))
    changes = hits[picks].mean(1) / base_hits[picks].mean(1) - 1
    low, high = changes.quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def measure_speed(model: nn.Module, prompts: list[Tensor], settings: dict[str, XShareConfig]) -> list[Speed]:
    """Every setting on every batch of prompts in turn, the order turned round from batch to batch."""
    decoder = Decoder(model, PROMPT + 1 + STEPS * (1 + DRAFT_LEN))
    runs: dict[str, list[Speculation]] = {name: [] for name in (OWN, *settings)}
    plain_rates, active, rows = [], {name: [] for name in runs}, {name: [] for name in runs}
    outputs: list[Tensor] = []
    speculative_decode(decoder, prompts[0], STEPS, DRAFT_LEN)  # caches warm
    with Progress(console=console()) as progress:
        for turn, batch in enumerate(progress.track(prompts, description="speed, end to end")):
            _, seconds = greedy_decode(decoder, batch, 1 + STEPS)
            plain_rates.append(BATCH * STEPS / seconds)
            outputs.append(greedy_decode(decoder, batch, 1 + STEPS * (1 + DRAFT_LEN))[0])
            for name in list(runs)[:: 1 if turn % 2 else -1]:
                config = settings.get(name)
                if config is None:
                    runs[name].append(speculative_decode(decoder, batch, STEPS, DRAFT_LEN))
                    continue
                with attach(decoder, config) as attached:
                    runs[name].append(speculative_decode(decoder, batch, STEPS, DRAFT_LEN, attached))
                    active[name].append(mean(layer.experts_after for layer in attached.stats))
                    rows[name].append(mean(layer.rows for layer in attached.stats))
                    if not active[OWN] or len(active[OWN]) <= turn:
                        active[OWN].append(mean(layer.experts_before for layer in attached.stats))
                        rows[OWN].append(rows[name][-1])
    own_rates = [run.new_tokens / run.seconds for run in runs[OWN]]
    results = [_speed(PLAIN, None, plain_rates, own_rates)]
    for name, made in runs.items():
        rates = [run.new_tokens / run.seconds for run in made]
        equal = [_agreement(run, output) for run, output in zip(made, outputs, strict=True)]
        if name == OWN and min(equal) < 1:
            raise AssertionError("speculation with the model's own routing changed the greedy output")
        results.append(
            _speed(
                name,
                settings.get(name),
                rates,
                own_rates,
                tokens_per_step=mean(run.tokens_per_step for run in made),
                acceptance=sum(run.accepted for run in made) / sum(run.drafted for run in made),
                active_experts=mean(active[name]),
                rows=mean(rows[name]),
                agreement=mean(equal),
            )
        )
    return results


def _speed(
    name: str,
    config: XShareConfig | None,
    rates: list[float],
    own_rates: list[float],
    *,
    tokens_per_step: float = 1.0,
    acceptance: float = 0.0,
    active_experts: float | None = None,
    rows: float = float(BATCH),
    agreement: float = 1.0,
) -> Speed:
    ratios = torch.tensor([rate / own for rate, own in zip(rates, own_rates, strict=True)])
    low, high = ratios.quantile(torch.tensor([0.25, 0.75])).tolist()
    return Speed(
        name,
        None if config is None else config.budget,
        None if config is None else config.request_budget,
        median(rates),
        median(ratios.tolist()),
        (low, high),
        tokens_per_step,
        acceptance,
        active_experts,
        rows,
        agreement,
    )


def _agreement(run: Speculation, plain: Tensor) -> float:
    """Mean share of each sequence before its first token that plain decoding would not have made."""
    return mean(
        agreement(torch.tensor([own]), expected[None, : len(own)])
        for own, expected in zip(run.tokens, plain, strict=True)
    )


def plot(points: list[Point], speeds: list[Speed], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), constrained_layout=True)
    for request_budget in (None, *REQUEST_BUDGETS):
        curve = [point for point in points[1:] if point.request_budget == request_budget]
        is_flat = request_budget is None
        label = "flat" if is_flat else f"{request_budget} per request"
        left.plot(
            [point.budget for point in curve],
            [100 * point.accuracy_change for point in curve],
            "k--o" if is_flat else "o-",
            label=label,
            markersize=4,
        )
    left.axhspan(
        *(100 * bound for bound in points_interval(points)), color="grey", alpha=0.15, label="95 % of flat 40"
    )
    left.set_xlabel("budget: experts per layer and step")
    left.set_ylabel("next-token accuracy, change in %")
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    with_budget = [speed for speed in speeds if speed.budget is not None]
    for is_flat, style in ((True, "ko"), (False, "C0o")):
        side = [speed for speed in with_budget if (speed.request_budget is None) == is_flat]
        x = [speed.active_experts for speed in side]
        y = [100 * (speed.ratio - 1) for speed in side]
        spread = [
            [100 * (speed.ratio - speed.ratio_quartiles[0]) for speed in side],
            [100 * (speed.ratio_quartiles[1] - speed.ratio) for speed in side],
        ]
        right.errorbar(x, y, spread, fmt=style, capsize=3, label="flat" if is_flat else "per request")
    right.axhline(14, color="grey", linestyle="--", linewidth=1)
    right.set_xlabel("active experts per layer and step")
    right.set_ylabel("tokens per second against own routing, change in %")
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    figure.suptitle(f"Speculation of {DRAFT_LEN} tokens, batch {BATCH}, shipped model")
    with write_aside(path) as aside:
        figure.savefig(aside, dpi=120)
    pyplot.close(figure)


def points_interval(points: list[Point]) -> tuple[float, float]:
    """The interval of the largest flat budget."""
    return next(p for p in points if p.budget == BUDGETS[-1] and p.request_budget is None).accuracy_interval


def print_tables(points: list[Point], speeds: list[Speed]) -> None:
    table = Table(title="Next-token accuracy against own routing; active experts in brackets")
    table.add_column("budget")
    for request_budget in (None, *REQUEST_BUDGETS):
        table.add_column(
            "flat" if request_budget is None else f"{request_budget} per request", justify="right"
        )
    for budget in BUDGETS:
        row = [point for point in points[1:] if point.budget == budget]
        table.add_row(
            str(budget), *(f"{point.accuracy_change:+.2%} ({point.active_experts:.1f})" for point in row)
        )
    console().print(table)
    low, high = points_interval(points)
    console().print(
        f"own routing: {points[0].accuracy:.2%} accurate, {points[0].active_experts:.1f} active experts; "
        f"95 % interval of flat {BUDGETS[-1]}: {low:+.2%} to {high:+.2%}"
    )
    table = Table(title="End to end")
    for column in (
        "setting",
        "tokens/s",
        "change",
        "quartiles",
        "tokens/step",
        "drafts kept",
        "experts",
        "rows",
        "agrees",
    ):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for speed in speeds:
        low, high = speed.ratio_quartiles
        table.add_row(
            speed.name,
            f"{speed.tokens_per_second:.0f}",
            f"{speed.ratio - 1:+.1%}",
            f"{low - 1:+.1%} {high - 1:+.1%}",
            f"{speed.tokens_per_step:.2f}",
            f"{speed.acceptance:.0%}",
            "" if speed.active_experts is None else f"{speed.active_experts:.1f}",
            f"{speed.rows:.1f}",
            f"{speed.agreement:.0%}",
        )
    console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write the numbers; the picture goes beside it")
    parser.add_argument("--texts", type=int, default=112, help="held-out texts to use, of 112")
    arguments = parser.parse_args()
    model, tokenizer = load_model()
    spec = RouterSpec.from_hf_config(model.config)
    batches = token_batches(held_out()[: arguments.texts], tokenizer, LENGTH, BATCH)
    points = quality_curve(model, spec, batches, token_bytes(tokenizer))
    settings = {}
    for budget in (20, 24, 28, 32):
        for request_budget in (None, 12):
            kind = "flat" if request_budget is None else f"{request_budget} per request"
            settings[f"budget {budget}, {kind}"] = XShareConfig(
                budget, warmup=WARMUP, request_budget=request_budget
            )
    with one_thread():
        speeds = measure_speed(model, [tokens[:, :PROMPT] for tokens in batches], settings)
    print_tables(points, speeds)
    if arguments.json:
        report = {
            "machine": machine(),
            "batch": BATCH,
            "draft_len": DRAFT_LEN,
            "warmup": WARMUP,
            "quality_tokens": len(batches) * BATCH * LENGTH,
            "quality": [asdict(point) for point in points],
            "speed": [asdict(speed) for speed in speeds],
        }
        write_json(arguments.json, report)
        plot(points, speeds, arguments.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
