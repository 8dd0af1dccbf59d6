"""tensorrt_llm/_torch/models/modeling_utils.py: registered model classes.

executor/proxy.py gives the mapping to `worker_main(..., _torch_model_class_mapping=MODEL_CLASS_MAPPING)` in
every worker process, pickled, so that a worker imports the module of each class (executor/worker.py at
005bc84889; later versions send the names of external modules).
"""

from __future__ import annotations

from collections.abc import Callable

MODEL_CLASS_MAPPING: dict[str, type] = {}


def register_auto_model(name: str) -> Callable[[type], type]:
    def decorator(cls: type) -> type:
        MODEL_CLASS_MAPPING[name] = cls
        return cls

    return decorator
