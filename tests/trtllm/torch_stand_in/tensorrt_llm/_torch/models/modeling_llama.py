"""tensorrt_llm/_torch/models/modeling_llama.py: Llama 4 routes by a method of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from tensorrt_llm._torch.models.modeling_utils import register_auto_model
from tensorrt_llm._torch.modules.fused_moe.routing import Llama4RenormalizeMoeRoutingMethod


@register_auto_model("Llama4ForConditionalGeneration")
class Llama4ForConditionalGeneration(nn.Module):
    @staticmethod
    def routing_method() -> Any:
        return Llama4RenormalizeMoeRoutingMethod(1)
