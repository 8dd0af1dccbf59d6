"""`trtllm-build --plugin xshare` against a stand-in for TensorRT-LLM 1.2 on a real TensorRT's network."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engine_runs import COMMAND, LIBRARY, build, checkpoint, environment, refusal, run

from xshare_trtllm import XShareConfig
from xshare_trtllm.trtllm.engine import Settings, XShareBuild, check_version, expert_gpu

XSHARE = ("--plugin", "xshare", "--xshare_budget", "4")
DEVICE_LIMITED = {
    "num_experts": 16,
    "top_k": 3,
    "device_limited_n_group": 4,
    "device_limited_topk_group": 2,
    "device_limited_routed_scaling_factor": 16.0,
}


def options(folder: Path, **values: Any) -> tuple[str, ...]:
    path = folder / "xshare.yaml"
    path.write_text(json.dumps(values))
    return "--plugin", "xshare", "--xshare_config", str(path)


@pytest.mark.parametrize(
    ("moe", "fields"),
    (
        ({"num_experts": 8, "top_k": 2, "normalization_mode": 0}, ("softmax", 1, 1, 1.0)),
        ({"num_experts": 8, "top_k": 2, "normalization_mode": 1}, ("topk_softmax", 1, 1, 1.0)),
        (DEVICE_LIMITED | {"normalization_mode": 3}, ("softmax", 4, 2, 16.0)),
        (
            DEVICE_LIMITED | {"normalization_mode": 4, "shared_expert_intermediate_size": 8},
            ("softmax_renorm", 4, 2, 1.0),
        ),
    ),
    ids=("none", "renormalize", "device_limited", "device_limited_renorm"),
)
def test_contract_modes(moe: dict[str, Any], fields: tuple[Any, ...], tmp_path: Path) -> None:
    """Every mode's router becomes the plugin's fields; the whole network builds into an engine."""
    checkpoint(tmp_path, moe)
    (notes,) = build(tmp_path, *XSHARE)
    assert len(notes["plugins"]) == 2
    for plugin in notes["plugins"]:
        names = ("scoring", "num_groups", "top_k_groups", "routed_scaling_factor")
        assert tuple(plugin[name] for name in names) == fields
        assert (plugin["num_experts"], plugin["top_k"]) == (moe["num_experts"], moe["top_k"])
        assert (plugin["budget"], plugin["warmup"], plugin["has_exempt"]) == (4, 1, 1)
        assert "has_request_ids" not in plugin and "request_budget" not in plugin
    logits = [plugin["inputs"][0] for plugin in notes["plugins"]]
    rows = {plugin["inputs"][1] for plugin in notes["plugins"]}
    assert len(set(logits)) == 2 and len(rows) == 1  # own logits, the same rows
    assert (tmp_path / "engine" / "rank0.engine").stat().st_size > 10_000


def test_contract_coverage(tmp_path: Path) -> None:
    """No number of experts; with expert parallelism the GPU of each, whose load a coverage then limits."""
    checkpoint(tmp_path, mapping={"moe_ep_size": 4})
    (notes,) = build(tmp_path, "--dry_run", *options(tmp_path, coverage=0.97, utility="affinity"))
    for plugin in notes["plugins"]:
        assert (plugin["coverage"], plugin["utility"]) == (0.97, "affinity")
        assert "budget" not in plugin and plugin["has_expert_gpu"] == 1


def test_contract_record(tmp_path: Path) -> None:
    """config.json keeps what TensorRT-LLM wrote and says what XShare did."""
    checkpoint(tmp_path)
    build(tmp_path, "--dry_run", *options(tmp_path, budget=5, warmup=2, coverage=None, max_rows=64))
    values = json.loads((tmp_path / "engine" / "config.json").read_text())
    assert values["version"] == "1.2.1" and values["pretrained_config"]["num_hidden_layers"] == 2
    xshare = values["xshare"]
    assert XShareConfig.from_dict(xshare["config"]) == XShareConfig(5, 2, max_rows=64)
    assert (xshare["plugin"], xshare["plugin_version"]) == ("xshare::XShareRouting", "2")
    assert xshare["library_sha256"] == hashlib.sha256(LIBRARY.read_bytes()).hexdigest()
    assert not (tmp_path / "engine" / "rank0.engine").exists()


def test_contract_visualize_network(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    picture = tmp_path / "network.txt"
    build(tmp_path, "--dry_run", "--visualize_network", picture, *XSHARE)
    names, _, _, outputs = zip(*map(json.loads, picture.read_text().splitlines()), strict=True)
    assert len(set(names)) == len(names) and any(name.startswith("xshare/") for name in names)
    edges = [edge for of_layer in outputs for edge in of_layer]
    assert len(set(edges)) == len(edges)  # an edge has one source


def test_contract_spawned_workers(tmp_path: Path) -> None:
    """Ranks are built in processes that the command starts, with XShare in them."""
    checkpoint(tmp_path, mapping={"world_size": 2, "tp_size": 2})
    notes = build(tmp_path, "--workers", 2, "--dry_run", *XSHARE)
    assert [len(note["plugins"]) for note in notes] == [2, 2]
    assert all(
        note["parent"] != os.getpid() for note in notes
    )  # one process may be quick enough for both ranks
    assert "xshare" in json.loads((tmp_path / "engine" / "config.json").read_text())


def test_contract_one_worker_for_two_ranks(tmp_path: Path) -> None:
    """In one process one after the other: the hook of the first is gone when the second comes."""
    checkpoint(tmp_path, mapping={"world_size": 2, "tp_size": 2})
    notes = build(tmp_path, "--dry_run", *XSHARE)
    assert [len(note["plugins"]) for note in notes] == [2, 2]
    assert notes[0]["layers"] == notes[1]["layers"]


def test_contract_mpirun(tmp_path: Path) -> None:
    """Two processes as mpirun starts them, each with its ranks."""
    checkpoint(tmp_path, mapping={"world_size": 2, "tp_size": 2})
    arguments = ("--checkpoint_dir", tmp_path, "--output_dir", tmp_path / "engine", "--dry_run", *XSHARE)
    pytest.importorskip("tensorrt_rtx_bindings", reason="needs TensorRT-RTX")
    started = [
        subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            env=environment(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK=str(rank)),
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    notes = [json.loads((tmp_path / "engine" / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [note["pid"] for note in notes] == [process.pid for process in started]
    assert [len(note["plugins"]) for note in notes] == [2, 2]
    assert "xshare" in json.loads((tmp_path / "engine" / "config.json").read_text())


def test_contract_budget_per_layer(tmp_path: Path) -> None:
    """Counted over MoE layers, across pipeline stages, behind layers without experts."""
    checkpoint(tmp_path, layers=6, num_dense_layers=2, mapping={"world_size": 2, "pp_size": 2})
    notes = build(tmp_path, "--dry_run", *options(tmp_path, budget=[4, 5, 6, 7]))
    assert [[plugin["budget"] for plugin in note["plugins"]] for note in notes] == [[4], [5, 6, 7]]


@pytest.mark.parametrize("mode", ("medusa", "lookahead_decoding", "explicit_draft_tokens"))
def test_contract_speculative(mode: str, tmp_path: Path) -> None:
    checkpoint(tmp_path)
    arguments = ("--max_draft_len", 3, "--speculative_decoding_mode", mode)
    (notes,) = build(tmp_path, *arguments, "--dry_run", *options(tmp_path, budget=6, request_budget=3))
    for plugin in notes["plugins"]:
        assert (plugin["request_budget"], plugin["has_request_ids"], plugin["has_exempt"]) == (3, 1, 1)
        assert len(plugin["inputs"]) == 3


def test_contract_request_budget_without_drafts(tmp_path: Path) -> None:
    """Every row is then a request of its own; the engine builds."""
    checkpoint(tmp_path)
    (notes,) = build(tmp_path, *options(tmp_path, budget=6, request_budget=3))
    assert all(plugin["has_request_ids"] == 1 for plugin in notes["plugins"])


def test_contract_padding(tmp_path: Path) -> None:
    """Padded rows have request id -1, whatever the configuration."""
    checkpoint(tmp_path)
    (notes,) = build(tmp_path, "--remove_input_padding", "disable", "--dry_run", *XSHARE)
    assert all((plugin["has_request_ids"], plugin["has_exempt"]) == (1, 1) for plugin in notes["plugins"])


def test_contract_gpu_budget(tmp_path: Path) -> None:
    checkpoint(tmp_path, mapping={"moe_ep_size": 4})
    (notes,) = build(tmp_path, "--dry_run", *options(tmp_path, budget=6, gpu_budget=2))
    assert all((plugin["gpu_budget"], plugin["has_expert_gpu"]) == (2, 1) for plugin in notes["plugins"])


SPARSE_MIXER = {"num_experts": 8, "top_k": 2, "normalization_mode": 2}


@pytest.mark.parametrize(
    ("model", "arguments", "config", "message"),
    (
        ({"moe": SPARSE_MIXER}, (), {}, "normalization_mode SPARSE_MIXER is not supported"),
        ({"static_routing": True}, (), {}, "static_routing has no router"),
        ({"num_dense_layers": 2}, (), {}, "has no MixtureOfExperts layer"),
        ({}, ("--speculative_decoding_mode", "eagle"), {}, "eagle: its draft layers"),
        (
            {},
            ("--speculative_decoding_mode", "draft_tokens_external"),
            {"request_budget": 2},
            "(request_budget=2) with --speculative_decoding_mode draft_tokens_external",
        ),
        ({}, ("--gpt_attention_plugin", "disable"), {}, "no input context_lengths"),
        ({}, ("--remove_input_padding", "disable", "--max_draft_len", 3), {}, "needs --remove_input_padding"),
        ({}, (), {"gpu_budget": 2}, "no expert parallelism"),
        ({}, (), {"budget": 1}, "budget must be at least top_k=2"),
        ({"num_dense_layers": 1}, (), {"budget": [4, 4]}, "means 2 here, the model has 1"),
        ({}, (), {"budget": [4]}, "budget names 1 layers"),
        ({}, (), {"budget": [4, 4, 4]}, "names 3 layers, the model has 2"),
    ),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_contract_refused(
    model: dict[str, Any], arguments: tuple[Any, ...], config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """By name, and before anything is in the engine's folder."""
    checkpoint(tmp_path, **model)
    said = refusal(tmp_path, *arguments, *options(tmp_path, **({"budget": 4} | config)))
    assert said.startswith("ValueError: ") and message in said


def test_contract_nothing_stays_behind(tmp_path: Path) -> None:
    """After a build, and after one that fails, TensorRT-LLM is as it was."""
    checkpoint(tmp_path)
    code = """
import sys
from tensorrt_llm.commands import build
from tensorrt_llm.layers.moe import MixtureOfExperts
from tensorrt_llm.models import MoeModel
from xshare_trtllm.trtllm.build_command import main
theirs = build.build_and_save, build.build_model, MixtureOfExperts.forward, list(sys.argv)
models, own = [], MoeModel.from_checkpoint
MoeModel.from_checkpoint = lambda *args, **kwargs: models.append(own(*args, **kwargs)) or models[-1]
for budget in ("4", "1"):
    try:
        ours = ["--plugin", "xshare", "--xshare_budget", budget]
        main(["--checkpoint_dir", *sys.argv[1:], "--dry_run", *ours])
    except ValueError:
        print("refused")
    assert theirs == (build.build_and_save, build.build_model, MixtureOfExperts.forward, sys.argv)
layers = [(layer, model.config.moe) for model in models for layer in model.layers]
assert len(layers) == 4
assert all("renormalize" not in vars(layer) and layer.moe_config is own for layer, own in layers)
"""
    done = run("-c", code, tmp_path, "--output_dir", tmp_path / "engine", command=(COMMAND[0],))
    assert (done.returncode, done.stdout) == (0, "built\nrefused\n"), done.stderr


def test_contract_experts_of_a_rank_are_a_slice() -> None:
    """TensorRT-LLM 1.x, mapping.py, `ep_experts`."""
    moe = SimpleNamespace(moe_config=SimpleNamespace(num_experts=8), mapping=SimpleNamespace(moe_ep_size=4))
    assert expert_gpu(moe).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_pickled_by_reference() -> None:
    """What a spawned worker gets: our class and the settings, no function of TensorRT-LLM."""
    build_and_save = XShareBuild(Settings(XShareConfig([4, 5], warmup=2), LIBRARY), own=lambda: True)
    data = pickle.dumps(build_and_save)
    assert b"xshare_trtllm.trtllm.engine" in data and b"tensorrt_llm.commands" not in data
    copy = pickle.loads(data)
    assert copy.own is None and copy.settings == build_and_save.settings


def test_versions() -> None:
    for version in ("1.0.0", "1.0.0rc4", "1.1.0", "1.2.1"):
        check_version(version)
    for version in ("0.21.0", "1.3.0rc1", "1.4.0", "2.0", "unknown"):
        with pytest.raises(ValueError, match=f"TensorRT-LLM {version}: --plugin xshare serves"):
            check_version(version)


def test_contract_stand_in_is_plain_without_xshare(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    (notes,) = build(tmp_path, "--dry_run")
    assert notes["plugins"] == []
    assert "xshare" not in json.loads((tmp_path / "engine" / "config.json").read_text())
    assert os.listdir(tmp_path / "engine") != []
