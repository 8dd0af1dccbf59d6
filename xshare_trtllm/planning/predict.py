"""`xshare predict`: what XShare would gain for a model on a GPU, by the cost model of `planning.cost`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.table import Table

    from xshare_trtllm.config import XShareConfig
    from xshare_trtllm.planning.cost import Prediction, Predictor
    from xshare_trtllm.planning.shapes import ModelShape
    from xshare_trtllm.planning.speculation import SpeculativeStep

COVERAGE = 0.97


@click.command()
@click.option("--model", required=True, help="A known model (gpt-oss-120b, ...) or a config.json.")
@click.option("--gpu", required=True, help="h100, h200, a100, b200, gb200, rtx5090, thor, spark or orin.")
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(1, 4096),
    multiple=True,
    default=(4, 8, 16, 32, 64),
    show_default=True,
    help="Rows of a decode step; may be repeated.",
)
@click.option(
    "--coverage",
    type=click.FloatRange(0, 1, min_open=True),
    help=f"Share of what the rows ask for that is enough [{COVERAGE}, without --budget].",
)
@click.option("--budget", type=click.IntRange(1), help="Experts that may be active in a layer.")
@click.option(
    "--warmup", type=click.IntRange(0), default=1, show_default=True, help="Experts that each row keeps."
)
@click.option(
    "--context", type=click.IntRange(1), default=1024, show_default=True, help="Cached tokens per row."
)
@click.option("--draft-rows", type=click.IntRange(2), help="Rows that one request verifies: speculation.")
@click.option("--accepted", type=click.FloatRange(1), help="Tokens that a request gains per step then.")
@click.option("--draft-passes", type=click.IntRange(0), help="Passes of the draft model [--draft-rows - 1].")
@click.option("--tensor-parallel", type=click.IntRange(1), default=1, help="GPUs that split every matrix.")
@click.option("--expert-parallel", type=click.IntRange(1), default=1, help="GPUs that share the experts.")
@click.option(
    "--weight-bits",
    type=click.FloatRange(1, 32),
    help="Bits per weight, scales included, in place of what the config.json says.",
)
def predict(
    model: str,
    gpu: str,
    batches: tuple[int, ...],
    coverage: float | None,
    budget: int | None,
    warmup: int,
    context: int,
    draft_rows: int | None,
    accepted: float | None,
    draft_passes: int | None,
    tensor_parallel: int,
    expert_parallel: int,
    weight_bits: float | None,
) -> None:
    """Predict the gain of a coverage from the model's shape and the GPU's data sheet.

    A calculation, not a measurement: its error against the public figures is printed below the table. With
    --expert-parallel the coverage limits the fullest GPU, and a budget without one is spread evenly. With
    --draft-rows and --accepted: when speculative decoding pays, and what the coverage does to that.
    """
    from xshare_trtllm.planning.cost import GPUS, Parallel, Predictor
    from xshare_trtllm.report import console

    try:
        if gpu.lower() not in GPUS:
            raise ValueError(f"gpu {gpu!r} is not known; known are {', '.join(GPUS)}")
        parallel = Parallel(tensor_parallel, expert_parallel)
        predictor = Predictor(_shape(model, weight_bits), GPUS[gpu.lower()], context, parallel)
        if coverage is None and budget is None:
            coverage = COVERAGE
        config = predictor.loads.config(coverage, budget, warmup)
        if draft_rows is not None or accepted is not None:
            return _speculation(predictor, batches, config, draft_rows, accepted, draft_passes)
        predictions = [predictor.at(batch, config) for batch in sorted(set(batches))]
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    out = console()
    out.print(_table(predictor, predictions, config))
    for line in (*_memory(predictor), _break_even(predictor, config), _error()):
        out.print(line)


def _shape(model: str, weight_bits: float | None) -> ModelShape:
    from xshare_trtllm.planning.shapes import CONFIGS, ModelShape

    config = CONFIGS.get(model.lower())
    if config is not None:
        return ModelShape.from_hf_config(config, model.lower(), weight_bits=weight_bits)
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if path.suffix != ".json":
        raise ValueError(
            f"model {model!r} is not known; known are {', '.join(CONFIGS)}, or a config.json or its folder"
        )
    config = _read(path)
    try:
        return ModelShape.from_hf_config(config, weight_bits=weight_bits)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    """A config.json, with or without a byte order mark."""
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: a configuration has fields, this is a {type(config).__name__}")
    return config


def _table(predictor: Predictor, predictions: list[Prediction], config: XShareConfig) -> Table:
    from rich.table import Table

    router = predictor.shape.router
    per_gpu = predictor.parallel.expert > 1
    gpus = max(predictor.parallel.tensor, predictor.parallel.expert)
    limits = [] if config.coverage is None else [f"coverage {config.coverage}"]
    limits += [] if config.budget is None else [f"budget {config.budget} of {router.num_experts} experts"]
    table = Table(
        title=f"{predictor.shape.name} on {gpus} x {predictor.gpu.name}: {', '.join(limits)}, "
        f"{predictor.context} tokens of context",
        caption="times in ms per decode step, own routing > XShare; gain at most: an engine without overhead",
    )
    experts = "peak experts\nper GPU" if per_gpu else "active experts\nper layer"
    columns = ("batch", experts, "utility\nkept", "experts", "weights", "KV\ncache", "exchange")
    for name in (*columns, "XShare's\nrouting", "over-\nhead", "step", "gain", "gain\nat most"):
        table.add_column(name, justify="right")
    for p in predictions:
        before, after = p.before, p.after
        table.add_row(
            str(p.batch),
            f"{p.own.peak_experts:.1f} > {p.shared.peak_experts:.1f}",
            f"{p.shared.kept_utility:.0%}",
            f"{1e3 * before.experts:.2f} > {1e3 * after.experts:.2f}",
            *(f"{1e3 * part:.2f}" for part in (before.weights, before.kv_cache, before.exchange)),
            f"{1e3 * after.routing:.2f}",
            f"{1e3 * before.overhead:.2f}",
            f"{1e3 * before.total:.2f} > {1e3 * after.total:.2f}",
            f"{p.gain:+.1%}",
            f"{p.gain_without_overhead:+.1%}",
        )
    return table


def _memory(predictor: Predictor) -> tuple[str, ...]:
    gpus = max(predictor.parallel.tensor, predictor.parallel.expert)
    needed, there = predictor.weight_bytes / 1e9, gpus * predictor.gpu.memory / 1e9
    if needed < there:
        return ()
    return (f"The weights take {needed:.0f} GB, the memory is {there:.0f} GB: more GPUs are needed.",)


def _break_even(predictor: Predictor, config: XShareConfig) -> str:
    from xshare_trtllm.planning.cost import BATCHES

    span = predictor.break_even(config)
    if span is None:
        return f"Break-even: none from batch 1 to {BATCHES[-1]}; leave XShare off."
    lower, upper = span
    if upper is None:
        return f"Break-even: gains from batch {lower} on, and still at {BATCHES[-1]}; below, leave it off."
    return f"Break-even: gains from batch {lower} to {upper}; max_rows={upper}; below {lower}, leave it off."


def _error() -> str:
    from xshare_trtllm.planning.cost import validate

    pairs = [(published.gain, prediction.gain) for published, prediction in validate()]
    errors = [abs(theirs - ours) for theirs, ours in pairs]
    listed = ", ".join(f"{theirs:+.0%} ({ours:+.0%})" for theirs, ours in pairs)
    return (
        f"Known error: {100 * sum(errors) / len(errors):.0f} points on average, {100 * max(errors):.0f} at "
        f"worst, on the public gains of gpt-oss-120b on one H200 at batch 4, 8, 16, 32, and predicted in "
        f"brackets: {listed}. "
        "Active experts are those of fitted routers; utility kept is no accuracy."
    )


# ---- Speculation ------------------------------------------------------------------------------------------


def _speculation(
    predictor: Predictor,
    batches: tuple[int, ...],
    config: XShareConfig,
    rows: int | None,
    accepted: float | None,
    passes: int | None,
) -> None:
    from xshare_trtllm.planning.speculation import Draft, SpeculativePredictor
    from xshare_trtllm.report import console

    if rows is None or accepted is None:
        raise ValueError("speculation needs both --draft-rows and --accepted")
    draft = Draft(rows, accepted, rows - 1 if passes is None else passes)
    speculative = SpeculativePredictor(predictor)
    steps = [speculative.at(batch, draft, config) for batch in sorted(set(batches))]
    out = console()
    out.print(_speculation_table(predictor, steps, config))
    losing = [step for step in steps if step.shared_speedup < 1]
    for step in losing:
        out.print(
            f"Batch {step.batch}: leave speculation off. It pays from {step.shared_break_even:.2f} accepted "
            f"tokens per step with XShare, from {step.own_break_even:.2f} without; {accepted} are given."
        )
    for line in (*_memory(predictor), _speculation_error()):
        out.print(line)


def _speculation_table(predictor: Predictor, steps: list[SpeculativeStep], config: XShareConfig) -> Table:
    from rich.table import Table

    draft = steps[0].draft
    gpus = max(predictor.parallel.tensor, predictor.parallel.expert)
    limit = f"coverage {config.coverage}" if config.coverage else f"budget {config.budget}"
    table = Table(
        title=f"{predictor.shape.name} on {gpus} x {predictor.gpu.name}: {draft.rows} rows per request, "
        f"{draft.accepted} tokens accepted, {draft.passes} draft passes; {limit}",
        caption="speed-up: tokens per second over plain decoding, own routing > XShare; no host time: by "
        "bytes and operations alone; pays from: accepted tokens per step",
    )
    columns = ("batch", "rows", "experts\nplain", "experts\nverifying", "plain\nms", "step\nms")
    for name in (*columns, "speed-up", "no host\ntime", "pays\nfrom"):
        table.add_column(name, justify="right")
    for step in steps:
        table.add_row(
            str(step.batch),
            str(step.batch * draft.rows),
            f"{step.plain_experts:.1f}",
            f"{step.own_experts:.1f} > {step.shared_experts:.1f}",
            f"{1e3 * step.plain:.2f}",
            f"{1e3 * step.own:.2f} > {1e3 * step.shared:.2f}",
            f"{step.own_speedup:.2f} > {step.shared_speedup:.2f}",
            f"{step.own_speedup_without_host:.2f} > {step.shared_speedup_without_host:.2f}",
            f"{step.own_break_even:.2f} > {step.shared_break_even:.2f}",
        )
    return table


def _speculation_error() -> str:
    from xshare_trtllm.planning.speculation import validate

    pairs = validate()
    listed = ", ".join(f"{public.batch}: {public.speedup:.2f} ({ours:.2f})" for public, ours in pairs)
    small, large = ([abs(a.speedup - b) for a, b in pairs if (a.batch <= 8) is few] for few in (True, False))
    return (
        f"Known error: {sum(small) / len(small):.2f} on average, {max(small):.2f} at worst, on the public "
        f"speed-ups of Qwen3-30B-A3B with EAGLE3 on 2 and 4 H100 at batch 1 to 8; {max(large):.2f} at 32 and "
        f"64, where 20 questions do not fill the batch. By batch, predicted in brackets: {listed}. "
        "Drafting's host time is SGLang's there; another runtime has its own."
    )
