"""Metrics: the numbers are those of the attachment, the names those of the documentation and dashboard."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from xshare_trtllm import XShareConfig
from xshare_trtllm.evaluation import load_model
from xshare_trtllm.hf import Decoder, attach
from xshare_trtllm.serving import metrics
from xshare_trtllm.serving.metrics import METRICS, PrometheusCollector, Statistics, StatisticsClock
from xshare_trtllm.trtllm.setting import Setting

ROOT = Path(__file__).parents[2]
DASHBOARD = Path(metrics.__file__).with_name("dashboard.json")
LAYER = (80, 60, 3 << 19, 1 << 21, 2, 9, 7, 40, 1, 5)


def test_names_are_prometheus_names_and_documented() -> None:
    documentation = (ROOT / "docs" / "serve.md").read_text()
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert re.fullmatch(r"xshare_[a-z_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert f"`{metric.name}`" in documentation


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"xshare_\w+", query)}
    assert asked == {metric.name for metric in METRICS}
    labels = {label for query in queries for label in re.findall(r"by \((\w+)\)", query)}
    assert labels == {metric.label for metric in METRICS if metric.label}


def test_prometheus_sees_the_totals() -> None:
    prometheus = pytest.importorskip("prometheus_client", reason="needs prometheus-client")
    setting = Setting(XShareConfig(coverage=0.97))
    statistics = Statistics((LAYER,) * 2, {"length": 3, "cancelled": 1}, 50, 4, 2, 1, setting)
    registry = prometheus.CollectorRegistry()
    registry.register(PrometheusCollector(lambda: statistics))
    text = prometheus.generate_latest(registry).decode()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for line in (
        'xshare_experts_before_total{layer="1"} 80.0',
        'xshare_experts_after_total{layer="0"} 60.0',
        'xshare_utility_kept_total{layer="0"} 1.5',
        'xshare_utility_total{layer="0"} 2.0',
        'xshare_warmup_overflow_total{layer="0"} 2.0',
        'xshare_peak_gpu_experts_before_total{layer="0"} 9.0',
        'xshare_peak_gpu_experts_after_total{layer="0"} 7.0',
        'xshare_rows_total{layer="0"} 40.0',
        'xshare_stand_asides_total{layer="0"} 1.0',
        'xshare_steps_total{layer="0"} 5.0',
        'xshare_requests_total{finish="cancelled"} 1.0',
        "xshare_output_tokens_total 50.0",
        "xshare_running_requests 4.0",
        "xshare_waiting_requests 2.0",
        "xshare_engine_restarts_total 1.0",
        "xshare_enabled 1.0",
        "xshare_shadow 0.0",
        "xshare_coverage 0.97",
        "xshare_dial_refused 0.0",
    ):
        assert line in lines
    assert len(lines) == 2 * 10 + 2 + 8


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, (0, 0, 1)),
        (Setting(XShareConfig(coverage=0.9), "on"), (1, 0, 0.9)),
        (Setting(XShareConfig(coverage=0.9), "shadow"), (0, 1, 0.9)),
        (Setting(XShareConfig(coverage=0.9), "off"), (0, 0, 1)),
        (Setting(XShareConfig(24), "on"), (1, 0, 1)),
    ],
)
def test_what_is_set_is_three_numbers(setting: Setting | None, expected: tuple[float, ...]) -> None:
    values = {metric.name: value for metric, _, value in Statistics(setting=setting).samples()}
    assert tuple(values[f"xshare_{name}"] for name in ("enabled", "shadow", "coverage")) == expected


@torch.inference_mode()
def test_the_clock_adds_up_what_the_attachment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(load_model()[0], 32)
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    with attach(decoder, XShareConfig(20, max_rows=3)) as attached:
        clock, cache = StatisticsClock(attached), decoder.new_cache(4)
        read_at = []
        for step in range(12):
            decoder(torch.full((2 + step % 3, 1), step), cache=cache)
            now[0] += 0.3
            clock.tick(running=4, waiting=0)
            read_at.append(clock.statistics.layers[0][9])
        assert read_at == [1, 1, 1, 1, 5, 5, 5, 5, 9, 9, 9, 9]  # once a second
        clock.count("length", 12)
        clock.tick(running=0, waiting=0)  # nothing left to do: at once
    statistics = clock.statistics
    assert statistics.finished == {"length": 1} and statistics.output_tokens == 12
    for before, after, *_, rows, asides, steps in statistics.layers:
        assert (rows, asides, steps) == (4 * (2 + 3 + 4), 4, 12)
        assert after <= 8 * 20 + 4 * 32 and after <= before
