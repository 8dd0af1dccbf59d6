"""The operators that the routing graph is made of; ONNX and TensorRT both have them.

Operands have one rank and are broadcast along dimensions of size 1.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

DType = Literal["float32", "int32", "int64", "bool"]
Binary = Literal["Add", "Sub", "Mul", "Div", "Min", "Max", "Less", "Greater", "Equal", "And", "Or"]
Unary = Literal["Abs", "Neg", "Floor", "Round", "Sqrt", "Not", "IsNaN"]


class Ops(Protocol):
    def constant(self, value: npt.NDArray[np.generic]) -> Any: ...

    def binary(self, kind: Binary, a: Any, b: Any) -> Any:
        """`Div` of integers that are not negative drops the remainder."""
        ...

    def unary(self, kind: Unary, a: Any) -> Any:
        """`Round` rounds half to even."""
        ...

    def cast(self, a: Any, dtype: DType) -> Any: ...

    def where(self, condition: Any, a: Any, b: Any) -> Any: ...

    def reduce_max(self, a: Any, axis: int) -> Any:
        """Keeps the dimension, as `reduce_sum` does."""
        ...

    def reduce_sum(self, a: Any, axis: int) -> Any: ...

    def cumulative_sum(self, a: Any, axis: int) -> Any: ...

    def top_k(self, a: Any, k: int, axis: int) -> tuple[Any, Any]:
        """Values and int32 indices, largest first; of equal values the lower index first."""
        ...

    def gather(self, a: Any, indices: Any, axis: int) -> Any: ...

    def gather_elements(self, a: Any, indices: Any) -> Any:
        """out[t, j] = a[t, indices[t, j]]"""
        ...

    def scatter_elements(self, a: Any, indices: Any, updates: Any) -> Any:
        """A copy of a with a[t, indices[t, j]] = updates[t, j]"""
        ...

    def reshape(self, a: Any, shape: tuple[int, ...]) -> Any:
        """One size may be -1."""
        ...

    def transpose(self, a: Any) -> Any:
        """Of a matrix."""
        ...

    def matmul(self, a: Any, b: Any) -> Any: ...
