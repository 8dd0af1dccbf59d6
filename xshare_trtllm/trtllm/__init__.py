"""XShare in TensorRT-LLM: the engine path (`trtllm-build --plugin xshare`), the PyTorch backend (`enable`).

Nothing is imported before it is asked for: the command line reads from this package without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xshare_trtllm.trtllm.torch_backend import (
        Enabled,
        enable,
        enable_when_loaded,
        run_console_script,
        write_options,
    )
    from xshare_trtllm.trtllm.torch_routing import XShareMoeRoutingMethod
    from xshare_trtllm.trtllm.torch_support import router_spec

_HOME = {"XShareMoeRoutingMethod": "torch_routing", "router_spec": "torch_support"}
__all__ = [
    "Enabled",
    "XShareMoeRoutingMethod",
    "enable",
    "enable_when_loaded",
    "router_spec",
    "run_console_script",
    "write_options",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME.get(name, 'torch_backend')}"), name)
