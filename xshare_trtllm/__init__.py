"""XShare: one shared set of experts per MoE layer and decode step, chosen for the batch under a budget."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xshare_trtllm.config import RouterSpec, XShareConfig
    from xshare_trtllm.routing import Routing, RoutingStats, mask_logits, route, warm_up

__version__ = "0.1.0"
__all__ = [
    "RouterSpec",
    "Routing",
    "RoutingStats",
    "XShareConfig",
    "__version__",
    "mask_logits",
    "route",
    "warm_up",
]

_HOME = {  # where each name lives: imported when first asked for, so that the configuration needs no torch
    "RouterSpec": "config",
    "XShareConfig": "config",
    "Routing": "routing",
    "RoutingStats": "routing",
    "mask_logits": "routing",
    "route": "routing",
    "warm_up": "routing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
