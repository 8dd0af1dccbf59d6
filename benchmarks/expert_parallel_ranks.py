"""Expert parallelism on real processes: what a coverage, which sets the cap per GPU, saves the slowest rank.

    python benchmarks/expert_parallel_ranks.py [--ranks 2 --ranks 4] [--batches 7] [--steps 40]
        [--json PATH]

The shipped model decodes mixed batches of 16 sequences. Each of N processes holds 1/N of every layer's
experts and 16/N of the sequences. Settings: own routing, coverages, one number per GPU, and the paper's rule
with that number. Every batch runs through all settings before the next, in a rotating order; a ratio is the
median over batches of setting over own routing in the same batch.

Slowest rank's expert time: in each MoE layer and step the largest processor time that any rank's experts
took, summed over the layers: what a step waits for where every rank has a device of its own. Processor time,
so that ranks that share a core do not count each other's work. A step's time is wall-clock time, with
attention, routing in PyTorch operations and the exchanges, all of which cost more here than the experts of so
small a model; where ranks share cores it says little about ranks that do not.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from statistics import mean, median

import click
import torch
import torch.distributed as dist
import torch.multiprocessing
from rich.table import Table

from xshare_trtllm import XShareConfig
from xshare_trtllm.evaluation import held_out, load_model, token_batches
from xshare_trtllm.hf import Decoder
from xshare_trtllm.hf.expert_parallel import expert_parallel
from xshare_trtllm.report import console, machine, write_json

BATCH, PROMPT = 16, 32
EXPERTS, HALF = 64, 32
COVERAGES = (0.97, 0.90)
RESULTS = Path(__file__).resolve().parent / "results" / "expert_parallel_ranks.json"


def settings(ranks: int) -> dict[str, XShareConfig]:
    per_gpu = HALF // ranks
    coverages = {f"coverage {c:.2f}": XShareConfig(coverage=c) for c in COVERAGES}
    return {"own routing": XShareConfig(EXPERTS), **coverages} | {
        f"{per_gpu} per GPU": XShareConfig(gpu_budget=per_gpu),
        f"the paper's rule, {per_gpu} per GPU": XShareConfig(gpu_budget=per_gpu, utility="affinity"),
    }


@dataclass(frozen=True, slots=True)
class Measured:
    """Means over the steps of one batch; experts and rows: per layer, of the rank that has most of them."""

    expert_ms: float  # per step, the slowest rank's in each layer
    step_ms: float
    peak_experts: float
    peak_rows: float
    mean_experts: float  # per layer and rank


# ---- In every rank -----------------------------------------------------------------------------------------


def run_rank(rank: int, ranks: int, folder: str, batches: int, steps: int, results: SimpleQueue) -> None:
    """Rank 0 puts `(setting, Measured)` of every batch into `results`."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/ranks", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    model, tokenizer = load_model()
    decoder = Decoder(model, PROMPT + steps)
    prompts = [batch[:, :PROMPT] for batch in token_batches(held_out(), tokenizer, PROMPT, BATCH)[:batches]]
    mine = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    order = list(settings(ranks).items())
    measure(decoder, order[1][1], prompts[0][mine], 3)  # warm-up
    for batch in prompts:
        for name, config in order:
            measured = measure(decoder, config, batch[mine], steps)
            if rank == 0:
                results.put((name, measured))
        order.append(order.pop(0))  # nobody is always first
    dist.destroy_process_group()


@torch.inference_mode()
def measure(decoder: Decoder, config: XShareConfig, prompts: torch.Tensor, steps: int) -> Measured:
    """Greedy decoding of this rank's sequences for `steps` steps after the prefill; equal on every rank."""
    with expert_parallel(decoder, config) as parallel:
        output = decoder(input_ids=prompts)
        parallel.work.clear()
        dist.barrier()
        started = time.perf_counter()
        for _ in range(steps):
            token = output.logits[:, -1:].argmax(-1)
            output = decoder(input_ids=token, cache=output.cache)
        seconds = time.perf_counter() - started
    layers = len(decoder.layers)
    work = torch.tensor([list(each) for each in parallel.work], dtype=torch.float64)  # [steps * layers, 3]
    slowest, total = torch.cat([work.flatten(), torch.tensor([seconds])]), work[:, 1].clone()
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    dist.all_reduce(total)
    expert_seconds, experts, rows = slowest[:-1].view(-1, 3).mean(dim=0).tolist()
    return Measured(
        expert_ms=1e3 * expert_seconds * layers,
        step_ms=1e3 * float(slowest[-1]) / steps,
        peak_experts=experts,
        peak_rows=rows,
        mean_experts=float(total.mean()) / dist.get_world_size(),
    )


# ---- The report --------------------------------------------------------------------------------------------


def run(ranks: int, batches: int, steps: int) -> list[dict[str, object]]:
    """One entry per setting: medians over the batches, and ratios to own routing."""
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    measured: dict[str, list[Measured]] = {name: [] for name in settings(ranks)}
    with tempfile.TemporaryDirectory() as folder:
        spawned = torch.multiprocessing.spawn(
            run_rank, (ranks, folder, batches, steps, queue), nprocs=ranks, join=False
        )
        while not spawned.join(timeout=1) or not queue.empty():  # raises what a rank raised
            while not queue.empty():
                name, value = queue.get()
                measured[name].append(value)
    own = next(iter(measured.values()))
    return [
        {"setting": name, "ranks": ranks, "config": settings(ranks)[name].to_dict()}
        | {field: mean(getattr(each, field) for each in values) for field in Measured.__slots__}
        | {
            f"{field}_ratio": median(
                getattr(here, field) / getattr(there, field) for here, there in zip(values, own, strict=True)
            )
            for field in ("expert_ms", "step_ms")
        }
        | {"batches": [asdict(each) for each in values]}
        for name, values in measured.items()
    ]


def show(rows: list[dict[str, object]]) -> Table:
    table = Table(
        title="Expert parallelism on real processes: the slowest rank",
        caption=f"the ranks share {os.cpu_count()} cores: processor time for experts, wall-clock time for "
        "steps; ratios to own routing, medians of pairs",
    )
    table.add_column("ranks", justify="right")
    table.add_column("setting")
    columns = {
        "slowest rank's experts\nms per step": "expert_ms",
        "ratio ": "expert_ms_ratio",
        "whole step\nms": "step_ms",
        "ratio": "step_ms_ratio",
        "experts run per layer\nbusiest rank": "peak_experts",
        "mean rank": "mean_experts",
        "rows per layer\nbusiest rank": "peak_rows",
    }
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row["ranks"]), str(row["setting"]), *(f"{row[field]:.2f}" for field in columns.values())
        )
    return table


@click.command(help=__doc__)
@click.option(
    "--ranks", type=click.Choice(["2", "4", "8"]), multiple=True, default=("2", "4"), show_default=True
)
@click.option("--batches", type=click.IntRange(1, 7), default=7, show_default=True)
@click.option("--steps", type=click.IntRange(2), default=40, show_default=True)
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS)
def main(ranks: tuple[str, ...], batches: int, steps: int, path: Path) -> None:
    rows = [row for count in ranks for row in run(int(count), batches, steps)]
    console().print(show(rows))
    cores, most = os.cpu_count() or 1, max(map(int, ranks))
    chosen = " ".join(f"--ranks {count}" for count in ranks)
    report = {
        "command": f"python benchmarks/expert_parallel_ranks.py {chosen} --batches {batches} --steps {steps}",
        "machine": machine(),
        "sharing": f"up to {most} ranks on {cores} cores: expert time is the processor time of a rank, which "
        "sharing a core hardly changes; step time is wall-clock time and includes waiting for a core",
        "batch": BATCH,
        "settings": rows,
    }
    write_json(path, report)
    console().print(f"Written: {path}")


if __name__ == "__main__":
    main()
