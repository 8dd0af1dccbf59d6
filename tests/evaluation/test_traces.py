"""Traces, the fit of a router, and routers drawn from it."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

from xshare_trtllm import RouterSpec, XShareConfig
from xshare_trtllm.evaluation import held_out, load_model, token_batches
from xshare_trtllm.evaluation import traces as module
from xshare_trtllm.evaluation.traces import (
    SyntheticRouters,
    choice_moments,
    decode_steps,
    fit_layer,
    gpu_load,
    load_choices,
    load_fit,
    load_trace,
    own_choice,
    record,
    save_fit,
    simulate,
    statistics,
)
from xshare_trtllm.routing import contiguous_placement

TRACE = Path(os.environ.get("XSHARE_TRACE", Path(__file__).parents[3] / "shared/traces/gpt-oss-20b.npz"))
# Active experts of 32 of gpt-oss-20b by batch, and how many fewer by coverage (without a warm-up): 494
# requests of the public AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting, 120 batches of each size, all layers.
REAL_EXPERTS = {4: 11.98, 8: 17.90, 16: 23.07, 32: 26.66}
REAL_SAVED = {
    0.97: {4: 0.078, 8: 0.110, 16: 0.147, 32: 0.180},
    0.95: {4: 0.131, 8: 0.172, 16: 0.212, 32: 0.244},
    0.90: {4: 0.242, 8: 0.288, 16: 0.329, 32: 0.357},
}
REAL_KEPT_BY_12 = {4: 0.986, 8: 0.890, 16: 0.818, 32: 0.776}
GPT_OSS = RouterSpec(32, 4, "topk_softmax")
LENGTH = 256
SPEC = RouterSpec(64, 8, "softmax_renorm")


@pytest.fixture(scope="module")
def recorded():
    """The shipped model, tokens of 32 documents, their traces. Short documents would route differently."""
    model, tokenizer = load_model()
    tokens = torch.cat(token_batches(held_out()[:32], tokenizer, LENGTH))
    return model, tokens, record(model, tokens.split(16))


def test_record_is_what_the_routers_see(recorded):
    model, tokens, logits = recorded
    assert logits.shape == (4, 32, LENGTH, 64)
    seen = []
    hook = model.model.layers[2].mlp.gate.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    with torch.inference_mode():
        model(input_ids=tokens[28:, :-1])
        hook.remove()
        weight = model.model.layers[2].mlp.gate.weight
        expected = nn.functional.linear(seen[0], weight).view(4, LENGTH, 64)
    torch.testing.assert_close(logits[2, 28:], expected, rtol=1e-3, atol=1e-4)  # other batch, other sums
    assert not any(router._forward_hooks for router in module.find_routers(model))


def test_decode_steps_are_the_same_position_of_a_batch_of_documents():
    logits = torch.arange(2 * 5 * 3 * 4).view(2, 5, 3, 4).float()
    steps = decode_steps(logits, 2)
    assert steps.shape == (2, 6, 2, 4)
    torch.testing.assert_close(steps[1, 4], logits[1, 2:4, 1])


def draw(documents=400, length=40):
    """A layer's logits with known parts: 12 experts, 3 document and 5 token components, lag 0.6."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    bias = torch.linspace(-0.5, 0.5, 12)
    document = normal(documents, 1, 3) @ (0.4 * normal(3, 12))
    noise = normal(documents, length, 5)
    for t in range(1, length):
        noise[:, t] = 0.6 * noise[:, t - 1] + 0.8 * noise[:, t]
    token_directions = 0.5 * normal(5, 12)
    return bias, document, bias + document + noise @ token_directions, token_directions


def test_the_fit_finds_what_made_the_logits():
    bias, document, logits, token_directions = draw()
    fit = fit_layer(logits + torch.randn(400, 40, 1))  # a constant per row changes nothing
    assert fit.bias_variance == pytest.approx(float(bias.var()), rel=0.15)
    centred = document[:, 0] - document[:, 0].mean(-1, keepdim=True)
    assert sum(fit.document_variances) == pytest.approx(float(centred.var(0).sum()), rel=0.15)
    directions = token_directions - token_directions.mean(-1, keepdim=True)
    assert sum(fit.token_variances) == pytest.approx(float(directions.square().sum()), rel=0.1)
    assert len([v for v in fit.token_variances if v > 0.01 * fit.token_variances[0]]) == 5
    assert fit.lag_correlation == pytest.approx(0.6, abs=0.06)
    assert list(fit.profile) == sorted(fit.profile)


def test_too_few_documents_are_refused():
    with pytest.raises(ValueError, match="needs 2 documents of 2 tokens, got 1 of 9"):
        fit_layer(torch.zeros(1, 9, 4))


def test_a_fit_survives_its_file(tmp_path):
    layers = (fit_layer(draw(20, 8)[2]), fit_layer(draw(30, 5)[2]))
    save_fit(tmp_path / "fit.json", layers)
    assert load_fit(tmp_path / "fit.json") == layers


def test_the_shipped_fit_is_of_this_model(recorded):
    """On part of the documents, so near and not equal."""
    shipped = load_fit()
    assert len(shipped) == 4
    for layer, logits in zip(shipped, recorded[2], strict=True):
        again = fit_layer(logits)
        assert sum(layer.token_variances) == pytest.approx(sum(again.token_variances), rel=0.15)
        assert layer.profile == pytest.approx(again.profile, abs=0.15)


def test_drawn_routers_behave_like_the_traces(recorded):
    """3 % on experts and 3 points on affinity: what benchmarks/expert_parallel.py finds on held-out
    documents, with room for the fewer documents here."""
    routers = [SyntheticRouters(load_fit(), SPEC, seed) for seed in range(3)]
    drawn = [statistics(router.logits(32, LENGTH), 8, (8, 16)) for router in routers]
    traces = statistics(recorded[2], 8, (8, 16))
    for batch in (8, 16):
        experts = sum(one["distinct_experts"][batch] for one in drawn) / 3
        assert experts == pytest.approx(traces["distinct_experts"][batch], rel=0.04)
        kept = sum(one["kept_affinity"][batch] for one in drawn) / 3
        assert kept == pytest.approx(traces["kept_affinity"][batch], abs=0.03)
    overlap = {name: sum(one["overlap"][name] for one in drawn) / 3 for name in ("1", "16", "other")}
    assert overlap["1"] > overlap["16"] > overlap["other"] > 8 / 64


def test_more_experts_can_be_drawn_than_were_fitted():
    spec = RouterSpec(256, 8, "sigmoid_bias", 8, 4)
    logits = SyntheticRouters(load_fit(), spec).logits(16, 2)
    assert logits.shape == (4, 16, 2, 256)
    kth = logits.sort(-1, descending=True).values[..., 7]
    torch.testing.assert_close(kth, torch.zeros_like(kth), atol=1e-6, rtol=0)
    spread, fitted = (
        logits.std(-1).mean(),
        torch.tensor([layer.profile for layer in load_fit()]).std(-1).mean(),
    )
    assert float(spread) == pytest.approx(float(fitted), rel=0.05)
    again = SyntheticRouters(load_fit(), spec).logits(16, 2)
    assert torch.equal(logits, again), "the seed decides"
    assert not torch.equal(logits, SyntheticRouters(load_fit(), spec, seed=1).logits(16, 2))


def test_gpu_load_counts_what_has_weight():
    ids = torch.tensor([[[0, 1], [0, 5], [2, 2]], [[4, 5], [4, 5], [4, 5]]])
    weights = torch.tensor([[[1.0, 1], [1, 1], [1, 0]], [[1.0, 1], [1, 1], [1, 1]]])
    gpu = torch.tensor([0, 0, 0, 1, 1, 1])
    # Step 0: experts 0, 1, 2 with 2, 1, 1 rows on GPU 0; expert 5 with 1 row on GPU 1. Step 1: 4, 5; 6 rows.
    assert gpu_load(ids, weights, gpu, 2) == (3.0, 2.5, 5.0)


def test_simulate_equals_the_routing_statistics():
    logits = 2 * torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(0))
    spec = RouterSpec(16, 2, "softmax_renorm")
    placement = contiguous_placement(16, 4).expand(2, -1)
    own = simulate(logits, spec, XShareConfig.off(spec), placement, 4)
    assert own.kept_utility == 1
    assert own.experts == pytest.approx(float(own_choice(logits, 2).any(2).sum(-1).float().mean()))
    shared = simulate(logits, spec, XShareConfig(16, warmup=0, gpu_budget=1), placement, 4)
    assert shared.peak_experts == 1 and shared.experts <= 4
    assert 0 < shared.kept_utility < 1


def test_a_coverage_limits_the_fullest_gpu_where_there_are_some():
    logits = 2 * torch.randn(1, 20, 8, 16, generator=torch.Generator().manual_seed(0))
    spec, config = RouterSpec(16, 2, "softmax_renorm"), XShareConfig(coverage=0.8, warmup=0)
    placement = contiguous_placement(16, 4).expand(1, -1)
    layer = simulate(logits, spec, config, torch.zeros(1, 16, dtype=torch.int32))
    spread = simulate(logits, spec, config, placement, 4)
    assert spread.experts > layer.experts, "what fits below the fullest GPU's load is free"
    assert spread.peak_experts < simulate(logits, spec, XShareConfig.off(spec), placement, 4).peak_experts
    assert min(layer.kept_utility, spread.kept_utility) >= 0.8


# ---- A router of which only the choices are known ----------------------------------------------------------


def test_choice_moments_by_hand():
    # Two layers of three experts, two of them chosen per row; four rows.
    ids = torch.tensor([[[0, 1], [2, 1]], [[0, 1], [2, 0]], [[0, 2], [2, 1]], [[0, 1], [2, 0]]])
    weights = torch.tensor([0.75, 0.25]).expand(4, 2, 2)
    moments = choice_moments(ids, 3 * weights, 3, "by hand")
    # Layer 0: 4, 3, 1 of 4 rows; layer 1: 2, 2, 4.
    assert moments.popularity == pytest.approx([(0.25 + 0.5) / 2, (0.75 + 0.5) / 2, 1.0])
    assert sum(moments.popularity) == moments.top_k == 2
    assert moments.squared_weights == pytest.approx(0.75**2 + 0.25**2)
    assert moments.origin == "by hand"


def test_choice_moments_survive_their_file(tmp_path):
    path = tmp_path / "choices.json"
    path.write_text(json.dumps(asdict(load_choices())))
    assert load_choices(path) == load_choices()
    assert "gpt-oss-20b" in load_choices().origin


def drawn_choices(spec, moments, seeds=2, rows=2048):
    """Logits [layers, rows, E] of routers with these moments."""
    drawn = [SyntheticRouters(load_fit(), spec, seed, moments).logits(rows)[:, :, 0] for seed in range(seeds)]
    return torch.cat(drawn)


def test_routers_have_the_moments_that_they_are_drawn_with():
    moments = load_choices()
    logits = drawn_choices(GPT_OSS, moments)
    weights, ids = logits.topk(4, -1)
    again = choice_moments(ids.transpose(0, 1), weights.softmax(-1).transpose(0, 1), 32, "drawn")
    # 2048 rows: a share of 1/8 has a standard error of 0.007; the sorted mean of 8 layers is nearer.
    assert again.popularity == pytest.approx(moments.popularity, abs=0.012)
    assert again.squared_weights == pytest.approx(moments.squared_weights, rel=0.002)


def test_popularity_carries_over_to_other_numbers_of_experts():
    moments = load_choices()
    load = own_choice(drawn_choices(RouterSpec(128, 4, "topk_softmax"), moments, seeds=1), 4).float().mean(1)
    known = torch.tensor(moments.popularity)
    assert float((load.std(-1) / load.mean(-1)).mean()) == pytest.approx(
        float(known.std() / known.mean()), rel=0.1
    )
    with_few = (
        own_choice(drawn_choices(RouterSpec(8, 2, "topk_softmax"), moments, seeds=1), 2).float().mean(1)
    )
    assert float(with_few.max()) < 0.9


def test_popularity_alone_decides_how_many_experts_a_batch_activates():
    """Within 3 % of the real router at every batch; by the shipped model's fit alone it is 5 to 12 % more."""
    chosen = own_choice(drawn_choices(GPT_OSS, load_choices()), 4)
    balanced = own_choice(drawn_choices(GPT_OSS, None), 4)
    for batch, real in REAL_EXPERTS.items():
        drawn, without = (
            float(c.view(len(c), -1, batch, 32).any(2).sum(-1).float().mean()) for c in (chosen, balanced)
        )
        assert drawn == pytest.approx(real, rel=0.03)
        assert without > drawn
    assert without > 1.1 * real


@pytest.mark.parametrize("coverage", REAL_SAVED)
def test_a_coverage_saves_what_it_saves_on_the_real_router(coverage):
    """3.5 points: the rows of drawn routers all have the same weights by rank, those of real ones do not,
    which counts where rows are few."""
    logits = drawn_choices(GPT_OSS, load_choices())
    placement = torch.zeros(len(logits), 32, dtype=torch.int32)
    for batch, saved in REAL_SAVED[coverage].items():
        steps = logits.view(len(logits), -1, batch, 32)[:, :24]
        own = simulate(steps, GPT_OSS, XShareConfig.off(GPT_OSS), placement)
        shared = simulate(steps, GPT_OSS, XShareConfig(coverage=coverage, warmup=0), placement)
        assert 1 - shared.experts / own.experts == pytest.approx(saved, abs=0.035)
        budget = simulate(steps, GPT_OSS, XShareConfig(12, warmup=0), placement)
        assert budget.kept_utility == pytest.approx(REAL_KEPT_BY_12[batch], abs=0.02)


def test_a_file_that_is_no_trace_is_refused(tmp_path):
    path = tmp_path / "trace.npz"
    numpy.savez(path, ids=numpy.zeros((2, 3, 4, 2)))
    with pytest.raises(ValueError, match="has ids; expert_ids and expert_weights are needed"):
        load_trace(path)
    numpy.savez(path, expert_ids=numpy.zeros((2, 3, 4), "uint8"), expert_weights=numpy.zeros((2, 3, 4, 2)))
    with pytest.raises(ValueError, match=r"ids \[2, 3, 4\], weights \[2, 3, 4, 2\]"):
        load_trace(path)


@pytest.mark.skipif(not TRACE.exists(), reason="the trace of gpt-oss-20b is not here: set XSHARE_TRACE")
def test_the_stored_moments_are_those_of_the_real_trace():
    assert module.record_choices(TRACE) == load_choices()
