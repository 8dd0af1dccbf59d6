"""Steps of an exported model on the CPU, as the runtime of TensorRT Edge-LLM makes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file

from plugins import PAGE, Array, Log, operators

CONTEXT, DECODE, VERIFY, MIXED = 1, 3, 5, 8  # execution phases, cpp/common/executionPhase.h
PAGES = 4  # per sequence


@dataclass
class Piece:
    """Rows of one sequence in a step: tokens, and of a draft tree each row's parent (-1 = the prefix)."""

    sequence: int
    tokens: list[int]
    is_context: bool = False
    parents: list[int] | None = None


class Engine:
    """One model with a paged cache for `sequences` sequences.

    float32  compute everything in float32, so that a comparison sees no rounding of float16
    """

    def __init__(self, folder: Path, sequences: int = 4, *, float32: bool = False) -> None:
        self.model = onnx.load(folder / "model.onnx")
        if float32:
            _widen(self.model.graph)
        self.log = Log()
        self.evaluator = ReferenceEvaluator(self.model, new_ops=operators(self.log))
        self.inputs = {value.name: value.type.tensor_type for value in self.model.graph.input}
        table = folder / "embedding.safetensors"
        self.embedding = next(iter(load_file(table).values())) if table.exists() else None
        self.past = np.zeros(sequences, np.int32)
        pages = np.random.default_rng(0).permutation(sequences * PAGES).reshape(sequences, PAGES)
        self.table = np.stack([pages, pages + sequences * PAGES], 1).astype(np.int32)
        self.state = {name: self._empty(name) for name in self.inputs if self._is_state(name)}

    def step(self, pieces: list[Piece], *, padded: bool = False, commit: bool = True) -> list[Array]:
        """Logits [rows, vocabulary] of each piece. Context pieces come first. `commit`: the rows stay."""
        self.log.clear()
        feed, rows = self._feed(pieces, padded)
        names = [value.name for value in self.model.graph.output]
        made = dict(zip(names, self.evaluator.run(None, feed), strict=True))
        for name in self.state:
            self.state[name] = made.get(f"present_{name.removeprefix('past_')}", self.state[name])
        if commit:
            for piece in pieces:
                self.past[piece.sequence] += len(piece.tokens)
        logits = made["logits"]
        ends = np.cumsum([len(each) for each in rows])[:-1]
        return np.split(logits, ends)

    def _feed(self, pieces: list[Piece], padded: bool) -> tuple[dict[str, Array], list[Array]]:
        sequences = [piece.sequence for piece in pieces]
        lengths = np.array([len(piece.tokens) for piece in pieces], np.int32)
        room = np.full(len(pieces), lengths.max(), np.int32) if padded else lengths
        starts = np.concatenate([[0], np.cumsum(room)]).astype(np.int32)
        total, contexts = int(starts[-1]), sum(piece.is_context for piece in pieces)
        rows = [start + np.arange(length) for start, length in zip(starts, lengths, strict=False)]
        tokens, positions = np.zeros(total, np.int64), np.zeros(total, np.int32)
        for piece, of_piece in zip(pieces, rows, strict=True):
            tokens[of_piece] = piece.tokens
            positions[of_piece] = self.past[piece.sequence] + _depths(piece)
        is_verify = not contexts and lengths.max() > 1
        phase = VERIFY if is_verify else DECODE if not contexts else CONTEXT
        phase = MIXED if 0 < contexts < len(pieces) else phase
        values: dict[str, Array] = {
            "positions": positions,
            "attention_position_ids": positions,
            "query_start_offsets": starts,
            "query_lengths": lengths,
            "past_lengths": self.past[sequences],
            "attention_sequence_lengths": self.past[sequences] + lengths,
            "state_indices": np.array(sequences, np.int32),
            "execution_phase_marker": np.zeros(phase, np.int32),
            "context_sequence_count_carrier": np.zeros(contexts, np.int32),
            "kv_page_table": self.table[sequences],
            "logits_indices": np.concatenate(rows),
            "packed_attention_mask": self._masks(pieces, rows, total),
        }
        feed = {name: values[name] for name in self.inputs if name in values} | self.state
        for name in self.inputs:
            if name.startswith("rope_rotary_cos_sin"):
                feed[name] = _rope(positions, self._sizes(name)[1])
        feed["inputs_embeds"] = self._embed(tokens)
        feed |= {name: self._nothing(name, total) for name in self.inputs if name not in feed}
        return feed, rows

    def _embed(self, tokens: Array) -> Array:
        width = self._sizes("inputs_embeds")[1]
        if self.embedding is not None:
            return self.embedding[tokens].astype(self._dtype("inputs_embeds"))
        table = np.random.default_rng(1).normal(size=(256, width))
        return table[tokens].astype(self._dtype("inputs_embeds"))

    def _masks(self, pieces: list[Piece], rows: list[Array], total: int) -> Array:
        """[T, words]: bit j says that the row sees row j of its own piece."""
        longest = max(len(piece.tokens) for piece in pieces)
        masks = np.zeros((total, -(-longest // 32)), np.uint32)
        for piece, of_piece in zip(pieces, rows, strict=True):
            for place, row in enumerate(of_piece):
                for ancestor in _ancestors(piece, place):
                    masks[row, ancestor // 32] |= np.uint32(1 << ancestor % 32)
        return masks.astype(np.int32)

    def _sizes(self, name: str) -> list[int]:
        return [dim.dim_value for dim in self.inputs[name].shape.dim]

    def _is_state(self, name: str) -> bool:
        return name.startswith(("past_key_values_", "conv_state_", "recurrent_state_", "ssm_state_"))

    def _empty(self, name: str) -> Array:
        sizes = self._sizes(name)
        free = len(self.past) * (PAGES if name.startswith("past_") else 1)
        return np.zeros([size or free for size in sizes], self._dtype(name))

    def _nothing(self, name: str, total: int) -> Array:
        """Zeros for an input that decides nothing here: [T, ...]"""
        return np.zeros([size or total for size in self._sizes(name)], self._dtype(name))

    def _dtype(self, name: str) -> Any:
        return onnx.helper.tensor_dtype_to_np_dtype(self.inputs[name].elem_type)


def _widen(graph: onnx.GraphProto) -> None:
    """Makes float16 float32."""
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    for tensor in graph.initializer:
        if tensor.data_type == half:
            array = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for value in graph.input:
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = single
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == half:
                attribute.i = single


def _ancestors(piece: Piece, place: int) -> list[int]:
    if piece.parents is None:
        return list(range(place + 1))
    seen = []
    while place >= 0:
        seen.append(place)
        place = piece.parents[place]
    return seen


def _depths(piece: Piece) -> Array:
    return np.array([len(_ancestors(piece, place)) - 1 for place in range(len(piece.tokens))])


def _rope(positions: Array, width: int, base: float = 10000.0) -> Array:
    angles = positions[:, None] / base ** (np.arange(0, width, 2) / width)
    return np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


def page_crossing_prompt(length: int = PAGE + 22) -> list[int]:
    """More tokens than a page of the cache holds."""
    return np.random.default_rng(7).integers(1, 200, length).tolist()
