"""XShare in plain PyTorch, written to be read and believed. The fast versions are held to its every bit."""

from xshare_trtllm.reference.route import mask_logits, route

__all__ = ["mask_logits", "route"]
