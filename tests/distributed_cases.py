"""Batches spread over ranks, drawn from a seed: every rank draws the same and takes its own rows."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from xshare_trtllm import RouterSpec, Routing, XShareConfig
from xshare_trtllm.config import RULES, SCORINGS, UTILITIES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("normal", "ties", "zeros", "huge", "wide", "low")


@dataclass
class Case:
    """The whole batch. `local_ids` [T]: the request ids as the ranks know them, each from 0."""

    logits: Tensor
    spec: RouterSpec
    config: XShareConfig
    rows: list[int]  # of each rank
    local_ids: Tensor | None
    exempt: Tensor | None
    shared: dict[str, Tensor] = field(default_factory=dict)  # correction_bias, expert_gpu

    def batch(self) -> dict[str, Tensor]:
        """What a single rank is told: request ids that no two ranks share."""
        extras = dict(self.shared)
        if self.local_ids is not None:
            owner = torch.arange(len(self.rows)).repeat_interleave(torch.tensor(self.rows))
            world = len(self.rows)
            extras["request_ids"] = torch.where(
                self.local_ids < 0, self.local_ids, self.local_ids * world + owner
            )
        if self.exempt is not None:
            extras["exempt"] = self.exempt
        return extras

    def slice(self, rank: int) -> slice:
        first = sum(self.rows[:rank])
        return slice(first, first + self.rows[rank])

    def of_rank(self, rank: int) -> tuple[Tensor, dict[str, Tensor]]:
        """One rank's logits and what it is told about them."""
        mine, extras = self.slice(rank), dict(self.shared)
        if self.local_ids is not None:
            extras["request_ids"] = self.local_ids[mine]
        if self.exempt is not None:
            extras["exempt"] = self.exempt[mine]
        return self.logits[mine], extras


def draw(seed: int, world: int) -> Case:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows = [rng.choice((0, 1, 2, 3, 5, 9)) for _ in range(world)]
    if rng.random() < 0.05:
        rows = [0] * world
    spec, total = draw_spec(rng), sum(rows)
    experts = spec.num_experts
    coverage = rng.choice((None, rng.uniform(0.05, 1.0), 0.5, 0.97))
    budget = rng.randint(spec.top_k, experts + 1)
    config = XShareConfig(
        budget=budget if coverage is None else rng.choice((None, budget)),
        warmup=rng.randint(1 if spec.num_groups > 1 else 0, spec.top_k),
        request_budget=rng.choice((None, rng.randint(1, experts + 1))),
        gpu_budget=rng.choice((None, rng.randint(1, max(1, experts // 4)))),
        coverage=coverage,
        max_rows=rng.choice((None, None, rng.randint(1, 5 * world))),
        utility=rng.choice(UTILITIES if spec.rule.is_bounded else ("squared_weight",)),
    )
    logits = draw_logits(rng, generator, total, experts).to(rng.choice(DTYPES))
    for _ in range(rng.choice((0, 0, 1, 2)) if total else 0):
        row, expert = rng.randrange(total), rng.randrange(experts)
        logits[row, expert] = rng.choice((torch.nan, torch.inf, -torch.inf))
    if rng.random() < 0.3:
        banned = torch.rand(logits.shape, generator=generator) < rng.choice((0.1, 0.5, 0.9))
        logits.masked_fill_(banned, -torch.inf)
    case = Case(logits, spec, config, rows, None, None)
    if config.request_budget is not None or rng.random() < 0.5:
        dtype = rng.choice((torch.int32, torch.int64))
        case.local_ids = torch.randint(-1, 4, (total,), generator=generator).to(dtype)
    if rng.random() < 0.4:
        case.exempt = torch.rand(total, generator=generator) < rng.choice((0.2, 0.9))
    if spec.rule.has_bias and rng.random() < 0.7:
        scale = rng.choice((0.1, 1.0, 0.0))
        case.shared["correction_bias"] = torch.randn(experts, generator=generator) * scale
    if config.gpu_budget is not None or rng.random() < 0.5:
        gpus = rng.choice((1, 2, min(8, experts), experts))
        case.shared["expert_gpu"] = torch.randint(0, gpus, (experts,), generator=generator, dtype=torch.int32)
    return case


def draw_spec(rng: random.Random) -> RouterSpec:
    scoring = rng.choice(SCORINGS)
    groups = 1 if RULES[scoring].group_best_of == 0 else rng.choice((1, 1, 2, 4))
    experts = groups * (512 // groups if rng.random() < 0.03 else rng.randint(2, 24))
    top_k_groups = rng.randint(1, groups)
    top_k = rng.randint(1, min(16, top_k_groups * experts // groups))
    return RouterSpec(experts, top_k, scoring, groups, top_k_groups, rng.choice((1.0, 2.5)))


def draw_logits(rng: random.Random, generator: torch.Generator, rows: int, experts: int) -> Tensor:
    logits, kind = torch.randn(rows, experts, generator=generator), rng.choice(KINDS)
    if kind == "ties":
        return (logits * 2).round()
    if kind == "zeros":
        return logits.sign() * 0.0
    if kind == "huge":
        return logits * 1e38
    if kind == "wide":  # most affinities underflow
        return logits * 60
    if kind == "low":  # sigmoids of 0 in fixed point
        return logits - 40
    return logits


def assert_same(got: Routing, expected: Routing, mine: slice, what: str) -> None:
    """Every bit of one rank's result, given the whole batch's."""
    pairs = {
        "expert_ids": (got.expert_ids, expected.expert_ids[mine]),
        "expert_weights": (
            got.expert_weights.view(torch.int32),
            expected.expert_weights[mine].view(torch.int32),
        ),
        "active_experts": (got.active_experts, expected.active_experts),
        "raw_stats": (got.raw_stats, expected.raw_stats),
    }
    for name, (mine_is, should_be) in pairs.items():
        assert mine_is.dtype == should_be.dtype, f"{what}: {name}"
        assert torch.equal(mine_is, should_be), f"{what}: {name}\n{mine_is}\n{should_be}"
