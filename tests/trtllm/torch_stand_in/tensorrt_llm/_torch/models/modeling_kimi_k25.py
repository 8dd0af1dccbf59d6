"""tensorrt_llm/_torch/models/modeling_kimi_k25.py at 010373d3b4: names no routing method, its language model
is another file's."""

from __future__ import annotations

from torch import nn

from tensorrt_llm._torch.models.modeling_deepseekv3 import DeepseekV3ForCausalLM
from tensorrt_llm._torch.models.modeling_utils import register_auto_model


@register_auto_model("KimiK25ForConditionalGeneration")
class KimiK25ForConditionalGeneration(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.llm = DeepseekV3ForCausalLM()
