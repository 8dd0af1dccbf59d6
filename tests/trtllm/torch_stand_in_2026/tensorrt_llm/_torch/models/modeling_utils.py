"""tensorrt_llm/_torch/models/modeling_utils.py after pull request 18284 (2026-08-27): modules of external
model classes are declared in a worker, and imported when somebody looks their architecture up."""

from __future__ import annotations

import importlib
from collections.abc import Callable

MODEL_CLASS_MAPPING: dict[str, type] = {}
_EXTERNAL_ARCH_TO_MODULE: dict[str, str] = {}


def register_auto_model(name: str) -> Callable[[type], type]:
    def decorator(cls: type) -> type:
        MODEL_CLASS_MAPPING[name] = cls
        return cls

    return decorator


def register_external_model_modules(arch_to_module: dict[str, str]) -> None:
    _EXTERNAL_ARCH_TO_MODULE.clear()
    _EXTERNAL_ARCH_TO_MODULE.update(arch_to_module)


def _ensure_model_registered(model_arch: str) -> None:
    if model_arch in _EXTERNAL_ARCH_TO_MODULE:
        importlib.import_module(_EXTERNAL_ARCH_TO_MODULE[model_arch])
