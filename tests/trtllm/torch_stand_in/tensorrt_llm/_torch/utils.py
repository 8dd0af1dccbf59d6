"""tensorrt_llm/_torch/utils.py: the attributes of the model call under way, per thread. SINGLE is a Mapping
(tensorrt_llm/mapping.py) of one rank."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

SINGLE = SimpleNamespace(
    enable_attention_dp=False,
    tp_size=1,
    tp_group=[0],
    pp_size=1,
    rank=0,
    world_size=1,
    moe_ep_size=1,
)
_current = threading.local()
is_torch_compiling_flag = False


def set_torch_compiling(enable: bool) -> None:
    global is_torch_compiling_flag
    is_torch_compiling_flag = enable


def is_torch_compiling() -> bool:
    return is_torch_compiling_flag


def get_model_extra_attrs() -> dict[str, Any] | None:
    return getattr(_current, "attrs", None)


@contextlib.contextmanager
def model_extra_attrs(attrs: dict[str, Any]) -> Iterator[None]:
    before = get_model_extra_attrs()
    _current.attrs = attrs
    try:
        yield
    finally:
        _current.attrs = before
