"""Where the nodes go, what is refused by name, and that files are whole or untouched."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

onnx = pytest.importorskip("onnx", reason="needs onnx")

from graphs import EXPERTS, ROWS, moe_graph, save  # noqa: E402

from xshare_trtllm import XShareConfig  # noqa: E402
from xshare_trtllm.cli import main  # noqa: E402
from xshare_trtllm.edgellm.folder import rewrite_folder, undo_folder  # noqa: E402
from xshare_trtllm.edgellm.moe import BIAS_INPUT  # noqa: E402
from xshare_trtllm.edgellm.rewrite import register_schema, rewrite  # noqa: E402

CONFIG = XShareConfig(coverage=0.97)
ZEROS = np.zeros(EXPERTS, np.float32)
NOWHERE = Path("nowhere")


def attributes(node: Any) -> dict[str, Any]:
    return {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}


@pytest.mark.parametrize("plugin", BIAS_INPUT)
@pytest.mark.parametrize("mode", (0, 1, 2))
def test_every_plugin_and_mode(plugin: str, mode: int) -> None:
    if BIAS_INPUT[plugin] is None and mode:
        return  # Int4MoePlugin has one mode
    bias = ZEROS + (mode > 0) if BIAS_INPUT[plugin] else None
    model = moe_graph(plugin, layers=2, bias=bias, routing_mode=mode)
    config = XShareConfig((9, 12), warmup=1, request_budget=6, coverage=0.9, max_rows=64)
    specs = rewrite(model, config, NOWHERE)
    register_schema()
    onnx.checker.check_model(model)
    nodes = {node.name: node for node in model.graph.node}
    for layer in range(2):
        ours, theirs = nodes[f"xshare/moe_{layer}"], nodes[f"moe_{layer}"]
        given = attributes(ours)
        assert given["budget"] == (9, 12)[layer] and given["coverage"] == np.float32(0.9)
        assert (given["plugin_version"], given["plugin_namespace"]) == (b"2", b"xshare")
        assert (given["request_budget"], given["max_rows"]) == (6, 64)
        rows = ["xshare/request_ids", "xshare/exempt"]
        if mode == 1:
            assert list(ours.input) == [f"logits_{layer}", "bias", *rows]
            assert theirs.input[0] == f"logits_{layer}"
            assert theirs.input[BIAS_INPUT[plugin]] == ours.output[0]
            assert given["output"] == b"step_bias" and given["has_correction_bias"] == 1
        else:
            assert list(ours.input) == [f"logits_{layer}", *rows] and given["output"] == b"masked_logits"
            assert theirs.input[0] == ours.output[0] and f"logits_{layer}" not in theirs.input
    assert len(specs) == 2


@pytest.mark.parametrize(
    ("model", "message"),
    (
        (moe_graph(norm_topk_prob=0), "moe_0: norm_topk_prob is 0"),
        (moe_graph("Nvfp4MoePlugin", bias=ZEROS + 1), "moe_0: e_score_correction_bias is added"),
        (moe_graph("OtherMoePlugin"), "moe_0: the MoE plugin OtherMoePlugin is not known"),
        (moe_graph(inputs=ROWS[:2]), "no input context_sequence_count_carrier"),
        (moe_graph(inputs=(*ROWS, "canvas_ids")), "canvas_ids: a diffusion model"),
        (moe_graph(layers=0), "no MoE plugin of trt_edgellm"),
        (moe_graph(top_k=64), r"moe_0: RouterSpec\(top_k=64\)"),
    ),
)
def test_refused_by_name(model: Any, message: str) -> None:
    before = model.SerializeToString()
    with pytest.raises(ValueError, match=message):
        rewrite(model, CONFIG, NOWHERE)
    assert model.SerializeToString() == before


@pytest.mark.parametrize(
    ("config", "message"),
    (
        (XShareConfig(3), r"moe_0: XShareConfig\(budget=3\): budget must be at least top_k=4"),
        (XShareConfig((8, 9, 10)), "names 3 MoE layers, the graph has 2"),
        (XShareConfig(coverage=0.9, gpu_budget=4), "a graph has one GPU"),
    ),
)
def test_configurations_that_do_not_fit(config: XShareConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rewrite(moe_graph(layers=2), config, NOWHERE)
    sigmoid = moe_graph(bias=ZEROS, routing_mode=1, n_group=1, topk_group=1)
    with pytest.raises(ValueError, match=r"moe_0: .* a sigmoid router needs a warm-up"):
        rewrite(sigmoid, XShareConfig(coverage=0.9, warmup=0), NOWHERE)


def test_twice_is_refused_and_undone(tmp_path: Path) -> None:
    folder = save(tmp_path / "llm", moe_graph())
    original = (folder / "model.onnx").read_bytes()
    with pytest.raises(ValueError, match="nothing to undo"):
        undo_folder(folder)
    rewrite_folder(folder, CONFIG)
    with pytest.raises(ValueError, match="has XShare already"):
        rewrite_folder(folder, CONFIG)
    undo_folder(folder)
    assert [path.name for path in folder.iterdir()] == ["model.onnx"]
    assert (folder / "model.onnx").read_bytes() == original
    rewrite_folder(folder, CONFIG)
    (folder / "model.onnx.xshare-original").unlink()
    with pytest.raises(ValueError, match="is gone; export again"):
        undo_folder(folder)


def test_an_export_into_a_rewritten_folder_is_the_new_original(tmp_path: Path) -> None:
    folder = save(tmp_path / "llm", moe_graph())
    rewrite_folder(folder, CONFIG)
    new = moe_graph(layers=3)
    save(folder, new)
    rewrite_folder(folder, CONFIG)
    undo_folder(folder)
    assert onnx.load(folder / "model.onnx") == new


def test_all_ranks_or_none(tmp_path: Path) -> None:
    folder = save(tmp_path / "llm", moe_graph())
    os.rename(folder / "model.onnx", folder / "model_world2_rank0.onnx")
    save(folder, moe_graph(norm_topk_prob=0))
    os.rename(folder / "model.onnx", folder / "model_world2_rank1.onnx")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for out in (None, tmp_path / "out"):
        with pytest.raises(ValueError, match=r"model_world2_rank1\.onnx: moe_0: norm_topk_prob"):
            rewrite_folder(folder, CONFIG, out)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["llm"]


def test_a_failing_disk_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "llm", moe_graph())
    original = (folder / "model.onnx").read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    for out in (None, tmp_path / "out"):
        with pytest.raises(OSError, match="disk full"):
            rewrite_folder(folder, CONFIG, out)
    assert [path.name for path in folder.iterdir()] == ["model.onnx"]
    assert (folder / "model.onnx").read_bytes() == original
    assert [path.name for path in tmp_path.iterdir()] == ["llm"]


# ---- The command -------------------------------------------------------------------------------------------


def edge(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["edge", *map(str, arguments)])


def test_command(tmp_path: Path) -> None:
    folder = save(tmp_path / "llm", moe_graph(layers=3))
    done = edge("--onnx", folder, "--out", tmp_path / "new", "--coverage", 0.95, "--request-budget", 8)
    assert done.exit_code == 0, done.output
    assert "XShare in 3 MoE layers, 32 experts, top 4, softmax_renorm" in done.output
    model = onnx.load(tmp_path / "new/model.onnx")
    node = next(node for node in model.graph.node if node.domain == "xshare")
    assert attributes(node)["coverage"] == np.float32(0.95)
    assert '"coverage": 0.95' in model.metadata_props[0].value
    assert edge("--onnx", tmp_path / "new", "--undo").exit_code == 0
    assert onnx.load(tmp_path / "new/model.onnx") == onnx.load(folder / "model.onnx")


def test_command_with_a_file(tmp_path: Path) -> None:
    folder = save(tmp_path / "llm", moe_graph(layers=2))
    XShareConfig((8, 10)).to_yaml(tmp_path / "xshare.yaml")
    assert edge("--onnx", folder, "--config", tmp_path / "xshare.yaml").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ([], "nothing is limited; set coverage"),
        (["--coverage", 2], "coverage"),
        (["--undo", "--coverage", 0.9], "leave --coverage out"),
        (["--undo"], "nothing to undo"),
        (["--out", "{folder}", "--coverage", 0.9], "is there already"),
    ),
)
def test_command_refuses(tmp_path: Path, arguments: list[object], message: str) -> None:
    folder = save(tmp_path / "llm", moe_graph())
    before = (folder / "model.onnx").read_bytes()
    done = edge("--onnx", folder, *(str(each).format(folder=folder) for each in arguments))
    assert done.exit_code != 0 and message in done.output and "Traceback" not in done.output
    assert (folder / "model.onnx").read_bytes() == before


def test_command_runs_the_exporter_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in the exporter's place: what is behind `--` reaches it, and its failure ends the command."""
    model = save(tmp_path / "made", moe_graph()) / "model.onnx"
    program = tmp_path / "bin" / "tensorrt-edgellm-export"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\n[ "$1" = good ] || exit 3\nmkdir -p "$2/llm" && cp {model} "$2/llm"\n')
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program.parent / "python"))
    out = tmp_path / "out"
    arguments = ["--onnx", out / "llm", "--coverage", 0.97, "--"]
    done = edge(*arguments, "bad", out)
    assert done.exit_code == 1 and "ended with status 3; nothing was rewritten" in done.output
    assert not out.exists()
    done = edge(*arguments, "good", out)
    assert done.exit_code == 0, done.output
    assert "XShare in 1 MoE layers" in done.output
