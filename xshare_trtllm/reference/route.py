"""XShare (Vankov et al., arXiv 2602.07265) on a few pages: one function per stage, to be read top to bottom.

Shapes: `T` rows, `E` experts, `k` experts per row. Arithmetic is fp32 with one rounding per operation.
Sums over rows are exact (fixed point, int64): in any order of rows, these operations give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xshare_trtllm.config import RouterSpec, XShareConfig

FIXED_POINT = 2**20


# ---- The two results ---------------------------------------------------------------------------------------


def route(
    router_logits: Tensor,
    spec: RouterSpec,
    config: XShareConfig,
    correction_bias: Tensor | None = None,
    request_ids: Tensor | None = None,
    exempt: Tensor | None = None,
    expert_gpu: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments as for `xshare_trtllm.route`, already checked.

    Returns expert_ids [T, k] int32, expert_weights [T, k] fp32, active_experts [E] bool and eight statistics
    int64: experts before, after, utility kept, in total, warm-up overflow, peak experts per GPU before,
    after, and rows | stood_aside << 32.
    """
    step = _Step(router_logits, spec, config, correction_bias, request_ids, exempt, expert_gpu)
    chosen, valid = refine(step.ranking, step.active, spec.top_k)
    weights = weigh(step.logits, step.affinity, chosen, valid, spec)

    # Padding rows, and rows that find nothing in S, name only experts that are active anyway.
    served = (step.real & valid.any(dim=-1))[:, None]
    chosen = torch.where(served, chosen, lowest_ids(step.active, spec.top_k))
    weights = torch.where(served, weights, 0.0)

    after = experts_in(chosen[step.real], spec.num_experts)
    return chosen.to(torch.int32), weights, step.active, statistics(step, after)


def mask_logits(
    router_logits: Tensor,
    spec: RouterSpec,
    config: XShareConfig,
    correction_bias: Tensor | None = None,
    request_ids: Tensor | None = None,
    exempt: Tensor | None = None,
    expert_gpu: Tensor | None = None,
) -> Tensor:
    """The same selection as logits [T, E], `-inf` where a row may not go; the model's own router follows."""
    step = _Step(router_logits, spec, config, correction_bias, request_ids, exempt, expert_gpu)
    free = step.real if step.stands_aside else step.exempt
    kept = free[:, None] | (step.active & (step.ranking > -torch.inf))
    masked = router_logits.masked_fill(~kept, -torch.inf)

    active = step.active if bool(step.active.any()) else torch.ones_like(step.active)
    padding = torch.zeros_like(router_logits).masked_fill(~active, -torch.inf)
    idle = ~step.real | ~kept.any(dim=-1)
    return torch.where(idle[:, None], padding, masked)


class _Step:
    """Stages 0 to 4: everything that is decided once for all rows of a layer and step.

    real          [T] bool    rows that are not padding
    exempt        [T] bool    real rows that keep their own top-k
    participating [T] bool    the other real rows
    logits        [T, E] fp32, affinity [T, E] fp32, ranking [T, E] fp32
    own           [T, k]      the model's own choice, best first
    active        [E] bool    the set S. It holds the own choice of exempt rows, and of all real rows where it
                              stands aside: taking the best of S leaves these as they are
    """

    def __init__(
        self,
        router_logits: Tensor,
        spec: RouterSpec,
        config: XShareConfig,
        correction_bias: Tensor | None,
        request_ids: Tensor | None,
        exempt: Tensor | None,
        expert_gpu: Tensor | None,
    ) -> None:
        num_experts, device = spec.num_experts, router_logits.device
        gpu = None if expert_gpu is None else expert_gpu.cpu().long()
        self.gpu = torch.zeros(num_experts, dtype=torch.int64) if gpu is None else gpu
        readable = readable_rows(router_logits, request_ids)

        # Padding rows get harmless logits; + 0.0 makes -0.0 a plain zero: not every sort calls them equal.
        self.logits = torch.where(readable[:, None], router_logits.float(), 0.0) + 0.0
        self.affinity, self.ranking = score(self.logits, correction_bias, spec)
        self.real = readable & ((self.ranking > -torch.inf).sum(dim=-1) >= spec.top_k)
        self.exempt = torch.zeros_like(self.real) if exempt is None else exempt & self.real
        self.participating = self.real & ~self.exempt
        self.own = top_ids(self.ranking, spec.top_k)
        self.before = experts_in(self.own[self.real], num_experts)

        self.overflow = 0
        self.column_sums = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.stands_aside = stands_aside(int(self.real.sum()), spec, config)
        if self.stands_aside:
            self.active = self.before
            return

        free = experts_in(self.own[self.exempt], num_experts)
        warm = experts_in(self.own[self.participating, : config.warmup], num_experts)
        fixed = to_fixed_point(row_utility(self.logits, self.affinity, self.own, spec, config))
        fixed = fixed * self.participating[:, None]
        utility = self.column_sums = fixed.sum(dim=0)
        if config.request_budget is not None:
            assert request_ids is not None
            utility = proposed_utility(fixed, request_ids, self.participating, config.request_budget)
        self.active = select(utility, free, warm, gpu, spec.top_k, config).to(device)
        self.overflow = warmup_overflow(warm & ~free, self.gpu, config)


# ---- Stage 0: stand aside ----------------------------------------------------------------------------------


def stands_aside(num_real_rows: int, spec: RouterSpec, config: XShareConfig) -> bool:
    """The model's own routing is the output where XShare is off or the real rows, exempt too, are many."""
    too_many = config.max_rows is not None and num_real_rows > config.max_rows
    return too_many or config.is_off(spec)


# ---- Stage 1: score ----------------------------------------------------------------------------------------


def readable_rows(router_logits: Tensor, request_ids: Tensor | None) -> Tensor:
    """[T] bool: rows of a request, without NaN or +inf (which make padding: they poison no other row). A row
    also needs k experts that are not banned (-inf) to be real."""
    readable = ~(router_logits.isnan() | (router_logits == torch.inf)).any(dim=-1)
    return readable if request_ids is None else readable & (request_ids >= 0)


def score(logits: Tensor, correction_bias: Tensor | None, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    """Affinity and ranking score, both [T, E] fp32, from logits [T, E] fp32; -inf bans an expert."""
    affinity = AFFINITIES[spec.rule.affinity](logits)
    ranking = logits if spec.rule.ranked_by == "logits" else affinity
    if correction_bias is not None:
        largest = torch.finfo(torch.float32).max  # what is not banned stays finite
        ranking = (ranking + correction_bias.float()).clamp(-largest, largest)
    ranking = ranking.masked_fill(logits == -torch.inf, -torch.inf)
    return affinity, limit_to_groups(ranking, spec)


def limit_to_groups(ranking: Tensor, spec: RouterSpec) -> Tensor:
    """[T, E]: `-inf` outside each row's best groups, by their best expert, or best two. A group without so
    many experts to choose from is out."""
    if spec.num_groups == 1:
        return ranking
    by_group = ranking.view(-1, spec.num_groups, spec.experts_per_group)
    best_of = spec.rule.group_best_of
    best = by_group.topk(best_of, dim=-1).values
    group_score = best[..., 0] + best[..., 1] if best_of == 2 else best[..., 0]
    groups = experts_per_row(top_ids(group_score, spec.top_k_groups), spec.num_groups)
    groups &= group_score > -torch.inf
    return ranking.masked_fill(~groups.repeat_interleave(spec.experts_per_group, dim=-1), -torch.inf)


def row_utility(
    logits: Tensor, affinity: Tensor, own: Tensor, spec: RouterSpec, config: XShareConfig
) -> Tensor:
    """`d` [T, E] fp32, 0 to 1: what each expert is worth to each row."""
    if config.utility == "affinity":
        return affinity
    return squared_weights(logits, affinity, own, spec)


def squared_weights(logits: Tensor, affinity: Tensor, own: Tensor, spec: RouterSpec) -> Tensor:
    """[T, E] fp32: the square of each weight, before scaling, that the model gives its own top-k; else 0."""
    weights = choice_weights(logits, affinity, own, torch.ones_like(own, dtype=torch.bool), spec)
    return torch.zeros_like(affinity).scatter_(1, own, weights * weights)


# ---- Stage 2 is `own[:, :k0]`. Stage 3: what each request proposes -----------------------------------------


def proposed_utility(
    fixed: Tensor, request_ids: Tensor, participating: Tensor, request_budget: int
) -> Tensor:
    """u [E] int64: the column sums of each request, counted only at the experts that it proposes.

    fixed [T, E] int64 utilities; request_ids [T]; a request proposes its `request_budget` best experts.
    """
    requests, index = torch.unique(request_ids[participating], return_inverse=True)
    per_request = torch.zeros(len(requests), fixed.shape[1], dtype=torch.int64, device=fixed.device)
    per_request.index_add_(0, index, fixed[participating])
    proposed = experts_per_row(top_ids(per_request, request_budget), fixed.shape[1])
    return (per_request * proposed).sum(dim=0)


# ---- Stage 4: budgeted greedy ------------------------------------------------------------------------------


def select(
    utility: Tensor, free: Tensor, warm: Tensor, gpu: Tensor | None, top_k: int, config: XShareConfig
) -> Tensor:
    """The set S [E] bool.

    utility [E] int64; gpu [E] or None; warm [E] bool, the warm-up; free [E] bool, the experts of exempt rows:
    active anyway, so they do not count. A set is worth the sum over its experts and the limits nest (GPU
    inside batch), so greedy is optimal.
    """
    u = utility.tolist()
    order = sorted((e for e in range(len(u)) if u[e] > 0), key=lambda e: (-u[e], e))
    coverage, gpu_budget = config.coverage, config.gpu_budget
    on_gpu = [0] * len(u) if gpu is None else gpu.tolist()
    chosen = set(free.nonzero().flatten().tolist())
    if coverage is not None and gpu is not None and gpu_budget is None:
        gpu_budget, coverage = gpu_cap(u, order, chosen, on_gpu, top_k, coverage), None

    counted = [on_gpu[e] for e in (warm & ~free).nonzero().flatten().tolist()]  # the GPU of each
    chosen |= set(warm.nonzero().flatten().tolist())
    for e in order:
        if len(counted) >= config.layer_budget:
            break
        if coverage is not None and len(chosen) >= top_k and is_covered(u, chosen, coverage):
            break
        gpu_is_full = gpu_budget is not None and counted.count(on_gpu[e]) >= gpu_budget
        if e in chosen or gpu_is_full:
            continue
        chosen.add(e)
        counted.append(on_gpu[e])

    active = torch.zeros(len(u), dtype=torch.bool)
    active[sorted(chosen)] = True
    return active


def gpu_cap(
    u: list[int], order: list[int], free: set[int], on_gpu: list[int], top_k: int, coverage: float
) -> int:
    """The smallest number of experts per GPU that is enough, beyond the free ones: with so many of each GPU's
    most useful, the coverage is reached and there are k experts. Every GPU waits for the fullest."""
    for cap in range(len(u)):
        room = dict.fromkeys(on_gpu, cap)
        chosen = set(free)
        for e in order:
            if e not in free and room[on_gpu[e]] > 0:
                room[on_gpu[e]] -= 1
                chosen.add(e)
        if len(chosen) >= min(top_k, len(free.union(order))) and is_covered(u, chosen, coverage):
            return cap
    return len(u)


def is_covered(u: list[int], chosen: set[int], coverage: float) -> bool:
    """True where the chosen experts keep that share of all utility. One rounding: in float64."""
    return float(sum(u[e] for e in chosen)) >= coverage * float(sum(u))


def warmup_overflow(counted: Tensor, gpu: Tensor, config: XShareConfig) -> int:
    """Experts by which the counted warm-up [E] bool exceeds the batch budget, plus the same for each GPU."""
    overflow = max(0, int(counted.sum()) - config.layer_budget)
    if config.gpu_budget is not None:
        overflow += int((per_gpu(counted, gpu) - config.gpu_budget).clamp(min=0).sum())
    return overflow


# ---- Stage 5: refine ---------------------------------------------------------------------------------------


def refine(ranking: Tensor, active: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Each row's best experts of S, active [E] bool: ids [T, k], and which slots hold a choice, [T, k] bool.

    A row that finds fewer than k repeats its last choice, which activates nothing new.
    """
    restricted = ranking.masked_fill(~active, -torch.inf)
    chosen = top_ids(restricted, top_k)
    valid = restricted.gather(-1, chosen) > -torch.inf
    last = (valid.sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    return torch.where(valid, chosen, chosen.gather(-1, last)), valid


def weigh(logits: Tensor, affinity: Tensor, chosen: Tensor, valid: Tensor, spec: RouterSpec) -> Tensor:
    """Weights [T, k] fp32 of the chosen experts, by the model's own rule; 0 in slots without a choice."""
    return choice_weights(logits, affinity, chosen, valid, spec) * spec.routed_scaling_factor


def choice_weights(
    logits: Tensor, affinity: Tensor, chosen: Tensor, valid: Tensor, spec: RouterSpec
) -> Tensor:
    """[T, k] fp32, before scaling; 0 in slots without a choice."""
    weights = affinity.gather(-1, chosen)
    if spec.rule.ranked_by == "logits" and spec.rule.affinity == "softmax":
        z = logits.gather(-1, chosen)
        weights = exp(z - z[:, :1])  # the first slot has the largest logit
    weights = torch.where(valid, weights, 0.0)
    return divide_by_sum(weights) if spec.rule.renormalises else weights


def divide_by_sum(weights: Tensor) -> Tensor:
    """Weights [T, k] that sum to 1 in each row; 0 where their sum is."""
    total = torch.zeros_like(weights[:, 0])
    for slot in range(weights.shape[1]):  # in slot order: fp32 addition is not associative
        total = total + weights[:, slot]
    return torch.where(total[:, None] > 0, weights / total[:, None], 0.0)


def lowest_ids(active: Tensor, top_k: int) -> Tensor:
    """[k]: the lowest ids of the set, the last one repeated; 0 if the set is empty."""
    ids = active.nonzero().flatten()[:top_k]
    if len(ids) == 0:
        return torch.zeros(top_k, dtype=torch.int64, device=active.device)
    return ids[torch.arange(top_k, device=active.device).clamp(max=len(ids) - 1)]


# ---- Statistics --------------------------------------------------------------------------------------------


def statistics(step: _Step, after: Tensor) -> Tensor:
    """[8] int64, see `route`. `after` [E] bool: the experts in the real rows' output."""
    sums = step.column_sums
    return torch.tensor(
        [
            int(step.before.sum()),
            int(after.sum()),
            int(sums[step.active].sum()),
            int(sums.sum()),
            step.overflow,
            int(per_gpu(step.before, step.gpu).max()),
            int(per_gpu(after, step.gpu).max()),
            int(step.real.sum()) | int(step.stands_aside) << 32,
        ],
        dtype=torch.int64,
    )


def per_gpu(experts: Tensor, gpu: Tensor) -> Tensor:
    """How many of the experts [E] bool each GPU holds: [E] int64 (GPU numbers are below E)."""
    return torch.bincount(gpu[experts.cpu()], minlength=len(gpu))


# ---- Order and sets ----------------------------------------------------------------------------------------


def top_ids(values: Tensor, k: int) -> Tensor:
    """Ids of the k largest along the last dimension, largest first; of equal values the lower id first."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def experts_in(ids: Tensor, num_experts: int) -> Tensor:
    """[E] bool: the experts named anywhere in ids."""
    return torch.zeros(num_experts, dtype=torch.bool, device=ids.device).scatter_(0, ids.flatten(), True)


def experts_per_row(ids: Tensor, num_experts: int) -> Tensor:
    """[T, E] bool: the experts named in each row of ids [T, n]."""
    return torch.zeros(len(ids), num_experts, dtype=torch.bool, device=ids.device).scatter_(1, ids, True)


# ---- Arithmetic that every implementation repeats bit by bit -----------------------------------------------


def exp(x: Tensor) -> Tensor:
    """e^x for x <= 0 by Cephes' polynomial, fp32, each operation rounded by itself; 0 below -87."""
    n = torch.round(x * 1.44269504)
    r = x - n * 0.693359375
    r = r - n * -2.12194440e-4
    p = torch.full_like(r, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + c
    y = p * (r * r)
    y = y + r
    y = y + 1.0
    power_of_two = ((n.clamp(min=-126).to(torch.int32) + 127) << 23).view(torch.float32)
    return torch.where(x < -87, 0.0, y * power_of_two)


def softmax(logits: Tensor) -> Tensor:
    """Over the last dimension of [T, E] fp32. The sum is exact (multiples of 2^-40), in any order."""
    e = exp(logits - logits.amax(dim=-1, keepdim=True))
    exact = (e.double() * 2**40).round().long().sum(dim=-1, keepdim=True)
    return e * (exact.double() * 2**-40).float().reciprocal()


def sigmoid(logits: Tensor) -> Tensor:
    """1 / (1 + e^-z), elementwise, without ever exponentiating a positive number."""
    e = exp(-logits.abs())
    r = (1.0 + e).reciprocal()
    return torch.where(logits >= 0, r, e * r)


def sqrt_softplus(logits: Tensor) -> Tensor:
    """sqrt(log(1 + e^z)), elementwise; 0 where z < -87. log(1 + e) = 2 artanh(s) with s = e / (2 + e), whose
    series in s^2 is cut to a polynomial."""
    e = exp(-logits.abs())
    s = e / (2.0 + e)
    t = s * s
    p = torch.full_like(t, 0.268675476)
    for c in (0.282339573, 0.400076717, 0.666666389, 2.0):
        p = p * t + c
    softplus = logits.clamp(min=0) + s * p
    return softplus.double().sqrt().float()  # a float32 root of torch is not always rounded to the nearest


AFFINITIES = {"softmax": softmax, "sigmoid": sigmoid, "sqrt_softplus": sqrt_softplus}


def to_fixed_point(utility: Tensor) -> Tensor:
    """round(d * 2^20), half away from zero, int64: sums of these do not depend on their order."""
    x = utility * FIXED_POINT
    whole = x.trunc()
    return whole.long() + ((x - whole) >= 0.5)
