"""tensorrt_llm/module.py of 1.x: how attributes of a module are set and found, and what a call does."""

from __future__ import annotations

from typing import Any


class Module:
    def __init__(self) -> None:
        self._modules: dict[str, Module] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules")
        if modules is not None and name in modules:
            return modules[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__getattribute__(name)
        except AttributeError:
            if isinstance(value, Module):
                self.__dict__["_modules"][name] = value
            else:
                super().__setattr__(name, value)
        else:
            super().__setattr__(name, value)
