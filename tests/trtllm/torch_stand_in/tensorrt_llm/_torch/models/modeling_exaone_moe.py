"""tensorrt_llm/_torch/models/modeling_exaone_moe.py at 0d30bf1243: the block is another file's."""

from __future__ import annotations

from torch import nn

from tensorrt_llm._torch.models.modeling_deepseekv3 import Deepseekv3MoE
from tensorrt_llm._torch.models.modeling_utils import register_auto_model


class ExaoneMoeSparseMoEBlock(Deepseekv3MoE):
    pass


@register_auto_model("ExaoneMoEForCausalLM")
class ExaoneMoeForCausalLM(nn.Module):
    pass
