"""tensorrt_llm/_torch/moe/fused_moe/routing.py at 660c812e64: `apply` takes `input_ids`, every method says
whether it `requires_separated_routing`, and there are new methods."""

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
    SigmoidRenorm = 6
    DeepSeekV4 = 7
    Unspecified = 8


class BaseMoeRoutingMethod(nn.Module):
    top_k: int

    def apply(self, _router_logits: Tensor, _input_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def get_experts_per_token(self) -> int:
        return self.top_k

    @property
    def experts_per_token(self) -> int:
        return self.get_experts_per_token()

    @property
    def requires_separated_routing(self) -> bool:
        return False

    @property
    def routing_method_type(self) -> RoutingMethodType:
        return RoutingMethodType.Unspecified


class RenormalizeMoeRoutingMethod(BaseMoeRoutingMethod):
    def __init__(self, top_k: int, output_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.top_k, self.output_dtype = top_k, output_dtype

    def apply(self, router_logits: Tensor, input_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        best, ids = router_logits.topk(self.top_k)
        return ids.to(torch.int32), best.to(self.output_dtype).softmax(-1)

    @property
    def routing_method_type(self) -> RoutingMethodType:
        return RoutingMethodType.Renormalize


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
        """Of one group, which is all that the methods below use it for."""
        assert self.n_group == self.topk_group == 1
        scores = logits.float().sigmoid()
        ids = (scores + e_score_correction_bias).topk(self.top_k).indices
        weights = scores.gather(-1, ids)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.routed_scaling_factor
        return ids.to(torch.int32), weights


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

    @staticmethod
    def get_scores(logits: Tensor, e_score_correction_bias: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.sigmoid()
        return scores, scores + e_score_correction_bias

    def apply(self, router_logits: Tensor, input_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scores, ranking = self.get_scores(router_logits, self.e_score_correction_bias)
        ids = ranking.topk(self.top_k, sorted=False).indices
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return ids.to(torch.int32), weights.to(self.output_dtype)

    @property
    def e_score_correction_bias(self) -> Tensor:
        return self.callable_e_score_correction_bias()

    @property
    def routing_method_type(self) -> RoutingMethodType:
        return RoutingMethodType.MiniMax2


class SqrtSoftplusMoeRoutingMethod(MiniMaxM2MoeRoutingMethod):
    @property
    def requires_separated_routing(self) -> bool:
        return True

    @staticmethod
    def get_scores(logits: Tensor, e_score_correction_bias: Tensor) -> tuple[Tensor, Tensor]:
        scores = nn.functional.softplus(logits.float()).sqrt()
        return scores, scores + e_score_correction_bias


class MiniMaxM3MoeRoutingMethod(MiniMaxM2MoeRoutingMethod):
    def __init__(
        self,
        top_k: int,
        num_experts: int,
        callable_e_score_correction_bias: Callable[[], Tensor],
        routed_scaling_factor: float = 1.0,
        output_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(top_k, num_experts, callable_e_score_correction_bias, output_dtype)
        self.routed_scaling_factor = float(routed_scaling_factor)
        self.routing_impl = Deepseekv3RoutingImpl(top_k, 1, 1, self.routed_scaling_factor)

    def apply(self, router_logits: Tensor, input_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        ids, weights = super().apply(router_logits, input_ids)
        return ids, weights * self.routed_scaling_factor


class DeepSeekV4MoeRoutingMethod(BaseMoeRoutingMethod):
    def __init__(
        self,
        top_k: int,
        n_group: int,
        topk_group: int,
        routed_scaling_factor: float,
        callable_e_score_correction_bias: Callable[[], Tensor],
        callable_tid2eid: Callable[[], Tensor],
        is_hashed: bool = True,
    ) -> None:
        super().__init__()
        self.top_k, self.is_hashed = top_k, is_hashed
        self.callable_e_score_correction_bias = callable_e_score_correction_bias

    @property
    def e_score_correction_bias(self) -> Tensor:
        return self.callable_e_score_correction_bias()

    @property
    def requires_separated_routing(self) -> bool:
        return True

    @property
    def routing_method_type(self) -> RoutingMethodType:
        return RoutingMethodType.DeepSeekV3


class SigmoidRenormMoeRoutingMethod(BaseMoeRoutingMethod):
    def __init__(
        self,
        top_k: int,
        num_experts: int,
        renormalize: bool = True,
        output_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.top_k, self.num_experts = top_k, num_experts
        self.renormalize, self.output_dtype = renormalize, output_dtype

    def apply(self, router_logits: Tensor, input_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weights, ids = router_logits.sigmoid().topk(self.top_k, sorted=False)
        if self.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return ids.to(torch.int32), weights.to(self.output_dtype)

    @property
    def routing_method_type(self) -> RoutingMethodType:
        return RoutingMethodType.SigmoidRenorm


class StaticMoeRoutingMethod(BaseMoeRoutingMethod):
    def __init__(self, routing_tensor: Tensor, routing_scales: Tensor | None = None) -> None:
        super().__init__()
        self.routing_tensor, self.routing_scales = routing_tensor, routing_scales

    def get_experts_per_token(self) -> int:
        return int(self.routing_tensor.shape[1])


class LoadBalancedMoeRoutingMethod(BaseMoeRoutingMethod):
    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
