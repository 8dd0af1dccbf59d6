"""What the GPU benchmarks share: timing a captured graph, and a report that says what it ran on. Needs torch
alone."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch

WARM_UP = 3
FIRST_BUSY_CYCLES, MOST_BUSY_CYCLES = 1 << 18, 1 << 26  # 0.1 to 40 ms of a GPU's clock


def time_graph(enqueue: Callable[[], Any], replays: int) -> float:
    """Median microseconds of a replay of the graph that `enqueue` makes; it is run once before.

    Each replay is enqueued behind a kernel that keeps the GPU busy, so that what the host takes to launch it
    is in no time. A replay that the GPU waited for all the same does not count, and the next one gets longer.
    Raises RuntimeError where that does not help."""
    enqueue()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        enqueue()
    times: list[float] = []
    cycles = FIRST_BUSY_CYCLES
    while len(times) < replays + WARM_UP:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(cycles)
        start.record()
        graph.replay()
        end.record()
        came_late = start.query()
        end.synchronize()
        if not came_late:
            times.append(1e3 * start.elapsed_time(end))
        elif cycles < MOST_BUSY_CYCLES:
            cycles *= 2
        else:
            raise RuntimeError("the host is too slow to enqueue a replay while the GPU is busy")
    return statistics.median(times[WARM_UP:])


def write_report(path: Path, command: str, results: dict[str, Any], **more: Any) -> None:
    """Whole or not at all: written aside, then renamed. Cheap enough to be called after every row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    report = {"command": command, "machine": machine(), "results": results} | more
    aside.write_text(json.dumps(report, indent=1) + "\n")
    aside.replace(path)


def read_results(path: Path) -> dict[str, Any]:
    """The results in a report of this very machine, versions and commit; nothing where there is none."""
    try:
        report = json.loads(path.read_text())
        there, results = report["machine"], dict(report["results"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return results if there | {"time": None} == machine() | {"time": None} else {}


@cache
def machine() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _first_line("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _first_line(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return None
