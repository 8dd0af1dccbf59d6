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

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

from xshare_trtllm import RouterSpec, XShareConfig, route
from xshare_trtllm.evaluation.traces import load_trace
from xshare_trtllm.planning.cost import Loads
from xshare_trtllm.report import console, machine, write_aside, write_json

BATCHES = (4, 8, 16, 32, 64)
STEPS = 120  # batches of each size
COVERAGES = (0.99, 0.97, 0.95, 0.90)
BUDGET_SHARES = (1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)  # of the experts
PLOTTED_BATCH = 16
LAGS = (1, 2, 4, 16)
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

    def steps(self, batch: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids and weights [layers, batch, k] of `count` decode steps; the same for the same arguments."""
        generator = torch.Generator().manual_seed(batch)
        for _ in range(count):
            request = torch.randperm(self.requests, generator=generator)[:batch]
            token = torch.randint(0, self.tokens, (batch,), generator=generator)
            yield tuple(x[request, token].transpose(0, 1) for x in (self.ids, self.weights))


# ---- The rules ---------------------------------------------------------------------------------------------
# A peer's rule gives, from ids and weights [rows, k] and its own number n, the slots bool [rows, k] that it
# uses. Its active experts are those of the slots in use.

Rule = Callable[[Tensor, Tensor, int, int], Tensor]


def fewer_per_row(ids: Tensor, weights: Tensor, experts: int, n: int) -> Tensor:
    """Plain reduction: each row uses its n best."""
    return (torch.arange(ids.shape[1]) < n).expand(ids.shape)


def oea(ids: Tensor, weights: Tensor, experts: int, n: int) -> Tensor:
    """OEA (arXiv 2511.02237), simplified form: what is among any row's n best serves every row that wants
    it."""
    active = torch.zeros(experts, dtype=torch.bool)
    active[ids[:, :n].flatten()] = True
    return active[ids]


def mass(ids: Tensor, weights: Tensor, experts: int, n: int) -> Tensor:
    """MoE-Spec (arXiv 2602.16052): the n experts with the largest sum of the rows' own weights."""
    return _largest(torch.zeros(experts).index_add_(0, ids.flatten(), weights.flatten()), n)[ids]


def frequency(ids: Tensor, weights: Tensor, experts: int, n: int) -> Tensor:
    """Lynx (arXiv 2411.08982): the n experts that most rows choose."""
    return _largest(torch.bincount(ids.flatten(), minlength=experts), n)[ids]


def _largest(values: Tensor, n: int) -> Tensor:
    """Bool [E]; the lower id wins a tie."""
    active = torch.zeros(len(values), dtype=torch.bool)
    active[values.sort(descending=True, stable=True).indices[:n]] = True
    return active


PER_ROW: dict[str, Rule] = {"fewer per row": fewer_per_row, "OEA, simplified": oea}
PER_BATCH: dict[str, Rule] = {"top-k mass (MoE-Spec)": mass, "frequency (Lynx)": frequency}


def choice_logits(ids: Tensor, weights: Tensor, experts: int) -> Tensor:
    """[..., E]: logits of a `topk_softmax` router with that choice; what a row did not choose is banned."""
    logits = torch.full((*ids.shape[:-1], experts), -torch.inf)
    return logits.scatter_(-1, ids, weights.log())


def shared(logits: Tensor, spec: RouterSpec, config: XShareConfig) -> tuple[float, float]:
    """Active experts and utility kept, of this project's choice."""
    routing = route(logits, spec, config)
    return float(routing.active_experts.sum()), routing.stats.kept_utility


# ---- Measuring ---------------------------------------------------------------------------------------------


def measure(trace: Trace, batch: int, steps: int) -> dict[str, Any]:
    """Means over layers and steps, with the 95 % interval over steps where two rules are compared."""
    spec = trace.spec
    values: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for ids, weights in trace.steps(batch, steps):
        layers = list(zip(ids, weights, choice_logits(ids, weights, spec.num_experts), strict=True))
        for name, config in _configs(trace).items():
            ours = [shared(logits, spec, config) for _, _, logits in layers]
            values["ours", name].append(torch.tensor(ours).mean(0))
        for name, rule, n in _peers(trace):
            pairs = [_compare(rule, n, *layer, spec) for layer in layers]
            values["peer", name, n].append(torch.tensor(pairs).mean(0))
    ours = {key[1]: torch.stack(v).mean(0).tolist() for key, v in values.items() if key[0] == "ours"}
    own = ours.pop("own")[0]
    return {
        "batch": batch,
        "own": own,
        "ours": [
            {"setting": name, "experts": experts, "saved": 1 - experts / own, "kept_utility": kept}
            for name, (experts, kept) in ours.items()
        ],
        "peers": [_peer_row(*key[1:], torch.stack(v)) for key, v in values.items() if key[0] == "peer"],
    }


def _configs(trace: Trace) -> dict[str, XShareConfig]:
    configs = {"own": XShareConfig.off(trace.spec)}
    for warmup in (1, 0):
        for c in COVERAGES:
            configs[f"coverage {c:.2f}, warm-up {warmup}"] = XShareConfig(coverage=c, warmup=warmup)
    return configs | {f"budget {m}, warm-up 0": XShareConfig(m, warmup=0) for m in trace.budgets}


def _peers(trace: Trace) -> Iterator[tuple[str, Rule, int]]:
    for name, rule in PER_ROW.items():
        yield from ((name, rule, n) for n in range(1, trace.spec.top_k))
    for name, rule in PER_BATCH.items():
        yield from ((name, rule, m) for m in trace.budgets)


def _compare(
    rule: Rule, n: int, ids: Tensor, weights: Tensor, logits: Tensor, spec: RouterSpec
) -> tuple[float, float, float]:
    """The peer's active experts and the utility it keeps, and what as many of ours keep. A set below k
    experts is filled up to k by ours, so it is compared with the peer's only from k on."""
    used = rule(ids, weights, spec.num_experts, n)
    squares = weights.square()
    active = len(ids[used].unique())
    kept = float((squares * used).sum() / squares.sum())
    config = XShareConfig(max(active, spec.top_k), warmup=0)
    return float(active), kept, shared(logits, spec, config)[1]


def _peer_row(name: str, n: int, values: Tensor) -> dict[str, Any]:
    """values [steps, 3]."""
    experts, kept, ours = values.mean(0).tolist()
    difference = values[:, 2] - values[:, 1]
    half = 1.96 * float(difference.std()) / len(difference) ** 0.5
    row = {"rule": name, "n": n, "experts": experts, "kept_utility": kept, "ours_kept": ours}
    return row | {"difference": float(difference.mean()), "interval": half}


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
