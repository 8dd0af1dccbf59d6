"""Other ways to activate fewer experts in a decode step, each on a few lines, to be measured against ours.

A rule routes many decode steps at once: router logits [steps, rows, E] to ids and weights [steps, rows, k].
Where a paper leaves the weights of the experts that are left to the model, the model's own rule applies: it
is the same for all, so that only the choice differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xshare_trtllm.config import RouterSpec
from xshare_trtllm.hf.routers import find_routers
from xshare_trtllm.reference.route import (
    divide_by_sum,
    experts_per_row,
    refine,
    score,
    top_ids,
    weigh,
)


@dataclass(frozen=True, slots=True)
class Steps:
    """The rows of some decode steps of one layer, as its own router scores them.

    affinity, ranking  [steps, rows, E]
    own, shares        [steps, rows, k], the own choice, best first, and its affinities divided by their sum
    """

    spec: RouterSpec
    layer: int
    logits: Tensor
    affinity: Tensor
    ranking: Tensor
    own: Tensor
    shares: Tensor

    @classmethod
    def of(cls, logits: Tensor, spec: RouterSpec, bias: Tensor | None, layer: int) -> Steps:
        shape = logits.shape
        flat = logits.flatten(0, 1)
        affinity, ranking = score(flat, bias, spec)
        own = top_ids(ranking, spec.top_k)
        weights = affinity.gather(1, own)
        rows = (shape[0], shape[1], -1)
        return cls(
            spec, layer, logits, affinity.view(shape), ranking.view(shape), own.view(rows),
            divide_by_sum(weights).view(rows),
        )  # fmt: skip

    def named(self, slots: Tensor) -> Tensor:
        """[steps, rows, E] bool: the experts in those slots, [steps, rows, k] bool, of the own choice."""
        return torch.zeros_like(self.ranking, dtype=torch.bool).scatter_(2, self.own, slots)

    def first(self, count: int) -> Tensor:
        """[steps, E] bool: the experts that are among the best `count` of any row."""
        slots = torch.arange(self.spec.top_k, device=self.own.device) < count
        return self.named(slots.expand(self.own.shape)).any(1)

    def within(self, allowed: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's best k of the experts that it may use, [steps, rows or 1, E] bool, with the model's own
        weights."""
        flat = self.ranking.flatten(0, 1)
        chosen, valid = refine(
            flat.masked_fill(~allowed.expand_as(self.ranking).flatten(0, 1), -torch.inf),
            torch.ones(flat.shape[1], dtype=torch.bool, device=flat.device),
            self.spec.top_k,
        )
        logits, affinity = self.logits.flatten(0, 1), self.affinity.flatten(0, 1)
        weights = weigh(logits, affinity, chosen, valid, self.spec)
        return chosen.view(self.own.shape), weights.view(self.own.shape)

    def best(self, demand: Tensor, count: int) -> Tensor:
        """[steps, 1, E] bool: the `count` experts with the most demand [steps, E], a float."""
        return experts_per_row(top_ids(demand, count), demand.shape[1])[:, None]


Rule = Callable[[Steps], tuple[Tensor, Tensor]]


def squared_shares(budget: int) -> Rule:
    """XShare's squared weights with a warm-up of 1, but each row's weights divided by their sum: it chooses
    otherwise only where the model itself does not divide (OLMoE)."""

    def rule(steps: Steps) -> tuple[Tensor, Tensor]:
        squares = torch.zeros_like(steps.affinity).scatter_(2, steps.own, steps.shares.square())
        return steps.within(steps.best(squares.sum(1) + 1e3 * steps.first(1), budget))

    return rule


def fewer_per_row(top_k: int) -> Rule:
    """The model's own routing with fewer experts per token."""

    def rule(steps: Steps) -> tuple[Tensor, Tensor]:
        slots = torch.arange(steps.spec.top_k, device=steps.own.device) < top_k
        return steps.within(steps.named(slots.expand(steps.own.shape)))

    return rule


def oea(kept: int, mass: float = 1.0) -> Rule:
    """Opportunistic Expert Activation (Oncescu et al., arXiv 2511.02237): every row's `kept` best experts are
    loaded, the rows then fill up with what is there. Simplified form; with `mass` < 1 the general one, where
    a row keeps fewer once these have that share of its weights."""

    def rule(steps: Steps) -> tuple[Tensor, Tensor]:
        slots = torch.arange(steps.spec.top_k, device=steps.own.device).expand(steps.own.shape) < kept
        if mass < 1:
            slots = slots & (steps.shares.cumsum(-1) - steps.shares < mass)
        return steps.within(steps.named(slots).any(1, keepdim=True))

    return rule


def moe_spec(budget: int) -> Rule:
    """MoE-Spec (McDanel et al., arXiv 2602.16052), with substitution: the experts with the most router
    probability over all rows, counted at each row's own choice."""

    def rule(steps: Steps) -> tuple[Tensor, Tensor]:
        mass = torch.zeros_like(steps.affinity).scatter_(2, steps.own, steps.affinity.gather(2, steps.own))
        return steps.within(steps.best(mass.sum(1), budget))

    return rule


def lynx(budget: int) -> Rule:
    """Lynx (Gupta et al., arXiv 2411.08982): the experts that the most rows chose; of equal ones those with
    more router probability."""

    def rule(steps: Steps) -> tuple[Tensor, Tensor]:
        chosen = steps.named(torch.ones_like(steps.own, dtype=torch.bool))
        demand = chosen.sum(1) + steps.affinity.mean(1).clamp(max=0.999)
        return steps.within(steps.best(demand, budget))

    return rule


def sere(kept: int, similarity: Tensor) -> Rule:
    """SERE (Wu et al., arXiv 2602.07616): every row's `kept` best experts are primary; its others, where they
    are primary to nobody, give their weight to the primary expert that is most like them.

    similarity  [layers, E, E], of `expert_similarity`
    """

    def rule(steps: Steps) -> tuple[Tensor, Tensor]:
        primary = steps.first(kept)
        likeness = similarity[steps.layer].masked_fill(~primary[:, None], -torch.inf)  # [steps, E, E]
        best = likeness.argmax(2)  # [steps, E]; a primary expert is most like itself
        _, weights = steps.within(steps.named(torch.ones_like(steps.own, dtype=torch.bool)))
        return best.gather(1, steps.own.flatten(1)).view_as(steps.own), weights

    return rule


@torch.inference_mode()
def expert_similarity(model: nn.Module, batches: list[Tensor], rows: int = 256) -> Tensor:
    """How alike the outputs of each pair of experts are on the same inputs: mean cosine, [layers, E, E].

    The inputs are those of the first `rows` tokens of each layer over `batches`, which the rules must not be
    measured on.
    """
    experts = [module for module in model.modules() if type(module).__name__.endswith("Experts")]
    inputs: list[list[Tensor]] = [[] for _ in experts]
    hooks = [
        module.register_forward_pre_hook(lambda _module, args, kept=kept: kept.append(args[0].flatten(0, -2)))
        for module, kept in zip(experts, inputs, strict=True)
    ]
    try:
        for tokens in batches:
            model(input_ids=tokens[:, :-1], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(
        [_similarity(module, torch.cat(kept)[:rows]) for module, kept in zip(experts, inputs, strict=True)]
    )


def _similarity(experts: Any, inputs: Tensor) -> Tensor:
    """[E, E] of one layer from inputs [rows, H]."""
    outputs = []
    for expert in range(experts.num_experts):
        ids = torch.full((len(inputs), 1), expert, device=inputs.device)
        outputs.append(experts(inputs, ids, torch.ones(ids.shape, device=inputs.device)))
    unit = nn.functional.normalize(torch.stack(outputs).float(), dim=-1)  # [E, rows, H]
    return torch.einsum("erh,frh->ef", unit, unit) / len(inputs)


@dataclass(slots=True)
class Counted:
    """Distinct experts with a weight, summed over `steps` steps and layers."""

    experts: int = 0
    steps: int = 0

    @property
    def mean(self) -> float:
        return self.experts / max(self.steps, 1)


@contextmanager
def rerouted(model: nn.Module, rule: Rule, step_tokens: int = 1) -> Iterator[Counted]:
    """A transformers model whose routers follow a rule, each `step_tokens` positions of a pass a step of
    their own, but for the first, which is the prompt. Yields the experts counted so far."""
    model_config: Any = model.config
    spec = RouterSpec.from_hf_config(model_config)
    counted = Counted()
    shape: list[int] = []
    hooks = [
        model.register_forward_pre_hook(
            lambda _module, _args, kwargs: shape.__setitem__(slice(None), kwargs["input_ids"].shape),
            with_kwargs=True,
        )
    ]

    def route(layer: int, router: nn.Module, output: tuple[Tensor, Tensor, Tensor]) -> Any:
        logits, weights, ids = output
        batch, length = shape
        by_step = logits.float().view(batch, length // step_tokens, step_tokens, -1).transpose(0, 1)
        bias = getattr(router, "e_score_correction_bias", None)
        steps = Steps.of(by_step[1:].flatten(1, 2), spec, bias, layer)
        new_ids, new_weights = rule(steps)
        used = torch.zeros_like(steps.ranking, dtype=torch.int64).scatter_add_(
            2, new_ids, (new_weights > 0).long()
        )
        counted.experts += int((used.sum(1) > 0).sum())
        counted.steps += len(new_ids)

        def in_order(own: Tensor, new: Tensor) -> Tensor:
            after = new.view(-1, batch, step_tokens, spec.top_k).transpose(0, 1).flatten(1, 2)
            first = own.view(batch, length, spec.top_k)[:, :step_tokens]
            return torch.cat([first, after.to(own.dtype)], dim=1).view_as(own)

        return logits, in_order(weights, new_weights), in_order(ids, new_ids)

    for layer, router in enumerate(find_routers(model)):
        hooks.append(
            router.register_forward_hook(
                lambda module, _args, output, layer=layer: route(layer, module, output)
            )
        )
    try:
        yield counted
    finally:
        for hook in hooks:
            hook.remove()
