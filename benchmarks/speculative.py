"""Speculative decoding on the shipped model: what a coverage costs and gains, beside the paper's budgets.

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
    agreement,
    greedy_decode,
    held_out,
    load_model,
    teacher_forced,
    token_batches,
    token_bytes,
)
from xshare_trtllm.evaluation.measure import Change, compare, one_thread
from xshare_trtllm.hf import Decoder, attach
from xshare_trtllm.hf.speculative import Speculation, speculative_decode
from xshare_trtllm.report import console, machine, write_aside, write_json

BATCH, DRAFT_LEN = 4, 3
LENGTH = 256  # tokens of a text for quality
PROMPT, STEPS = 128, 40  # tokens of a prompt; verification passes after it
SETTINGS = {
    **{f"coverage {c}": XShareConfig(coverage=c) for c in (0.99, 0.97, 0.95, 0.92, 0.9, 0.87)},
    **{f"budget {m}": XShareConfig(m) for m in (32, 24)},
    **{f"budget {m}, 12 per request": XShareConfig(m, request_budget=12) for m in (32, 24)},
    **{
        f"paper, {m}, 12 per request": XShareConfig(m, warmup=2, request_budget=12, utility="affinity")
        for m in (32, 24)
    },
}
TIMED = (*(f"coverage {c}" for c in (0.97, 0.95, 0.92, 0.9, 0.87)), "paper, 24, 12 per request")
PLAIN, OWN = "plain decoding", "speculation, own routing"


@dataclass(frozen=True, slots=True)
class Point:
    """Quality of one setting; the change is to the model's own routing."""

    name: str
    active_experts: float
    kept_utility: float
    bits_per_byte: float
    accuracy: float
    change: Change


@dataclass(frozen=True, slots=True)
class Speed:
    """Speed of one setting; `ratio` is to speculation with the model's own routing, paired."""

    name: str
    tokens_per_second: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    tokens_per_step: float
    acceptance: float
    active_experts: float | None
    rows: float
    agreement: float


def quality_curve(model: nn.Module, spec: RouterSpec, batches: list[Tensor], sizes: Tensor) -> list[Point]:
    """The model's own routing first, then every setting."""
    points, base = [], None
    with Progress(console=console()) as progress:
        settings = {OWN: XShareConfig.off(spec)} | SETTINGS
        for name, config in progress.track(settings.items(), description="quality, teacher-forced"):
            with attach(model, config, prefill="stepwise", step_tokens=1 + DRAFT_LEN) as attached:
                quality = teacher_forced(model, batches, sizes)
                stats = attached.stats
            base = base or quality
            points.append(
                Point(
                    name,
                    mean(layer.experts_after for layer in stats),
                    mean(layer.kept_utility for layer in stats),
                    quality.bits_per_byte,
                    quality.accuracy,
                    compare(quality, base),
                )
            )
    return points


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
    results = [_speed(PLAIN, plain_rates, own_rates)]
    for name, made in runs.items():
        rates = [run.new_tokens / run.seconds for run in made]
        equal = [_agreement(run, output) for run, output in zip(made, outputs, strict=True)]
        if name == OWN and min(equal) < 1:
            raise AssertionError("speculation with the model's own routing changed the greedy output")
        results.append(
            _speed(
                name,
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
    for kind, style in (("coverage", "ko-"), ("budget", "C0s"), ("paper", "C1^")):
        side = [point for point in points if point.name.startswith(kind)]
        x = [point.active_experts for point in side]
        y = [100 * point.change.accuracy for point in side]
        low, high = zip(*(point.change.accuracy_interval for point in side), strict=True)
        spread = [
            [value - 100 * bound for value, bound in zip(y, low, strict=True)],
            [100 * bound - value for value, bound in zip(y, high, strict=True)],
        ]
        left.errorbar(x, y, spread, fmt=style, capsize=3, markersize=4, linewidth=1, label=kind)
    for speed in speeds:
        if speed.active_experts is None or speed.name == OWN:
            continue
        y = 100 * (speed.ratio - 1)
        spread = [[y - 100 * (speed.ratio_quartiles[0] - 1)], [100 * (speed.ratio_quartiles[1] - 1) - y]]
        is_dial = speed.name.startswith("coverage")
        right.errorbar(speed.active_experts, y, spread, fmt="ko" if is_dial else "C1^", capsize=3)
        right.annotate(
            speed.name.removeprefix("coverage "), (speed.active_experts, y), xytext=(5, 5), fontsize=8,
            textcoords="offset points",
        )  # fmt: skip
    left.axhline(0, color="grey", linewidth=1)
    right.axhline(14, color="grey", linestyle="--", linewidth=1)
    left.set_ylabel("next-token accuracy, change in %")
    right.set_ylabel("tokens per second against own routing, change in %")
    left.legend(fontsize=8)
    for axis in (left, right):
        axis.set_xlabel("active experts per layer and step")
        axis.grid(alpha=0.3)
    figure.suptitle(f"Speculation of {DRAFT_LEN} tokens, batch {BATCH}, shipped model")
    with write_aside(path) as aside:
        figure.savefig(aside, dpi=120)
    pyplot.close(figure)


def print_tables(points: list[Point], speeds: list[Speed]) -> None:
    table = Table(title="Quality against own routing, 95 % intervals")
    for column in ("setting", "active experts", "bits per byte", "accuracy"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for point in points:
        bits, accuracy = point.change.bits_interval, point.change.accuracy_interval
        table.add_row(
            point.name,
            f"{point.active_experts:.1f}",
            f"{point.change.bits_per_byte:+.2%} ({bits[0]:+.2%} to {bits[1]:+.2%})",
            f"{point.change.accuracy:+.2%} ({accuracy[0]:+.2%} to {accuracy[1]:+.2%})",
        )
    console().print(table)
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
    settings = {name: SETTINGS[name] for name in TIMED}
    with one_thread():
        speeds = measure_speed(model, [tokens[:, :PROMPT] for tokens in batches], settings)
    print_tables(points, speeds)
    if arguments.json:
        report = {
            "machine": machine(),
            "batch": BATCH,
            "draft_len": DRAFT_LEN,
            "quality_tokens": len(batches) * BATCH * LENGTH,
            "quality": [asdict(point) for point in points],
            "speed": [asdict(speed) for speed in speeds],
        }
        write_json(arguments.json, report)
        plot(points, speeds, arguments.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
