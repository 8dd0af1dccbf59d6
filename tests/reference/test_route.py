"""The reference against brute force, and the properties that the algorithm promises."""

from importlib import import_module
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xshare_trtllm import RouterSpec, RoutingStats, XShareConfig, ops
from xshare_trtllm import mask_logits as any_mask_logits
from xshare_trtllm import route as any_route
from xshare_trtllm.config import RULES, SCORINGS, UTILITIES

stages = import_module("xshare_trtllm.reference.route")  # the function of that name hides the module
SEEDS = st.integers(0, 2**31)
INF = float("inf")
BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not ops.available(), reason="needs libxshare.so")),
]


def route(*args, **kwargs):
    return any_route(*args, **kwargs, backend="reference")


def mask_logits(*args, **kwargs):
    return any_mask_logits(*args, **kwargs, backend="reference")


def ids_of(mask):
    return set(mask.nonzero().flatten().tolist())


def mask_of(ids, n):
    mask = torch.zeros(n, dtype=torch.bool)
    mask[sorted(ids)] = True
    return mask


def utilities_of(scoring):
    return UTILITIES if RULES[scoring].is_bounded else ("squared_weight",)


@st.composite
def cases(draw, **fixed):
    """(logits, spec, config, arguments) over all options; logits from a coarse grid, so that ties occur."""
    generator = torch.Generator().manual_seed(draw(SEEDS))
    rows, k = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    scoring = draw(st.sampled_from(SCORINGS))
    groups = 1 if RULES[scoring].group_best_of == 0 else draw(st.sampled_from([1, 3]))
    n = draw(st.sampled_from([6, 12]))
    spec = RouterSpec(n, k, scoring, groups, min(2, groups), draw(st.sampled_from([1.0, 2.5])))
    coverage = draw(st.sampled_from([None, 0.5, 0.9]))
    budget = st.integers(k, n)
    config = XShareConfig(
        budget=draw(budget if coverage is None else st.none() | budget),
        warmup=draw(st.integers(0 if groups == 1 else 1, k)),
        request_budget=draw(st.sampled_from([None, 1, 3])),
        gpu_budget=draw(st.sampled_from([None, 1, 2])),
        coverage=coverage,
        max_rows=draw(st.sampled_from([None, None, 6])),
        utility=draw(st.sampled_from(utilities_of(scoring))),
    )
    config = config.model_copy(update=fixed)
    logits = torch.randint(-8, 9, (rows, n), generator=generator) / 4
    if draw(st.booleans()):  # a few bans: every row and every group keeps enough to choose from
        banned = torch.rand(rows, n // 6, 6, generator=generator).argsort(dim=-1) == 0
        logits = logits.masked_fill(banned.flatten(1), -INF)
    arguments = {
        "request_ids": torch.randint(-1, 3, (rows,), generator=generator),
        "exempt": torch.rand(rows, generator=generator) < 0.2,
        "expert_gpu": torch.randint(0, 3, (n,), generator=generator),
    }
    if RULES[scoring].has_bias:
        arguments["correction_bias"] = torch.randint(-2, 3, (n,), generator=generator) / 8
    return logits, spec, config, arguments


# ---- The arithmetic ----------------------------------------------------------------------------------------


def test_exp_is_accurate():
    x = torch.cat([-torch.logspace(-8, 1.939, 20001), torch.tensor([0.0, -87.0])])
    exact = x.double().exp()
    # Cephes states 1.7e-7 for this polynomial; two units in the last place are 2.4e-7.
    assert ((stages.exp(x).double() - exact).abs() / exact).max() < 2.4e-7
    assert stages.exp(torch.tensor([0.0, -0.0])).tolist() == [1.0, 1.0]
    assert stages.exp(torch.tensor([-87.01, -1e30, -INF])).tolist() == [0.0, 0.0, 0.0]


def test_softmax_and_sigmoid_are_accurate():
    logits = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * 6
    below_max = (
        logits - logits.amax(-1, keepdim=True)
    ).double()  # the one rounding that any fp32 softmax makes
    exact = below_max.softmax(-1)
    # Two values of exp, their sum's rounding and the division: 2 * 2.4e-7 + 2 * 6e-8.
    assert ((stages.softmax(logits).double() - exact).abs() / exact).max() < 6e-7
    exact = logits.double().sigmoid()
    assert ((stages.sigmoid(logits).double() - exact).abs() / exact).max() < 6e-7
    assert stages.softmax(torch.tensor([[3e38, -3e38]])).tolist() == [[1.0, 0.0]]
    assert stages.sigmoid(torch.tensor([0.0, 3e38, -3e38])).tolist() == [0.5, 1.0, 0.0]


def test_the_root_of_a_softplus_is_accurate():
    # Every 1009th float of both signs up to 87, where the exponential ends, and 3e38.
    bits = torch.cat([torch.arange(low, low + 0x7F61B1E6, 1009) for low in (0, -(2**31))])
    z = bits.to(torch.int32).view(torch.float32)
    z = z[(z >= -87) & z.isfinite()]
    exact = torch.log1p((-z.double().abs()).exp()) + z.double().clamp(min=0)
    error = (stages.sqrt_softplus(z).double() / exact.sqrt() - 1).abs().max()
    assert error < 4e-7, float(error)
    low = stages.sqrt_softplus(torch.tensor([-87.01, -1e30, -INF]))
    assert low.tolist() == [0.0, 0.0, 0.0]


def test_softmax_does_not_depend_on_the_order_of_experts():
    logits = torch.randn(32, 512, generator=torch.Generator().manual_seed(1)) * 4
    order = torch.randperm(512, generator=torch.Generator().manual_seed(2))
    assert torch.equal(stages.softmax(logits)[:, order], stages.softmax(logits[:, order]))


def test_fixed_point_rounds_half_away_from_zero():
    affinity = torch.tensor([0.0, 0.49, 0.5, 1.5, 2.5, 2**20]) / 2**20
    assert stages.to_fixed_point(affinity).tolist() == [0, 0, 1, 2, 3, 2**20]


# ---- Stage 4 against brute force ---------------------------------------------------------------------------


def supersets(base, others):
    """All sets of experts that hold `base` and any of the others."""
    others = [e for e in others if e not in base]
    return (base | set(extra) for n in range(len(others) + 1) for extra in combinations(others, n))


def worth(u, experts):
    return sum(u[e] for e in experts)


def select(u, config, top_k=1, free=(), warm=(), gpu=None):
    placement = None if gpu is None else torch.tensor(gpu)
    sets = mask_of(free, len(u)), mask_of(warm, len(u))
    return ids_of(stages.select(torch.tensor(u), *sets, placement, top_k, config))


utilities = st.lists(st.integers(0, 6), min_size=8, max_size=8)
expert_sets = st.sets(st.integers(0, 7), max_size=4)
placements = st.lists(st.integers(0, 2), min_size=8, max_size=8)
coverages = st.sampled_from([0.25, 0.5, 0.75, 0.9, 1.0])


@settings(max_examples=150, deadline=None)
@given(u=utilities, warm=expert_sets, free=expert_sets, budget=st.integers(1, 8))
def test_modular_optimum(u, warm, free, budget):
    chosen = select(u, XShareConfig(budget), free=free, warm=warm)
    counted = warm - free
    assert chosen >= warm | free
    assert len(chosen - free) <= max(budget, len(counted))
    assert all(u[e] > 0 for e in chosen - warm - free)
    room = max(0, budget - len(counted))
    allowed = (s for s in supersets(warm | free, range(8)) if len(s - warm - free) <= room)
    assert worth(u, chosen) == max(worth(u, s) for s in allowed)


@settings(max_examples=150, deadline=None)
@given(
    u=utilities,
    warm=expert_sets,
    free=expert_sets,
    gpu=placements,
    budget=st.none() | st.integers(1, 8),
    gpu_budget=st.integers(1, 4),
)
def test_laminar_greedy_optimum(u, warm, free, gpu, budget, gpu_budget):
    """Per GPU inside per batch, around a warm-up that may already exceed either."""
    chosen = select(u, XShareConfig(budget, gpu_budget=gpu_budget), free=free, warm=warm, gpu=gpu)
    counted, base = warm - free, warm | free
    room = max(0, (budget or 8) - len(counted))

    def fits(experts):
        on = [gpu[e] for e in experts - free]
        added = {gpu[e] for e in experts - base}
        return len(experts - base) <= room and all(on.count(g) <= gpu_budget for g in added)

    assert chosen >= base and fits(chosen)
    assert worth(u, chosen) == max(worth(u, s) for s in supersets(base, range(8)) if fits(s))


@settings(max_examples=150, deadline=None)
@given(u=utilities, warm=expert_sets, free=expert_sets, coverage=coverages, top_k=st.integers(1, 5))
def test_the_coverage_set_is_the_smallest_and_never_below_k(u, warm, free, coverage, top_k):
    chosen, base = select(u, XShareConfig(coverage=coverage), top_k, free, warm), warm | free
    useful = base | {e for e in range(8) if u[e] > 0}

    def suffices(experts):
        return worth(u, experts) >= coverage * sum(u) and len(experts) >= min(top_k, len(useful))

    assert suffices(chosen) and base <= chosen <= useful
    assert len(chosen) == min(len(s) for s in supersets(base, useful) if suffices(s))
    least = min((u[e] for e in chosen - base), default=INF)
    assert all(u[e] <= least for e in set(range(8)) - chosen), "a prefix of the order"


@settings(max_examples=150, deadline=None)
@given(u=utilities, warm=expert_sets, free=expert_sets, coverage=coverages, budget=st.integers(1, 8))
def test_a_budget_caps_the_coverage(u, warm, free, coverage, budget):
    by_coverage = select(u, XShareConfig(coverage=coverage), 1, free, warm)
    by_budget = select(u, XShareConfig(budget), 1, free, warm)
    both = select(u, XShareConfig(budget, coverage=coverage), 1, free, warm)
    assert both == min(by_coverage, by_budget, key=len)


@settings(max_examples=150, deadline=None)
@given(
    u=utilities,
    warm=expert_sets,
    free=expert_sets,
    gpu=placements,
    coverage=coverages,
    top_k=st.integers(1, 5),
)
def test_the_coverage_sets_the_smallest_cap_of_a_gpu(u, warm, free, gpu, coverage, top_k):
    """And every GPU is filled up to it, by its most useful experts; the warm-up counts, but wins."""
    useful = free | {e for e in range(8) if u[e] > 0}
    at_least = min(top_k, len(useful))

    def peak(experts):
        on = [gpu[e] for e in experts]
        return max(map(on.count, on), default=0)

    enough = (s for s in supersets(free, useful) if worth(u, s) >= coverage * sum(u) and len(s) >= at_least)
    cap = min(peak(s - free) for s in enough)
    chosen = select(u, XShareConfig(coverage=coverage), top_k, free, warm, gpu)
    for g in set(gpu):
        counted = [e for e in warm - free if gpu[e] == g]
        others = sorted((e for e in useful - warm - free if gpu[e] == g), key=lambda e: (-u[e], e))
        here = counted + others[: max(0, cap - len(counted))]
        assert {e for e in chosen - free if gpu[e] == g} == set(here)
    assert select(u, XShareConfig(coverage=coverage, gpu_budget=8), top_k, free, warm, gpu) == select(
        u, XShareConfig(coverage=coverage), top_k, free, warm
    ), "a budget of one's own leaves the coverage to end the walk"


# ---- From logits to the set, with the utilities computed independently in fp64 -----------------------------


AFFINITIES = {
    "softmax": lambda z: z.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": lambda z: torch.nn.functional.softplus(z).sqrt(),
}


def column_utility(logits, spec, utility):
    """g [E] fp64, from torch's own softmax, sigmoid and topk."""
    z = logits.double()
    affinity = AFFINITIES[spec.rule.affinity](z)
    if utility == "affinity":
        return affinity.sum(0)
    values, ids = affinity.topk(spec.top_k, dim=-1)
    weights = values / values.sum(-1, keepdim=True) if spec.rule.renormalises else values
    return torch.zeros_like(z).scatter_(1, ids, weights**2).sum(0)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS,
    worth_by=st.sampled_from([(s, u) for s in SCORINGS for u in utilities_of(s)]),
    limits=st.fixed_dictionaries(
        {}, optional={"budget": st.integers(2, 7), "coverage": st.sampled_from([0.5, 0.8, 0.9, 0.97])}
    ).filter(bool),
    gpu_budget=st.none() | st.integers(1, 3),
)
def test_route_keeps_the_most_utility_of_all_sets(backend, seed, worth_by, limits, gpu_budget):
    scoring, utility = worth_by
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)) * 2
    spec, gpu = RouterSpec(8, 2, scoring), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    config = XShareConfig(**limits, gpu_budget=gpu_budget, warmup=0, utility=utility)
    placement = {"expert_gpu": gpu} if gpu_budget else {}
    result = any_route(logits, spec, config, backend=backend, **placement)
    g = column_utility(logits, spec, utility)
    share = (g / g.sum()).tolist()
    error = 2 * 40 * 2**-20  # each of the 40 utilities is rounded to a multiple of 2^-20, and so the total is
    wanted = limits.get("coverage", 2.0)

    def fits(experts):
        on = [int(gpu[e]) for e in experts]
        in_gpus = gpu_budget is None or all(on.count(one) <= gpu_budget for one in on)
        return in_gpus and len(experts) <= limits.get("budget", 8)

    chosen = ids_of(result.active_experts)
    kept = worth(share, chosen)
    assert fits(chosen) and result.stats.kept_utility == pytest.approx(kept, abs=error)
    fitting = [s for s in supersets(set(), range(8)) if fits(s)]
    assert kept >= max(worth(share, s) for s in fitting if len(s) <= len(chosen)) - error
    if kept < wanted - error:
        assert kept >= max(worth(share, s) for s in fitting) - error
    elif len(chosen) > spec.top_k:
        assert all(worth(share, s) < wanted + error for s in fitting if len(s) < len(chosen))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, scoring=st.sampled_from(SCORINGS), coverage=st.sampled_from([0.5, 0.9, 0.97, 1.0]))
def test_the_cap_by_coverage_is_the_smallest_of_all_sets(backend, seed, scoring, coverage):
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)) * 2
    spec, gpu = RouterSpec(8, 2, scoring), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    config = XShareConfig(coverage=coverage, warmup=0)
    result = any_route(logits, spec, config, backend=backend, expert_gpu=gpu)
    g = column_utility(logits, spec, "squared_weight")
    share, error = (g / g.sum()).tolist(), 2 * 40 * 2**-20
    chosen = ids_of(result.active_experts)
    assert worth(share, chosen) >= coverage - error

    def peak(experts):
        return max(sum(int(gpu[e]) == one for e in experts) for one in range(3))

    for experts in supersets(set(), range(8)):
        if peak(experts) < peak(chosen) and len(experts) >= spec.top_k:
            assert worth(share, experts) < coverage + error


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["normal", "flat", "peaked"])
def test_resolution_of_the_fixed_point(backend, kind):
    """With k experts per row, each row's squared weights sum to 1 / k or more and lose less than k / 2^21, so
    a share is right within k^2 / 2^21, for any number of rows."""
    spec, rows = RouterSpec(512, 16, "softmax_renorm"), 2048 if backend == "reference" else 16384
    logits = torch.randn(rows, 512, generator=torch.Generator().manual_seed(1))
    logits *= {"normal": 1.0, "flat": 0.001, "peaked": 30.0}[kind]
    result = any_route(logits, spec, XShareConfig(200, warmup=0), backend=backend)
    g = column_utility(logits, spec, "squared_weight")
    kept = float(g[result.active_experts].sum() / g.sum())
    assert result.stats.kept_utility == pytest.approx(kept, abs=16**2 / 2**21)
    best = float(g.topk(200).values.sum() / g.sum())
    assert kept >= best - 2 * 16**2 / 2**21


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, scoring=st.sampled_from(SCORINGS), coverage=st.sampled_from([0.01, 0.9, 1.0]))
def test_a_single_row_keeps_its_own_routing(seed, scoring, coverage):
    spec = RouterSpec(12, 3, scoring)
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(seed))
    own, result = (
        route(logits, spec, XShareConfig.off(spec)),
        route(logits, spec, XShareConfig(coverage=coverage)),
    )
    assert torch.equal(result.expert_ids, own.expert_ids)
    assert torch.equal(result.expert_weights, own.expert_weights)
    assert not result.stats.stood_aside


# ---- Banned experts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_banned_expert_leaves_the_row_real(backend):
    logits, spec = torch.tensor([[1.0, 2.0, -INF, 0.5]]), RouterSpec(4, 2, "topk_softmax")
    for config in (XShareConfig(4), XShareConfig(coverage=1.0), XShareConfig(2, utility="affinity")):
        result = any_route(logits, spec, config, backend=backend)
        assert result.expert_ids.tolist() == [[1, 0]] and result.stats.rows == 1
        assert result.expert_weights[0].tolist() == pytest.approx([0.731, 0.269], abs=5e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "row", [[1.0, -INF, -INF, -INF], [-INF] * 4, [1, 2, float("nan"), 3], [1, 2, INF, 3]]
)
@pytest.mark.parametrize("scoring", SCORINGS)
def test_too_few_or_broken_logits_make_padding(backend, scoring, row):
    logits = torch.tensor([row, [0.0, 1.0, 2.0, -INF]])
    result = any_route(logits, RouterSpec(4, 2, scoring), XShareConfig(2), backend=backend)
    assert result.stats.rows == 1 and ids_of(result.active_experts) == {1, 2}
    assert result.expert_ids.tolist() == [[1, 2], [2, 1]]
    assert not result.expert_weights[0].any() and bool(result.expert_weights[1].all())


def test_a_group_with_too_few_experts_left_is_closed():
    logits = torch.tensor([[9.0, -INF, 1.0, 1.0]])  # sigmoid_bias scores a group by two
    spec = RouterSpec(4, 2, "sigmoid_bias", num_groups=2, top_k_groups=1)
    assert route(logits, spec, XShareConfig.off(spec)).expert_ids.tolist() == [[2, 3]]
    by_best = RouterSpec(4, 2, "softmax", num_groups=2, top_k_groups=1)
    padding = route(logits, by_best, XShareConfig.off(by_best))  # group 0 wins and has one expert for k = 2
    assert padding.stats.rows == 0 and not padding.expert_weights.any()


def test_a_row_that_finds_nothing_in_the_set_gets_the_padding_output():
    logits = torch.zeros(6, 6)
    logits[:5, 2:] = -INF  # five rows decide for 0 and 1
    logits[5, :2] = -INF  # which the sixth may not use
    spec, config = RouterSpec(6, 2, "softmax"), XShareConfig(2, warmup=0)
    result = route(logits, spec, config)
    assert ids_of(result.active_experts) == {0, 1}
    assert result.expert_ids[5].tolist() == [0, 1] and not result.expert_weights[5].any()
    assert mask_logits(logits, spec, config)[5].tolist() == [0.0, 0.0] + [-INF] * 4
    assert result.stats.rows == 6


@settings(max_examples=100, deadline=None)
@given(case=cases(max_rows=None), seed=SEEDS, share=st.sampled_from([0.2, 0.6]))
def test_banned_experts_are_never_used(case, seed, share):
    logits, spec, config, arguments = case
    banned = torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed)) < share
    logits = logits.masked_fill(banned, -INF)
    result = route(logits, spec, config, **arguments)
    used = torch.zeros_like(banned).scatter_(1, result.expert_ids.long(), True)
    with_weight = result.expert_weights.any(dim=-1)
    assert not (used & (logits == -INF))[with_weight].any()
    assert not with_weight[(logits > -INF).sum(-1) < spec.top_k].any()
    assert result.expert_weights.isfinite().all()
    masked = stages.mask_logits(logits, spec, config, **arguments)
    assert not (masked[with_weight] > -INF)[logits[with_weight] == -INF].any()


# ---- Properties of the whole, over all options -------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(case=cases(), seed=SEEDS)
def test_row_order_does_not_matter(case, seed):
    logits, spec, config, arguments = case
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    result = route(logits, spec, config, **arguments)
    by_row = {name: arguments[name][order] for name in ("request_ids", "exempt")}
    moved = route(logits[order], spec, config, **(arguments | by_row))
    assert torch.equal(moved.active_experts, result.active_experts)
    assert torch.equal(moved.expert_ids, result.expert_ids[order])
    assert torch.equal(moved.expert_weights, result.expert_weights[order])
    assert torch.equal(moved.raw_stats, result.raw_stats)


@settings(max_examples=100, deadline=None)
@given(case=cases(), bad=st.sampled_from([float("nan"), INF]), where=st.integers(0, 5))
def test_bad_rows_are_padding_and_poison_nothing(case, bad, where):
    logits, spec, config, arguments = case
    row = where % len(logits)
    arguments["request_ids"][row] = -1
    expected = route(logits, spec, config, **arguments)
    logits = logits.clone()
    logits[row, where] = bad
    arguments["request_ids"] = arguments["request_ids"].clone()
    arguments["request_ids"][row] = 1
    result = route(logits, spec, config, **arguments)
    assert torch.equal(result.expert_ids, expected.expert_ids)
    assert torch.equal(result.expert_weights, expected.expert_weights)
    assert torch.equal(result.active_experts, expected.active_experts)
    assert torch.equal(result.raw_stats, expected.raw_stats)
    assert result.expert_weights.isfinite().all()


@settings(max_examples=100, deadline=None)
@given(case=cases(), seed=SEEDS)
def test_padding_changes_nothing_and_activates_nothing(case, seed):
    logits, spec, config, arguments = case
    real = arguments["request_ids"] >= 0
    by_row = {name: arguments[name][real] for name in ("request_ids", "exempt")}
    alone = route(logits[real], spec, config, **(arguments | by_row))
    result = route(logits, spec, config, **arguments)
    assert torch.equal(result.expert_ids[real], alone.expert_ids)
    assert torch.equal(result.expert_weights[real], alone.expert_weights)
    assert torch.equal(result.active_experts, alone.active_experts)
    assert torch.equal(result.raw_stats, alone.raw_stats)
    active = sorted(ids_of(result.active_experts)) or [0]
    slots = [active[min(slot, len(active) - 1)] for slot in range(spec.top_k)]
    assert all(row == slots for row in result.expert_ids[~real].tolist())
    assert not result.expert_weights[~real].any()


@settings(max_examples=150, deadline=None)
@given(case=cases(max_rows=None))
def test_rows_rank_by_score_inside_the_set(case):
    """A row's output is the best of what it may use, warm-up included; exempt rows keep their own top-k."""
    logits, spec, config, arguments = case
    result = route(logits, spec, config, **arguments)
    own = route(logits, spec, XShareConfig.off(spec), **arguments)
    _, ranking = stages.score(logits, arguments.get("correction_bias"), spec)
    active = ids_of(result.active_experts)
    for row in (arguments["request_ids"] >= 0).nonzero().flatten().tolist():
        if arguments["exempt"][row]:
            assert torch.equal(result.expert_ids[row], own.expert_ids[row])
            assert torch.equal(result.expert_weights[row], own.expert_weights[row])
            continue
        score = ranking[row].tolist()
        best = sorted((e for e in active if score[e] > -INF), key=lambda e: (-score[e], e))[: spec.top_k]
        ids, weights = result.expert_ids[row].tolist(), result.expert_weights[row].tolist()
        if not best:  # all of S is banned: the padding output
            assert not any(weights) and set(ids) <= (active or {0})
            continue
        assert ids == best + [best[-1]] * (spec.top_k - len(best))
        assert not any(weights[len(best) :])
        assert all(w > 0 for w in weights[: len(best)])
        assert own.expert_ids[row, : config.warmup].tolist() == ids[: config.warmup]
        if spec.rule.renormalises:
            assert sum(weights) == pytest.approx(spec.routed_scaling_factor, rel=1e-6)


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_statistics_recount_the_output(case):
    logits, spec, config, arguments = case
    result = route(logits, spec, config, **arguments)
    own = route(logits, spec, XShareConfig.off(spec), **arguments)
    real = arguments["request_ids"] >= 0
    gpu = arguments["expert_gpu"].tolist()
    before, after = (set(r.expert_ids[real].flatten().tolist()) for r in (own, result))

    def peak(experts):
        return max([[gpu[e] for e in experts].count(g) for g in range(3)])

    stats = result.stats
    assert (stats.experts_before, stats.experts_after) == (len(before), len(after))
    assert (stats.peak_gpu_before, stats.peak_gpu_after) == (peak(before), peak(after))
    assert stats.rows == int(real.sum())
    assert 0 <= stats.kept_utility <= 1
    assert stats.stood_aside == (
        config.is_off(spec) or (config.max_rows is not None and stats.rows > config.max_rows)
    )
    if stats.stood_aside:
        assert (stats.kept_utility, stats.warmup_overflow) == (1.0, 0)
        assert torch.equal(result.expert_ids[real], own.expert_ids[real])
        assert torch.equal(result.expert_weights[real], own.expert_weights[real])
        assert ids_of(result.active_experts) == before
    assert after <= ids_of(result.active_experts)


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_masked_logits_allow_what_route_uses(case):
    logits, spec, config, arguments = case
    result = route(logits, spec, config, **arguments)
    masked = stages.mask_logits(logits, spec, config, **arguments)
    _, ranking = stages.score(logits, arguments.get("correction_bias"), spec)
    for row in range(len(logits)):
        if arguments["request_ids"][row] < 0:
            kept, value = ids_of(result.active_experts) or set(range(spec.num_experts)), torch.zeros(())
        elif arguments["exempt"][row] or result.stats.stood_aside:
            kept, value = set(range(spec.num_experts)), logits[row]
        else:
            kept, value = ids_of(result.active_experts & (ranking[row] > -INF)), logits[row]
            if not kept:  # all of S is banned: as padding
                kept, value = ids_of(result.active_experts) or set(range(spec.num_experts)), torch.zeros(())
        inside = mask_of(kept, spec.num_experts)
        assert torch.equal(masked[row], torch.where(inside, value, -INF))
        if arguments["request_ids"][row] >= 0:
            assert set(result.expert_ids[row].tolist()) <= kept


@settings(max_examples=60, deadline=None)
@given(case=cases(), dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_narrow_logits_are_widened(case, dtype):
    logits, spec, config, arguments = case
    narrow = (logits * 1.0137).to(dtype)
    result = route(narrow, spec, config, **arguments)
    expected = route(narrow.float(), spec, config, **arguments)
    assert torch.equal(result.expert_ids, expected.expert_ids)
    assert torch.equal(result.expert_weights, expected.expert_weights)
    assert (result.expert_ids.dtype, result.expert_weights.dtype) == (torch.int32, torch.float32)
    masked = stages.mask_logits(narrow, spec, config, **arguments)
    assert masked.dtype == dtype
    assert torch.equal(masked.float(), stages.mask_logits(narrow.float(), spec, config, **arguments))


@settings(max_examples=60, deadline=None)
@given(case=cases(), dtype=st.sampled_from([torch.int32, torch.int16, torch.int8]))
def test_index_dtypes_and_strides_do_not_matter(case, dtype):
    logits, spec, config, arguments = case
    expected = route(logits, spec, config, **arguments)
    wide = torch.stack([logits, logits], dim=-1)[..., 0]
    narrow = {name: arguments[name].to(dtype) for name in ("request_ids", "expert_gpu")}
    result = route(wide, spec, config, **(arguments | narrow))
    assert torch.equal(result.expert_ids, expected.expert_ids)
    assert torch.equal(result.raw_stats, expected.raw_stats)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_no_rows(case):
    logits, spec, config, arguments = case
    by_row = {name: arguments[name][:0] for name in ("request_ids", "exempt")}
    result = route(logits[:0], spec, config, **(arguments | by_row))
    assert result.expert_ids.shape == result.expert_weights.shape == (0, spec.top_k)
    assert not result.active_experts.any()
    assert result.stats == RoutingStats(0, 0, 1.0, 0, 0, 0, 0, config.is_off(spec))
    assert stages.mask_logits(logits[:0], spec, config, **(arguments | by_row)).shape == (0, spec.num_experts)


# ---- Small cases, by hand ----------------------------------------------------------------------------------

SPEC = RouterSpec(8, 2, "softmax")


def test_ties_go_to_the_lower_id():
    result = route(torch.zeros(4, 8), SPEC, XShareConfig(3, utility="affinity"))
    assert ids_of(result.active_experts) == {0, 1, 2}
    assert result.expert_ids.tolist() == [[0, 1]] * 4
    assert result.expert_weights.tolist() == [[0.125, 0.125]] * 4


def test_minus_zero_ties_with_zero():
    logits = torch.tensor([[-0.0, 0.0, -0.0, 0.0]])
    for scoring in SCORINGS:
        assert route(logits, RouterSpec(4, 2, scoring), XShareConfig(2)).expert_ids.tolist() == [[0, 1]]


def test_group_ties_go_to_the_lower_group():
    spec = RouterSpec(8, 2, "sigmoid_bias", num_groups=4, top_k_groups=1)
    result = route(torch.zeros(1, 8), spec, XShareConfig.off(spec))
    assert result.expert_ids.tolist() == [[0, 1]]


def test_groups_score_by_best_two_or_by_best():
    logits = torch.tensor([[1.2, -4.0, 1.0, 1.0]])  # the best expert is in group 0, the best two are group 1
    for scoring, rule in RULES.items():
        if rule.group_best_of == 0:
            continue
        ids = [2, 3] if rule.group_best_of == 2 else [0, 1]
        spec = RouterSpec(4, 2, scoring, num_groups=2, top_k_groups=1)
        assert route(logits, spec, XShareConfig.off(spec)).expert_ids.tolist() == [ids]


def test_bias_ranks_but_does_not_weigh():
    bias = torch.tensor([0.0, 0.0, 5.0, 1.0])
    weights = {"softmax_bias": 0.5, "topk_sigmoid": 1.0}  # of these alone the affinities count, not their sum
    for scoring, rule in RULES.items():
        if not rule.has_bias:
            continue
        spec = RouterSpec(4, 2, scoring, routed_scaling_factor=2.0)
        result = route(torch.zeros(1, 4), spec, XShareConfig.off(spec), correction_bias=bias)
        assert result.expert_ids.tolist() == [[2, 3]]
        assert result.expert_weights.tolist() == [[weights.get(scoring, 1.0)] * 2]


def test_a_logit_with_its_bias_stays_finite():
    largest = torch.finfo(torch.float32).max
    logits, bias = torch.tensor([[-largest, largest, 0.0]]), torch.tensor([-largest, largest, 0.0])
    spec = RouterSpec(3, 3, "topk_sigmoid")
    result = route(logits, spec, XShareConfig.off(spec), correction_bias=bias)
    assert result.expert_ids.tolist() == [[1, 2, 0]] and result.stats.rows == 1
    assert result.expert_weights.tolist() == [[1.0, 0.5, 0.0]]


def test_a_biased_softmax_cannot_be_masked():
    for scoring in ("softmax_bias", "softmax_bias_renorm"):
        with pytest.raises(ValueError, match=f"mask_logits: {scoring} cannot be masked"):
            mask_logits(torch.zeros(1, 4), RouterSpec(4, 2, scoring), XShareConfig(2))


def test_topk_softmax_ranks_by_logits_where_affinities_vanish():
    logits = torch.tensor([[200.0, -60.0, -50.0, -70.0]])
    result = route(logits, RouterSpec(4, 2, "topk_softmax"), XShareConfig(4))
    assert result.expert_ids.tolist() == [[0, 2]]
    assert result.expert_weights.tolist() == [[1.0, 0.0]]


def peaked(*tops, height=20.0):
    """One row per tuple, whose experts get the logits `height`, `height - 1`, ...; all others 0."""
    logits = torch.zeros(len(tops), 8)
    for row, experts in enumerate(tops):
        for slot, e in enumerate(experts):
            logits[row, e] = height - slot
    return logits


def test_warmup_wins_over_the_budget_and_says_so():
    result = route(peaked((0, 1), (2, 3), (4, 5), (6, 7)), SPEC, XShareConfig(2))
    assert ids_of(result.active_experts) == {0, 2, 4, 6}
    assert result.stats.warmup_overflow == 2
    assert result.expert_ids[:, 0].tolist() == [0, 2, 4, 6]


def test_warmup_overflow_of_a_gpu_leaves_the_other_gpus_room():
    gpu = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    rows = peaked((0, 4), (1, 4), (2, 5))
    result = route(rows, SPEC, XShareConfig(8, gpu_budget=1), expert_gpu=gpu)
    assert ids_of(result.active_experts) == {0, 1, 2, 4}
    assert result.stats.warmup_overflow == 2
    assert (result.stats.peak_gpu_before, result.stats.peak_gpu_after) == (3, 3)
    both = route(rows, SPEC, XShareConfig(2, gpu_budget=1), expert_gpu=gpu)
    assert ids_of(both.active_experts) == {0, 1, 2}
    assert both.stats.warmup_overflow == 1 + 2


def test_without_warmup_the_batch_decides_alone():
    rows = peaked((0, 1), (0, 1), (1, 0), (2, 3))
    result = route(rows, SPEC, XShareConfig(2, warmup=0))
    assert ids_of(result.active_experts) == {0, 1}
    assert result.expert_ids[3].tolist() == [0, 1]


def test_exempt_experts_are_free_and_exempt_utility_does_not_count():
    rows = peaked((6, 7), (0, 1), (0, 2))
    exempt = torch.tensor([True, False, False])
    result = route(rows, SPEC, XShareConfig(2), exempt=exempt)
    assert ids_of(result.active_experts) == {6, 7, 0, 1}  # 6 and 7 do not use up the budget of 2
    assert result.expert_ids[0].tolist() == [6, 7]
    # Only the two participating rows' squared weights: those of 0, twice, and of 1; not that of 2.
    first, second = (1 / (1 + torch.e**-1)) ** 2, (1 / (1 + torch.e)) ** 2
    kept = (2 * first + second) / (2 * first + 2 * second)
    assert result.stats.kept_utility == pytest.approx(kept, abs=1e-5)
    assert result.stats.rows == 3


def test_free_experts_of_the_warmup_do_not_overflow():
    rows = peaked((0, 1), (0, 2), (1, 3), (4, 5))
    exempt = torch.tensor([True, False, False, False])
    result = route(rows, SPEC, XShareConfig(2), exempt=exempt)
    assert result.stats.warmup_overflow == 0
    assert ids_of(result.active_experts) == {0, 1, 4, 2}  # 4 counts; 2, 3 and 5 tie for the other place


def test_max_rows_counts_exempt_rows_and_not_padding():
    rows, config = peaked((0, 1), (2, 3), (4, 5)), XShareConfig(2, max_rows=2)
    exempt = torch.tensor([True, False, False])
    assert route(rows, SPEC, config, exempt=exempt).stats.stood_aside
    padded = route(rows, SPEC, config, exempt=exempt, request_ids=torch.tensor([5, 5, -1]))
    assert not padded.stats.stood_aside


def test_a_request_proposes_before_the_batch_decides():
    """Expert 2 is everybody's third choice: the batch alone wants it most, but no request proposes it."""
    logits = torch.tensor([[3.0, 0, 2.9, 0], [0, 3.0, 2.9, 0]])
    spec, ids = RouterSpec(4, 1, "softmax"), torch.tensor([4, 9])
    flat = route(logits, spec, XShareConfig(1, warmup=0, utility="affinity"), request_ids=ids)
    assert ids_of(flat.active_experts) == {2}
    by_request = XShareConfig(1, warmup=0, request_budget=1, utility="affinity")
    proposed = route(logits, spec, by_request, request_ids=ids)
    assert ids_of(proposed.active_experts) == {0}
    same_request = route(logits, spec, by_request, request_ids=torch.tensor([4, 4]))
    assert ids_of(same_request.active_experts) == {2}


@settings(max_examples=60, deadline=None)
@given(case=cases(max_rows=None, request_budget=2))
def test_the_utility_of_proposals_by_hand(case):
    logits, spec, _, arguments = case
    fixed = stages.to_fixed_point(stages.score(logits, None, RouterSpec(spec.num_experts, 1, "softmax"))[0])
    request_ids, taking_part = arguments["request_ids"], arguments["request_ids"] >= 0
    expected = [0] * spec.num_experts
    for request in set(request_ids[taking_part].tolist()):
        sums = fixed[request_ids == request].sum(0).tolist()
        for e in sorted(range(spec.num_experts), key=lambda e: (-sums[e], e))[:2]:
            expected[e] += sums[e]
    assert stages.proposed_utility(fixed, request_ids, taking_part, 2).tolist() == expected


def test_a_set_smaller_than_k_repeats_the_last_choice_with_weight_zero():
    gpu = torch.zeros(8, dtype=torch.int64)
    result = route(
        peaked((5, 1)), RouterSpec(8, 3, "softmax_renorm"), XShareConfig(3, gpu_budget=1), expert_gpu=gpu
    )
    assert result.expert_ids.tolist() == [[5, 5, 5]]
    assert result.expert_weights.tolist() == [[1.0, 0.0, 0.0]]


def test_an_empty_set_leaves_rows_idle():
    logits = torch.full((2, 4), -100.0)  # sigmoid below half of 2^-20: no expert is worth adding
    spec, config = RouterSpec(4, 2, "sigmoid_bias"), XShareConfig(2, warmup=0)
    result = route(logits, spec, config)
    assert not result.active_experts.any()
    assert result.expert_ids.tolist() == [[0, 0]] * 2
    assert not result.expert_weights.any()
    assert result.stats.kept_utility == 1.0
    assert not mask_logits(logits, spec, config).any()


def test_vanishing_affinities_give_weight_zero_not_nan():
    spec = RouterSpec(4, 2, "sigmoid_bias")
    result = route(torch.full((1, 4), -100.0), spec, XShareConfig(2))
    assert result.expert_weights.tolist() == [[0.0, 0.0]]


def test_inputs_are_left_alone():
    logits = torch.tensor([[float("nan"), 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]])
    before = logits.clone()
    route(logits, RouterSpec(4, 2, "softmax"), XShareConfig(2))
    mask_logits(logits, RouterSpec(4, 2, "softmax"), XShareConfig(2))
    assert torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0))


# ---- Refusals ----------------------------------------------------------------------------------------------

CONFIG = XShareConfig(4)
BIASED = RouterSpec(8, 2, "sigmoid_bias")
ROWS = torch.zeros(3, 8)


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        (
            (ROWS.double(), SPEC, CONFIG),
            {},
            "router_logits: dtype must be one of float32, bfloat16, float16, got float64",
        ),
        ((ROWS[:, :7], SPEC, CONFIG), {}, "router_logits: shape must be [rows, 8], got [3, 7]"),
        ((ROWS[0], SPEC, CONFIG), {}, "router_logits: shape must be [rows, 8], got [8]"),
        ((ROWS, SPEC, XShareConfig(1)), {}, "XShareConfig(budget=1): budget must be at least top_k=2"),
        (
            (ROWS, SPEC, XShareConfig([4, 4])),
            {},
            "XShareConfig(budget=one per layer): route needs one layer's configuration, config.for_layer(i)",
        ),
        (
            (ROWS, SPEC, CONFIG),
            {"correction_bias": torch.zeros(8)},
            "correction_bias: softmax scoring has none",
        ),
        (
            (ROWS, BIASED, CONFIG),
            {"correction_bias": torch.zeros(7)},
            "correction_bias: shape must be [8], got [7]",
        ),
        (
            (ROWS, BIASED, CONFIG),
            {"correction_bias": torch.full((8,), INF)},
            "correction_bias: has NaN or infinite values",
        ),
        (
            (ROWS, SPEC, XShareConfig(4, request_budget=2)),
            {},
            "XShareConfig(request_budget=2): route needs request_ids",
        ),
        (
            (ROWS, SPEC, CONFIG),
            {"request_ids": torch.zeros(3)},
            "request_ids: dtype must be one of int32, int64, int16, int8, got float32",
        ),
        (
            (ROWS, SPEC, CONFIG),
            {"request_ids": torch.tensor([0, -2, 1])},
            "request_ids: must be >= 0, or -1 for padding, got -2",
        ),
        (
            (ROWS, SPEC, CONFIG),
            {"request_ids": torch.zeros(4).int()},
            "request_ids: shape must be [3], got [4]",
        ),
        (
            (ROWS, SPEC, CONFIG),
            {"exempt": torch.zeros(3).int()},
            "exempt: dtype must be one of bool, got int32",
        ),
        (
            (ROWS, SPEC, XShareConfig(4, gpu_budget=2)),
            {},
            "XShareConfig(gpu_budget=2): route needs expert_gpu",
        ),
        (
            (ROWS, SPEC, CONFIG),
            {"expert_gpu": torch.full((8,), 8)},
            "expert_gpu: must be from 0 to num_experts - 1 = 7",
        ),
    ],
)
@pytest.mark.parametrize("call", [route, mask_logits])
def test_refusals(call, args, kwargs, message):
    with pytest.raises(ValueError) as caught:
        call(*args, **kwargs)
    assert str(caught.value) == message


@pytest.mark.parametrize("call", [route, mask_logits])
def test_check_names_the_bad_row(call):
    logits = torch.zeros(4, 8)
    logits[2, 3], logits[3, 0] = float("nan"), INF
    with pytest.raises(ValueError, match=r"router_logits: row 2 has NaN or \+inf \(2 such rows\)"):
        call(logits, SPEC, CONFIG, check=True)
    call(logits[:2], SPEC, CONFIG, check=True)


def test_auto_is_native_where_it_is_built(monkeypatch):
    from xshare_trtllm import ops, reference
    from xshare_trtllm.routing import _backend

    assert _backend("auto", "cpu") is (ops if ops.available() else reference)
    monkeypatch.setattr(ops, "why_no_cuda", lambda: None)
    assert _backend("auto", "cuda") is ops
    monkeypatch.setattr(ops, "why_no_cuda", lambda: "no compiler: pip install it")
    with pytest.warns(RuntimeWarning, match=r"no compiler: pip install it; routing of CUDA tensors uses the"):
        assert _backend("auto", "cuda") is reference
    assert _backend("reference", "cpu") is reference


def test_native_is_refused_where_it_is_not_built(monkeypatch):
    from xshare_trtllm import ops

    monkeypatch.setattr(ops, "available", lambda: False)
    with pytest.raises(ValueError, match=r"backend='native': libxshare.so is not built"):
        any_route(ROWS, SPEC, CONFIG, backend="native")
    assert any_route(ROWS, SPEC, CONFIG).expert_ids.tolist() == [[0, 1]] * 3


def test_route_compiles_into_one_graph():
    from xshare_trtllm import ops

    if not ops.available():
        pytest.skip("needs libxshare.so: the reference is not meant to be compiled")

    def layer(logits, request_ids):
        result = any_route(logits * 2, SPEC, CONFIG, request_ids=request_ids)
        return result.expert_ids, result.expert_weights, any_mask_logits(logits * 2, SPEC, CONFIG)

    logits, ids = (
        torch.randn(5, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 0, 1, 1, -1]),
    )
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(logits, ids), layer(logits, ids), strict=True):
        assert torch.equal(got, expected)


def test_backend_is_refused_by_name():
    with pytest.raises(ValueError, match="backend='cuda': must be auto, native or reference"):
        any_route(ROWS, SPEC, CONFIG, backend="cuda")
