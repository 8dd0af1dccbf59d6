"""tensorrt_llm/functional.py of 1.x: Tensor, _create_tensor and the functions that the layers here call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorrt as trt

from tensorrt_llm._common import default_net, default_trtnet

_constants: list[np.ndarray] = []  # they live as long as the process


class Tensor:
    def __init__(
        self,
        name: str | None = None,
        dtype: Any = None,
        shape: Any = None,
        dim_range: Any = None,
        is_network_input: bool = True,
        location: Any = trt.TensorLocation.DEVICE,
        network: Any = None,
        trt_tensor: Any = None,
    ) -> None:
        self.producer: Any = None
        if is_network_input:
            default_net()._add_input(self, name, dtype, shape, dim_range)

    @property
    def name(self) -> str:
        return self.trt_tensor.name

    @property
    def dtype(self) -> Any:
        return self.trt_tensor.dtype

    @property
    def shape(self) -> Any:
        return self.trt_tensor.shape

    def mark_output(self, name: str, dtype: Any = None) -> None:
        self.trt_tensor.name = name
        default_trtnet().mark_output(self.trt_tensor)

    def __add__(self, other: Tensor) -> Tensor:
        return _elementwise(self, other, trt.ElementWiseOperation.SUM)

    def __mul__(self, other: Tensor) -> Tensor:
        return _elementwise(self, other, trt.ElementWiseOperation.PROD)

    def __truediv__(self, other: Tensor) -> Tensor:
        return _elementwise(self, other, trt.ElementWiseOperation.DIV)


def _create_tensor(trt_tensor: Any, producer: Any) -> Tensor:
    assert trt_tensor is not None and producer is not None
    default_net()._set_layer_name(producer)
    assert len(trt_tensor.shape) >= 0, f"tensor {trt_tensor.name} has an invalid shape"
    tensor = Tensor(is_network_input=False)
    tensor.trt_tensor, tensor.producer = trt_tensor, producer
    return tensor


def _elementwise(left: Tensor, right: Tensor, op: Any) -> Tensor:
    layer = default_trtnet().add_elementwise(left.trt_tensor, right.trt_tensor, op)
    return _create_tensor(layer.get_output(0), layer)


def constant(ndarray: np.ndarray) -> Tensor:
    _constants.append(ndarray)
    layer = default_trtnet().add_constant(ndarray.shape, trt.Weights(ndarray))
    return _create_tensor(layer.get_output(0), layer)


def cast(input: Tensor, dtype: Any) -> Tensor:
    layer = default_trtnet().add_cast(input.trt_tensor, dtype)
    return _create_tensor(layer.get_output(0), layer)


def shape(input: Tensor, dim: int | None = None) -> Tensor:
    layer = default_trtnet().add_shape(input.trt_tensor)
    whole = cast(_create_tensor(layer.get_output(0), layer), trt.int32)
    return whole if dim is None else gather(whole, 0, constant(np.array([dim], np.int32)))


def gather(input: Tensor, dim: int, indices: Tensor) -> Tensor:
    layer = default_trtnet().add_gather(input.trt_tensor, indices.trt_tensor, dim)
    return _create_tensor(layer.get_output(0), layer)


def concat(inputs: Sequence[Tensor | int], dim: int = 0) -> Tensor:
    tensors = [constant(np.array([x], np.int32)) if isinstance(x, int) else x for x in inputs]
    layer = default_trtnet().add_concatenation([tensor.trt_tensor for tensor in tensors])
    return _create_tensor(layer.get_output(0), layer)


def view(input: Tensor, shape: Tensor, zero_is_placeholder: bool = True) -> Tensor:
    layer = default_trtnet().add_shuffle(input.trt_tensor)
    layer.set_input(1, shape.trt_tensor)
    return _create_tensor(layer.get_output(0), layer)


def softmax(input: Tensor, dim: int | None = None) -> Tensor:
    layer = default_trtnet().add_softmax(input.trt_tensor)
    layer.axes = 1 << (len(input.shape) - 1)
    return _create_tensor(layer.get_output(0), layer)


def topk(input: Tensor, k: int, dim: int) -> tuple[Tensor, Tensor]:
    axes = 1 << (len(input.shape) - 1)
    layer = default_trtnet().add_topk(input.trt_tensor, trt.TopKOperation.MAX, k, axes)
    return _create_tensor(layer.get_output(0), layer), _create_tensor(layer.get_output(1), layer)


def sum(input: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    axes = 1 << (len(input.shape) - 1)
    layer = default_trtnet().add_reduce(input.trt_tensor, trt.ReduceOperation.SUM, axes, keepdim)
    return _create_tensor(layer.get_output(0), layer)


def matmul(input: Tensor, mat2: Tensor) -> Tensor:
    plain = trt.MatrixOperation.NONE
    layer = default_trtnet().add_matrix_multiply(input.trt_tensor, plain, mat2.trt_tensor, plain)
    return _create_tensor(layer.get_output(0), layer)
