"""The rows' facts that are worked out in the graph: packed, padded, context beside generation."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs onnx")
ort = pytest.importorskip("onnxruntime", reason="needs onnxruntime")

from xshare_trtllm.edgellm.rows import add_rows  # noqa: E402


@pytest.fixture(scope="module")
def session() -> ort.InferenceSession:
    make = onnx.helper.make_tensor_value_info
    kinds = onnx.TensorProto
    rows = add_rows("logits")
    graph = onnx.helper.make_graph(
        rows.nodes,
        "rows",
        [
            make("logits", kinds.FLOAT, ["rows", 4]),
            make("query_start_offsets", kinds.INT32, ["offsets"]),
            make("query_lengths", kinds.INT32, ["sequences"]),
            make("context_sequence_count_carrier", kinds.INT32, ["contexts"]),
        ],
        [make(rows.request_ids, kinds.INT32, ["rows"]), make(rows.exempt, kinds.BOOL, ["rows"])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run(
    session: ort.InferenceSession, starts: list[int], lengths: list[int], contexts: int
) -> list[list[int]]:
    feed = {
        "logits": np.zeros((starts[-1], 4), np.float32),
        "query_start_offsets": np.array(starts, np.int32),
        "query_lengths": np.array(lengths, np.int32),
        "context_sequence_count_carrier": np.zeros(contexts, np.int32),
    }
    return [output.tolist() for output in session.run(None, feed)]


def test_decode(session: ort.InferenceSession) -> None:
    assert run(session, [0, 1, 2, 3], [1, 1, 1], 0) == [[0, 1, 2], [False] * 3]


def test_a_tree_is_one_request(session: ort.InferenceSession) -> None:
    assert run(session, [0, 3, 5], [3, 2], 0) == [[0, 0, 0, 1, 1], [False] * 5]


def test_padded_to_one_length(session: ort.InferenceSession) -> None:
    ids, exempt = run(session, [0, 4, 8, 12], [2, 4, 1], 3)
    assert ids == [0, 0, -1, -1, 1, 1, 1, 1, 2, -1, -1, -1]
    assert all(flag for flag, row in zip(exempt, ids, strict=True) if row >= 0)


def test_context_beside_generation(session: ort.InferenceSession) -> None:
    assert run(session, [0, 3, 4, 5], [3, 1, 1], 1) == [[0, 0, 0, 1, 2], [True] * 3 + [False] * 2]


def test_any_step(session: ort.InferenceSession) -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        sequences = int(random.integers(1, 6))
        lengths = random.integers(0, 5, sequences)
        room = lengths + random.integers(0, 3, sequences)
        room[-1] += 1  # at least one row
        starts = np.concatenate([[0], np.cumsum(room)])
        contexts = int(random.integers(0, sequences + 1))
        ids = np.full(starts[-1], -1)
        for sequence, (start, length) in enumerate(zip(starts, lengths, strict=False)):
            ids[start : start + length] = sequence
        found, exempt = run(session, starts.tolist(), lengths.tolist(), contexts)
        assert found == ids.tolist()
        assert np.array_equal(np.array(exempt)[ids >= 0], (ids < contexts)[ids >= 0])
