"""tensorrt_llm/_torch/models/modeling_deepseekv3.py: the method is named in its gate."""

from __future__ import annotations

from typing import Any

from torch import nn

from tensorrt_llm._torch.models.modeling_utils import register_auto_model
from tensorrt_llm._torch.modules.fused_moe.routing import DeepSeekV3MoeRoutingMethod


@register_auto_model("DeepseekV32ForCausalLM")
@register_auto_model("DeepseekV3ForCausalLM")
class DeepseekV3ForCausalLM(nn.Module):
    @staticmethod
    def routing_method(bias: Any) -> Any:
        return DeepSeekV3MoeRoutingMethod(8, 8, 4, 2.5, lambda: bias)
