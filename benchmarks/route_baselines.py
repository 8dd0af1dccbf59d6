"""What the routing kernel is compared with on a GPU: routing without sharing in flashinfer, and the whole
algorithm in PyTorch. Routing without sharing in the language Triton is in route_triton.py.

Every function takes logits [T, E], an fp32 correction bias [E] or None, and a `Settings`, and gives expert
ids int32 [T, k] and weights [T, k].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from device_routing import Settings

try:
    from flashinfer.fused_moe import fused_topk_deepseek
except ImportError:
    fused_topk_deepseek = None


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
