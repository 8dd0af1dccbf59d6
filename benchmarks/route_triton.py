"""Routing without sharing in the language Triton, which route_gpu.py compares with where Triton is installed.

Every function takes logits [T, E], an fp32 correction bias [E] or None, and a `Settings`, and gives expert
ids int32 [T, k] and weights [T, k].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from device_routing import Settings


@triton.jit
def take_best(
    ranking, affinity, experts, ids, weights, scale, top_k: tl.constexpr, renormalise: tl.constexpr
):
    """`top_k` times the maximum of `ranking`; `affinity` there, over their sum if `renormalise`."""
    slots = tl.arange(0, 16)
    best_ids = tl.zeros([16], tl.int32)
    best = tl.zeros([16], tl.float32)
    for slot in tl.static_range(top_k):
        top = tl.argmax(ranking, 0)
        here = experts == top
        best_ids = tl.where(slots == slot, top, best_ids)
        best = tl.where(slots == slot, tl.sum(tl.where(here, affinity, 0.0), 0), best)
        ranking = tl.where(here, -float("inf"), ranking)
    if renormalise:
        best = best / tl.sum(best, 0)
    tl.store(ids + slots, best_ids, slots < top_k)
    tl.store(weights + slots, best * scale, slots < top_k)


@triton.jit
def softmax_topk_kernel(
    logits,
    ids,
    weights,
    num_experts,
    top_k: tl.constexpr,
    renormalise: tl.constexpr,
    block: tl.constexpr,
    programmatic: tl.constexpr,
):
    """A row per program."""
    row = tl.program_id(0)
    experts = tl.arange(0, block)
    if programmatic:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    z = tl.load(logits + row * num_experts + experts, experts < num_experts, -float("inf")).to(tl.float32)
    e = tl.exp(z - tl.max(z, 0))
    scores = e / tl.sum(e, 0)
    take_best(scores, scores, experts, ids + row * top_k, weights + row * top_k, 1.0, top_k, renormalise)


@triton.jit
def sigmoid_topk_kernel(
    logits,
    bias,
    ids,
    weights,
    scale,
    num_experts,
    top_k: tl.constexpr,
    num_groups: tl.constexpr,
    top_k_groups: tl.constexpr,
    group_block: tl.constexpr,
    programmatic: tl.constexpr,
):
    """A row per program. More than one group: their number and size are powers of two."""
    row = tl.program_id(0)
    groups = tl.arange(0, num_groups)
    experts = groups[:, None] * group_block + tl.arange(0, group_block)[None, :]
    inside = experts < num_experts
    if programmatic:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    z = tl.load(logits + row * num_experts + experts, inside, 0.0).to(tl.float32)
    affinity = tl.sigmoid(z)
    ranking = tl.where(inside, affinity + tl.load(bias + experts, inside, 0.0), -float("inf"))
    if num_groups > 1:
        at_best = experts == tl.argmax(ranking, 1)[:, None] + groups[:, None] * group_block
        second = tl.max(tl.where(at_best, -float("inf"), ranking), 1)
        group_scores = tl.max(ranking, 1) + second
        kept = groups < 0
        for _ in tl.static_range(top_k_groups):
            top = groups == tl.argmax(group_scores, 0)
            kept = kept | top
            group_scores = tl.where(top, -float("inf"), group_scores)
        ranking = tl.where(kept[:, None], ranking, -float("inf"))
    block: tl.constexpr = num_groups * group_block
    take_best(
        tl.reshape(ranking, [block]),
        tl.reshape(affinity, [block]),
        tl.reshape(experts, [block]),
        ids + row * top_k,
        weights + row * top_k,
        scale,
        top_k,
        True,
    )


def has_programmatic_launch() -> bool:
    """Whether the installed Triton can start a kernel before the one ahead of it has ended, as ours does."""
    return hasattr(getattr(tl.extra, "cuda", None), "gdc_wait")


class TritonTopK:
    """Fused scoring and top-k, one warp per row, outputs reused."""

    def __init__(self, logits: Tensor, s: Settings, programmatic: bool = False) -> None:
        num_tokens, num_experts = logits.shape
        self.settings = s
        self.ids = torch.empty(num_tokens, s.top_k, dtype=torch.int32, device=logits.device)
        self.weights = torch.empty(num_tokens, s.top_k, device=logits.device)
        self.block = triton.next_power_of_2(num_experts // s.num_groups)
        self.options = {"programmatic": programmatic, "num_warps": 1}
        if programmatic:
            self.options["launch_pdl"] = True

    def __call__(self, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        s, (num_tokens, num_experts) = self.settings, logits.shape
        outputs = self.ids, self.weights
        if s.scoring == "sigmoid_bias":
            groups = s.num_groups, s.top_k_groups, self.block
            sigmoid_topk_kernel[(num_tokens,)](
                logits, bias, *outputs, s.routed_scaling_factor, num_experts, s.top_k, *groups, **self.options
            )
        else:
            renormalise = s.scoring != "softmax"
            softmax_topk_kernel[(num_tokens,)](
                logits, *outputs, num_experts, s.top_k, renormalise, self.block, **self.options
            )
        return outputs
