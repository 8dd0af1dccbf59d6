"""The main job: the shipped model with its own routing and with XShare, side by side."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from xshare_trtllm.config import RouterSpec, XShareConfig
from xshare_trtllm.evaluation.measure import (
    Quality,
    agreement,
    greedy_decode,
    one_thread,
    teacher_forced,
)
from xshare_trtllm.evaluation.model import MODEL_DIR, held_out, load_model, token_batches, token_bytes
from xshare_trtllm.hf.attach import attach
from xshare_trtllm.hf.decoder import Decoder
from xshare_trtllm.report import machine, write_aside, write_json
from xshare_trtllm.routing import contiguous_placement

BATCH = 16
LENGTH = 256  # tokens of a document on which quality is measured
PROMPT, STEPS = 32, 40  # tokens of a prompt, and tokens decoded after it
ROUNDS = 2  # how often every batch is decoded
GPUS = 8  # simulated: each holds a contiguous slice of the experts

SETTINGS: dict[str, XShareConfig | None] = {
    "own routing": None,
    "coverage 0.99": XShareConfig(coverage=0.99),
    "coverage 0.97": XShareConfig(coverage=0.97),
    "coverage 0.95": XShareConfig(coverage=0.95),
    "coverage 0.90": XShareConfig(coverage=0.9),
    "budget 32": XShareConfig(32),
    "4 per GPU": XShareConfig(gpu_budget=4),
    "budget 32, paper's rule": XShareConfig(32, utility="affinity"),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One setting's line of the table; ratios are to the first setting, the model's own routing.

    peak_gpu_experts is None for a coverage: it is measured on one GPU, and would set the cap of several.
    """

    name: str
    config: dict[str, Any]
    active_experts: float
    active_ratio: float
    bits_per_byte: float
    accuracy: float
    accuracy_ratio: float
    greedy_agreement: float
    tokens_per_second: float
    tokens_per_second_ratio: float
    peak_gpu_experts: float | None
    kept_utility: float
    warmup_overflow: float


def run(json_path: Path, png_path: Path, console: Console) -> dict[str, Any]:
    """Measure every setting, print the table, write the report and its picture; returns the report."""
    model, tokenizer = load_model()
    spec = RouterSpec.from_hf_config(model.config)
    batches = token_batches(held_out(), tokenizer, LENGTH, BATCH)
    layers = model.config.num_hidden_layers
    console.print(
        f"{MODEL_DIR.name}: {layers} MoE layers of {spec.num_experts} experts, top-{spec.top_k}. "
        f"Held-out text of 7 domains, batches of {BATCH} rows; speed on one thread."
    )
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    expert_gpu = contiguous_placement(spec.num_experts, GPUS)
    with Progress(*columns, console=console) as progress:
        quality = _measure_quality(model, spec, expert_gpu, batches, token_bytes(tokenizer), progress)
        with one_thread():
            speed = _measure_speed(Decoder(model, PROMPT + STEPS), expert_gpu, batches, progress)
    rows = _rows(spec, quality, speed)
    report = {
        "model": MODEL_DIR.name,
        "batch": BATCH,
        "quality_tokens": BATCH * LENGTH * len(batches),
        "decoded_tokens": BATCH * STEPS * len(batches) * ROUNDS,
        "simulated_gpus": GPUS,
        "machine": machine(),
        "settings": [{name: getattr(row, name) for name in Row.__slots__} for row in rows],
    }
    console.print(_table(rows))
    write_json(json_path, report)
    plot(report, png_path)
    console.print(f"Written: {json_path} and {png_path}")
    return report


def _measure_quality(
    model: nn.Module,
    spec: RouterSpec,
    expert_gpu: Tensor,
    batches: list[Tensor],
    sizes: Tensor,
    progress: Progress,
) -> dict[str, tuple[Quality, dict[str, float]]]:
    """Teacher-forced quality in decode-shaped batches, and the routing statistics as means over layers."""
    task = progress.add_task("quality, teacher-forced", total=len(SETTINGS))
    results = {}
    for name, config in SETTINGS.items():
        config = config or XShareConfig.off(spec)
        with attach(model, config, prefill="stepwise", expert_gpu=_placed(config, expert_gpu)) as attached:
            quality = teacher_forced(model, batches, sizes)
            stats = attached.stats
        fields = ("experts_after", "peak_gpu_after", "kept_utility", "warmup_overflow")
        results[name] = quality, {field: mean(getattr(layer, field) for layer in stats) for field in fields}
        progress.advance(task)
    return results


def _placed(config: XShareConfig, expert_gpu: Tensor) -> Tensor | None:
    """The experts' GPUs, but for a coverage: there they would not be counted only, but set the cap."""
    return None if config.coverage is not None else expert_gpu


def _measure_speed(
    model: nn.Module, expert_gpu: Tensor, batches: list[Tensor], progress: Progress
) -> dict[str, tuple[list[Tensor], list[float]]]:
    """Greedy output and seconds of each batch; a batch runs through all settings before the next, so that the
    seconds of two settings are pairs."""
    task = progress.add_task("speed, greedy decoding", total=len(SETTINGS) * len(batches) * ROUNDS)
    results: dict[str, tuple[list[Tensor], list[float]]] = {name: ([], []) for name in SETTINGS}
    greedy_decode(model, batches[0][:, :PROMPT], STEPS)  # warm-up
    order = list(SETTINGS)
    for tokens in batches * ROUNDS:
        for name in order:
            config = SETTINGS[name]
            with attach(model, config, expert_gpu=_placed(config, expert_gpu)) if config else nullcontext():
                output, seconds = greedy_decode(model, tokens[:, :PROMPT], STEPS)
            results[name][0].append(output)
            results[name][1].append(seconds)
            progress.advance(task)
        order.append(order.pop(0))  # nobody is always first
    return results


def _rows(
    spec: RouterSpec,
    quality: dict[str, tuple[Quality, dict[str, float]]],
    speed: dict[str, tuple[list[Tensor], list[float]]],
) -> list[Row]:
    first = next(iter(SETTINGS))
    base_quality, base_stats = quality[first]
    base_output, base_seconds = speed[first]
    rows = []
    for name, config in SETTINGS.items():
        measured, stats = quality[name]
        output, seconds = speed[name]
        equal = [agreement(mine, theirs) for mine, theirs in zip(output, base_output, strict=True)]
        gains = [theirs / mine for mine, theirs in zip(seconds, base_seconds, strict=True)]
        row = Row(
            name=name,
            config=(config or XShareConfig.off(spec)).to_dict(),
            active_experts=stats["experts_after"],
            active_ratio=stats["experts_after"] / base_stats["experts_after"],
            bits_per_byte=measured.bits_per_byte,
            accuracy=measured.accuracy,
            accuracy_ratio=measured.accuracy / base_quality.accuracy,
            greedy_agreement=mean(equal),
            tokens_per_second=BATCH * (STEPS - 1) / median(seconds),
            tokens_per_second_ratio=median(gains),
            peak_gpu_experts=None if config and config.coverage else stats["peak_gpu_after"],
            kept_utility=stats["kept_utility"],
            warmup_overflow=stats["warmup_overflow"],
        )
        rows.append(row)
    return rows


def _table(rows: list[Row]) -> Table:
    table = Table(
        title="What XShare saves, costs and gains", caption="changes are relative to the model's own routing"
    )
    table.add_column("setting")
    columns = (
        "active experts\nper layer",
        "change",
        "bits\nper byte",
        "next-token\naccuracy",
        "change",
        "greedy output\nagrees",
        "tokens/s",
        "change",
        f"peak experts per\nGPU ({GPUS} simulated)",
    )
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.active_experts:.1f}",
            f"{row.active_ratio - 1:+.1%}",
            f"{row.bits_per_byte:.4f}",
            f"{row.accuracy:.2%}",
            f"{row.accuracy_ratio - 1:+.2%}",
            f"{row.greedy_agreement:.0%}",
            f"{row.tokens_per_second:.0f}",
            f"{row.tokens_per_second_ratio - 1:+.1%}",
            "" if row.peak_gpu_experts is None else f"{row.peak_gpu_experts:.2f}",
        )
    return table


def plot(report: dict[str, Any], path: Path) -> None:
    """The trade-off as a picture: accuracy and speed against the active experts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = report["settings"]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2), constrained_layout=True)
    panels = (
        ("accuracy_ratio", "next-token accuracy, change in %", "tab:blue"),
        ("tokens_per_second_ratio", "output tokens per second, change in %", "tab:green"),
    )
    for axis, (field, title, colour) in zip(axes, panels, strict=True):
        dial = [row for row in settings if "coverage" in row["name"] or row is settings[0]]
        axis.plot(
            [row["active_experts"] for row in dial],
            [100 * (row[field] - 1) for row in dial],
            "o-",
            color=colour,
            linewidth=1,
        )
        others = sorted((row for row in settings if row not in dial), key=lambda row: -row[field])
        for row in settings:
            x, y = row["active_experts"], 100 * (row[field] - 1)
            if row not in dial:
                axis.plot(x, y, "s", color=colour, fillstyle="none")
            at: dict[str, Any] = {"xytext": (-6, 6), "ha": "right"}
            if row in others:
                at = {"xytext": (8, 9 - 12 * others.index(row))}
            label = row["name"].removeprefix("coverage ")
            axis.annotate(label, (x, y), textcoords="offset points", fontsize=8, **at)
        axis.set_xlabel("active experts per layer and step; numbers are coverages")
        axis.set_ylabel(title)
        axis.margins(x=0.2, y=0.15)
        axis.grid(alpha=0.3)
    axes[0].axhline(-1, color="grey", linestyle="--", linewidth=1)
    figure.suptitle(f"{report['model']}: batches of {report['batch']} rows of different documents")
    with write_aside(path) as aside:
        figure.savefig(aside, dpi=120)
    pyplot.close(figure)
