"""The peers' rules against their definitions, row by row, and in a model."""

import pytest
import torch

from xshare_trtllm import RouterSpec, XShareConfig
from xshare_trtllm.evaluation import held_out, load_model, teacher_forced, token_batches, token_bytes
from xshare_trtllm.evaluation.peers import (
    Steps,
    expert_similarity,
    fewer_per_row,
    lynx,
    moe_spec,
    oea,
    rerouted,
    sere,
)
from xshare_trtllm.hf import attach

SPECS = [RouterSpec(16, 4, "softmax_renorm"), RouterSpec(16, 4, "softmax"), RouterSpec(16, 4, "topk_softmax")]


@pytest.fixture(scope="module")
def loaded():
    return load_model()


def some_steps(spec):
    logits = 2 * torch.randn(5, 6, 16, generator=torch.Generator().manual_seed(1))
    return Steps.of(logits, spec, None, 0)


def best_of(logits, allowed, k):
    return [e for e in logits.argsort(descending=True).tolist() if e in allowed][:k]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.scoring)
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_oea_fills_up_from_what_is_loaded(spec, kept):
    steps = some_steps(spec)
    ids, weights = oea(kept)(steps)
    for step in range(5):
        loaded = {e for row in steps.logits[step] for e in row.topk(kept).indices.tolist()}
        for row in range(6):
            expected = best_of(steps.logits[step, row], loaded, 4)
            assert ids[step, row].tolist()[: len(expected)] == expected
            assert weights[step, row, len(expected) :].sum() == 0
    if spec.scoring != "softmax":
        torch.testing.assert_close(weights.sum(-1), torch.ones(5, 6))


def test_oea_by_mass_keeps_fewer_where_a_row_is_sure():
    steps = some_steps(SPECS[0])
    ids, _ = oea(4, 0.6)(steps)
    for step in range(5):
        loaded = set()
        for row in steps.logits[step]:
            best = row.topk(4)
            shares = best.values.softmax(-1)
            enough = int((shares.cumsum(-1) < 0.6).sum()) + 1
            loaded |= set(best.indices[:enough].tolist())
        for row in range(6):
            assert ids[step, row, 0] == steps.logits[step, row].argmax()
            assert set(ids[step, row].tolist()) <= loaded


@pytest.mark.parametrize("rule, demand", [(moe_spec, "mass"), (lynx, "count")])
def test_budgets_keep_the_experts_in_demand(rule, demand):
    steps = some_steps(SPECS[0])
    ids, weights = rule(7)(steps)
    for step in range(5):
        wanted = torch.zeros(16)
        for row in steps.logits[step]:
            own = row.topk(4).indices
            probabilities = row.softmax(-1)[own]
            wanted[own] += probabilities if demand == "mass" else 1 + probabilities / 1000
        kept = set(wanted.topk(7).indices.tolist())
        used = set(ids[step][weights[step] > 0].tolist())
        if demand == "mass":
            assert used <= kept
        assert len(used) <= 7
        assert wanted[list(used)].sum() >= 0.8 * wanted[list(kept)].sum()
        for row in range(6):
            assert ids[step, row, 0].item() == best_of(steps.logits[step, row], used, 1)[0]


def test_fewer_per_row():
    steps = some_steps(SPECS[0])
    ids, weights = fewer_per_row(2)(steps)
    assert torch.equal(ids[..., :2], steps.logits.topk(2).indices)
    torch.testing.assert_close(weights[..., :2], steps.logits.topk(2).values.softmax(-1))
    assert weights[..., 2:].sum() == 0


def test_sere_gives_secondary_experts_to_their_like():
    steps = some_steps(SPECS[0])
    like = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(2))
    like[0].fill_diagonal_(2)
    ids, weights = sere(1, like)(steps)
    own = steps.logits.topk(4)
    torch.testing.assert_close(weights, own.values.softmax(-1))
    for step in range(5):
        primary = {int(row.argmax()) for row in steps.logits[step]}
        for row in range(6):
            for slot in range(4):
                expert = int(own.indices[step, row, slot])
                expected = expert if expert in primary else max(primary, key=lambda p: like[0, expert, p])
                assert ids[step, row, slot] == expected


def test_rerouted_shows_the_rule_the_same_steps_as_attach(loaded):
    """The paper's rule, written as a rule and as a configuration."""
    model, tokenizer = loaded
    batches = token_batches(held_out()[:16], tokenizer, 32, 4)
    sizes = token_bytes(tokenizer)

    def rule(steps):
        return steps.within(steps.best(steps.affinity.sum(1), 20))

    for step_tokens in (1, 4):
        with rerouted(model, rule, step_tokens) as counted:
            got = teacher_forced(model, batches, sizes)
        config = XShareConfig(20, warmup=0, utility="affinity")
        with attach(model, config, prefill="stepwise", step_tokens=step_tokens) as attached:
            expected = teacher_forced(model, batches, sizes)
        active = sum(layer.experts_after for layer in attached.stats) / 4
        assert counted.mean == pytest.approx(active, abs=0.02)  # a tie in fixed point is none in float
        torch.testing.assert_close(got.nats, expected.nats, rtol=1e-3, atol=0.1)


def test_the_own_routing_as_a_rule_changes_nothing(loaded):
    model, tokenizer = loaded
    batches = token_batches(held_out()[:4], tokenizer, 32, 4)
    sizes = token_bytes(tokenizer)
    expected = teacher_forced(model, batches, sizes)
    with rerouted(model, fewer_per_row(8)) as counted:
        got = teacher_forced(model, batches, sizes)
    torch.testing.assert_close(got.nats, expected.nats, rtol=1e-5, atol=1e-3)
    assert 8 < counted.mean < 32
    assert torch.equal(teacher_forced(model, batches, sizes).predictions, expected.predictions), "detached"


def test_similarity_is_that_of_the_outputs(loaded):
    model, tokenizer = loaded
    similarity = expert_similarity(model, token_batches(held_out()[:4], tokenizer, 32, 4), rows=64)
    assert similarity.shape == (4, 64, 64)
    torch.testing.assert_close(similarity.diagonal(dim1=1, dim2=2), torch.ones(4, 64), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(similarity, similarity.mT)
    others = similarity.masked_fill(torch.eye(64, dtype=torch.bool), -1)
    assert others.max() < 0.5
