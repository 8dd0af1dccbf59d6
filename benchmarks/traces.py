"""A real router, token by token: what a coverage saves, what a budget keeps, and how far `predict` is off.

    python benchmarks/traces.py --trace FILE [--json PATH]

FILE is a trace of a router's own choices, as `load_trace` reads it: ids and weights [requests, tokens,
layers, k]. The measured one is of gpt-oss-20b (96 requests, 24 layers, 4 of 32 experts). A batch of B is one
token of each of B requests, both drawn at random.

Squared weights and a row's own mass follow exactly from such a trace; what a row would do outside its own k
does not, nor does quality. So every rule here needs only each row's own choice, an expert outside it counts
as banned, and a rule is judged by the utility (squared weights) that it keeps at equal active experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

from xshare_trtllm import RouterSpec, XShareConfig, route
from xshare_trtllm.evaluation.peers import Rule, Steps, fewer_per_row, lynx, moe_spec, oea
from xshare_trtllm.evaluation.traces import load_trace
from xshare_trtllm.planning.cost import Loads
from xshare_trtllm.report import console, machine, write_aside, write_json

BATCHES = (4, 8, 16, 32, 64)
STEPS = 120  # batches of each size
COVERAGES = (0.99, 0.97, 0.95, 0.90)
BUDGET_SHARES = (1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)  # of the experts
PLOTTED_BATCH = 16
LAGS = (1, 2, 4, 16)
PER_ROW = {"fewer per row": fewer_per_row, "OEA, simplified": oea}
PER_BATCH = {"top-k mass (MoE-Spec)": moe_spec, "frequency (Lynx)": lynx}
RESULTS = Path(__file__).parent / "results" / "traces.json"


class Trace:
    """The rows' own choices, best first: ids int64 and weights fp32 [requests, tokens, layers, k]."""

    def __init__(self, path: Path) -> None:
        ids, weights = load_trace(path)
        order = weights.sort(dim=-1, descending=True, stable=True).indices
        self.ids, self.weights = ids.gather(-1, order), weights.gather(-1, order)
        self.requests, self.tokens, self.layers, top_k = ids.shape
        self.spec = RouterSpec(int(ids.max()) + 1, top_k, "topk_softmax")
        self.budgets = sorted({max(top_k, round(s * self.spec.num_experts)) for s in BUDGET_SHARES})

    def steps(self, batch: int, count: int) -> Tensor:
        """Router logits [layers, count, batch, E] of decode steps with these choices; the same for the same
        arguments. What a row did not choose is banned."""
        generator = torch.Generator().manual_seed(batch)
        request = torch.stack(
            [torch.randperm(self.requests, generator=generator)[:batch] for _ in range(count)]
        )
        token = torch.randint(0, self.tokens, (count, batch), generator=generator)
        ids, weights = (x[request, token].movedim(2, 0) for x in (self.ids, self.weights))
        logits = torch.full((*ids.shape[:-1], self.spec.num_experts), -torch.inf)
        return logits.scatter_(-1, ids, weights.log())


# ---- Measuring ---------------------------------------------------------------------------------------------


def measure(trace: Trace, batch: int, steps: int) -> dict[str, Any]:
    """Means over layers and steps, with the 95 % interval over steps where two rules are compared."""
    layers = [Steps.of(x, trace.spec, None, i) for i, x in enumerate(trace.steps(batch, steps))]
    own = float(_mean(layers, lambda layer: shared(layer, XShareConfig.off(trace.spec)))[0])
    ours = []
    for name, config in _configs(trace).items():
        experts, kept = _mean(layers, lambda layer, config=config: shared(layer, config)).tolist()
        row = {"setting": name, "experts": experts, "saved": 1 - experts / own, "kept_utility": kept}
        ours.append(row)
    peers = [_compare(layers, *peer) for peer in _peers(trace)]
    return {"batch": batch, "own": own, "ours": ours, "peers": peers}


def _mean(layers: list[Steps], outcome: Callable[[Steps], Tensor]) -> Tensor:
    """Of [steps, n] of each layer: [n]."""
    return torch.stack([outcome(layer) for layer in layers]).mean((0, 1))


def shared(layer: Steps, config: XShareConfig | list[XShareConfig]) -> Tensor:
    """Active experts and utility kept by this project's choice, fp64 [steps, 2]; one configuration for all
    steps or one for each."""
    configs = config if isinstance(config, list) else [config] * len(layer.logits)
    routed = [route(step, layer.spec, c) for step, c in zip(layer.logits, configs, strict=True)]
    values = [(float(r.active_experts.sum()), r.stats.kept_utility) for r in routed]
    return torch.tensor(values, dtype=torch.float64)


def followed(layer: Steps, rule: Rule) -> Tensor:
    """Active experts and utility kept by a peer's rule, fp64 [steps, 2]."""
    ids, weights = rule(layer)
    utility = torch.zeros_like(layer.ranking).scatter_(2, layer.own, layer.shares.square())
    used = torch.zeros_like(utility).scatter_add_(2, ids, (weights > 0).float()) > 0
    kept = (utility * used).sum((1, 2)) / utility.sum((1, 2))
    return torch.stack([used.any(1).sum(1), kept], 1).double()


def _compare(layers: list[Steps], name: str, n: int, rule: Rule) -> dict[str, Any]:
    """A peer, and what as many of our experts keep in the same layer and step (at least k: no choice here is
    smaller)."""
    by_layer = []
    for layer in layers:
        theirs = followed(layer, rule)
        sizes = [max(int(experts), layer.spec.top_k) for experts in theirs[:, 0]]
        ours = shared(layer, [XShareConfig(size, warmup=0) for size in sizes])
        by_layer.append(torch.cat([theirs, ours[:, 1:]], 1))
    values = torch.stack(by_layer).mean(0)  # [steps, 3]
    experts, kept, ours_kept = values.mean(0).tolist()
    difference = values[:, 2] - values[:, 1]
    half = 1.96 * float(difference.std()) / len(difference) ** 0.5
    row = {"rule": name, "n": n, "experts": experts, "kept_utility": kept, "ours_kept": ours_kept}
    return row | {"difference": float(difference.mean()), "interval": half}


def _configs(trace: Trace) -> dict[str, XShareConfig]:
    configs = {"own": XShareConfig.off(trace.spec)}
    for warmup in (1, 0):
        for c in COVERAGES:
            configs[f"coverage {c:.2f}, warm-up {warmup}"] = XShareConfig(coverage=c, warmup=warmup)
    return configs | {f"budget {m}, warm-up 0": XShareConfig(m, warmup=0) for m in trace.budgets}


def _peers(trace: Trace) -> Iterator[tuple[str, int, Rule]]:
    for name, rule in PER_ROW.items():
        yield from ((name, n, rule(n)) for n in range(1, trace.spec.top_k))
    for name, rule in PER_BATCH.items():
        yield from ((name, m, rule(m)) for m in trace.budgets)


def describe(trace: Trace) -> dict[str, Any]:
    """Why the experts are as many as they are: how unequal their loads are, and how alike the rows.

    independent_rows  active experts by batch if every row chose each expert independently with the loads
    overlap           share of a token's choice that is also the choice of another: `lag` later, anywhere in
                      the same request, and in another request
    """
    experts, top_k = trace.spec.num_experts, trace.spec.top_k
    chosen = torch.zeros(*trace.ids.shape[:-1], experts).scatter_(-1, trace.ids, 1)
    load = chosen.mean((0, 1))
    by_request = chosen.mean(1)
    mean_of_others = (by_request.sum(0) - by_request) / (trace.requests - 1)
    overlap = {
        str(lag): float((chosen[:, lag:] * chosen[:, :-lag]).sum(-1).mean()) / top_k
        for lag in LAGS
        if lag < trace.tokens
    }
    overlap["same request"] = float(by_request.square().sum(-1).mean()) / top_k
    overlap["other request"] = float((by_request * mean_of_others).sum(-1).mean()) / top_k
    return {
        "load_variation_by_layer": (load.std(-1) / load.mean(-1)).tolist(),
        "load_by_layer": load.sort(-1).values.tolist(),
        "independent_rows": {b: float((1 - (1 - load) ** b).sum(-1).mean()) for b in BATCHES},
        "overlap": overlap,
        "squared_weights": float(trace.weights.square().sum(-1).mean()),
    }


def predicted(trace: Trace) -> list[dict[str, Any]]:
    """What the routers of `xshare predict` do at each batch: counts, coverages and budgets."""
    loads = Loads(trace.spec)
    rows = []
    for batch in BATCHES:
        own = loads.at(batch, XShareConfig.off(trace.spec)).experts
        settings = _configs(trace)
        settings.pop("own")
        done = {name: loads.at(batch, config) for name, config in settings.items()}
        ours = [
            {"setting": name, "experts": load.experts, "saved": 1 - load.experts / own}
            | {"kept_utility": load.kept_utility}
            for name, load in done.items()
        ]
        rows.append({"batch": batch, "own": own, "ours": ours})
    return rows


# ---- Report ------------------------------------------------------------------------------------------------


def coverage_table(report: dict[str, Any]) -> Table:
    table = Table(
        title="Active experts by coverage, and utility kept by budget; `predict` in brackets",
        caption="with a warm-up of 1; budgets without",
    )
    budget = f"budget {report['budgets'][1]}, warm-up 0"
    names = [f"coverage {c:.2f}, warm-up 1" for c in COVERAGES]
    for name in (
        "batch",
        "own",
        *(f"coverage\n{c:.2f}" for c in COVERAGES),
        f"budget\n{report['budgets'][1]} keeps",
    ):
        table.add_column(name, justify="right")
    for real, drawn in zip(report["real"], report["predicted"], strict=True):
        ours, theirs = ({row["setting"]: row for row in side["ours"]} for side in (real, drawn))
        cells = [str(real["batch"]), f"{real['own']:.2f} ({drawn['own']:.2f})"]
        for name in names:
            cells.append(
                f"{ours[name]['experts']:.2f} ({-ours[name]['saved']:+.1%}, {-theirs[name]['saved']:+.1%})"
            )
        cells.append(f"{ours[budget]['kept_utility']:.1%} ({theirs[budget]['kept_utility']:.1%})")
        table.add_row(*cells)
    return table


def peers_table(report: dict[str, Any]) -> Table:
    table = Table(title="Utility kept at equal active experts, by rules that need only the rows' own choice")
    for name in ("batch", "rule", "n", "active", "keeps", "ours keeps", "difference, points"):
        table.add_column(name, justify="right")
    for real in report["real"]:
        for row in real["peers"]:
            points = f"{100 * row['difference']:+.2f} ± {100 * row['interval']:.2f}"
            numbers = (
                f"{row['experts']:.2f}",
                f"{row['kept_utility']:.1%}",
                f"{row['ours_kept']:.1%}",
                points,
            )
            table.add_row(str(real["batch"]), row["rule"], str(row["n"]), *numbers)
    return table


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.8), constrained_layout=True)
    real = {row["batch"]: row for row in report["real"]}
    _plot_rules(axes[0], real[PLOTTED_BATCH])
    _plot_batches(axes[1], report)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    with write_aside(path) as aside:
        figure.savefig(aside, dpi=110)
    pyplot.close(figure)


def _plot_rules(axis: Any, real: dict[str, Any]) -> None:
    ours = [r for r in real["ours"] if r["setting"].endswith("warm-up 0")]
    for kind, style in (("budget", "ko-"), ("coverage", "r*")):
        points = [r for r in ours if r["setting"].startswith(kind)]
        x, y = ([r[field] for r in points] for field in ("experts", "kept_utility"))
        axis.plot(x, [100 * v for v in y], style, label=f"squared weights, {kind}", markersize=8, zorder=3)
    for name in (*PER_ROW, *PER_BATCH):
        points = [r for r in real["peers"] if r["rule"] == name]
        x, y = ([r[field] for r in points] for field in ("experts", "kept_utility"))
        axis.plot(x, [100 * v for v in y], "s--", label=name, markersize=4)
    axis.axvline(real["own"], color="grey", linestyle=":", label="own routing")
    axis.set_xlabel("active experts")
    axis.set_ylabel("utility (squared weights) kept, %")
    axis.set_title(f"real router, batch {PLOTTED_BATCH}", fontsize=10)


def _plot_batches(axis: Any, report: dict[str, Any]) -> None:
    settings = {"own routing": None} | {
        f"coverage {c:.2f}": f"coverage {c:.2f}, warm-up 1" for c in COVERAGES
    }
    for colour, (label, setting) in enumerate(settings.items()):
        for side, style in (("real", "o-"), ("predicted", "x--")):
            rows = [{r["setting"]: r["experts"] for r in b["ours"]} | {None: b["own"]} for b in report[side]]
            counts = [row[setting] for row in rows]
            axis.plot(BATCHES, counts, style, color=f"C{colour}", label=label if side == "real" else None)
    axis.plot([], [], "kx--", label="routers of `predict`")
    axis.set_xscale("log", base=2)
    axis.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
    axis.set_xlabel("batch")
    axis.set_ylabel("active experts")
    axis.set_title("real router and the routers of `predict`", fontsize=10)


@click.command()
@click.option(
    "--trace",
    "path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    envvar="XSHARE_TRACE",
    required=True,
    help="An .npz file of a router's own choices [XSHARE_TRACE].",
)
@click.option("--steps", type=click.IntRange(2), default=STEPS, show_default=True, help="Of each batch size.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS)
def main(path: Path, steps: int, json_path: Path) -> None:
    """Measure a real router's trace; writes JSON and, beside it, a picture. A minute or two on one core."""
    out = console()
    try:
        trace = Trace(path)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    report = {
        "command": f"python benchmarks/traces.py --trace FILE --steps {steps}",
        "machine": machine(),
        "trace": {
            "file": path.name,
            "requests": trace.requests,
            "tokens": trace.tokens,
            "layers": trace.layers,
        },
        "budgets": trace.budgets,
        "routers": describe(trace),
        "real": [
            measure(trace, batch, steps) for batch in track(BATCHES, console=out, description="batches")
        ],
        "predicted": predicted(trace),
    }
    out.print(coverage_table(report))
    out.print(peers_table(report))
    write_json(json_path, report)
    plot(report, json_path.with_suffix(".png"))
    out.print(f"Written: {json_path} and {json_path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
