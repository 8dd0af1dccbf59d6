"""What do the metrics cost that are always on?

    python benchmarks/metrics_cost.py [--json PATH]

The shipped model decodes 16 rows through XShare, once as it is served (every router keeps its statistics, the
clock looks at the time after each step and reads them once a second) and once with nothing counted, in turn.
Two answers: the median of the paired ratios, and the time of the counting alone, which scatters less, as a
share of the step.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from rich.table import Table

from xshare_trtllm import XShareConfig
from xshare_trtllm.evaluation import held_out, load_model, token_batches
from xshare_trtllm.hf import Decoder, attach
from xshare_trtllm.report import console, machine, write_json
from xshare_trtllm.serving.metrics import INTERVAL, StatisticsClock

BATCH, PROMPT, STEPS = 16, 32, 60


class _Nowhere(list[Any]):
    """In place of a router's statistics: forgets them."""

    def append(self, _: Any) -> None:
        pass


@click.command()
@click.option("--pairs", type=int, default=100, show_default=True, help="Runs of each kind.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="where to write the numbers"
)
@torch.inference_mode()
def main(pairs: int, json_path: Path | None) -> None:
    """Measure the cost of the metrics."""
    torch.set_num_threads(1)
    model, tokenizer = load_model()
    decoder = Decoder(model, PROMPT + STEPS)
    prompts = token_batches(held_out(), tokenizer, PROMPT, BATCH)[0][:, :PROMPT]
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with attach(decoder, XShareConfig(32, warmup=2)) as attached:
        clock = StatisticsClock(attached)
        for pair in range(pairs + 1):
            for is_on in (True, False) if pair % 2 else (False, True):
                elapsed = _decode(decoder, attached, prompts, clock if is_on else None)
                if pair:  # the first is a warm-up
                    seconds[is_on].append(elapsed)
        step = median(seconds[False])
        counting, reading = _alone(attached, decoder, prompts)
    ratio = median(on / off for on, off in zip(seconds[True], seconds[False], strict=True))
    per_step = counting + reading * step / INTERVAL
    table = Table(title=f"Metrics, {BATCH} rows, {pairs} pairs of {STEPS} steps")
    for name in ("step", "with metrics, paired", "counting per step", "one reading", "share of a step"):
        table.add_column(name, justify="right")
    table.add_row(
        f"{step * 1e3:.2f} ms",
        f"{ratio - 1:+.2%}",
        f"{counting * 1e6:.1f} us",
        f"{reading * 1e6:.0f} us, every {INTERVAL:.0f} s",
        f"{per_step / step:.2%}",
    )
    console().print(table)
    if json_path is not None:
        values = {
            "step_seconds": step,
            "paired_ratio": ratio,
            "counting_seconds": counting,
            "reading_seconds": reading,
            "share_of_step": per_step / step,
        }
        write_json(json_path, {"machine": machine(), "batch": BATCH, "pairs": pairs, **values})


def _decode(decoder: Decoder, attached: Any, prompts: torch.Tensor, clock: StatisticsClock | None) -> float:
    """Seconds per step of one greedy continuation; without a clock nothing is counted."""
    attached.reset_stats()
    if clock is None:
        for router in attached._routers:
            router._raw_stats = _Nowhere(router._raw_stats)
    cache = decoder.new_cache(BATCH)
    token = decoder(prompts, cache=cache).logits[:, -1:].argmax(-1)
    started = time.perf_counter()
    for _ in range(STEPS):
        token = decoder(token, cache=cache).logits.argmax(-1)
        if clock is not None:
            clock.tick(BATCH, 0)
    elapsed = (time.perf_counter() - started) / STEPS
    attached.reset_stats()
    return elapsed


def _alone(attached: Any, decoder: Decoder, prompts: torch.Tensor) -> tuple[float, float]:
    """Seconds that a step spends on counting, and that a reading of a second's statistics takes."""
    _decode(decoder, attached, prompts, StatisticsClock(attached))
    entry, rounds = torch.zeros(8, dtype=torch.int64), 1000
    clock = StatisticsClock(attached)
    clock.tick(BATCH, 0)
    started = time.perf_counter()
    for _ in range(rounds):
        for router in attached._routers:
            router._raw_stats.append(entry)
            router.steps += 1
        clock.tick(BATCH, 0)
    counting = (time.perf_counter() - started) / rounds
    readings = []
    for _ in range(20):
        for router in attached._routers:
            router._raw_stats.extend([entry] * 128)
        started = time.perf_counter()
        clock.tick(0, 0)
        readings.append(time.perf_counter() - started)
    return counting, median(readings)


if __name__ == "__main__":
    main()
