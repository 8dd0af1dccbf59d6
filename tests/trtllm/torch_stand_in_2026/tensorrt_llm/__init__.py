"""What changed in TensorRT-LLM's main until August 2026; all else is found in torch_stand_in/.

Read from the public repository NVIDIA/TensorRT-LLM; each file names the paths and commits. Bodies are our own
and as small as the contract allows.
"""

from pathlib import Path

__version__ = "1.3.0rc18"
__path__.append(str(Path(__file__).parents[2] / "torch_stand_in" / "tensorrt_llm"))
