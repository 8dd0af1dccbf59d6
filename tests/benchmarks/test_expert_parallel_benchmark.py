"""benchmarks/expert_parallel.py, on short text."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from xshare_trtllm import XShareConfig
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
        patch.setattr(benchmark, "LENGTH", 17)
        yield benchmark.ShippedModel()


def test_the_settings_answer_the_question():
    settings = benchmark.all_settings()
    assert len(set(settings)) == len(settings)
    covered = [s for s in settings if s.rule == benchmark.COVERAGE]
    cases = {(8, batch) for batch in (4, 8, 16, 32, 64)} | {(gpus, 16) for gpus in (2, 4, 8, 16)}
    assert {(s.gpus, s.batch) for s in covered} == cases
    assert all(s.config.gpu_budget is None and s.config.budget is None for s in covered)
    papers = [s for s in settings if s.rule == benchmark.PAPER]
    assert papers and all(s.config.utility == "affinity" for s in papers)
    numbers = {(s.gpus, s.batch, s.config.gpu_budget) for s in settings if s.rule == benchmark.NUMBER}
    assert numbers >= {(s.gpus, s.batch, s.config.gpu_budget) for s in papers}, "side by side"


def test_a_row_is_what_the_attached_model_did(shipped):
    setting = Setting(benchmark.COVERAGE, XShareConfig(coverage=0.8), 8, 16)
    row = shipped.measure(setting)
    hits = []
    with attach(
        shipped.model, setting.config, prefill="stepwise", expert_gpu=contiguous_placement(64, 8)
    ) as attached:
        for tokens in shipped.tokens.split(16):
            with torch.inference_mode():
                logits = shipped.model(input_ids=tokens[:, :-1]).logits
            hits.append(logits.argmax(-1) == tokens[:, 1:])
    stats = attached.stats
    assert row["peak"] == pytest.approx(sum(layer.peak_gpu_after for layer in stats) / 4)
    assert row["experts"] == pytest.approx(sum(layer.experts_after for layer in stats) / 4)
    assert row["times_less"] == row["own_peak"] / row["peak"] > 1.5
    assert 0.8 <= row["kept_utility"] < 1
    accuracy = float(torch.cat(hits).double().mean())
    assert row["change"]["accuracy"] == pytest.approx(accuracy / shipped.own.accuracy - 1, abs=1e-3)
    low, high = row["change"]["bits_interval"]
    assert low < row["change"]["bits_per_byte"] < high


def test_documents_that_do_not_fill_a_batch_are_left_out_on_both_sides(shipped):
    row = shipped.measure(Setting(benchmark.COVERAGE, XShareConfig(coverage=1.0), 2, 64))
    assert len(shipped.score(64).nats) == 64 < len(shipped.own.nats)
    # All of the utility is all of the own routing: only sums in another order differ.
    assert row["change"]["bits_per_byte"] == pytest.approx(0, abs=1e-5)
    assert row["peak"] == row["own_peak"] and row["own_experts"] == row["experts"]


def test_best_at_loss():
    rows = [
        {"peak": peak, "change": {"accuracy": change}}
        for peak, change in ((5, -0.002), (4, -0.009), (3, -0.02))
    ]
    assert benchmark.best_at(rows, 0.01)["peak"] == 4
    assert benchmark.best_at(rows, 0.001) is None


def test_report_and_picture(monkeypatch, tmp_path):
    settings = [
        *(
            Setting(benchmark.COVERAGE, XShareConfig(coverage=c), gpus, 16)
            for c in (0.97, 0.95, 0.9)
            for gpus in (2, 8)
        ),
        Setting(benchmark.NUMBER, XShareConfig(gpu_budget=4)),
        Setting(benchmark.PAPER, XShareConfig(gpu_budget=4, warmup=2, utility="affinity")),
    ]
    monkeypatch.setattr(benchmark, "LENGTH", 9)
    monkeypatch.setattr(benchmark, "all_settings", lambda: settings)
    monkeypatch.setattr(benchmark, "MODELS", ("qwen3-235b-a22b",))
    monkeypatch.setattr(benchmark, "MODEL_BATCHES", (64,))
    path = tmp_path / "expert_parallel.json"
    result = CliRunner().invoke(benchmark.main, ["--json", str(path)])
    assert result.exit_code == 0, f"{result.output}{result.exception!r}"
    report = json.loads(path.read_text())
    assert [row["config"] for row in report["shipped_model"]] == [s.config.to_dict() for s in settings]
    shapes = report["shapes"]
    assert {(row["gpus"], row["coverage"]) for row in shapes} == {
        (gpus, coverage) for gpus in (2, 4, 8, 16) for coverage in benchmark.COVERAGES
    }
    assert all(row["kept_utility"] >= row["coverage"] and row["times_less"] >= 1 for row in shapes)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "qwen3-235b" in result.output
