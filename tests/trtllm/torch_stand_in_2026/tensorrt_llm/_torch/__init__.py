"""As the package above: what is not here is found in torch_stand_in/."""

from pathlib import Path

__path__.append(str(Path(__file__).parents[3] / "torch_stand_in" / "tensorrt_llm" / "_torch"))
