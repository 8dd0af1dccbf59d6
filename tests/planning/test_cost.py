"""The cost model: limits, bytes counted by hand, and the shapes' parameters against the published totals."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from xshare_trtllm import XShareConfig
from xshare_trtllm.planning.cost import (
    GPUS,
    PUBLISHED,
    Assumptions,
    Gpu,
    Loads,
    Parallel,
    Predictor,
    fit_layer_overhead,
    gain,
    step_cost,
    validate,
    worthwhile,
)
from xshare_trtllm.planning.shapes import CONFIGS, ModelShape, shape

SMALL = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "hidden_size": 10,
    "moe_intermediate_size": 6,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 5,
    "vocab_size": 100,
    "torch_dtype": "bfloat16",
}
# One byte per second of everything, and no limit on operations: a time is a count of bytes.
COUNTING = Gpu("counting", 1e9, 1.0, 1e30, 1e30, 1.0)
EXACT = Assumptions(memory=1, compute=1, link=1, collective=0, routing=0, layer_overhead=0)
# Billions of parameters as their makers state them (model cards).
STATED = {
    "gpt-oss-120b": 117,
    "gpt-oss-20b": 21,
    "qwen3-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235,
    "deepseek-r1": 671,
    "kimi-k2": 1000,
    "mixtral-8x7b": 46.7,
    "olmoe-1b-7b": 6.9,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_add_up_to_the_stated_total(name):
    assert shape(name).total_parameters / 1e9 == pytest.approx(STATED[name], rel=0.03)


def test_bytes_counted_by_hand():
    small = ModelShape.from_hf_config(SMALL)
    cost = step_cost(small, COUNTING, 7, experts=5, rows=14, context=20, assumptions=EXACT)
    assert cost.experts == 3 * 5 * (3 * 10 * 6) * 2  # layers, experts, gate and up and down, bf16
    attention = 10 * 20 + 2 * 10 * 10 + 20 * 10  # q, k and v, o
    router, head = 10 * 8, 10 * 100
    assert cost.weights == 2 * (3 * (attention + router) + head)
    assert cost.kv_cache == 3 * 7 * 20 * (2 * 2 * 5) * 2  # layers, rows, tokens, k and v of 2 heads of 5
    assert (cost.exchange, cost.routing, cost.overhead) == (0, 0, 0)
    assert cost.total == cost.experts + cost.weights + cost.kv_cache


def test_operations_count_where_they_take_longer():
    small = ModelShape.from_hf_config(SMALL)
    slow = replace(COUNTING, memory_bandwidth=1e30, bf16=1.0)
    cost = step_cost(small, slow, 7, experts=5, rows=14, assumptions=EXACT)
    assert cost.experts == 3 * 2 * 14 * (3 * 10 * 6)
    assert cost.weights == 2 * 7 * (3 * (10 * 20 + 2 * 10 * 10 + 20 * 10 + 80) + 1000)


def test_tensor_parallelism_splits_the_bytes_and_reduces_twice_per_layer():
    small = ModelShape.from_hf_config(SMALL)
    one = step_cost(small, COUNTING, 8, 5, 16, assumptions=EXACT)
    two = step_cost(small, COUNTING, 8, 5, 16, parallel=Parallel(tensor=2), assumptions=EXACT)
    assert (two.experts, two.weights, two.kv_cache) == (one.experts / 2, one.weights / 2, one.kv_cache / 2)
    assert two.exchange == 2 * 3 * (2 * (2 - 1) / 2 * 8 * 10 * 2)


def test_expert_parallelism_spreads_the_rows_and_exchanges_them():
    small = ModelShape.from_hf_config(SMALL)
    one = step_cost(small, COUNTING, 8, 5, 16, assumptions=EXACT)
    four = step_cost(
        small, COUNTING, 8, 2, 5, shares_experts=True, parallel=Parallel(expert=4), assumptions=EXACT
    )
    assert (four.experts, four.weights, four.kv_cache) == (one.experts * 2 / 5, one.weights, one.kv_cache / 4)
    assert four.exchange == 2 * 3 * (2 * (2 * 3 / 4) * 10 * 2)  # 2 rows per GPU, 2 copies, 3 of 4 leave
    slow_link = replace(EXACT, collective=1, routing=10)
    routing = step_cost(
        small, COUNTING, 8, 2, 5, shares_experts=True, parallel=Parallel(expert=4), assumptions=slow_link
    ).routing
    assert routing == 3 * 11, "with the rows spread, the sums of the utilities are reduced"


def test_a_window_limits_the_cache_that_is_read():
    oss = shape("gpt-oss-20b")
    assert (oss.window, oss.windowed_layers) == (128, 12)
    short, long = (
        step_cost(oss, COUNTING, 1, 1, 1, context=c, assumptions=EXACT).kv_cache for c in (128, 1128)
    )
    assert long - short == pytest.approx(12 * 1000 * 2 * 8 * 64 * 2)


def test_nothing_saved_costs_the_routing():
    small = shape("gpt-oss-120b")
    before = step_cost(small, GPUS["h200"], 16, 40, 64)
    after = step_cost(small, GPUS["h200"], 16, 40, 64, shares_experts=True)
    assert after.total - before.total == pytest.approx(36 * Assumptions().routing)
    assert gain(before, after) == pytest.approx(before.total / (before.total + 36 * 5e-6) - 1)
    assert gain(before, before) == 0


def test_a_budget_of_all_experts_gains_nothing():
    predictor = Predictor(shape("olmoe-1b-7b"), GPUS["h100"])
    prediction = predictor.at(8, XShareConfig(64))
    assert prediction.own == prediction.shared
    assert prediction.gain == pytest.approx(-prediction.after.routing / prediction.after.total)


def test_the_gain_falls_as_the_budget_grows():
    predictor = Predictor(shape("olmoe-1b-7b"), GPUS["h100"])
    gains = [predictor.at(16, XShareConfig(budget, warmup=0)).gain for budget in (8, 16, 24, 32, 40, 48)]
    assert gains == sorted(gains, reverse=True) and gains[0] > gains[-1] > -0.05
    assert all(p.gain < p.gain_without_overhead for p in [predictor.at(16, XShareConfig(16))])


def test_faster_memory_gains_less():
    predictions = [
        Predictor(shape("gpt-oss-120b"), GPUS[name]).at(16, XShareConfig(24))
        for name in ("a100", "h100", "h200")
    ]
    gains = [prediction.gain for prediction in predictions]
    assert gains == sorted(gains, reverse=True)


def test_expert_parallel_budget_is_spread_over_the_gpus():
    predictor = Predictor(shape("deepseek-r1"), GPUS["h200"], parallel=Parallel(expert=8))
    config = predictor.loads.config(None, 32, warmup=1)
    assert config == XShareConfig(32, gpu_budget=4)
    prediction = predictor.at(8, config)
    assert prediction.shared.peak_experts < prediction.own.peak_experts
    assert prediction.shared.experts <= 32 + 1
    with pytest.raises(ValueError, match="256 experts do not split over 7 GPUs"):
        Loads(shape("deepseek-r1").router, 7)


def test_a_coverage_saves_more_the_lower_it_is():
    predictor = Predictor(shape("olmoe-1b-7b"), GPUS["h100"])
    predictions = [predictor.at(16, XShareConfig(coverage=c)) for c in (0.99, 0.95, 0.9)]
    gains = [p.gain for p in predictions]
    assert gains == sorted(gains) and gains[0] < gains[-1]
    assert all(p.shared.kept_utility >= c for p, c in zip(predictions, (0.99, 0.95, 0.9), strict=True))


def test_a_coverage_sets_the_cap_of_the_fullest_gpu():
    predictor = Predictor(shape("deepseek-r1"), GPUS["h200"], parallel=Parallel(expert=8))
    config = predictor.loads.config(0.9, None, warmup=1)
    assert config == XShareConfig(coverage=0.9)
    prediction = predictor.at(16, config)
    assert prediction.shared.peak_experts < 0.8 * prediction.own.peak_experts
    assert prediction.shared.kept_utility >= 0.9
    with pytest.raises(ValueError, match="nothing is limited"):
        predictor.loads.config(None, None, warmup=1)


def test_the_gpt_oss_family_activates_what_the_real_router_does():
    """Within 5 % of gpt-oss-20b's counts, see tests/evaluation/test_traces.py."""
    loads = Loads(shape("gpt-oss-20b").router)
    for batch, real in ((4, 11.98), (8, 17.90), (16, 23.07), (32, 26.66)):
        assert loads.at(batch, XShareConfig.off(loads.spec)).experts == pytest.approx(real, rel=0.05)


def test_break_even_between_the_tried_batches():
    gains = {1: -2.0, 2: -1.0, 4: 1.0, 8: 3.0, 16: 1.0, 32: -1.0}
    assert worthwhile(gains.get, gains) == (4, 23)  # roots at 3 and 24, and those gain nothing
    assert worthwhile(gains.get, (2, 4, 8)) == (4, None)
    assert worthwhile(gains.get, (4, 8, 16, 32)) == (4, 23)
    assert worthwhile(gains.get, (1, 2)) is None


def test_the_default_overhead_is_the_fitted_one():
    assert Assumptions().layer_overhead == pytest.approx(fit_layer_overhead(), rel=0.05)


def test_public_figures_within_the_stated_error():
    """docs/cost_model.md says 9 points on average and 14 at worst; step times of plain routing 8 %."""
    pairs = validate()
    errors = [abs(published.gain - prediction.gain) for published, prediction in pairs]
    assert sum(errors) / len(errors) < 0.095 and max(errors) < 0.14
    for published, prediction in pairs:
        assert prediction.before.total == pytest.approx(published.batch / published.own, rel=0.08)
    assert [round(point.gain, 2) for point in PUBLISHED] == [0.05, 0.16, 0.37, 0.53]


def test_parallelism_is_of_one_kind():
    with pytest.raises(ValueError, match="cannot be combined"):
        Parallel(tensor=2, expert=2)
    with pytest.raises(ValueError, match="at least 1"):
        Parallel(tensor=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"quantization_config": {"quant_method": "awq"}},
            "the quantisation block lacks bits or w_bit; give --weight-bits",
        ),
        ({"torch_dtype": None}, "dtype=None is not known"),
        ({"hidden_size": None}, "hidden_size must be a positive integer, got None"),
        (
            {"quantization_config": {"quant_method": "quanto"}},
            "quant_method='quanto' is not known; known are awq, .*; give --weight-bits",
        ),
        (
            {
                "model_type": "nemotron_h",
                "n_routed_experts": 8,
                "n_group": 1,
                "topk_group": 1,
                "routed_scaling_factor": 1.0,
            },
            "nemotron_h is not predicted: some of its layers have no attention",
        ),
        ({"model_type": "llama"}, "model_type 'llama' is not known"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelShape.from_hf_config(SMALL | change)


def test_measured_moe_layers_are_compared_where_they_exist(monkeypatch, tmp_path):
    """The JSON of benchmarks/moe_layer_gpu.py, with the times that the model itself would predict."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "predict_validation.py"
    spec = importlib.util.spec_from_file_location("predict_validation", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    read = {active: 1e6 * active * 3 * 2880 * 2880 * 2 / (4.8e12 * 0.8) for active in (8, 128)}
    results = {"gpt-oss-120b": {"by_active_experts": {str(active): us for active, us in read.items()}}}
    measured = {"machine": {"gpu": "NVIDIA H200"}, "results": results}
    monkeypatch.setattr(benchmark, "MOE_LAYER", tmp_path / "moe_layer_gpu.json")
    benchmark.MOE_LAYER.write_text(json.dumps(measured))
    traces = torch.randn(1, 64, 18, 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(benchmark, "record_shipped", lambda: traces)
    monkeypatch.setattr(benchmark, "LENGTH", 18)
    out = tmp_path / "validation.json"
    result = CliRunner().invoke(benchmark.main, ["--json", str(out)])
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["moe_layer"]
    assert [row["us_predicted"] for row in rows] == pytest.approx([row["us"] for row in rows])
    assert [row["active_experts"] for row in rows] == [8, 128]
    report = json.loads(out.read_text())
    assert [row["experts"] for row in report["real_router"]] == [11.98, 17.9, 23.07, 26.66]
    both = [side["distinct_experts"]["4"] for side in report["shipped_model"].values()]
    assert both[1] == pytest.approx(both[0], rel=0.03), "half of the documents tell of the other half"
