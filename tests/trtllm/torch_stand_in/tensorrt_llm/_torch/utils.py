"""tensorrt_llm/_torch/utils.py: the attributes of the model call under way, per thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

_current = threading.local()


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
