"""tensorrt_llm/_torch/moe/fused_moe/__init__.py at 05b0324813: the package names its classes."""

from tensorrt_llm._torch.moe.fused_moe.moe import ConfigurableMoE, MoE, MoEImplBase

__all__ = ["ConfigurableMoE", "MoE", "MoEImplBase"]
