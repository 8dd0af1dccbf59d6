"""tensorrt_llm/_torch/models/modeling_gpt_oss.py at 7924c7f (1.0) and 050b6cb9: the block holds the routing
method too, and hands logits on by keyword; it is no MoE module (no `use_dp`, no `ep_size`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tensorrt_llm._torch.models.modeling_utils import register_auto_model


class MLPBlock(nn.Module):
    def __init__(self, experts: Any, layer_idx: int) -> None:
        super().__init__()
        self.num_experts, self.num_slots = experts.num_experts, experts.num_experts
        self.layer_idx, self.mapping = layer_idx, experts.mapping
        self.routing_method = experts.routing_method
        self.experts = experts

    def forward(self, x: Tensor, router_logits: Tensor) -> Tensor:
        output: Tensor = self.experts(x=x, router_logits=router_logits)
        return output


@register_auto_model("GptOssForCausalLM")
class GptOssForCausalLM(nn.Module):
    """Its block routes by a method that the file names (here only so that it is named)."""

    @staticmethod
    def routing_method(top_k: int) -> Any:
        from tensorrt_llm._torch.modules.fused_moe.routing import RenormalizeMoeRoutingMethod

        return RenormalizeMoeRoutingMethod(top_k)
