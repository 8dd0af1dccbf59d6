"""A server's ranks as Prometheus metrics, from what they report."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from xshare_trtllm.trtllm.run_folder import RunFolder
from xshare_trtllm.trtllm.serving import rank_problem

_COUNTERS = {
    "rows": "Rows that layers routed.",
    "experts_before": "Distinct experts of the model's own routing, summed over layers and steps.",
    "experts_after": "Distinct experts in use, summed over layers and steps.",
    "warmup_overflow": "Experts by which the warm-up exceeded the budgets.",
    "stood_aside": "Layers and steps in which XShare stood aside.",
}


def registry(folder: RunFolder) -> CollectorRegistry:
    """A registry that reads the folder when it is collected."""
    made = CollectorRegistry()
    made.register(_Ranks(folder))
    return made


class _Ranks:
    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Metric]:
        status = self._folder.status()
        up = GaugeMetricFamily("xshare_up", "1 where the rank routes by XShare.", labels=["rank"])
        age = GaugeMetricFamily("xshare_report_age_seconds", "Since the rank's last report.", labels=["rank"])
        for rank in status["missing"]:
            up.add_metric([str(rank)], 0)
        for report in status["ranks"]:
            up.add_metric([str(report["rank"])], float(rank_problem(report) is None))
            age.add_metric([str(report["rank"])], time.time() - report["time"])
        yield up
        yield age
        yield from _counters(status["ranks"])


def _counters(reports: list[dict[str, Any]]) -> Iterable[Metric]:
    for name, text in _COUNTERS.items():
        family = CounterMetricFamily(f"xshare_{name}", text, labels=["rank"])
        for report in reports:
            family.add_metric([str(report["rank"])], report["statistics"][name])
        yield family
