"""What each row of a step is, worked out in the graph from its own inputs.

A step of TensorRT Edge-LLM 0.11 has T rows of N sequences, packed or padded to one length per sequence:

query_start_offsets             [N + 1] int32, the first row of each sequence
query_lengths                   [N] int32, its rows; what lies between one sequence and the next is padding
context_sequence_count_carrier  [C] int32: the first C sequences are context. Only its shape counts

The rows of a draft tree are the rows of one sequence, so of one request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OFFSETS, LENGTHS, CONTEXTS = "query_start_offsets", "query_lengths", "context_sequence_count_carrier"
INPUTS = (OFFSETS, LENGTHS, CONTEXTS)
PREFIX = "xshare/"  # of all names that are added to a graph


class Rows(NamedTuple):
    """Names of two tensors, and the nodes that make them.

    request_ids  [T] int32, the sequence of each row; -1 = padding
    exempt       [T] bool, the row belongs to a context sequence
    """

    request_ids: str
    exempt: str
    nodes: list[onnx.NodeProto]


def add_rows(logits: str) -> Rows:
    """The rows of router logits [T, E], of which only T counts."""
    g = _Nodes()
    row = g.column(g.range(g.size(logits)))
    start = g.row(g("Slice", OFFSETS, g.const([0]), g.const([-1])))
    end = g("Add", start, g.row(LENGTHS))
    inside = g("And", g("Not", g("Less", row, start)), g("Less", row, end))  # [T, N]
    sequence = g.row(g.range(g.size(LENGTHS)))
    of_row = g("Where", inside, sequence, g.const([[-1]], np.int32))
    request_ids = g("ReduceMax", of_row, g.const([1]), name="request_ids", keepdims=0)
    exempt = g("Less", request_ids, g.int32(g.size(CONTEXTS)), name="exempt")
    return Rows(request_ids, exempt, g.nodes)


class _Nodes:
    """A tensor is its name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []

    def __call__(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        output = f"{PREFIX}{name or f'{kind.lower()}_{len(self.nodes)}'}"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def const(self, values: Sequence[Any] | int, dtype: Any = np.int64) -> str:
        return self("Constant", value=numpy_helper.from_array(np.array(values, dtype)))

    def size(self, tensor: str) -> str:
        """Of the first dimension, int64 [1]."""
        return self("Shape", tensor, start=0, end=1)

    def int32(self, tensor: str) -> str:
        return self("Cast", tensor, to=TensorProto.INT32)

    def range(self, size: str) -> str:
        """0, 1, ... int32 [size]"""
        scalar = self("Squeeze", size, self.const([0]))
        return self.int32(self("Range", self.const(0), scalar, self.const(1)))

    def row(self, vector: str) -> str:
        return self("Unsqueeze", vector, self.const([0]))

    def column(self, vector: str) -> str:
        return self("Unsqueeze", vector, self.const([1]))
