"""tensorrt_llm/_torch/modules/fused_moe/routing.py at 0f3e29af15 (between 1.2 and 1.3).

`requires_separated_routing` and the second argument of `apply` are those that moe_scheduler.py at 0150f78ea2
(after 1.2) uses; `DeepseekV3Gate` is that of models/modeling_deepseekv3.py in 1.0, a routing method with the
gate's weight in it.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import torch
from torch import Tensor, nn


class RoutingMethodType(IntEnum):
    Default = 0
    Renormalize = 1
    DeepSeekV3 = 2
    Llama4 = 3
    RenormalizeNaive = 4
    MiniMax2 = 5
    Unspecified = 6


class BaseMoeRoutingMethod(nn.Module):
    top_k: int

    def apply(self, _router_logits: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def get_experts_per_token(self) -> int:
        return self.top_k

    @property
    def experts_per_token(self) -> int:
        return self.get_experts_per_token()

    @property
    def routing_method_type(self) -> RoutingMethodType:
        return RoutingMethodType.Unspecified


class DefaultMoeRoutingMethod(BaseMoeRoutingMethod):
    def __init__(
        self,
        top_k: int,
        output_dtype: torch.dtype = torch.float32,
        force_enable_pytorch_op: bool = False,
    ) -> None:
        super().__init__()
        self.top_k, self.output_dtype = top_k, output_dtype

    def apply(self, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = router_logits.to(self.output_dtype).softmax(-1).topk(self.top_k)
        return ids.to(torch.int32), weights

    @property
    def routing_method_type(self) -> RoutingMethodType:
        return RoutingMethodType.Default


class RenormalizeMoeRoutingMethod(BaseMoeRoutingMethod):
    def __init__(
        self,
        top_k: int,
        output_dtype: torch.dtype = torch.float32,
        force_enable_pytorch_op: bool = False,
    ) -> None:
        super().__init__()
        self.top_k, self.output_dtype = top_k, output_dtype

    def apply(self, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        best, ids = router_logits.topk(self.top_k)
        return ids.to(torch.int32), best.to(self.output_dtype).softmax(-1)

    @property
    def routing_method_type(self) -> RoutingMethodType:
        return RoutingMethodType.Renormalize


class RenormalizeNaiveMoeRoutingMethod(RenormalizeMoeRoutingMethod):
    def __init__(self, top_k: int, output_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(top_k, output_dtype)

    @property
    def routing_method_type(self) -> RoutingMethodType:
        return RoutingMethodType.RenormalizeNaive


class Deepseekv3RoutingImpl:
    def __init__(
        self,
        top_k: int,
        n_group: int,
        topk_group: int,
        routed_scaling_factor: float,
        is_fused: bool = True,
    ) -> None:
        self.top_k, self.n_group, self.topk_group = top_k, n_group, topk_group
        self.routed_scaling_factor = routed_scaling_factor

    def apply(self, logits: Tensor, e_score_correction_bias: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.float().sigmoid()
        ranking = scores + e_score_correction_bias
        groups = ranking.unflatten(-1, (self.n_group, -1))
        best = groups.topk(2).values.sum(-1).topk(self.topk_group).indices
        open_groups = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter_(-1, best, True)
        ranking = groups.masked_fill(~open_groups[..., None], -torch.inf).flatten(-2)
        ids = ranking.topk(self.top_k).indices
        weights = scores.gather(-1, ids)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.routed_scaling_factor
        return ids.to(torch.int32), weights


class DeepSeekV3MoeRoutingMethod(BaseMoeRoutingMethod):
    def __init__(
        self,
        top_k: int,
        n_group: int,
        topk_group: int,
        routed_scaling_factor: float,
        callable_e_score_correction_bias: Callable[[], Tensor],
        is_fused: bool = True,
    ) -> None:
        super().__init__()
        self.routing_impl = Deepseekv3RoutingImpl(top_k, n_group, topk_group, routed_scaling_factor, is_fused)
        self.callable_e_score_correction_bias = callable_e_score_correction_bias

    def apply(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return self.routing_impl.apply(logits, self.e_score_correction_bias)

    @property
    def e_score_correction_bias(self) -> Tensor:
        return self.callable_e_score_correction_bias()

    @property
    def top_k(self) -> int:  # type: ignore[override]
        return self.routing_impl.top_k

    @property
    def routing_method_type(self) -> RoutingMethodType:
        return RoutingMethodType.DeepSeekV3


class DeepseekV3Gate(BaseMoeRoutingMethod):
    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        n_group: int,
        topk_group: int,
        routed_scaling_factor: float,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_experts, hidden_size), requires_grad=False)
        self.e_score_correction_bias = nn.Parameter(0.1 * torch.randn(num_experts), requires_grad=False)
        self.top_k = top_k
        self.routing_impl = Deepseekv3RoutingImpl(top_k, n_group, topk_group, routed_scaling_factor)

    def apply(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return self.routing_impl.apply(logits, self.e_score_correction_bias)

    @property
    def routing_method_type(self) -> RoutingMethodType:
        return RoutingMethodType.DeepSeekV3


class MiniMaxM2MoeRoutingMethod(BaseMoeRoutingMethod):
    def __init__(
        self,
        top_k: int,
        num_experts: int,
        callable_e_score_correction_bias: Callable[[], Tensor],
        output_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.top_k, self.num_experts, self.output_dtype = top_k, num_experts, output_dtype
        self.callable_e_score_correction_bias = callable_e_score_correction_bias

    def apply(self, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        impl = Deepseekv3RoutingImpl(self.top_k, 1, 1, 1.0)
        ids, weights = impl.apply(router_logits, self.e_score_correction_bias)
        return ids, weights.to(self.output_dtype)

    @property
    def e_score_correction_bias(self) -> Tensor:
        return self.callable_e_score_correction_bias()

    @property
    def routing_method_type(self) -> RoutingMethodType:
        return RoutingMethodType.MiniMax2


class Llama4RenormalizeMoeRoutingMethod(BaseMoeRoutingMethod):
    def __init__(self, top_k: int, output_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.top_k, self.output_dtype = top_k, output_dtype

    def apply(self, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        best, ids = router_logits.topk(self.top_k)
        return ids.to(torch.int32), best.float().sigmoid().to(self.output_dtype)


class SparseMixerMoeRoutingMethod(BaseMoeRoutingMethod):
    def __init__(self, top_k: int, eps: float) -> None:
        super().__init__()
        self.top_k, self.eps = top_k, eps


class SeparableRoutingMethod(BaseMoeRoutingMethod):
    """What later versions add to every method."""

    @property
    def requires_separated_routing(self) -> bool:
        return False


class LaterRenormalize(RenormalizeMoeRoutingMethod, SeparableRoutingMethod):
    def apply(self, router_logits: Tensor, input_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().apply(router_logits)


class LaterDeepSeekV3(DeepSeekV3MoeRoutingMethod, SeparableRoutingMethod):
    def apply(self, logits: Tensor, input_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().apply(logits)


LaterRenormalize.__name__ = "RenormalizeMoeRoutingMethod"
LaterDeepSeekV3.__name__ = "DeepSeekV3MoeRoutingMethod"
