"""_torch/modules/fused_moe/ is gone: _torch/moe/fused_moe/ (routing.py at 660c812e64)."""
