"""Expert parallelism: experts on the fullest GPU and quality, with the cap that a coverage sets.

    python benchmarks/expert_parallel.py [--json PATH]

(a) The shipped model over held-out text in decode-shaped steps: a coverage, which sets the cap of each layer
and step; one number per GPU; and the paper's rule with that number. (b) Published model shapes, with the
synthetic routers of `xshare predict`: they have no quality, only the share of the utility that is kept, and
that is what the coverage says.

GPUs are simulated and hold contiguous slices of the experts: counts are exact, nothing is timed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import click
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from xshare_trtllm import RouterSpec, XShareConfig
from xshare_trtllm.evaluation import held_out, load_model, teacher_forced, token_batches, token_bytes
from xshare_trtllm.evaluation.measure import Quality, compare
from xshare_trtllm.hf import attach
from xshare_trtllm.planning.cost import Loads
from xshare_trtllm.planning.shapes import shape
from xshare_trtllm.report import console, machine, write_aside, write_json
from xshare_trtllm.routing import contiguous_placement

LENGTH = 256  # tokens of a document
GPUS, BATCH = 8, 16
GPU_COUNTS = (2, 4, 8, 16)
BATCHES = (4, 8, 16, 32, 64)
COVERAGES = (0.99, 0.97, 0.95, 0.90, 0.85)
FEWER_COVERAGES = (0.97, 0.95, 0.90)
NUMBERS = (3, 4, 5, 6)  # experts per GPU
HALF_PEAK = {2: 14, 4: 7, 8: 4, 16: 2}  # experts per GPU: about half of the own peak at BATCH
MODELS = ("deepseek-r1", "kimi-k2", "qwen3-235b-a22b", "gpt-oss-120b")
MODEL_BATCHES = (16, 32, 64)
LOSSES = (0.005, 0.008, 0.01)
RESULTS = Path(__file__).parent / "results" / "expert_parallel.json"

INTERVALS = {"bits_per_byte": "bits_interval", "accuracy": "accuracy_interval"}
COVERAGE, NUMBER, PAPER = "coverage", "one number per GPU", "the paper's rule"


@dataclass(frozen=True)
class Setting:
    """One run of the shipped model."""

    rule: str
    config: XShareConfig
    gpus: int = GPUS
    batch: int = BATCH


def all_settings() -> list[Setting]:
    """Everything at GPUS and BATCH; and one of the two at a time changed, fewer settings."""
    settings = [
        Setting(COVERAGE, XShareConfig(coverage=c, warmup=warmup)) for warmup in (1, 0) for c in COVERAGES
    ]
    for limit in NUMBERS:
        settings.append(Setting(NUMBER, XShareConfig(gpu_budget=limit)))
        settings += [Setting(PAPER, paper(limit, warmup)) for warmup in (1, 2)]
    others = [(GPUS, batch, HALF_PEAK[GPUS]) for batch in BATCHES if batch != BATCH]
    others += [(gpus, BATCH, limit) for gpus, limit in HALF_PEAK.items() if gpus != GPUS]
    for gpus, batch, limit in others:
        settings += [Setting(COVERAGE, XShareConfig(coverage=c), gpus, batch) for c in FEWER_COVERAGES]
        lowest = XShareConfig(coverage=min(FEWER_COVERAGES), warmup=0)
        settings.append(Setting(COVERAGE, lowest, gpus, batch))
        settings.append(Setting(NUMBER, XShareConfig(gpu_budget=limit), gpus, batch))
        settings.append(Setting(PAPER, paper(limit, 2), gpus, batch))
    return settings


def paper(limit: int, warmup: int) -> XShareConfig:
    return XShareConfig(gpu_budget=limit, warmup=warmup, utility="affinity")


# ---- (a) The shipped model --------------------------------------------------------------------------------


class ShippedModel:
    """The model, its held-out text, and how well it does with its own routing."""

    def __init__(self) -> None:
        self.model, tokenizer = load_model()
        self.tokens = torch.cat(token_batches(held_out(), tokenizer, LENGTH))
        self.token_bytes = token_bytes(tokenizer)
        self.experts = RouterSpec.from_hf_config(self.model.config).num_experts
        self.own = self.score(BATCH)

    def score(self, batch: int) -> Quality:
        """The text in batches of `batch`, with whatever is attached; what does not fill a batch is left
        out."""
        full = self.tokens[: len(self.tokens) // batch * batch]
        return teacher_forced(self.model, full.split(batch), self.token_bytes)

    def measure(self, setting: Setting) -> dict[str, Any]:
        """Means over layers and steps, and changes relative to the own routing, with 95 % intervals."""
        placement = contiguous_placement(self.experts, setting.gpus)
        with attach(self.model, setting.config, prefill="stepwise", expert_gpu=placement) as attached:
            quality = self.score(setting.batch)
            stats = attached.stats
        change = compare(quality, _first(self.own, len(quality.nats)))
        own_peak = mean(layer.peak_gpu_before for layer in stats)
        peak = mean(layer.peak_gpu_after for layer in stats)
        return {
            "rule": setting.rule,
            "config": setting.config.to_dict(),
            "gpus": setting.gpus,
            "batch": setting.batch,
            "own_experts": mean(layer.experts_before for layer in stats),
            "experts": mean(layer.experts_after for layer in stats),
            "own_peak": own_peak,
            "peak": peak,
            "times_less": own_peak / peak,
            "kept_utility": mean(layer.kept_utility for layer in stats),
            "change": asdict(change),
        }


def _first(quality: Quality, documents: int) -> Quality:
    parts = (quality.nats, quality.bytes, quality.predictions, quality.targets)
    return Quality(*(part[:documents] for part in parts))


def best_at(rows: list[dict[str, Any]], loss: float) -> dict[str, Any] | None:
    """The least peak at no more than that relative loss of accuracy."""
    good = [row for row in rows if row["change"]["accuracy"] >= -loss]
    return min(good, key=lambda row: row["peak"], default=None)


def best_of_each(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each batch and number of GPUs: what each rule reaches at each loss."""
    best = []
    for gpus, batch in sorted({(row["gpus"], row["batch"]) for row in rows}):
        here = [row for row in rows if (row["gpus"], row["batch"]) == (gpus, batch)]
        for rule in sorted({row["rule"] for row in here}):
            for loss in LOSSES:
                found = best_at([row for row in here if row["rule"] == rule], loss)
                best.append({"gpus": gpus, "batch": batch, "rule": rule, "loss": loss, "best": found})
    return best


# ---- (b) Published shapes ---------------------------------------------------------------------------------


def measure_shape(name: str, gpus: int, batch: int) -> list[dict[str, Any]]:
    """Peaks of the own routing and of the coverages, of one shape's synthetic routers."""
    loads = Loads(shape(name).router, gpus)
    own = loads.at(batch, XShareConfig.off(loads.spec))
    rows = []
    for coverage in COVERAGES:
        load = loads.at(batch, XShareConfig(coverage=coverage))
        row = {"model": name, "gpus": gpus, "batch": batch, "coverage": coverage}
        row |= {"own_peak": own.peak_experts, "peak": load.peak_experts, "own_rows": own.peak_rows}
        row |= {"rows": load.peak_rows, "kept_utility": load.kept_utility}
        rows.append(row | {"times_less": own.peak_experts / load.peak_experts})
    return rows


def shape_cases() -> list[tuple[str, int, int]]:
    """Every model and batch at GPUS, and the first model at the other numbers of GPUs."""
    cases = [(name, GPUS, batch) for name in MODELS for batch in MODEL_BATCHES]
    return cases + [(MODELS[0], gpus, MODEL_BATCHES[-1]) for gpus in GPU_COUNTS if gpus != GPUS]


# ---- Report -----------------------------------------------------------------------------------------------


def setting_name(row: dict[str, Any]) -> str:
    config = row["config"]
    if row["rule"] == COVERAGE:
        return f"coverage {config['coverage']:.2f}" + ("" if config["warmup"] else ", no warm-up")
    return f"{config['gpu_budget']} per GPU, warm-up {config['warmup']}"


def shipped_table(report: dict[str, Any]) -> Table:
    table = Table(
        title=f"(a) the shipped model, {report['tokens']} tokens, own accuracy {report['accuracy']:.2%}",
        caption="peak: experts on the fullest GPU; changes are relative, with 95 % intervals over documents",
    )
    for name in ("GPUs", "batch", "rule", "setting"):
        table.add_column(name)
    for name in ("active", "peak", "times less", "utility kept", "bits per byte", "accuracy"):
        table.add_column(name, justify="right")
    for row in sorted(report["shipped_model"], key=lambda r: (r["gpus"], r["batch"], r["rule"], r["peak"])):
        table.add_row(
            *(str(row[name]) for name in ("gpus", "batch", "rule")),
            setting_name(row),
            f"{row['own_experts']:.1f} > {row['experts']:.1f}",
            f"{row['own_peak']:.2f} > {row['peak']:.2f}",
            f"{row['times_less']:.2f}",
            f"{row['kept_utility']:.1%}",
            *(_with_interval(row["change"], name) for name in ("bits_per_byte", "accuracy")),
        )
    return table


def _with_interval(change: dict[str, Any], name: str) -> str:
    low, high = change[INTERVALS[name]]
    return f"{change[name]:+.2%} ({low:+.2%} to {high:+.2%})"


def shapes_table(report: dict[str, Any]) -> Table:
    table = Table(title="(b) published shapes, synthetic routers: times fewer experts on the fullest GPU")
    for name in ("model", "GPUs", "batch", "own peak", *(f"coverage {c:.2f}" for c in COVERAGES)):
        table.add_column(name, justify="right")
    for name, gpus, batch in sorted({(r["model"], r["gpus"], r["batch"]) for r in report["shapes"]}):
        rows = [r for r in report["shapes"] if (r["model"], r["gpus"], r["batch"]) == (name, gpus, batch)]
        times = (f"{row['times_less']:.2f}" for row in rows)
        table.add_row(name, str(gpus), str(batch), f"{rows[0]['own_peak']:.2f}", *times)
    return table


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = report["shipped_model"]
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8.4), constrained_layout=True)
    _plot_rules(axes[0, 0], [r for r in rows if (r["gpus"], r["batch"]) == (GPUS, BATCH)])
    _plot_batches(axes[0, 1], [r for r in rows if r["gpus"] == GPUS])
    covered = [r for r in rows if (r["rule"], r["batch"]) == (COVERAGE, BATCH)]
    _plot_gpu_counts(axes[1, 0], covered)
    _plot_shapes(axes[1, 1], [r for r in report["shapes"] if r["gpus"] == GPUS])
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    with write_aside(path) as aside:
        figure.savefig(aside, dpi=110)
    pyplot.close(figure)


def _plot_rules(axis: Any, rows: list[dict[str, Any]]) -> None:
    lines = ((COVERAGE, 1, "o-"), (COVERAGE, 0, "o:"), (NUMBER, 1, "s--"), (PAPER, 1, "^:"), (PAPER, 2, "v:"))
    for rule, warmup, style in lines:
        points = [r for r in rows if (r["rule"], r["config"]["warmup"]) == (rule, warmup)]
        points.sort(key=lambda r: r["peak"])
        changes = [100 * r["change"]["accuracy"] for r in points]
        ends = [[100 * end for end in r["change"]["accuracy_interval"]] for r in points]
        axis.errorbar(
            [r["times_less"] for r in points],
            changes,
            [
                [change - low for change, (low, _) in zip(changes, ends, strict=True)],
                [high - change for change, (_, high) in zip(changes, ends, strict=True)],
            ],
            fmt=style,
            capsize=2,
            label=f"{rule}, warm-up {warmup}",
        )
    axis.axhline(0, color="black", linewidth=1)
    axis.axhline(-0.8, color="grey", linestyle="--", linewidth=1)
    axis.set_xlabel("experts on the fullest GPU, times fewer than own routing")
    axis.set_ylabel("next-token accuracy, change in %")
    axis.set_title(f"shipped model, {GPUS} GPUs, batch {BATCH} (95 % intervals)", fontsize=10)


def _plot_batches(axis: Any, rows: list[dict[str, Any]]) -> None:
    names = [f"coverage {c:.2f}" for c in FEWER_COVERAGES]
    names.append(f"coverage {min(FEWER_COVERAGES):.2f}, no warm-up")
    names.append(f"{HALF_PEAK[GPUS]} per GPU, warm-up 1")
    for name in names:
        points = [r for r in rows if r["rule"] != PAPER and setting_name(r) == name]
        points.sort(key=lambda r: r["batch"])
        style = "o-" if name.startswith(COVERAGE) else "ks--"
        changes = [100 * r["change"]["bits_per_byte"] for r in points]
        axis.plot([r["batch"] for r in points], changes, style, label=name)
    axis.set_xscale("log", base=2)
    axis.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
    axis.set_xlabel("batch")
    axis.set_ylabel("bits per byte, change in %")
    axis.set_title(f"shipped model, {GPUS} GPUs: one coverage for all batches", fontsize=10)


def _plot_gpu_counts(axis: Any, rows: list[dict[str, Any]]) -> None:
    own = {r["gpus"]: r["own_peak"] for r in rows}
    axis.plot(*zip(*sorted(own.items()), strict=True), "k*-", label="own routing")
    for name in (f"coverage {c:.2f}" for c in FEWER_COVERAGES):
        points = {r["gpus"]: r["peak"] for r in rows if setting_name(r) == name}
        axis.plot(*zip(*sorted(points.items()), strict=True), "o-", label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(GPU_COUNTS, [str(n) for n in GPU_COUNTS])
    axis.set_yticks((2, 4, 8, 16), ("2", "4", "8", "16"))
    axis.set_xlabel("GPUs")
    axis.set_ylabel("experts on the fullest GPU")
    axis.set_title(f"shipped model, batch {BATCH}", fontsize=10)


def _plot_shapes(axis: Any, rows: list[dict[str, Any]]) -> None:
    batch = MODEL_BATCHES[-1]
    for name in MODELS:
        points = [r for r in rows if (r["model"], r["batch"]) == (name, batch)]
        label = f"{name}, own peak {points[0]['own_peak']:.1f}"
        axis.plot([r["coverage"] for r in points], [r["times_less"] for r in points], "o-", label=label)
    axis.invert_xaxis()
    axis.set_xlabel("coverage")
    axis.set_ylabel("experts on the fullest GPU, times fewer")
    axis.set_title(f"published shapes, synthetic routers, {GPUS} GPUs, batch {batch}", fontsize=10)


@click.command()
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS)
def main(json_path: Path) -> None:
    """Measure expert parallelism; writes JSON and, beside it, a picture. About 10 minutes on a quiet core."""
    out = console()
    settings, cases = all_settings(), shape_cases()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out) as progress:
        shipped = ShippedModel()
        rows = [shipped.measure(s) for s in progress.track(settings, description="(a) the shipped model")]
        shapes = [measure_shape(*c) for c in progress.track(cases, description="(b) published shapes")]
    report = {
        "command": "python benchmarks/expert_parallel.py --json benchmarks/results/expert_parallel.json",
        "machine": machine(),
        "documents": len(shipped.tokens),
        "tokens": shipped.tokens[:, 1:].numel(),
        "accuracy": shipped.own.accuracy,
        "shipped_model": rows,
        "best_at_loss": best_of_each(rows),
        "shapes": [row for case in shapes for row in case],
    }
    out.print(shipped_table(report))
    out.print(shapes_table(report))
    write_json(json_path, report)
    plot(report, json_path.with_suffix(".png"))
    out.print(f"Written: {json_path} and {json_path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
