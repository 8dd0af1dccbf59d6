"""Traces, the fit of a router, and routers drawn from it."""

import pytest
import torch
from torch import nn

from xshare_trtllm import RouterSpec, XShareConfig
from xshare_trtllm.evaluation import held_out, load_model, token_batches
from xshare_trtllm.evaluation import traces as module
from xshare_trtllm.evaluation.traces import (
    SyntheticRouters,
    decode_steps,
    fit_layer,
    gpu_load,
    kept_choice,
    load_fit,
    own_choice,
    record,
    save_fit,
    simulate,
    statistics,
)
from xshare_trtllm.routing import contiguous_placement

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
        kept = sum(one["kept_utility"][batch] for one in drawn) / 3
        assert kept == pytest.approx(traces["kept_utility"][batch], abs=0.03)
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
    assert (own.kept_utility, own.kept_choice) == (1, 1)
    assert own.experts == pytest.approx(float(own_choice(logits, 2).any(2).sum(-1).float().mean()))
    shared = simulate(logits, spec, XShareConfig(16, warmup=0, gpu_budget=1), placement, 4)
    assert shared.peak_experts == 1 and shared.experts <= 4
    assert 0 < shared.kept_utility < shared.kept_choice < 1


def test_kept_choice_by_hand():
    spec = RouterSpec(3, 1, "softmax")
    logits = torch.tensor([[[0.6, 0.3, 0.1]]]).log()
    assert kept_choice(logits, torch.tensor([[[1]]]), torch.ones(1, 1, 1), spec) == pytest.approx(0.5)
