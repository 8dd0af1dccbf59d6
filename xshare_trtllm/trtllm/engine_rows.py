"""Which rows of an engine's MoE layers are context rows or padding, and whose request they are.

Only tensors on the device are read: `context_lengths` and `spec_decoding_generation_lengths`. The `host_*`
inputs of the network are host memory, pageable in TensorRT-LLM's Python sessions, that its plugins read on
the host; a layer of TensorRT would read them on the device. Sizes come from shapes.

What the runtime puts into the tensors is written down in TensorRT-LLM 1.x, cpp/tensorrt_llm/batch_manager/
runtimeBuffers.cpp, `setFromInputs`: rows are packed, all context requests before all generation requests; the
context length of a context request is the number of its rows in this step (its chunk), that of a generation
request its prompt with its draft tokens. `spec_decoding_generation_lengths` has one entry per generation
request (the same folder, medusaBuffers.cpp, `reshape`).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

from xshare_trtllm.graph.ops import Ops


class RowOps(Ops, Protocol):
    """The operators of a graph, and the sizes of its tensors."""

    def size(self, a: Any, axis: int) -> Any:
        """int32 [1]"""
        ...

    def arange(self, length: Any) -> Any:
        """0, 1, ... length - 1 as int32 [length], for a length of `size`."""
        ...


class Rows(NamedTuple):
    """exempt [T] bool; request_ids [T] int32 (-1 = padding), None where nobody asks for them"""

    exempt: Any
    request_ids: Any | None


def packed_rows(
    ops: RowOps, logits: Any, context_lengths: Any, generation_lengths: Any | None, *, request_ids: bool
) -> Rows:
    """Rows of a network without padding, context requests first.

    logits              [T, E], for its number of rows
    context_lengths     [B] int32, per sequence (a request, or one beam of it)
    generation_lengths  [G] int32, rows of each generation request (speculative decoding); None: one row each
    request_ids         also say whose row it is; without generation_lengths every row is its own request

    A context request of one row (a chunk of one token) that has no longer one after it cannot be told from a
    generation request by its lengths, and is batched like one: it is one row of one request either way.
    """
    num_rows = ops.size(logits, 0)
    generated = _generated(ops, num_rows, context_lengths, generation_lengths)
    context_rows = ops.binary("Sub", num_rows, generated)
    row = ops.arange(num_rows)
    exempt = ops.binary("Less", row, context_rows)
    if not request_ids:
        return Rows(exempt, None)
    if generation_lengths is None:
        return Rows(exempt, row)
    ends = ops.reshape(ops.cumulative_sum(generation_lengths, 0), (1, -1))
    place = ops.reshape(ops.binary("Sub", row, context_rows), (-1, 1))
    begun = ops.unary("Not", ops.binary("Less", place, ends))  # [T, G]: the request ends before this row
    return Rows(exempt, ops.reshape(ops.reduce_sum(ops.cast(begun, "int32"), 1), (-1,)))


def _generated(ops: RowOps, num_rows: Any, context_lengths: Any, generation_lengths: Any | None) -> Any:
    """Rows of generation requests, int32 [1].

    With n context requests a step has f(n) = (the first n context lengths) + (B - n) rows. f never falls, so
    the number of n with f(n) < T is the number of context requests.
    """
    if generation_lengths is not None:
        return ops.reduce_sum(generation_lengths, 0)
    sequences = ops.size(context_lengths, 0)
    lengths = ops.binary("Min", context_lengths, num_rows)  # changes no comparison, and no sum can overflow
    before = ops.binary("Sub", ops.cumulative_sum(lengths, 0), lengths)
    after = ops.binary("Sub", sequences, ops.arange(sequences))
    is_context = ops.binary("Less", ops.binary("Add", before, after), num_rows)
    return ops.binary("Sub", sequences, ops.reduce_sum(ops.cast(is_context, "int32"), 0))


def padded_rows(ops: RowOps, logits: Any, context_lengths: Any) -> Rows:
    """Rows of a network with padding: B sequences of L rows each, L > 1 in the context phase only.

    logits [B, L, E]; context_lengths [B] int32. The rows of the result are those of logits [B * L, E].
    """
    batch, length = ops.size(logits, 0), ops.size(logits, 1)
    place = ops.reshape(ops.arange(length), (1, -1))
    is_real = ops.binary("Less", place, ops.reshape(context_lengths, (-1, 1)))
    one = ops.constant(np.array([[1]], np.int32))
    is_context = ops.binary("Greater", ops.reshape(length, (1, 1)), one)
    sequence = ops.reshape(ops.arange(batch), (-1, 1))
    request_ids = ops.where(is_real, sequence, ops.constant(np.array([[-1]], np.int32)))
    return Rows(ops.reshape(ops.binary("And", is_real, is_context), (-1,)), ops.reshape(request_ids, (-1,)))
