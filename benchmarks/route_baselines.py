"""What the routing kernel is compared with on a GPU: routing without sharing in Triton and in flashinfer, and
the whole algorithm in PyTorch.

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

try:
    from flashinfer.fused_moe import fused_topk_deepseek
except ImportError:
    fused_topk_deepseek = None


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
):
    """A row per program."""
    row = tl.program_id(0)
    experts = tl.arange(0, block)
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
):
    """A row per program. More than one group: their number and size are powers of two."""
    row = tl.program_id(0)
    groups = tl.arange(0, num_groups)
    experts = groups[:, None] * group_block + tl.arange(0, group_block)[None, :]
    inside = experts < num_experts
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


class TritonTopK:
    """Fused scoring and top-k, one warp per row, outputs reused."""

    def __init__(self, logits: Tensor, s: Settings) -> None:
        num_tokens, num_experts = logits.shape
        self.settings = s
        self.ids = torch.empty(num_tokens, s.top_k, dtype=torch.int32, device=logits.device)
        self.weights = torch.empty(num_tokens, s.top_k, device=logits.device)
        self.block = triton.next_power_of_2(num_experts // s.num_groups)

    def __call__(self, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        s, (num_tokens, num_experts) = self.settings, logits.shape
        if s.scoring == "sigmoid_bias":
            groups, scale = (s.num_groups, s.top_k_groups, self.block), s.routed_scaling_factor
            sigmoid_topk_kernel[(num_tokens,)](
                logits, bias, self.ids, self.weights, scale, num_experts, s.top_k, *groups, num_warps=1
            )
        else:
            softmax_topk_kernel[(num_tokens,)](
                logits,
                self.ids,
                self.weights,
                num_experts,
                s.top_k,
                s.scoring != "softmax",
                self.block,
                num_warps=1,
            )
        return self.ids, self.weights


class FlashinferTopK:
    """flashinfer's routing of DeepSeek-V3, not run yet: called as in its
    flashinfer/fused_moe/fused_routing_dsv3.py at commit 051441a."""

    def __init__(self, logits: Tensor, bias: Tensor, s: Settings) -> None:
        self.settings = s
        self.bias = bias.to(logits.dtype)
        self.ids = torch.empty(len(logits), s.top_k, dtype=torch.int32, device=logits.device)
        self.weights = torch.empty(len(logits), s.top_k, dtype=logits.dtype, device=logits.device)

    @staticmethod
    def takes(s: Settings) -> bool:
        return fused_topk_deepseek is not None and s.scoring == "sigmoid_bias"

    def __call__(self, logits: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor]:
        s = self.settings
        fused_topk_deepseek(
            logits,
            self.bias,
            s.num_groups,
            s.top_k_groups,
            s.top_k,
            s.routed_scaling_factor,
            self.weights,
            self.ids,
        )
        return self.ids, self.weights


def route_torch(logits: Tensor, bias: Tensor | None, s: Settings) -> tuple[Tensor, Tensor]:
    """Warm-up, coverage by squared weights and refinement in PyTorch; nothing waits for the host."""
    z = logits.float()
    affinity = torch.sigmoid(z) if s.scoring == "sigmoid_bias" else torch.softmax(z, -1)
    ranking = affinity if bias is None else affinity + bias
    if s.num_groups > 1:
        groups = ranking.view(len(z), s.num_groups, -1)
        best = groups.topk(2, -1).values.sum(-1).topk(s.top_k_groups, -1).indices
        kept = torch.zeros(len(z), s.num_groups, dtype=torch.bool, device=z.device).scatter_(1, best, True)
        ranking = ranking.masked_fill(~kept.repeat_interleave(groups.shape[-1], 1), -torch.inf)
    own = ranking.topk(s.top_k, -1).indices
    weights = affinity.gather(1, own)
    if s.scoring != "softmax":
        weights = weights / weights.sum(-1, keepdim=True)
    utility = torch.zeros_like(affinity).scatter_(1, own, weights * weights)
    sums = (utility * 2**20).round().long().sum(0)
    warm = torch.zeros_like(sums, dtype=torch.bool)
    warm = warm.index_fill(0, own[:, : s.warmup].flatten(), True)
    order = torch.where(warm, torch.iinfo(torch.int64).max, sums).argsort(descending=True)
    before = sums[order].cumsum(0) - sums[order]  # what is kept when each expert's turn comes
    goes_on = (before < s.coverage * sums.sum()) | (torch.arange(len(sums), device=z.device) < s.top_k)
    active = warm | (torch.zeros_like(warm).scatter_(0, order, goes_on) & (sums > 0))
    chosen = ranking.masked_fill(~active, -torch.inf).topk(s.top_k, -1)
    weights = affinity.gather(1, chosen.indices).masked_fill(chosen.values == -torch.inf, 0.0)
    if s.scoring != "softmax":
        weights = weights / weights.sum(-1, keepdim=True)
    return chosen.indices.int(), weights * s.routed_scaling_factor
