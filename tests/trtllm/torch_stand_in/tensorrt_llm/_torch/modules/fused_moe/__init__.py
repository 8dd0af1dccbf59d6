"""tensorrt_llm/_torch/modules/fused_moe/__init__.py: the package names its classes."""

from tensorrt_llm._torch.modules.fused_moe.moe import MoE

__all__ = ["MoE"]
