"""Which way to choose experts loses least, at the same number of active experts?

    python benchmarks/peers.py [--model FOLDER ...] [--batch 16 ...] [--json PATH]

Bits per byte and next-token accuracy of held-out text in decode-shaped steps, against the mean number of
active experts, for XShare (by coverage and by budget), the paper's rule and the rules of
`xshare_trtllm.evaluation.peers`; mixed batches of 4 to 32 rows, and verification of 4 requests x 4
positions. Changes are relative to the model's own routing on the same documents, with 95 % intervals of
pairs. A peer is better where, against XShare's curve at the peer's number of active experts, its interval of
bits per byte lies below 0.

Models: the shipped one, and two that were trained in the same way with other routers (benchmarks/models/).
SERE's similarities are calibrated on documents that nothing is measured on.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import click
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from xshare_trtllm import RouterSpec, XShareConfig
from xshare_trtllm.evaluation import (
    MODEL_DIR,
    Quality,
    held_out,
    load_model,
    teacher_forced,
    token_batches,
    token_bytes,
)
from xshare_trtllm.evaluation.measure import Change, compare, one_thread
from xshare_trtllm.evaluation.peers import (
    Rule,
    expert_similarity,
    fewer_per_row,
    lynx,
    moe_spec,
    oea,
    rerouted,
    sere,
    squared_shares,
)
from xshare_trtllm.hf import attach
from xshare_trtllm.report import console, machine, write_aside, write_json

MODELS = (MODEL_DIR, *sorted((Path(__file__).parent / "models").glob("xshare-*")))
CALIBRATION = 16  # documents for SERE's similarities
LENGTH = 128
DRAFT = "4 x 4"  # requests x positions
SHAPES = ("4", "8", "16", "32", DRAFT)
OURS, BUDGET = "XShare, coverage", "XShare, budget"
COLOURS = {
    "paper, warm-up 0": "tab:red", "paper, warm-up 1": "tab:orange", "paper, warm-up 2": "goldenrod",
    "OEA, simplified": "tab:blue", "OEA": "tab:cyan", "MoE-Spec": "tab:green", "Lynx": "tab:brown",
    "SERE": "tab:purple", "fewer per row": "tab:grey",
}  # fmt: skip
DIVIDED = "XShare, weights divided by their sum"
# Close to each other, since a peer is compared with the chord between two of them.
COVERAGES = (0.995, 0.99, 0.98, 0.97, 0.96, 0.95, 0.935, 0.92, 0.9, 0.87, 0.83)
SHARES = (0.85, 0.7, 0.55)  # of the experts that the own routing activates


@dataclass(frozen=True, slots=True)
class Point:
    """One setting of one method; changes are relative to the own routing."""

    method: str
    setting: str
    active: float
    change: Change
    quality: Quality


@dataclass(frozen=True, slots=True)
class Verdict:
    """A peer against XShare's coverage curve at the same number of active experts: the relative difference in
    bits per byte, above 0 where XShare is better."""

    method: str
    setting: str
    active: float
    difference: float
    interval: tuple[float, float]


def methods(spec: RouterSpec, own: float, similarity: Tensor) -> list[tuple[str, str, XShareConfig | Rule]]:
    """Every method with its settings; budgets are shares of the experts that the own routing activates."""
    top_k = spec.top_k
    budgets = sorted({max(top_k, round(own * share)) for share in SHARES}, reverse=True)
    kept = sorted({round(top_k * share) for share in (0.7, 0.5, 0.35)} - {0}, reverse=True)
    rows: list[tuple[str, str, XShareConfig | Rule]] = []
    rows += [(OURS, f"{c}", XShareConfig(coverage=c)) for c in COVERAGES]
    rows += [(BUDGET, f"{m}", XShareConfig(m)) for m in budgets]
    least = 1 if spec.num_groups > 1 else 0
    for warmup in sorted({least, 1, 2}):
        name = f"paper, warm-up {warmup}" + (" (vLLM)" if warmup == 0 else "")
        rows += [(name, f"{m}", XShareConfig(m, warmup=warmup, utility="affinity")) for m in budgets]
    if spec.scoring == "softmax":
        rows += [(DIVIDED, f"{m}", squared_shares(m)) for m in budgets]
    rows += [("OEA, simplified", f"{k}", oea(k)) for k in kept]
    rows += [("OEA", f"{p}", oea(top_k, p)) for p in (0.8, 0.6, 0.4)]
    rows += [("MoE-Spec", f"{m}", moe_spec(m)) for m in budgets]
    rows += [("Lynx", f"{m}", lynx(m)) for m in budgets]
    rows += [("SERE", f"{k}", sere(k, similarity)) for k in kept]
    rows += [("fewer per row", f"{k}", fewer_per_row(k)) for k in kept]
    return rows


def measure(
    model: Any, method: XShareConfig | Rule, batches: list[Tensor], sizes: Tensor, step_tokens: int
) -> tuple[Quality, float]:
    """Quality, and the mean number of active experts."""
    if isinstance(method, XShareConfig):
        with attach(model, method, prefill="stepwise", step_tokens=step_tokens) as attached:
            quality = teacher_forced(model, batches, sizes)
            return quality, mean(layer.experts_after for layer in attached.stats)
    with rerouted(model, method, step_tokens) as counted:
        return teacher_forced(model, batches, sizes), counted.mean


def curve(model: Any, tokenizer: Any, shape: str, similarity: Tensor, progress: Progress) -> list[Point]:
    """All methods on one shape of step; the own routing is the first point."""
    batch, step_tokens = (4, 4) if shape == DRAFT else (int(shape), 1)
    batches = token_batches(held_out()[:-CALIBRATION], tokenizer, LENGTH, batch)
    sizes = token_bytes(tokenizer)
    spec = RouterSpec.from_hf_config(model.config)
    base, own = measure(model, XShareConfig.off(spec), batches, sizes, step_tokens)
    points = [Point("own routing", "", own, compare(base, base), base)]
    settings = methods(spec, own, similarity)
    task = progress.add_task(f"{Path(model.name_or_path).name}, {shape} rows", total=len(settings))
    for name, setting, method in settings:
        quality, active = measure(model, method, batches, sizes, step_tokens)
        points.append(Point(name, setting, active, compare(quality, base), quality))
        progress.advance(task)
    return points


def judge(points: list[Point]) -> list[Verdict]:
    """Every peer's setting against XShare's coverage curve, read between its neighbouring points."""
    ours = sorted((p for p in points if p.method == OURS), key=lambda p: p.active)
    ours.append(points[0])
    verdicts = []
    for peer in points[1:]:
        if peer.method in (OURS, BUDGET, DIVIDED) or not ours[0].active <= peer.active <= ours[-1].active:
            continue
        above = next(i for i, p in enumerate(ours) if p.active >= peer.active)
        low, high = ours[max(above - 1, 0)], ours[above]
        share = (peer.active - low.active) / max(high.active - low.active, 1e-9)
        nats = low.quality.nats * (1 - share) + high.quality.nats * share
        base = Quality(nats, peer.quality.bytes, high.quality.predictions, peer.quality.targets)
        change = compare(peer.quality, base)
        verdicts.append(
            Verdict(peer.method, peer.setting, peer.active, change.bits_per_byte, change.bits_interval)
        )
    return verdicts


def divided_budgets(points: list[Point]) -> list[Verdict]:
    """Weights divided by their sum against the model's own at the same budget, above 0 where its own are
    better."""
    own = {point.setting: point for point in points if point.method == BUDGET}
    pairs = [(p, compare(p.quality, own[p.setting].quality)) for p in points if p.method == DIVIDED]
    return [Verdict(p.method, p.setting, p.active, c.bits_per_byte, c.bits_interval) for p, c in pairs]


def plot(models: dict[str, dict[str, Any]], path: Path) -> None:
    """From the report: a panel for each model and shape, what is lost against what is active."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(next(iter(models.values())))
    figure, axes = pyplot.subplots(
        len(models), len(shapes), figsize=(3.1 * len(shapes), 3.2 * len(models) + 0.6),
        constrained_layout=True, squeeze=False,
    )  # fmt: skip
    styles: dict[str, Any] = {OURS: "k-o", BUDGET: "k--s"}
    for row, (model, by_shape) in zip(axes, models.items(), strict=True):
        for axis, (shape, result) in zip(row, by_shape.items(), strict=True):
            own, *points = result["points"]
            names = [name for name in dict.fromkeys(p["method"] for p in points) if name != DIVIDED]
            for name in names:
                line = sorted((p for p in points if p["method"] == name), key=lambda p: p["active"])
                x = [p["active"] for p in line]
                y = [100 * p["bits_per_byte"] for p in line]
                colour = {} if name in styles else {"color": COLOURS[name.split(" (")[0]]}
                axis.plot(x, y, styles.get(name, "-."), markersize=3.5, linewidth=1.2, label=name, **colour)
            axis.set_title(f"{model}, {shape} rows (own: {own['active']:.1f})", fontsize=8)
            axis.set_ylim(-0.1, 3)
            axis.grid(alpha=0.3)
            axis.tick_params(labelsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("active experts per layer", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("bits per byte, change in %", fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    with write_aside(path) as aside:
        figure.savefig(aside, dpi=110)
    pyplot.close(figure)


def print_table(model: str, shape: str, points: list[Point], verdicts: list[Verdict]) -> None:
    """What every setting activates and loses."""
    table = Table(title=f"{model}, {shape} rows; own routing: {points[0].active:.1f} active experts")
    for column in (
        "method",
        "setting",
        "active",
        "bits per byte",
        "accuracy",
        "against XShare at equal number",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    against = {(v.method, v.setting): v for v in verdicts}
    for point in points[1:]:
        verdict = against.get((point.method, point.setting))
        low, high = point.change.bits_interval
        table.add_row(
            point.method,
            point.setting,
            f"{point.active:.1f}",
            f"{point.change.bits_per_byte:+.2%} ({low:+.2%} to {high:+.2%})",
            f"{point.change.accuracy:+.2%}",
            "" if verdict is None else f"{verdict.difference:+.2%} ({verdict.interval[0]:+.2%} to "
            f"{verdict.interval[1]:+.2%})",
        )  # fmt: skip
    console().print(table)


@click.command()
@click.option(
    "--model", "folders", multiple=True, type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="model folder; default: the shipped one and benchmarks/models/*",
)  # fmt: skip
@click.option("--batch", "shapes", multiple=True, type=click.Choice(SHAPES), help="default: all")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="where to write")
def main(folders: tuple[Path, ...], shapes: tuple[str, ...], json_path: Path | None) -> None:
    """Measure XShare against its peers."""
    report: dict[str, Any] = {"machine": machine(), "tokens_per_document": LENGTH, "models": {}}
    with one_thread(), Progress(console=console()) as progress:
        for folder in folders or MODELS:
            model, tokenizer = load_model(folder)
            calibration = token_batches(held_out()[-CALIBRATION:], tokenizer, LENGTH)
            similarity = expert_similarity(model, calibration)
            by_shape = report["models"][folder.name] = {}
            for shape in shapes or SHAPES:
                points = curve(model, tokenizer, shape, similarity, progress)
                verdicts = judge(points) + divided_budgets(points)
                print_table(folder.name, shape, points, verdicts)
                by_shape[shape] = {
                    "points": [
                        {"method": p.method, "setting": p.setting, "active": p.active} | asdict(p.change)
                        for p in points
                    ],
                    "against_xshare": [asdict(verdict) for verdict in verdicts],
                }
    better = [
        f"{model}, {shape} rows: {v['method']} {v['setting']}"
        for model, by_shape in report["models"].items()
        for shape, result in by_shape.items()
        for v in result["against_xshare"]
        if v["interval"][1] < 0 and v["method"] != DIVIDED
    ]
    report["better_than_xshare"] = better
    compared = sum(
        verdict["method"] != DIVIDED
        for by_shape in report["models"].values()
        for result in by_shape.values()
        for verdict in result["against_xshare"]
    )
    report["compared"] = compared
    console().print(
        f"Better than XShare beyond the interval, of {compared} comparisons (1 in 40 by chance): "
        f"{'; '.join(better) or 'none'}"
    )
    if json_path:
        write_json(json_path, report)
        plot(report["models"], json_path.with_suffix(".png"))


if __name__ == "__main__":
    main()
