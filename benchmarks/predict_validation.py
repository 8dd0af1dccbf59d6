"""The cost model against figures that others measured, and against this project's where they exist.

    python benchmarks/predict_validation.py [--json PATH]

Fits the one number of the model that is fitted (`Assumptions.layer_overhead`) to the public step times of
plain routing, and predicts the public gains, which it has not seen. The routers behind it are compared with
the active experts of the real gpt-oss-20b, and with traces of the shipped model that they were not fitted to.
Where results/moe_layer_gpu.json exists
(made on a GPU by moe_layer_gpu.py), its MoE-layer times are compared as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import click
from rich.table import Table

from xshare_trtllm import RouterSpec, XShareConfig
from xshare_trtllm.evaluation.traces import SyntheticRouters, fit, record_shipped, statistics
from xshare_trtllm.planning.cost import (
    GPUS,
    Assumptions,
    Loads,
    Predictor,
    expert_time,
    fit_layer_overhead,
    validate,
)
from xshare_trtllm.planning.shapes import CONFIGS, ModelShape, shape
from xshare_trtllm.report import console, machine, write_json

RESULTS = Path(__file__).parent / "results"
MOE_LAYER = RESULTS / "moe_layer_gpu.json"
PAPER_BATCH, PAPER_GAIN = 16, 0.13  # gpt-oss-120b with 30 % fewer experts, arXiv 2602.07265
# Active experts of gpt-oss-20b in mixed batches: 494 requests of the public repository
# AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting.
REAL_EXPERTS = {4: 11.98, 8: 17.90, 16: 23.07, 32: 26.66}
LENGTH = 256  # tokens of a document


def public_rows() -> list[dict[str, float]]:
    """Step times in ms and gains of the public figures, and predicted."""
    return [
        {
            "batch": published.batch,
            "experts_before": prediction.own.experts,
            "experts_after": prediction.shared.experts,
            "own_ms": 1e3 * published.batch / published.own,
            "own_ms_predicted": 1e3 * prediction.before.total,
            "shared_ms": 1e3 * published.batch / published.shared,
            "shared_ms_predicted": 1e3 * prediction.after.total,
            "gain": published.gain,
            "gain_predicted": prediction.gain,
        }
        for published, prediction in validate()
    ]


def paper_rows() -> list[dict[str, Any]]:
    """The paper's gain at 30 % fewer experts; its GPU is not in the figures used here, so all of ours."""
    rows = []
    for gpu in GPUS.values():
        predictor = Predictor(shape("gpt-oss-120b"), gpu)
        own = predictor.loads.at(PAPER_BATCH, XShareConfig.off(predictor.shape.router)).experts
        budget = round(0.7 * own)
        predicted = predictor.at(PAPER_BATCH, XShareConfig(budget)).gain
        rows.append({"gpu": gpu.name, "budget": budget, "gain": PAPER_GAIN, "gain_predicted": predicted})
    return rows


def real_router_rows() -> list[dict[str, Any]]:
    """Active experts of the real gpt-oss-20b, and predicted."""
    loads = Loads(shape("gpt-oss-20b").router)
    rows = []
    for batch, real in REAL_EXPERTS.items():
        predicted = loads.at(batch, XShareConfig.off(loads.spec)).experts
        rows.append({"batch": batch, "experts": real, "experts_predicted": predicted})
    return rows


def shipped_fit(seeds: int = 4) -> dict[str, Any]:
    """Statistics of every second document's traces, and of routers fitted to the other documents."""
    logits = record_shipped()
    spec = RouterSpec(logits.shape[-1], 8, "softmax_renorm")
    half, documents = fit(logits[:, ::2]), logits.shape[1] // 2
    routers = [SyntheticRouters(half, spec, seed) for seed in range(seeds)]
    drawn = [statistics(router.logits(documents, LENGTH), spec.top_k) for router in routers]
    traces = statistics(logits[:, 1::2], spec.top_k)
    fitted = {
        name: {key: mean(one[name][key] for one in drawn) for key in values}
        for name, values in traces.items()
    }
    return {"held_out_traces": traces, "fitted_routers": fitted}


def moe_layer_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Microseconds of one MoE layer with bf16 weights, by active experts, 64 rows."""
    gpu = next(gpu for key, gpu in GPUS.items() if key.upper() in report["machine"]["gpu"].upper())
    rows = []
    for name, result in report["results"].items():
        known = {"qwen3-235b": "qwen3-235b-a22b"}.get(name, name)
        plain = {k: v for k, v in CONFIGS[known].items() if k != "quantization_config"}
        bf16 = ModelShape.from_hf_config(plain | {"torch_dtype": "bfloat16"}, name)
        for active, measured in result["by_active_experts"].items():
            predicted = expert_time(bf16, gpu, int(active), 64 * bf16.router.top_k, assumptions=Assumptions())
            row = {"model": name, "gpu": gpu.name, "active_experts": int(active)}
            rows.append(row | {"us": measured, "us_predicted": 1e6 * predicted})
    return rows


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name.replace("_", "\n"), justify="right")
    for row in rows:
        cells = (
            f"{v:+.1%}" if "gain" in k else f"{v:.2f}" if isinstance(v, float) else str(v)
            for k, v in row.items()
        )
        table.add_row(*cells)
    return table


@click.command()
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Where to write.")
def main(json_path: Path | None) -> None:
    """Compare the cost model with measurements."""
    out = console()
    fitted = fit_layer_overhead()
    public, paper, real = public_rows(), paper_rows(), real_router_rows()
    errors = [abs(row["gain_predicted"] - row["gain"]) for row in public]
    steps = [abs(row["own_ms_predicted"] / row["own_ms"] - 1) for row in public]
    out.print(
        f"layer overhead fitted to plain routing: {1e6 * fitted:.0f} us (the default is "
        f"{1e6 * Assumptions().layer_overhead:.0f} us)"
    )
    out.print(_table("gpt-oss-120b on one H200, budget 24 of 128: public figures and predictions", public))
    out.print(
        f"step time of plain routing: error {mean(steps):.1%} on average, {max(steps):.1%} at worst; "
        f"gain: {100 * mean(errors):.1f} points on average, {100 * max(errors):.1f} at worst"
    )
    out.print(_table("gpt-oss-120b, batch 16, 30 % fewer experts: the paper's gain and predictions", paper))
    worst = max(abs(row["experts_predicted"] / row["experts"] - 1) for row in real)
    out.print(_table(f"gpt-oss-20b, active experts of 32: real and predicted, {worst:.1%} at worst", real))
    shipped = shipped_fit()
    for name, values in shipped.items():
        out.print(f"shipped model, {name.replace('_', ' ')}: {json.dumps(values)}")
    report: dict[str, Any] = {
        "command": "python benchmarks/predict_validation.py --json PATH",
        "machine": machine(),
        "fitted_layer_overhead_us": 1e6 * fitted,
        "public": public,
        "gain_error": {"mean": mean(errors), "worst": max(errors)},
        "own_step_error": {"mean": mean(steps), "worst": max(steps)},
        "paper": paper,
        "real_router": real,
        "shipped_model": shipped,
    }
    if MOE_LAYER.exists():
        rows = moe_layer_rows(json.loads(MOE_LAYER.read_text(encoding="utf-8")))
        report["moe_layer"] = rows
        out.print(_table("one MoE layer, bf16, 64 rows: measured and predicted", rows))
    else:
        out.print(f"No MoE-layer times: {MOE_LAYER.name} does not exist; moe_layer_gpu.py makes it on a GPU.")
    if json_path:
        write_json(json_path, report)


if __name__ == "__main__":
    main()
