"""tensorrt_llm/_common.py of 1.x: the network under construction."""

from __future__ import annotations

from typing import Any

net: Any = None


def default_net() -> Any:
    assert net, "there is no network yet"
    return net


def default_trtnet() -> Any:
    return default_net().trt_network


def set_network(network: Any) -> None:
    global net
    net = network
