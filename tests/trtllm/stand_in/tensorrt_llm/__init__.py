"""Contract stand-in for TensorRT-LLM 1.2: what `trtllm-build` calls on the way to an engine, in its order.

Signatures, names and call order were read from the public source of TensorRT-LLM 1.0 to 1.2
(NVIDIA/TensorRT-LLM; each module names its file). Bodies are ours. Layers are those of a
real TensorRT: see tensorrt.py beside it.
"""

from tensorrt_llm._common import default_net, default_trtnet

__version__ = "1.2.1"
__all__ = ["__version__", "default_net", "default_trtnet"]
