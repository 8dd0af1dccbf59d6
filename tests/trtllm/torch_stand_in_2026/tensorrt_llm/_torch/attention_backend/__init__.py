"""Pull requests 17968, 17969 (August 2026): the old package keeps names, but no submodule `interface`."""

from tensorrt_llm._torch.attention.backends.interface import AttentionMetadata, TrtllmAttentionMetadata

__all__ = ["AttentionMetadata", "TrtllmAttentionMetadata"]
