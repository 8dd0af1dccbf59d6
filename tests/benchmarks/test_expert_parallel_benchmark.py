"""benchmarks/expert_parallel.py, on short text."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from xshare_trtllm import XShareConfig
from xshare_trtllm.evaluation import token_batches
from xshare_trtllm.hf import attach
from xshare_trtllm.routing import contiguous_placement

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "expert_parallel.py"
SPEC = importlib.util.spec_from_file_location("expert_parallel_benchmark", PATH)
benchmark = importlib.util.module_from_spec(SPEC)
# Dataclasses look their module up by name.
importlib.import_module("sys").modules[SPEC.name] = benchmark
SPEC.loader.exec_module(benchmark)
Setting = benchmark.Setting


@pytest.fixture(scope="module")
def shipped():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "LENGTH", 24)
        yield benchmark.ShippedModel()


def test_balanced_by_hand():
    # 9 and 8 go apart, 5 joins 8, 4 joins 9; then both GPUs stand at 13, and the lower id gets 3.
    placement = benchmark.balanced(torch.tensor([1.0, 9, 3, 8, 4, 5]), 2)
    assert placement.tolist() == [1, 0, 0, 1, 0, 1]


@pytest.mark.parametrize("gpus", [2, 4, 8, 16])
def test_balanced_gives_every_gpu_as_many_experts_and_nearly_the_load(gpus):
    loads = torch.rand(64, generator=torch.Generator().manual_seed(gpus)) ** 4
    placement = benchmark.balanced(loads, gpus)
    assert placement.bincount().tolist() == [64 // gpus] * gpus
    totals = [
        float(loads[p == g].sum()) for p in (placement, contiguous_placement(64, gpus)) for g in range(gpus)
    ]
    assert max(totals[:gpus]) < max(totals[gpus:])


def test_renumbering_changes_nothing_and_is_undone(shipped):
    gate = shipped.model.model.layers[1].mlp.gate.weight
    before = gate.clone()
    tokens = shipped.tokens[:2, :-1]
    with torch.inference_mode():
        own = shipped.model(input_ids=tokens).logits
        placement = shipped.placement("balanced", 8, 0)
        with benchmark.placed(shipped.model, placement) as order:
            assert not torch.equal(gate, before)
            assert torch.equal(placement.gather(1, order), contiguous_placement(64, 8).expand(4, -1))
            torch.testing.assert_close(shipped.model(input_ids=tokens).logits, own, rtol=1e-4, atol=1e-4)
    assert torch.equal(gate, before)


def test_placements_come_from_other_documents(shipped):
    assert [int(shipped.half(torch.tensor(d))) for d in (0, 31, 32, 64, 111)] == [0, 0, 1, 0, 1]
    ids = shipped.own.ids[:, 32:64].flatten(1)
    ids = torch.cat([ids, shipped.own.ids[:, 96:].flatten(1)], 1)
    loads = torch.stack([layer.bincount(minlength=64) for layer in ids])
    expected = torch.stack([benchmark.balanced(layer, 8) for layer in loads])
    assert torch.equal(shipped.placement("balanced", 8, 0), expected)


@pytest.mark.parametrize("setting", [Setting(64, 1, 3, "contiguous"), Setting(24, 2)])
def test_counts_are_those_of_the_routing(shipped, setting):
    run = shipped.run(setting.config, 16, setting.placement if setting.per_gpu else None, 8)
    peaks = shipped.peaks(run, 16, "contiguous", 8)
    batches = token_batches(benchmark.held_out(), benchmark.load_model()[1], 24)
    with (
        attach(
            shipped.model, setting.config, prefill="stepwise", expert_gpu=contiguous_placement(64, 8)
        ) as attached,
        torch.inference_mode(),
    ):
        for tokens in batches:
            shipped.model(input_ids=tokens[:, :-1])
    stats = attached.stats
    assert peaks["peak_experts"] == pytest.approx(sum(s.peak_gpu_after for s in stats) / 4, rel=1e-4)
    assert peaks["active_experts"] == pytest.approx(sum(s.experts_after for s in stats) / 4, rel=1e-4)
    assert run.kept_utility == pytest.approx(sum(s.kept_utility for s in stats) / 4, rel=1e-3)
    assert 0.5 < run.kept_choice < 1


def test_a_balanced_budget_per_gpu_holds(shipped):
    run = shipped.run(XShareConfig(64, warmup=0, gpu_budget=2), 16, "balanced", 8)
    peaks = shipped.peaks(run, 16, "balanced", 8)
    assert peaks["peak_experts"] <= 2 < shipped.peaks(run, 16, "contiguous", 8)["peak_experts"]
    change, error = shipped.accuracy_change(run)
    assert change < -0.02 and 0 < error < 0.05
    assert shipped.accuracy_change(shipped.own) == (0, 0)


def test_own_peaks(shipped):
    peaks = {(g, k): shipped.peaks(shipped.own, 1, k, g) for g in (2, 8) for k in ("contiguous", "balanced")}
    for row in peaks.values():
        assert row["active_experts"] == 8 and row["peak_rows"] == row["peak_experts"]
    assert peaks[2, "contiguous"]["peak_experts"] > peaks[8, "contiguous"]["peak_experts"] > 1


def test_choice_at_loss_is_a_line():
    rows = [{"kept_choice": 1 - x, "accuracy_change": -x / 5} for x in (0.02, 0.1, 0.2)]
    assert benchmark.choice_at_loss(rows, 0.01) == pytest.approx(0.95)


def test_best_at_loss():
    rows = [{"peak_experts": p, "accuracy_change": a} for p, a in ((5, -0.002), (4, -0.009), (3, -0.02))]
    assert benchmark.best_at(rows, 0.01)["peak_experts"] == 4
    assert benchmark.best_at(rows, 0.001) is None


def test_report_and_picture(monkeypatch, tmp_path):
    settings = tuple(
        Setting(64, 2, per_gpu, placement, gpus)
        for gpus, per_gpu in ((2, 14), (4, 7), (8, 4), (16, 2))
        for placement in ("contiguous", "balanced")
    )
    monkeypatch.setattr(benchmark, "LENGTH", 17)
    monkeypatch.setattr(benchmark, "SETTINGS", (*settings, Setting(24, 2)))
    monkeypatch.setattr(benchmark, "MODELS", ("deepseek-r1",))
    monkeypatch.setattr(benchmark, "MODEL_BATCHES", (32,))
    monkeypatch.setattr(benchmark, "STEPS", 2)
    monkeypatch.setattr(benchmark, "SWEEP", 3)
    path = tmp_path / "expert_parallel.json"
    result = CliRunner().invoke(benchmark.main, ["--json", str(path)])
    assert result.exit_code == 0, f"{result.output}{result.exception!r}"
    report = json.loads(path.read_text())
    assert len(report["shipped_model"]) == 10, "a budget for the layer is seen under both placements"
    assert {s["model"] for s in report["shapes"]} == {
        "shipped model",
        "deepseek-r1",
        "deepseek-r1 as softmax",
    }
    assert 0.5 < report["kept_choice_at_1%_loss"] < 1
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "deepseek-r1" in result.output
