"""A pytest plugin, and a module to import first, that lets code written for a GPU run without one.

Tensors "on cuda" are on the host, a call is run where it would be enqueued, and a captured graph is the list
of the calls in it. It shows that the tests and benchmarks of the device check do what they say; it shows
nothing about a GPU. Times are made up, a microsecond for every call in a graph; with XSHARE_STAND_IN_LATE=1
the host is always too late to enqueue behind a busy GPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

sys.path.append(str(Path(__file__).resolve().parents[1] / "gpu"))

import device_routing

clock_us = 0.0
recording: list[Callable[[], Any]] | None = None


class OnHost(TorchFunctionMode):
    """Every tensor is made on the host."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {
            name: "cpu" if value == "cuda" and name == "device" else value
            for name, value in (kwargs or {}).items()
        }
        if function is torch.Tensor.cuda:
            return args[0].clone()
        if function is torch.Tensor.to and "cuda" in args:
            return args[0].clone()
        return function(*args, **kwargs)


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = clock_us

    def query(self) -> bool:
        return os.environ.get("XSHARE_STAND_IN_LATE") == "1"

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) / 1e3


class Graph:
    def __init__(self) -> None:
        self.calls: list[Callable[[], Any]] = []

    def replay(self) -> None:
        global clock_us
        clock_us += max(1, len(self.calls))
        for call in self.calls:
            call()


class Capture:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def __enter__(self) -> None:
        global recording
        recording = self.graph.calls

    def __exit__(self, *_: Any) -> None:
        global recording
        recording = None


def enqueue(call: device_routing.Call, stream: int | None = None) -> None:
    if recording is None:
        call.run_on_host()
    else:
        recording.append(call.run_on_host)


def install() -> None:
    nothing = lambda *_: None  # noqa: E731
    for name, value in {
        "is_available": lambda: True,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "a stand-in on the host",
        "get_device_properties": lambda *_: SimpleNamespace(
            name="a stand-in on the host", major=9, minor=0, multi_processor_count=1
        ),
        "current_stream": lambda: SimpleNamespace(cuda_stream=0),
        "synchronize": nothing,
        "empty_cache": nothing,
        "_sleep": nothing,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": Capture,
    }.items():
        setattr(torch.cuda, name, value)
    device_routing.Call.enqueue = enqueue
    OnHost().__enter__()


install()
