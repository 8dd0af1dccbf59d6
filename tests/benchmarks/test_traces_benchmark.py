"""benchmarks/traces.py, on a small trace made here and, where it is, on the real one."""

import importlib.util
import json
import os
from pathlib import Path

import numpy
import pytest
import torch
from click.testing import CliRunner

from xshare_trtllm import XShareConfig
from xshare_trtllm.evaluation.peers import Steps, lynx, moe_spec, oea

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "traces.py"
SPEC = importlib.util.spec_from_file_location("traces_benchmark", PATH)
benchmark = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(benchmark)
TRACE = Path(os.environ.get("XSHARE_TRACE", Path(__file__).parents[3] / "shared/traces/gpt-oss-20b.npz"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """64 requests of 5 tokens, 3 layers, 2 of 12 experts, the popular ones twice as often as the others."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 5, 3, 12, generator=generator) + torch.linspace(-1, 1, 12)
    weights, ids = logits.topk(2)
    path = tmp_path_factory.mktemp("trace") / "small.npz"
    mixed = torch.stack([ids[..., 1], ids[..., 0]], -1), weights.softmax(-1).flip(-1)  # worst first
    numpy.savez(path, expert_ids=mixed[0].numpy().astype("uint8"), expert_weights=mixed[1].half().numpy())
    return path


def layer_of(rows):
    """One step of rows of (expert, weight) pairs, 4 experts."""
    logits = torch.full((1, len(rows), 4), -torch.inf)
    for t, row in enumerate(rows):
        for expert, weight in row:
            logits[0, t, expert] = torch.tensor(weight).log()
    return Steps.of(logits, benchmark.RouterSpec(4, 2, "topk_softmax"), None, 0)


def test_the_rules_by_hand():
    layer = layer_of([[(0, 0.9), (1, 0.1)], [(2, 0.6), (1, 0.4)], [(3, 0.7), (1, 0.3)]])
    squares = 0.81 + 0.01 + 0.36 + 0.16 + 0.49 + 0.09
    for rule, active, kept in (
        (oea(1), 3, 0.81 + 0.36 + 0.49),
        (moe_spec(2), 2, 0.81 + 0.01 + 0.16 + 0.09),  # masses 0.9, 0.8
        (lynx(1), 1, 0.01 + 0.16 + 0.09),
    ):
        assert benchmark.followed(layer, rule)[0].tolist() == pytest.approx(
            [active, kept / squares], rel=1e-5
        )
    # Squared weights: 0.81, 0.26, 0.36, 0.49, so the best two are experts 0 and 3.
    ours = benchmark.shared(layer, XShareConfig(2, warmup=0))[0].tolist()
    assert ours == pytest.approx([2, (0.81 + 0.49) / squares], rel=1e-5)


def test_steps_are_of_different_requests_and_have_the_rows_own_choice(small):
    trace = benchmark.Trace(small)
    logits = trace.steps(8, 6)
    assert logits.shape == (3, 6, 8, 12)
    assert torch.equal(logits, trace.steps(8, 6))
    assert ((logits > -torch.inf).sum(-1) == 2).all()
    assert (trace.weights[..., 0] >= trace.weights[..., 1]).all()
    all_at_once = trace.steps(64, 2).topk(2).indices[0]
    assert all_at_once.shape == (2, 64, 2)


def test_no_rule_keeps_more_at_equal_active_experts(small):
    """By construction: squared weights are what is kept. 1e-5: ours are summed in fixed point."""
    trace = benchmark.Trace(small)
    measured = benchmark.measure(trace, 8, 4)
    for row in measured["peers"]:
        assert row["ours_kept"] >= row["kept_utility"] - 1e-5
        assert row["experts"] <= measured["own"]
    plain = {r["n"]: r for r in measured["peers"] if r["rule"] == "fewer per row"}
    ours = {r["n"]: r for r in measured["peers"] if r["rule"] == "OEA, simplified"}
    assert plain[1]["experts"] == ours[1]["experts"] and plain[1]["kept_utility"] < ours[1]["kept_utility"]


def test_loads_and_overlaps(small):
    trace = benchmark.Trace(small)
    described = benchmark.describe(trace)
    assert [sum(layer) for layer in described["load_by_layer"]] == pytest.approx([2, 2, 2])
    measured = benchmark.measure(trace, 16, 40)
    # The tokens of this trace are independent, so the loads alone tell the active experts.
    assert measured["own"] == pytest.approx(described["independent_rows"][16], rel=0.03)
    assert described["overlap"]["1"] == pytest.approx(described["overlap"]["other request"], abs=0.05)


def test_report_and_picture(small, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "BATCHES", (4, 16))
    path = tmp_path / "traces.json"
    result = CliRunner().invoke(benchmark.main, ["--trace", str(small), "--steps", "3", "--json", str(path)])
    assert result.exit_code == 0, f"{result.output}{result.exception!r}"
    report = json.loads(path.read_text())
    assert (
        [row["batch"] for row in report["real"]] == [row["batch"] for row in report["predicted"]] == [4, 16]
    )
    assert str(small.parent) not in path.read_text(), "no paths of this machine"
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_without_a_trace_it_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.delenv("XSHARE_TRACE", raising=False)
    result = CliRunner().invoke(benchmark.main, [])
    assert result.exit_code == 2 and "Missing option '--trace'" in result.output
    numpy.savez(tmp_path / "other.npz", ids=numpy.zeros(3))
    result = CliRunner().invoke(benchmark.main, ["--trace", str(tmp_path / "other.npz")])
    assert result.exit_code == 1 and "expert_ids and expert_weights are needed" in result.output


@pytest.mark.skipif(not TRACE.exists(), reason="the trace of gpt-oss-20b is not here: set XSHARE_TRACE")
def test_the_real_trace_has_the_published_figures():
    """Of the whole source's 494 requests; the file has 96 of them, so 5 % and 2 points here."""
    trace = benchmark.Trace(TRACE)
    for batch, own, saved, kept in ((4, 11.98, 0.131, 0.986), (16, 23.07, 0.212, 0.818)):
        measured = benchmark.measure(trace, batch, 10)
        assert measured["own"] == pytest.approx(own, rel=0.05)
        ours = {row["setting"]: row for row in measured["ours"]}
        assert ours["coverage 0.95, warm-up 0"]["saved"] == pytest.approx(saved, abs=0.02)
        assert ours["budget 12, warm-up 0"]["kept_utility"] == pytest.approx(kept, abs=0.02)
