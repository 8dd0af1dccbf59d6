"""What the kernels counted, read back between two steps without waiting for the device.

Every layer adds its statistics to a tensor on its device inside `apply`, so a CUDA graph that was captured
with XShare counts on every replay, and one that was captured without it does not: the host's count of steps
against the device's count of rows tells the two apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from xshare_trtllm.trtllm.torch_rows import after_prepare

SECONDS = 5.0  # between two reports of a server that serves
# Places of the statistics (`xshare_stat` in xshare.h) that add up over steps; rows have a flag in bit 32.
SUMS = {"experts_before": 0, "experts_after": 1, "kept_utility": 2, "total_utility": 3, "warmup_overflow": 4}
_ROWS = 7


class Reporter:
    """Hands the counts of an `Enabled` to `write`: at once, then every few seconds while steps are made."""

    def __init__(self, enabled: Any, write: Callable[[dict[str, Any]], None]) -> None:
        self._counters: Tensor = enabled.counters
        self._write = write
        self._steps = self._steps_read = self._steps_reported = 0
        self._due = 0.0
        self._on_host: tuple[Tensor, torch.cuda.Event | None] | None = None
        self._before = torch.zeros(self._counters.shape, dtype=torch.int64)
        self._totals = dict.fromkeys((*SUMS, "rows", "stood_aside"), 0)
        self._layers = torch.zeros(len(self._counters), _ROWS + 2, dtype=torch.int64)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="xshare-report")  # a slow disk delays no step

    def start(self) -> None:
        self._write(self._statistics(torch.zeros_like(self._before), 0))
        after_prepare(self._step)

    def _step(self, has_real_rows: bool) -> None:
        """Between two steps, in the thread that makes them, and never while a graph is captured."""
        if not has_real_rows:
            return
        if self._on_host is not None:
            counts, event = self._on_host
            if event is None or event.query():
                self._on_host = None
                self._report(counts)
        elif time.monotonic() >= self._due:
            self._due = time.monotonic() + SECONDS
            self._on_host, self._steps_read = self._read(), self._steps
        self._steps += 1

    def _read(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """Enqueues the copy. It is there when the event is."""
        if not self._counters.is_cuda:
            return self._counters.clone(), None
        on_host = torch.empty(self._counters.shape, dtype=torch.int64, pin_memory=True)
        on_host.copy_(self._counters, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return on_host, event

    def _report(self, counts: Tensor) -> None:
        steps = self._steps_read - self._steps_reported
        self._steps_reported = self._steps_read
        statistics = self._statistics(counts - self._before, steps)
        self._before = counts
        self._writer.submit(self._write, statistics)

    def _statistics(self, new: Tensor, steps: int) -> dict[str, Any]:
        """new [layers, 8]: counted since the last report, over which the host made `steps` steps. `by_layer`
        is what each layer has counted since the start: the statistics, of which the last are rows and steps
        that stood aside."""
        rows = new[:, _ROWS] & 0xFFFFFFFF
        for name, place in SUMS.items():
            self._totals[name] += int(new[:, place].sum())
        asides = new[:, _ROWS] >> 32
        self._totals["rows"] += int(rows.sum())
        self._totals["stood_aside"] += int(asides.sum())
        self._layers += torch.cat([new[:, :_ROWS], rows[:, None], asides[:, None]], dim=1)
        silent = [layer for layer, count in enumerate(rows.tolist()) if count == 0] if steps else []
        return self._totals | {
            "steps": self._steps_read,
            "recent_steps": steps,
            "silent_layers": silent,
            "by_layer": self._layers.tolist(),
        }
