"""Does a coverage cost the same whatever the batch, where a budget does not?

    python benchmarks/coverage.py [--model FOLDER ...] [--json PATH]

Active experts, bits per byte and next-token accuracy of held-out text in decode-shaped steps of 4, 8, 16 and
32 rows, for two coverages and a budget, on the shipped model and on two with other routers
(benchmarks/models/). Changes are relative to the model's own routing, with 95 % intervals of pairs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import click
from rich.progress import Progress
from rich.table import Table

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
from xshare_trtllm.hf import attach
from xshare_trtllm.report import console, machine, write_aside, write_json

MODELS = (MODEL_DIR, *sorted((Path(__file__).parent / "models").glob("xshare-*")))
BATCHES = (4, 8, 16, 32)
LENGTH = 256
DOCUMENTS = 96  # a multiple of every batch
SETTINGS = {
    "coverage 0.97": XShareConfig(coverage=0.97),
    "coverage 0.95": XShareConfig(coverage=0.95),
    "budget 32": XShareConfig(32),
}


@dataclass(frozen=True, slots=True)
class Point:
    """One setting at one batch size; changes are relative to the own routing."""

    setting: str
    batch: int
    own: float
    active: float
    kept_utility: float
    change: Change


def measure(model: Any, tokenizer: Any, progress: Progress) -> list[Point]:
    """Every setting at every batch size."""
    spec = RouterSpec.from_hf_config(model.config)
    sizes = token_bytes(tokenizer)
    points = []
    name = Path(model.name_or_path).name
    task = progress.add_task(name, total=len(BATCHES) * (1 + len(SETTINGS)))
    for batch in BATCHES:
        batches = token_batches(held_out()[:DOCUMENTS], tokenizer, LENGTH, batch)

        def run(config: XShareConfig, batches: list[Any] = batches) -> tuple[Quality, float, float]:
            with attach(model, config, prefill="stepwise") as attached:
                quality = teacher_forced(model, batches, sizes)
                layers = attached.stats
            progress.advance(task)
            return quality, mean(s.experts_after for s in layers), mean(s.kept_utility for s in layers)

        base, own, _ = run(XShareConfig.off(spec))
        for setting, config in SETTINGS.items():
            quality, active, kept = run(config)
            points.append(Point(setting, batch, own, active, kept, compare(quality, base)))
    return points


def print_table(model: str, points: list[Point]) -> None:
    """Settings down, batches across."""
    table = Table(title=f"{model}: active experts / bits per byte / accuracy, against own routing")
    table.add_column("setting")
    for batch in BATCHES:
        own = next(point.own for point in points if point.batch == batch)
        table.add_column(f"batch {batch} (own: {own:.1f})", justify="right")
    for setting in SETTINGS:
        row = [point for point in points if point.setting == setting]
        table.add_row(
            setting,
            *(
                f"{p.active / p.own - 1:+.1%} / {p.change.bits_per_byte:+.2%} / {p.change.accuracy:+.2%}"
                for p in row
            ),
        )
    console().print(table)


def plot(results: dict[str, list[Point]], path: Path) -> None:
    """Loss and active experts over the batch, a line for each setting, a row of panels for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(results), 2, figsize=(9, 3 * len(results) + 0.4), constrained_layout=True, squeeze=False
    )
    for (left, right), (model, points) in zip(axes, results.items(), strict=True):
        for index, setting in enumerate(SETTINGS):
            line = [point for point in points if point.setting == setting]
            x = [point.batch for point in line]
            y = [100 * p.change.bits_per_byte for p in line]
            spread = [
                [100 * (p.change.bits_per_byte - p.change.bits_interval[0]) for p in line],
                [100 * (p.change.bits_interval[1] - p.change.bits_per_byte) for p in line],
            ]
            left.errorbar(x, y, spread, fmt="o-", capsize=3, markersize=4, color=f"C{index}", label=setting)
            right.plot(x, [p.active for p in line], "o-", markersize=4, color=f"C{index}", label=setting)
        own = points[:: len(SETTINGS)]
        right.plot([p.batch for p in own], [p.own for p in own], "k:", label="own routing")
        left.set_title(f"{model}: bits per byte, change in %", fontsize=9)
        right.set_title(f"{model}: active experts per layer and step", fontsize=9)
        for axis in (left, right):
            axis.set_xscale("log", base=2)
            axis.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
            axis.set_xlabel("batch")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    with write_aside(path) as aside:
        figure.savefig(aside, dpi=110)
    pyplot.close(figure)


@click.command()
@click.option(
    "--model", "folders", multiple=True, type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="model folder; default: the shipped one and benchmarks/models/*",
)  # fmt: skip
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="where to write")
def main(folders: tuple[Path, ...], json_path: Path | None) -> None:
    """Measure coverages over batch sizes."""
    results: dict[str, list[Point]] = {}
    with one_thread(), Progress(console=console()) as progress:
        for folder in folders or MODELS:
            model, tokenizer = load_model(folder)
            results[folder.name] = measure(model, tokenizer, progress)
            print_table(folder.name, results[folder.name])
    if json_path:
        models = {name: [asdict(point) for point in points] for name, points in results.items()}
        write_json(
            json_path, {"machine": machine(), "documents": DOCUMENTS, "length": LENGTH, "models": models}
        )
        plot(results, json_path.with_suffix(".png"))


if __name__ == "__main__":
    main()
