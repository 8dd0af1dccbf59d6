"""The CUDA kernels without nvcc: compiled at first use for the very setting of a layer, launched from Python."""

from xshare_trtllm.kernels.launch import PLAN_BYTES, enqueue, why_not
from xshare_trtllm.kernels.setting import PARAMS, TENSORS

__all__ = ["PARAMS", "PLAN_BYTES", "TENSORS", "enqueue", "why_not"]
