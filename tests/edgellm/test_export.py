"""Graphs of NVIDIA's own exporter with XShare in them, run on the CPU: prefill, decode and verification."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("tensorrt_edgellm", reason="needs tensorrt-edgellm (pip install --no-deps), 200 MB")
pytest.importorskip("onnxscript", reason="needs onnxscript, for TensorRT Edge-LLM's exporter")
onnx = pytest.importorskip("onnx", reason="needs onnx")

import checkpoints  # noqa: E402
from engine import Engine, Piece  # noqa: E402

from plugins import choose, layer_of  # noqa: E402
from xshare_trtllm import XShareConfig, route  # noqa: E402
from xshare_trtllm.edgellm.folder import rewrite_folder, undo_folder  # noqa: E402
from xshare_trtllm.edgellm.rewrite import NODE, OURS, register_schema  # noqa: E402
from xshare_trtllm.evaluation import held_out, load_model  # noqa: E402

CLASSES: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "qwen3_moe": (checkpoints.qwen3_moe, ("--eagle-base",)),
    "qwen3_5_moe": (checkpoints.qwen3_5_moe, ("--mtp", "--components", "thinker")),
    "gemma4": (checkpoints.gemma4_moe, ("--quantization", "int4_awq")),
    "nemotron_h": (checkpoints.nemotron_h, ()),
}
PLUGINS = {"nemotron_h": "Nvfp4MoePlugin", "gemma4": "Int4MoePlugin"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """The folder of a model's graph, exported when it is first asked for."""
    base, made = tmp_path_factory.mktemp("edgellm"), {}

    def get(name: str) -> Path:
        if name not in made:
            make, arguments = CLASSES.get(name, (checkpoints.shipped, ()))
            checkpoint = make(base / name / "checkpoint")
            made[name] = checkpoints.export(checkpoint, base / name / "out", *arguments) / "llm"
        return made[name]

    yield get


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Three texts; the first needs two pages of the cache."""
    _, tokenizer = load_model()
    lengths = (140, 9, 21)
    texts = [tokenizer(document.text)["input_ids"] for document in held_out()[: len(lengths)]]
    return [tokens[:length] for tokens, length in zip(texts, lengths, strict=True)]


def prefill(engine: Engine, prompts: list[list[int]], *, padded: bool = False) -> list[Any]:
    return engine.step([Piece(i, tokens, True) for i, tokens in enumerate(prompts)], padded=padded)


def last(logits: list[Any]) -> list[int]:
    return [int(each[-1].argmax()) for each in logits]


# ---- The shipped model -------------------------------------------------------------------------------------


def test_without_limits_nothing_changes_and_both_are_the_model(
    exported: Callable[[str], Path], prompts: list[list[int]], tmp_path: Path
) -> None:
    """Prefill, decode, and a verification of three drafts, against the exported graph in every bit and
    against transformers."""
    folder = exported("shipped")
    rewrite_folder(folder, XShareConfig(budget=64), tmp_path / "llm")
    theirs, ours = (Engine(each, float32=True) for each in (folder, tmp_path / "llm"))
    model, _ = load_model()
    steps = []
    for padded in (False, True):  # packed rows, and padded ones after them: new prompts of the same texts
        for engine in (theirs, ours):
            engine.past[:] = 0
            steps.append(prefill(engine, prompts, padded=padded))
    for other in steps[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(steps[0], other, strict=True))
    texts = [[*prompt, token] for prompt, token in zip(prompts, last(steps[0]), strict=True)]
    compare(steps[0], expected(model, prompts), rows=slice(None))

    decode = [Piece(i, text[-1:]) for i, text in enumerate(texts)]
    made = [engine.step(decode) for engine in (theirs, ours)]
    assert all(np.array_equal(a, b) for a, b in zip(*made, strict=True))
    compare(made[0], expected(model, texts), rows=slice(-1, None))

    drafts = [[5, 6, 7], [8, 9, 10], [11, 12, 13]]
    tokens = [[token, *draft] for token, draft in zip(last(made[0]), drafts, strict=True)]
    verify = [Piece(i, each) for i, each in enumerate(tokens)]
    made = [engine.step(verify, padded=True, commit=False) for engine in (theirs, ours)]
    assert all(np.array_equal(a, b) for a, b in zip(*made, strict=True))
    whole = [text + each for text, each in zip(texts, tokens, strict=True)]
    compare(made[0], expected(model, whole), rows=slice(-4, None))


def expected(model: Any, texts: list[list[int]]) -> list[Any]:
    with torch.inference_mode():
        return [model(torch.tensor([text])).logits[0].numpy() for text in texts]


def compare(found: list[Any], right: list[Any], rows: slice) -> None:
    """The weights lose what bfloat16 has below the least float16, nothing else."""
    for a, b in zip(found, right, strict=True):
        np.testing.assert_allclose(a, b[rows], atol=2e-3)


@pytest.mark.parametrize("padded", (False, True), ids=("packed", "padded"))
def test_context_rows_keep_their_experts_and_generation_shares(
    exported: Callable[[str], Path], prompts: list[list[int]], tmp_path: Path, padded: bool
) -> None:
    folder = exported("shipped")
    rewrite_folder(folder, XShareConfig(coverage=0.9), tmp_path / "llm")
    theirs, ours = Engine(folder), Engine(tmp_path / "llm")
    first = prefill(theirs, prompts[1:], padded=padded)
    made = prefill(ours, prompts[1:], padded=padded)
    assert all(np.array_equal(a, b) for a, b in zip(first, made, strict=True)), "a prompt changed"
    check_choices(ours)

    tokens = last(made)
    saved = ours.step(
        [Piece(i, [token, 5, 6]) for i, token in enumerate(tokens)], padded=padded, commit=False
    )
    assert check_choices(ours) < own_experts(ours)
    assert saved[0].shape[0] == 3

    # A new prompt beside the generation rows: its experts are active anyway, its choice is its own.
    mixed = [Piece(2, prompts[0][:30], True), *(Piece(i, [token]) for i, token in enumerate(tokens))]
    ours.step(mixed, padded=padded)
    check_choices(ours)
    for layer, (ids, exempt) in enumerate(ours.log.rows):
        context = exempt & (ids >= 0)
        assert context.sum() == 30
        own = choose(ours.log.logits[layer], {"top_k": 8}, None)[0]
        assert np.array_equal(ours.log.chosen[layer][context], own[context])


def own_experts(engine: Engine) -> int:
    """Active experts of the model's own routing, over all layers; padding never counts."""
    total = 0
    for logits, (ids, _), bias in zip(engine.log.logits, engine.log.rows, engine.log.bias, strict=True):
        attributes = _moe_attributes(engine)
        total += len(np.unique(choose(logits, attributes, bias)[0][ids >= 0]))
    return total


def _moe_attributes(engine: Engine) -> dict[str, Any]:
    node = next(node for node in engine.model.graph.node if node.domain == OURS)
    spec, _ = layer_of({each.name: onnx.helper.get_attribute_value(each) for each in node.attribute})
    mode = 1 if spec.scoring == "sigmoid_bias" else 0
    return {"top_k": spec.top_k, "routing_mode": mode, "norm_topk_prob": 1}


def check_choices(engine: Engine) -> int:
    """What the MoE plugins chose is what `route` chooses; returns the active experts of all layers."""
    nodes = [node for node in engine.model.graph.node if node.domain == OURS]
    active = 0
    for layer, node in enumerate(nodes):
        attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        spec, config = layer_of(attributes)
        ids, exempt = engine.log.rows[layer]
        bias = engine.log.bias[layer]
        real = ids >= 0
        right = route(
            torch.from_numpy(engine.log.logits[layer]),
            spec,
            config,
            request_ids=torch.from_numpy(ids),
            exempt=torch.from_numpy(exempt),
            correction_bias=None if bias is None else torch.from_numpy(np.array(bias)),
        )
        chosen, stood_aside = engine.log.chosen[layer], bias is not None and np.any(exempt & real)
        if not stood_aside:
            assert np.array_equal(chosen[real], right.expert_ids.numpy()[real])
            assert set(np.unique(chosen)) <= set(np.flatnonzero(right.active_experts))
            expected_weights = right.expert_weights.numpy()[real]
            np.testing.assert_allclose(
                engine.log.weights[layer][real], expected_weights, rtol=2e-5, atol=1e-6
            )
        active += len(np.unique(chosen[real]))
    return active


# ---- Every class -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_every_class(exported: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """Without limits in every bit the graph as exported; with a coverage what `route` chooses."""
    folder = exported(name)
    off, on = tmp_path / "off", tmp_path / "on"
    specs = next(iter(rewrite_folder(folder, XShareConfig(budget=512), off).values()))
    rewrite_folder(folder, XShareConfig(coverage=0.8), on)
    theirs, unlimited, limited = Engine(folder), Engine(off), Engine(on)
    kinds = {node.op_type for node in theirs.model.graph.node if "moe" in node.op_type.lower()}
    assert kinds == {PLUGINS.get(name, "Fp16MoePlugin")} and len(specs) == 2
    texts = [list(range(40, 53)), list(range(90, 97)), list(range(3, 8))]
    for engine in (theirs, unlimited, limited):
        prefill(engine, texts, padded=True)
    check_choices(limited)
    tree = {"tokens": [7, 8, 9, 10], "parents": [-1, 0, 0, 1]}
    drafts = [Piece(i, **tree) for i in range(3)]
    steps = [engine.step(drafts, padded=True, commit=False) for engine in (theirs, unlimited)]
    assert all(np.array_equal(a, b) for a, b in zip(*steps, strict=True))
    limited.step(drafts, padded=True, commit=False)
    assert check_choices(limited) < own_experts(limited)
    assert [set(ids) for ids, _ in limited.log.rows] == [{0, 1, 2}] * len(specs)


@pytest.mark.parametrize("name", ("shipped", "qwen3_5_moe", "nemotron_h"))
def test_all_else_stays_and_undo(exported: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    from tensorrt_edgellm.onnx.onnx_custom_schemas import register_tensorrt_edgellm_onnx_custom_schemas

    folder, out = exported(name), tmp_path / "llm"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    rewrite_folder(folder, XShareConfig(coverage=0.97, request_budget=12), out)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    changed = {path.name for path in out.iterdir() if before.get(path.name) != path.read_bytes()}
    assert changed == {"model.onnx", "model.onnx.xshare-original"}

    register_tensorrt_edgellm_onnx_custom_schemas()
    register_schema()
    onnx.checker.check_model(str(out / "model.onnx"))
    assert _without_xshare(out / "model.onnx") == onnx.load(folder / "model.onnx", load_external_data=False)

    assert undo_folder(out) == [out / "model.onnx"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def _without_xshare(path: Path) -> Any:
    """The graph with every XShareRouting node taken out by hand."""
    model = onnx.load(path, load_external_data=False)
    source = {node.output[0]: node for node in model.graph.node if node.op_type == NODE}
    kept = [node for node in model.graph.node if not node.name.startswith("xshare/")]
    for node in kept:
        for place, name in enumerate(node.input):
            if name in source:
                node.input[place] = source[name].input[0 if place == 0 else 1]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    del model.opset_import[-1]
    del model.metadata_props[:]
    return model
