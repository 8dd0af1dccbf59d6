"""tensorrt_llm/_torch/models/modeling_deepseekv3.py: the method is named in its gate."""

from __future__ import annotations

from typing import Any

from torch import nn

from tensorrt_llm._torch.models.modeling_utils import register_auto_model
from tensorrt_llm._torch.modules.fused_moe.routing import DeepSeekV3MoeRoutingMethod


class DeepseekV3Gate(nn.Module):
    @property
    def routing_method(self) -> Any:
        return DeepSeekV3MoeRoutingMethod(8, 8, 4, 2.5, lambda: self.e_score_correction_bias)


class Deepseekv3MoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = DeepseekV3Gate()


@register_auto_model("DeepseekV32ForCausalLM")
@register_auto_model("DeepseekV3ForCausalLM")
class DeepseekV3ForCausalLM(nn.Module):
    pass
