"""Expert parallelism: experts and rows of the fullest GPU, with and without a budget per GPU.

    python benchmarks/expert_parallel.py [--json PATH]

(a) The shipped model, next-token accuracy measured on held-out text in decode-shaped batches. (b) Published
model shapes with routers drawn from a fit of the shipped model's router logits (`evaluation.traces`). They
have no accuracy: the share of the affinity to each row's own top-k that its new choice keeps stands for it.

Placements: `contiguous` slices of the experts, and `balanced`: in the order of their load on other documents
than those evaluated, each expert goes to the least loaded GPU that has room. GPUs are simulated: counts are
exact, nothing is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import click
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from xshare_trtllm import RouterSpec, XShareConfig
from xshare_trtllm.evaluation import held_out, load_model, token_batches
from xshare_trtllm.evaluation.traces import (
    SyntheticRouters,
    fit,
    gpu_load,
    kept_choice,
    load_fit,
    own_choice,
    simulate,
    statistics,
)
from xshare_trtllm.hf import attach
from xshare_trtllm.hf.attach import find_routers
from xshare_trtllm.planning.shapes import shape
from xshare_trtllm.report import console, machine, write_aside, write_json
from xshare_trtllm.routing import contiguous_placement

LENGTH = 256  # tokens of a document
BLOCK = 32  # documents; a block's placement is made from blocks of the other parity
GPUS, BATCH = 8, 16
GPU_COUNTS = (2, 4, 8, 16)
BATCHES = (1, 4, 8, 16, 32)
MODELS = ("deepseek-r1", "kimi-k2", "qwen3-235b-a22b", "gpt-oss-120b")
MODEL_BATCHES = (16, 32, 64)
PLOTTED_BATCH = 32
SWEEP = 16  # budgets per shape
STEPS = 48  # decode steps per synthetic layer
RESULTS = Path(__file__).parent / "results" / "expert_parallel.json"


@dataclass(frozen=True)
class Setting:
    """One run of the shipped model. per_gpu = None: a budget for the whole layer only."""

    budget: int | tuple[int, ...]
    warmup: int
    per_gpu: int | None = None
    placement: str = "balanced"
    gpus: int = GPUS
    batch: int = BATCH

    @property
    def config(self) -> XShareConfig:
        return XShareConfig(self.budget, warmup=self.warmup, gpu_budget=self.per_gpu)


ALL = 64  # experts of the shipped model: no limit on the layer
SETTINGS = (
    *(Setting(budget, 2) for budget in (40, 32, 28, 24, 20)),
    *(Setting(budget, 1) for budget in (32, 24)),
    *(Setting(ALL, warmup, per_gpu) for per_gpu in (5, 4, 3, 2) for warmup in (0, 1, 2)),
    *(Setting(ALL, 3, per_gpu) for per_gpu in (5, 4)),
    *(Setting(ALL, warmup, per_gpu, "contiguous") for per_gpu in (5, 4, 3) for warmup in (1, 2)),
    *(Setting(budget, 2, 4) for budget in (28, (22, 28, 30, 32), (32, 30, 28, 22))),
    *(Setting(ALL, 1, per_gpu, batch=batch) for batch in (4, 8, 32) for per_gpu in (4, 3, 2)),
    *(Setting(ALL, 2, per_gpu, batch=batch) for batch in (4, 8, 32) for per_gpu in (4, 3)),
    *(
        Setting(ALL, 2, per_gpu, placement, gpus)
        for gpus, per_gpu in ((2, 14), (4, 7), (16, 2))
        for placement in ("contiguous", "balanced")
    ),
)


# ---- Placement --------------------------------------------------------------------------------------------


def balanced(loads: Tensor, gpus: int) -> Tensor:
    """[E] int: GPUs of equally many experts; the largest load first, each to the least loaded with room."""
    room = [len(loads) // gpus] * gpus
    total = [0.0] * gpus
    placement = torch.empty(len(loads), dtype=torch.int32)
    for expert in loads.argsort(descending=True, stable=True).tolist():
        gpu = min((g for g in range(gpus) if room[g]), key=lambda g: total[g])
        placement[expert] = gpu
        room[gpu] -= 1
        total[gpu] += float(loads[expert])
    return placement


def placements(kind: str, loads: Tensor, gpus: int) -> Tensor:
    """[layers, E] from loads [layers, E]."""
    if kind == "contiguous":
        return contiguous_placement(loads.shape[1], gpus).expand(loads.shape[0], -1)
    return torch.stack([balanced(layer, gpus) for layer in loads])


@contextmanager
def placed(model: nn.Module, placement: Tensor) -> Iterator[Tensor]:
    """The model with its experts renumbered so that every GPU of `placement` [layers, E] holds a slice.

    Gives the old number of each new one, [layers, E]; the numbering is undone at the end.
    """
    order = placement.argsort(dim=1, stable=True)
    _renumber(model, order)
    try:
        yield order
    finally:
        _renumber(model, order.argsort(dim=1))


def _renumber(model: nn.Module, order: Tensor) -> None:
    blocks = [module for module in model.modules() if hasattr(module, "gate") and hasattr(module, "experts")]
    for block, layer in zip(blocks, order, strict=True):
        for weight in (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj):
            weight.data = weight.data[layer]


# ---- (a) The shipped model --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What one pass over the text did.

    hits          bool [documents, length], the next token was predicted
    ids, weights  [layers, documents, length, k], experts in the model's own numbering
    """

    hits: Tensor
    ids: Tensor
    weights: Tensor
    kept_utility: float
    kept_choice: float


class ShippedModel:
    """The model, its held-out text, and the experts' loads on each half of it."""

    def __init__(self) -> None:
        self.model, tokenizer = load_model()
        self.tokens = torch.cat(token_batches(held_out(), tokenizer, LENGTH))
        self.spec = RouterSpec.from_hf_config(self.model.config)
        self.own = self.run(XShareConfig.off(self.spec), BATCH, None, GPUS)
        chosen = nn.functional.one_hot(self.own.ids, self.spec.num_experts).sum((2, 3))
        half = self.half(torch.arange(len(self.tokens)))
        self.loads = [chosen[:, half == h].sum(1) for h in (0, 1)]  # [layers, E] each

    @staticmethod
    def half(document: Tensor) -> Tensor:
        return document // BLOCK % 2

    def placement(self, kind: str, gpus: int, first_document: int) -> Tensor:
        """For the documents of that one's block, from the loads of the other half."""
        other = 1 - int(self.half(torch.tensor(first_document)))
        return placements(kind, self.loads[other], gpus)

    def run(self, config: XShareConfig, batch: int, kind: str | None, gpus: int) -> Run:
        """The text in batches of `batch`; kind = None: no placement, the model as it is."""
        hits, observed, affinity = [], [], []
        expert_gpu = contiguous_placement(self.spec.num_experts, gpus)
        for start in range(0, len(self.tokens) // batch * batch, batch):
            tokens = self.tokens[start : start + batch]
            layers = len(find_routers(self.model))
            placement = self.placement(kind, gpus, start) if kind else expert_gpu.expand(layers, -1)
            with (
                placed(self.model, placement) as order,
                attach(self.model, config, prefill="stepwise", expert_gpu=expert_gpu) as attached,
                _observed(self.model) as outputs,
                torch.inference_mode(),
            ):
                logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits
            hits.append(logits.argmax(-1) == tokens[:, 1:])
            affinity += [layer.kept_utility for layer in attached.stats]
            pairs = zip(outputs, order, strict=True)
            observed.append([_in_old_numbers(*output, old, batch) for output, old in pairs])
        logits, ids, weights = (
            torch.stack([torch.cat([part[layer][i] for part in observed]) for layer in range(layers)])
            for i in range(3)
        )
        kept = mean(kept_choice(*layer, self.spec) for layer in zip(logits, ids, weights, strict=True))
        return Run(torch.cat(hits), ids, weights, mean(affinity), kept)

    def peaks(self, run: Run, batch: int, kind: str, gpus: int) -> dict[str, float]:
        """Of the decode steps of `batch` documents, under a placement."""
        parts = []
        for start in range(0, run.ids.shape[1] // batch * batch, batch):
            for layer, gpu in enumerate(self.placement(kind, gpus, start)):
                rows = slice(start, start + batch)
                ids, weights = (x[layer, rows].transpose(0, 1) for x in (run.ids, run.weights))
                parts.append(gpu_load(ids, weights, gpu, gpus))
        experts, peak_experts, peak_rows = (mean(values) for values in zip(*parts, strict=True))
        return {"active_experts": experts, "peak_experts": peak_experts, "peak_rows": peak_rows}

    def accuracy_change(self, run: Run) -> tuple[float, float]:
        """Relative to the own routing on the same documents, and its standard error over documents."""
        own = self.own.hits[: len(run.hits)].float().mean(1)
        difference = run.hits.float().mean(1) - own
        error = difference.std() / len(difference) ** 0.5
        return float(difference.mean() / own.mean()), float(error / own.mean())


@contextmanager
def _observed(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Outputs (logits, weights, ids) of every router, in the order of the layers, of one pass."""
    outputs: list[tuple[Tensor, Tensor, Tensor]] = []
    hooks = [
        router.register_forward_hook(lambda _module, _args, output: outputs.append(output))
        for router in find_routers(model)
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _in_old_numbers(
    logits: Tensor, weights: Tensor, ids: Tensor, old: Tensor, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, ids and weights [batch, length, ...]."""
    own = torch.empty_like(logits)
    own[:, old] = logits
    return (
        own.view(batch, -1, own.shape[1]),
        old[ids].view(batch, -1, ids.shape[1]),
        weights.view(batch, -1, ids.shape[1]),
    )


def measure_shipped(shipped: ShippedModel, settings: tuple[Setting, ...], progress: Progress) -> list[dict]:
    task = progress.add_task("(a) the shipped model", total=len(settings))
    rows = []
    for s in settings:
        kind = s.placement if s.per_gpu else None
        run = shipped.run(s.config, s.batch, kind, s.gpus)
        change, error = shipped.accuracy_change(run)
        row = {
            "budget": s.budget,
            "warmup": s.warmup,
            "per_gpu": s.per_gpu,
            "gpus": s.gpus,
            "batch": s.batch,
            "accuracy_change": change,
            "standard_error": error,
            "kept_utility": run.kept_utility,
            "kept_choice": run.kept_choice,
        }
        for placement in (s.placement,) if s.per_gpu else ("contiguous", "balanced"):
            rows.append(row | {"placement": placement} | shipped.peaks(run, s.batch, placement, s.gpus))
        progress.advance(task)
    return rows


def own_peaks(shipped: ShippedModel) -> list[dict[str, Any]]:
    """The own routing does not depend on the batch, so one run gives every batch size and GPU count."""
    return [
        {"batch": batch, "gpus": gpus, "placement": kind} | shipped.peaks(shipped.own, batch, kind, gpus)
        for batch in BATCHES
        for gpus in GPU_COUNTS
        for kind in ("contiguous", "balanced")
    ]


def check_fit(shipped: ShippedModel) -> dict[str, Any]:
    """Statistics of every second document's traces, and of routers fitted to the other documents."""
    from xshare_trtllm.evaluation.traces import record

    logits = record(shipped.model, shipped.tokens.split(BATCH))
    top_k = shipped.spec.top_k
    half = fit(logits[:, ::2])
    drawn = [
        statistics(SyntheticRouters(half, shipped.spec, seed).logits(56, LENGTH), top_k) for seed in range(4)
    ]
    traces = statistics(logits[:, 1::2], top_k)
    fitted = {
        name: {key: mean(one[name][key] for one in drawn) for key in values}
        for name, values in traces.items()
    }
    return {"held_out_traces": traces, "fitted_routers": fitted}


# ---- (b) Published shapes ---------------------------------------------------------------------------------


def measure_shape(name: str, spec: RouterSpec, gpus: int, batch: int) -> list[dict[str, Any]]:
    """Own routing, budgets per GPU and for the layer, of one shape at one batch size."""
    routers = SyntheticRouters(load_fit(), spec)
    logits = routers.logits(batch * STEPS)
    logits = logits.view(len(logits), STEPS, batch, -1)
    # Of other documents; a group limit is left out of the loads, though not of the routing.
    loads = own_choice(routers.logits(1024), spec.top_k).sum((1, 2))
    rows = []

    def add(config: XShareConfig, kind: str, **values: Any) -> None:
        load = simulate(logits, spec, config, placements(kind, loads, gpus), gpus)
        row = {"model": name, "gpus": gpus, "batch": batch, "placement": kind, **values}
        rows.append(row | {field: getattr(load, field) for field in load.__slots__})

    for kind in ("contiguous", "balanced"):
        add(XShareConfig.off(spec), kind, warmup=None, per_gpu=None, budget=None)
        for per_gpu in _sweep(spec, gpus):
            config = XShareConfig(spec.num_experts, gpu_budget=per_gpu)
            add(config, kind, warmup=config.warmup, per_gpu=per_gpu, budget=None)
    for per_gpu in _sweep(spec, gpus):
        config = XShareConfig(per_gpu * gpus)
        add(config, "balanced", warmup=config.warmup, per_gpu=None, budget=config.budget)
    return rows


def _sweep(spec: RouterSpec, gpus: int) -> list[int]:
    """Budgets per GPU, up to SWEEP of them from the least that fits the router to two thirds of all."""
    least = -(-spec.top_k // gpus)
    most = 2 * spec.num_experts // (3 * gpus)
    return sorted({least + (most - least) * i // (SWEEP - 1) for i in range(SWEEP)})


def measure_shapes(spec: RouterSpec, progress: Progress) -> list[dict[str, Any]]:
    """Every model and batch at GPUS, and the first of MODELS also at the other GPU counts; `spec` is the
    shipped model's. `as softmax`: without groups and sigmoid, to see what those two do."""
    specs = {"shipped model": spec} | {name: shape(name).router for name in MODELS}
    cases = [(name, router, GPUS, batch) for name, router in specs.items() for batch in MODEL_BATCHES]
    first = specs[MODELS[0]]
    cases += [(MODELS[0], first, gpus, PLOTTED_BATCH) for gpus in GPU_COUNTS if gpus != GPUS]
    softmax = RouterSpec(first.num_experts, first.top_k, "softmax_renorm")
    cases.append((f"{MODELS[0]} as softmax", softmax, GPUS, PLOTTED_BATCH))
    task = progress.add_task("(b) published shapes", total=len(cases))
    rows = []
    for case in cases:
        rows += measure_shape(*case)
        progress.advance(task)
    return rows


# ---- Report -----------------------------------------------------------------------------------------------


def peak_of_own(rows: list[dict[str, Any]], batch: int, gpus: int) -> float:
    """Peak experts of the own routing, contiguous: what reductions are relative to."""
    (row,) = [r for r in rows if (r["batch"], r["gpus"], r["placement"]) == (batch, gpus, "contiguous")]
    return float(row["peak_experts"])


def best_at(rows: list[dict[str, Any]], loss: float) -> dict[str, Any] | None:
    """The least peak at no more than that relative loss of accuracy."""
    good = [row for row in rows if row["accuracy_change"] >= -loss]
    return min(good, key=lambda row: row["peak_experts"], default=None)


def choice_at_loss(rows: list[dict[str, Any]], loss: float) -> float:
    """The kept choice that costs that much accuracy on the shipped model: a straight line through 0 loss at
    1, least squares over the rows."""
    lost = [1 - row["kept_choice"] for row in rows]
    slope = sum(x * -row["accuracy_change"] for x, row in zip(lost, rows, strict=True)) / sum(
        x * x for x in lost
    )
    return 1 - loss / slope


def summarise_shape(rows: list[dict[str, Any]], threshold: float) -> dict[str, Any]:
    """Of one model, batch and GPU count: peaks, the kept choice at a third of the own peak, and the
    reduction at the kept choice of `threshold`."""
    own = {row["placement"]: row for row in rows if row["warmup"] is None}
    base = own["contiguous"]["peak_experts"]
    per_gpu = [row for row in rows if row["per_gpu"] is not None]
    whole = [row for row in rows if row["budget"] is not None]
    third = [row for row in per_gpu if row["peak_experts"] <= base / 3]
    fields = ("model", "gpus", "batch")
    return {field: rows[0][field] for field in fields} | {
        "own_peak": base,
        "own_peak_balanced": own["balanced"]["peak_experts"],
        "own_peak_rows": own["contiguous"]["peak_rows"],
        "best_at_a_third": max(third, key=lambda row: row["kept_choice"], default=None),
        "best_per_gpu_at_threshold": _least_peak(per_gpu, threshold),
        "best_budget_at_threshold": _least_peak(whole, threshold),
    }


def _least_peak(rows: list[dict[str, Any]], threshold: float) -> dict[str, Any] | None:
    good = [row for row in rows if row["kept_choice"] >= threshold]
    return min(good, key=lambda row: row["peak_experts"], default=None)


def make_report(
    shipped: ShippedModel, own: list[dict], rows: list[dict], shapes: list[dict], check: dict
) -> dict[str, Any]:
    warm = [row for row in rows if (row["batch"], row["gpus"]) == (BATCH, GPUS) and row["warmup"] in (1, 2)]
    threshold = choice_at_loss(warm, 0.01)
    cases = sorted({(row["model"], row["gpus"], row["batch"]) for row in shapes})
    grouped = [[r for r in shapes if (r["model"], r["gpus"], r["batch"]) == case] for case in cases]
    best = []
    for batch in (4, 8, 16, 32):
        at_batch = [row for row in rows if (row["batch"], row["gpus"]) == (batch, GPUS)]
        per_gpu = [row for row in at_batch if row["per_gpu"]]
        whole = [row for row in at_batch if not row["per_gpu"]]
        for loss in (0.005, 0.01, 0.0125, 0.02):
            found = {"budget_per_gpu": best_at(per_gpu, loss), "budget_per_layer": best_at(whole, loss)}
            best.append({"batch": batch, "loss": loss, "own": peak_of_own(own, batch, GPUS), **found})
    return {
        "command": "python benchmarks/expert_parallel.py --json benchmarks/results/expert_parallel.json",
        "machine": machine(),
        "documents": len(shipped.tokens),
        "tokens": shipped.own.hits.numel(),
        "accuracy": float(shipped.own.hits.float().mean()),
        "own": own,
        "shipped_model": rows,
        "best_at_loss": best,
        "kept_choice_at_1%_loss": threshold,
        "fit": check,
        "shapes": [summarise_shape(group, threshold) for group in grouped],
        "shape_rows": shapes,
    }


def tables(report: dict[str, Any]) -> list[Table]:
    own, rows = report["own"], report["shipped_model"]
    table = Table(
        title=f"(a) the shipped model, {report['tokens']} tokens, own accuracy {report['accuracy']:.2%}"
    )
    for name in ("batch", "GPUs", "budget", "per GPU", "warm-up", "placement"):
        table.add_column(name, justify="right")
    for name in ("active", "peak experts", "x less", "peak rows", "accuracy", "± 1 s.e.", "choice kept"):
        table.add_column(name, justify="right")
    for row in own:
        if (row["batch"] == BATCH or row["gpus"] == GPUS) and row["placement"] == "contiguous":
            cells = [row["batch"], row["gpus"], "own", "", "", row["placement"], *_numbers(row), "", "", ""]
            table.add_row(*map(str, cells[:8]), "1.00", *map(str, cells[8:]))
    for row in sorted(rows, key=lambda r: (r["batch"], r["gpus"], r["peak_experts"])):
        ratio = peak_of_own(own, row["batch"], row["gpus"]) / row["peak_experts"]
        active, peak, peak_rows = _numbers(row)
        cells = [
            row["batch"],
            row["gpus"],
            row["budget"],
            row["per_gpu"] or "",
            row["warmup"],
            row["placement"],
        ]
        cells += [active, peak, f"{ratio:.2f}", peak_rows, f"{row['accuracy_change']:+.2%}"]
        table.add_row(*map(str, cells), f"{row['standard_error']:.2%}", f"{row['kept_choice']:.1%}")
    return [table, _shapes_table(report)]


def _numbers(row: dict[str, Any]) -> list[str]:
    return [f"{row[name]:.2f}" for name in ("active_experts", "peak_experts", "peak_rows")]


def _shapes_table(report: dict[str, Any]) -> Table:
    threshold = report["kept_choice_at_1%_loss"]
    table = Table(
        title="(b) published shapes, fitted routers; the share of the choice kept stands for accuracy",
        caption="peak: experts on the fullest GPU (times less than own, contiguous); keeping "
        f"{threshold:.1%} of the choice costs 1 % of the accuracy on the shipped model",
    )
    for name in ("model", "GPUs", "batch", "own peak", "own, balanced", "kept at a third"):
        table.add_column(name, justify="right")
    table.add_column(f"budget per GPU\nat {threshold:.1%}", justify="right")
    table.add_column(f"budget per layer\nat {threshold:.1%}", justify="right")
    for s in report["shapes"]:
        third = s["best_at_a_third"]
        cells = [s["model"], s["gpus"], s["batch"], f"{s['own_peak']:.2f}", f"{s['own_peak_balanced']:.2f}"]
        cells.append(f"{third['kept_choice']:.1%}" if third else "not reached")
        for name in ("best_per_gpu_at_threshold", "best_budget_at_threshold"):
            peak = s[name]["peak_experts"] if s[name] else None
            cells.append(f"{peak:.2f} ({s['own_peak'] / peak:.2f}x)" if peak else "not reached")
        table.add_row(*map(str, cells))
    return table


def plot(report: dict[str, Any], path: Path) -> None:
    """Accuracy against the peak, peaks against the GPU count, and the shapes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.6), constrained_layout=True)
    _plot_accuracy(axes[0], report)
    _plot_gpu_counts(axes[1], report)
    _plot_shapes(axes[2], report)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    with write_aside(path) as aside:
        figure.savefig(aside, dpi=120)
    pyplot.close(figure)


def _plot_accuracy(axis: Any, report: dict[str, Any]) -> None:
    rows = [r for r in report["shipped_model"] if (r["batch"], r["gpus"]) == (BATCH, GPUS)]
    colours = ("tab:red", "tab:orange", "tab:green", "tab:blue")
    kinds = {"per layer, contiguous": "o", "per GPU, contiguous": "s", "per GPU, balanced": "D"}
    for label, marker in kinds.items():
        kind, placement = label.split(", ")
        for row in rows:
            if (row["placement"], bool(row["per_gpu"])) == (placement, kind == "per GPU"):
                xy = row["peak_experts"], 100 * row["accuracy_change"]
                axis.plot(*xy, marker, color=colours[row["warmup"]], fillstyle="none", markersize=6)
        axis.plot([], [], marker, color="black", fillstyle="none", linestyle="", label=f"budget {label}")
    for warmup, colour in enumerate(colours):
        axis.plot([], [], color=colour, linewidth=3, label=f"warm-up {warmup}")
    own = peak_of_own(report["own"], BATCH, GPUS)
    axis.axhline(-1, color="grey", linestyle="--", linewidth=1)
    axis.axvline(own / 3, color="black", linestyle="--", linewidth=1, label="a third of the own peak")
    single = peak_of_own(report["own"], 1, GPUS)
    axis.axvline(single, color="grey", linestyle=":", linewidth=2, label="own peak of one row alone")
    axis.plot([own], [0], "k*", markersize=10, linestyle="", label="own routing")
    axis.set_xlabel("experts on the fullest GPU")
    axis.set_ylabel("next-token accuracy, change in %")
    axis.set_title(f"shipped model, {GPUS} GPUs, batch {BATCH}", fontsize=10)


def _plot_gpu_counts(axis: Any, report: dict[str, Any]) -> None:
    own = [r for r in report["own"] if r["batch"] == BATCH]
    for kind, style in (("contiguous", "-"), ("balanced", "--")):
        points = [r["peak_experts"] for r in own if r["placement"] == kind]
        axis.plot(GPU_COUNTS, points, style, marker="o", color="black", label=f"own routing, {kind}")
    rows = [r for r in report["shipped_model"] if r["batch"] == BATCH and r["warmup"] == 2]
    compared = {2: 14, 4: 7, 8: 4, 16: 2}
    for kind, style in (("contiguous", "-"), ("balanced", "--")):
        points = [
            next(
                r["peak_experts"]
                for r in rows
                if (r["gpus"], r["per_gpu"], r["placement"], r["budget"]) == (gpus, per_gpu, kind, ALL)
            )
            for gpus, per_gpu in compared.items()
        ]
        axis.plot(GPU_COUNTS, points, style, marker="D", color="tab:green", label=f"budget per GPU, {kind}")
    axis.plot(GPU_COUNTS, list(compared.values()), "k_", markersize=14, label="the budget per GPU")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(GPU_COUNTS, [str(n) for n in GPU_COUNTS])
    axis.set_yticks((2, 4, 8, 16), ("2", "4", "8", "16"))
    axis.set_xlabel("GPUs")
    axis.set_ylabel("experts on the fullest GPU")
    axis.set_title(f"shipped model, batch {BATCH}, warm-up 2", fontsize=10)


def _plot_shapes(axis: Any, report: dict[str, Any]) -> None:
    for summary in report["shapes"]:
        case = (summary["model"], GPUS, PLOTTED_BATCH)
        if (summary["model"], summary["gpus"], summary["batch"]) != case:
            continue
        rows = [r for r in report["shape_rows"] if (r["model"], r["gpus"], r["batch"]) == case]
        points = _frontier([r for r in rows if r["per_gpu"] is not None and r["placement"] == "balanced"])
        x = [summary["own_peak"] / r["peak_experts"] for r in points]
        label = f"{summary['model']}, own peak {summary['own_peak']:.1f}"
        axis.plot(x, [100 * r["kept_choice"] for r in points], marker=".", label=label)
    axis.axvline(3, color="black", linestyle="--", linewidth=1)
    threshold = 100 * report["kept_choice_at_1%_loss"]
    axis.axhline(threshold, color="grey", linestyle="--", linewidth=1)
    axis.annotate("costs the shipped model 1 % of its accuracy", (2.1, threshold), fontsize=7, va="bottom")
    axis.set_xlim(left=1)
    axis.set_xlabel("experts on the fullest GPU, times less than own routing")
    axis.set_ylabel("affinity to the own choice that is kept, %")
    axis.set_title(f"fitted routers, {GPUS} GPUs, batch {PLOTTED_BATCH}, budget per GPU", fontsize=10)


def _frontier(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that no other beats in both the peak and the kept choice, by peak."""
    best: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda r: (r["peak_experts"], -r["kept_choice"])):
        if not best or row["kept_choice"] > best[-1]["kept_choice"]:
            best.append(row)
    return best


@click.command()
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS)
def main(json_path: Path) -> None:
    """Measure expert parallelism; writes JSON and, beside it, a picture. About 6 minutes on 2 quiet cores."""
    out = console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out) as progress:
        shipped = ShippedModel()
        shapes = measure_shapes(shipped.spec, progress)
        rows = measure_shipped(shipped, SETTINGS, progress)
        own, check = own_peaks(shipped), check_fit(shipped)
    report = make_report(shipped, own, rows, shapes, check)
    for table in tables(report):
        out.print(table)
    write_json(json_path, report)
    plot(report, json_path.with_suffix(".png"))
    out.print(f"Written: {json_path} and {json_path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
