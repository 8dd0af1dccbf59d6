"""The routing as a graph of standard operators: an ONNX model, or TensorRT layers where no plugin can go."""

from xshare_trtllm.graph.inputs import GraphInputs

__all__ = ["GraphInputs"]
