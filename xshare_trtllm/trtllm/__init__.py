"""XShare in TensorRT-LLM: the engine path (`trtllm-build --plugin xshare`), the PyTorch backend (`enable`).

Nothing is imported before it is asked for: the command line reads from this package without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xshare_trtllm.trtllm.torch_backend import Enabled, enable
    from xshare_trtllm.trtllm.torch_routing import XShareMoeRoutingMethod
    from xshare_trtllm.trtllm.torch_support import router_spec
    from xshare_trtllm.trtllm.workers import use

_HOME = {
    "Enabled": "torch_backend",
    "XShareMoeRoutingMethod": "torch_routing",
    "enable": "torch_backend",
    "router_spec": "torch_support",
    "use": "workers",
}
__all__ = ["Enabled", "XShareMoeRoutingMethod", "enable", "router_spec", "use"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
