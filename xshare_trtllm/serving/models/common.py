"""What the Python models share: parameters, inputs, errors."""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

pb_utils: Any = import_module("triton_python_backend_utils")


def parameters(args: dict[str, str]) -> dict[str, str]:
    """The `parameters` of the model's config.pbtxt."""
    values = json.loads(args["model_config"])["parameters"]
    return {name: value["string_value"] for name, value in values.items()}


def one(name: str, array: Any) -> Any:
    """The only element of an input, in a Python type. Raises ValueError where there are more or none."""
    if array.size != 1:
        raise ValueError(f"{name}: must hold one value, got {array.size}; one prompt per request")
    return array.reshape(-1)[0].item() if array.dtype != object else array.reshape(-1)[0]


def text(name: str, data: Any) -> str:
    """A string input as text. Raises ValueError where it is not UTF-8, with the place."""
    if isinstance(data, str):
        return data
    try:
        return bytes(data).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: is not UTF-8, byte 0x{data[error.start]:02x} at {error.start}") from None


def refusal(message: str) -> Any:
    """The response to a request that asks for what is not possible."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
