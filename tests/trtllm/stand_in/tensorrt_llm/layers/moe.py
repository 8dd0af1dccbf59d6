"""tensorrt_llm/layers/moe.py of 1.x: MoeConfig, MixtureOfExperts, SharedMoE, the calls in `forward`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import tensorrt as trt

from tensorrt_llm.functional import Tensor, cast, constant, matmul, softmax, sum, topk
from tensorrt_llm.mapping import Mapping
from tensorrt_llm.module import Module


@dataclass
class MoeConfig:
    class ExpertScaleNormalizationMode(IntEnum):
        NONE = 0
        RENORMALIZE = 1
        SPARSE_MIXER = 2
        DEVICE_LIMITED = 3
        DEVICE_LIMITED_RENORM = 4

    num_experts: int = 0
    shared_expert_intermediate_size: int = 0
    top_k: int = 0
    normalization_mode: ExpertScaleNormalizationMode = ExpertScaleNormalizationMode.RENORMALIZE
    sparse_mixer_epsilon: float = 0.01
    tp_mode: int = 0
    device_limited_n_group: int = 0
    device_limited_topk_group: int = 0
    device_limited_routed_scaling_factor: float = 1.0

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> MoeConfig:
        return cls(**config)


class Router(Module):
    """In place of RowLinear, whose weights are fp32 here."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.weight = np.random.default_rng(0).normal(size=(hidden_size, num_experts)).astype(np.float32)

    def forward(self, x: Tensor, lora_runtime_params: Any = None) -> Tensor:
        weight = self.weight if len(x.shape) == 2 else self.weight[None]
        return matmul(x, constant(weight))


class MixtureOfExperts(Module):
    def __init__(
        self,
        moe_config: MoeConfig,
        hidden_size: int,
        ffn_hidden_size: int,
        hidden_act: str,
        mapping: Mapping | None = None,
        bias: bool = True,
        dtype: Any = None,
        tp_group: list[int] | None = None,
        tp_size: int = 1,
        quant_mode: Any = None,
        use_all_reduce: bool = True,
        pre_quant_scale: bool = False,
        zero: bool = False,
        use_w4a8_awq: bool = False,
        use_int8_weight: bool = False,
        group_size: int = -1,
        static_routing: bool = False,
    ) -> None:
        super().__init__()
        self.moe_config = moe_config
        self.top_k = moe_config.top_k
        self.mapping = mapping or Mapping()
        self.static_routing = static_routing
        self.router = Router(hidden_size, moe_config.num_experts)

    def default_routing(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scales, experts = topk(softmax(cast(logits, trt.float32), dim=-1), k=self.moe_config.top_k, dim=-1)
        return experts, scales

    def renormalize(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores, experts = topk(cast(logits, trt.float32), k=self.moe_config.top_k, dim=-1)
        return experts, softmax(scores, dim=-1)

    def group_limited_greedy(self, logits: Tensor) -> Tensor:
        return softmax(cast(logits, trt.float32), -1)  # without the groups

    def sparse_mixer(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return self.renormalize(logits)  # another rule

    def forward(
        self,
        hidden_states: Tensor,
        lora_layer_params: Any = None,
        all_reduce_params: Any = None,
        last_local_layer_residual: Any = None,
        side_stream_id: Any = 0,
        static_routing_input: Tensor | None = None,
    ) -> Tensor:
        routing = None if self.static_routing else self.router(cast(hidden_states, trt.float32), None)
        modes, mode = MoeConfig.ExpertScaleNormalizationMode, self.moe_config.normalization_mode
        if self.static_routing:
            experts, scales = static_routing_input, None
        elif mode in (modes.DEVICE_LIMITED, modes.DEVICE_LIMITED_RENORM):
            scales, experts = topk(self.group_limited_greedy(routing), k=self.moe_config.top_k, dim=-1)
            if mode == modes.DEVICE_LIMITED_RENORM:
                scales = scales / sum(scales, dim=-1, keepdim=True)
        elif mode == modes.RENORMALIZE:
            experts, scales = self.renormalize(routing)
        elif mode == modes.SPARSE_MIXER:
            experts, scales = self.sparse_mixer(routing)
        else:
            experts, scales = self.default_routing(routing)
        return self.forward_experts(hidden_states, experts, scales, lora_layer_params, side_stream_id)

    def forward_experts(
        self,
        hidden_states: Tensor,
        token_selected_experts: Tensor,
        token_final_scales: Tensor,
        lora_layer_params: Any,
        side_stream_id: Any,
    ) -> Tensor:
        """Expert e multiplies by e: not what an expert computes, but its ids and weights count."""
        assert token_selected_experts.dtype == trt.int32 and token_final_scales.dtype == trt.float32
        assert len(token_selected_experts.shape) == len(hidden_states.shape) == len(token_final_scales.shape)
        weighted = cast(token_selected_experts, trt.float32) * token_final_scales
        return hidden_states * sum(weighted, dim=-1, keepdim=True)


MOE = MixtureOfExperts


class SharedMoE(MOE):
    def forward(self, hidden_states: Tensor, lora_layer_params: Any = None) -> Tensor:
        routed = super().forward(hidden_states, lora_layer_params=lora_layer_params)
        return routed + hidden_states
