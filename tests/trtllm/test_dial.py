"""Turning the dial of a server: what the kernels make of it on the host (on the device: emulated, see
test_cuda_kernel.py), graphs that are not captured again, and ranks that turn before the same step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_torch_backend import DUMMY, EXPERTS, TOP_K, cutlass, engine_of, renormalize, trtllm
from torch import Tensor

from xshare_trtllm import RouterSpec, XShareConfig, ops, route
from xshare_trtllm.trtllm import dial as dial_module
from xshare_trtllm.trtllm.dial import LOOK_STEPS, DialWatch
from xshare_trtllm.trtllm.run_folder import RunFolder
from xshare_trtllm.trtllm.setting import Setting
from xshare_trtllm.trtllm.torch_backend import Enabled

__all__ = ["trtllm"]  # a fixture
pytestmark = pytest.mark.skipif(not ops.available(), reason="libxshare.so is not built: pip install -e .")

SPECS = (RouterSpec(EXPERTS, TOP_K, "topk_softmax"), RouterSpec(64, 6, "sigmoid_bias", 8, 4, 2.5))
CAPTURED = XShareConfig(coverage=0.9)
TURNED = XShareConfig(9, coverage=0.7)


def packed(config: XShareConfig, mode: str = "on") -> Tensor:
    return torch.frombuffer(bytearray(ops.pack_dial(config, mode)), dtype=torch.uint8)


def inputs(spec: RouterSpec, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "router_logits": torch.randn(12, spec.num_experts, generator=generator),
        "request_ids": torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 5, -1, -1], dtype=torch.int32),
        "exempt": torch.arange(12) < 2,
        "expert_gpu": torch.arange(spec.num_experts, dtype=torch.int32) // 8,
    }


# ---- One call ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.scoring)
def test_a_dial_stands_in_for_coverage_and_budget(spec: RouterSpec) -> None:
    for now in (TURNED, XShareConfig(coverage=1.0), XShareConfig(spec.num_experts), XShareConfig(spec.top_k)):
        got = ops.route(spec=spec, config=CAPTURED, dial=packed(now), **inputs(spec))
        wanted = ops.route(spec=spec, config=now, **inputs(spec))
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.scoring)
def test_off_and_shadow_leave_the_models_own_routing(spec: RouterSpec) -> None:
    own = ops.route(spec=spec, config=XShareConfig.off(spec), **inputs(spec))
    on = ops.route(spec=spec, config=TURNED, **inputs(spec))
    off = ops.route(spec=spec, config=CAPTURED, dial=packed(TURNED, "off"), **inputs(spec))
    shadow = ops.route(spec=spec, config=CAPTURED, dial=packed(TURNED, "shadow"), **inputs(spec))
    assert all(torch.equal(a, b) for a, b in zip(off, own, strict=True))
    for got, wanted in zip(shadow[:3], own[:3], strict=True):
        assert torch.equal(got, wanted)
    assert torch.equal(shadow[3], on[3]) and not torch.equal(on[3], own[3])
    logits = inputs(spec)["router_logits"]
    masked = ops.mask_logits(spec=spec, config=CAPTURED, dial=packed(TURNED, "shadow"), **inputs(spec))
    assert torch.equal(masked[:10], logits[:10])


def test_what_a_dial_holds_is_put_right() -> None:
    spec = SPECS[0]
    for coverage, budget, right in ((-1.0, 9, XShareConfig(9)), (2.0, 1, XShareConfig(TOP_K, coverage=1.0))):
        raw = torch.frombuffer(bytearray(ops._DIAL.pack(coverage, budget, 0)), dtype=torch.uint8)
        got = ops.route(spec=spec, config=CAPTURED, dial=raw, **inputs(spec))
        wanted = ops.route(spec=spec, config=right, **inputs(spec))
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    with pytest.raises(ValueError, match=r"dial: must be uint8 \[16\], got torch.int64 \[2\]"):
        ops.route(spec=spec, config=CAPTURED, dial=torch.zeros(2, dtype=torch.int64), **inputs(spec))
    with pytest.raises(ValueError, match="mode must be on, shadow, off, not 'half'"):
        ops.pack_dial(CAPTURED, "half")


def test_masked_logits_add_their_statistics() -> None:
    spec, counters = SPECS[0], torch.zeros(8, dtype=torch.int64)
    for _ in range(2):
        ops.mask_logits(spec=spec, config=TURNED, counters=counters, **inputs(spec))
    assert torch.equal(counters, 2 * ops.route(spec=spec, config=TURNED, **inputs(spec))[3])


# ---- A model -----------------------------------------------------------------------------------------------


def test_contract_a_captured_graph_follows_the_dial(trtllm: Any) -> None:
    """Not captured again: the same graph, with an apply layer and one of masked logits in it."""
    triton = trtllm.moe.TritonFusedMoE(routing_method=renormalize(trtllm), num_experts=EXPERTS)
    engine = engine_of(trtllm, cutlass(trtllm), triton)
    enabled = Enabled(engine.model, CAPTURED, has_dial=True)
    enabled.dial.turn(Setting(CAPTURED))
    requests = [70, 71, 72, 73, DUMMY, DUMMY]
    engine.step(torch.randn(6, EXPERTS), requests, cuda_graph=True)
    (graph,) = engine.graphs.values()
    for setting in (Setting(TURNED), Setting(TURNED, "shadow"), Setting(CAPTURED, "off"), Setting(CAPTURED)):
        enabled.dial.turn(setting)
        logits = torch.randn(6, EXPERTS)
        enabled.counters.zero_()
        output = engine.step(logits, requests, cuda_graph=True)
        config = setting.config if setting.mode == "on" else XShareConfig(EXPERTS)
        places = torch.tensor([0, 1, 2, 3, -1, -1], dtype=torch.int32)
        wanted = route(logits, SPECS[0], config, request_ids=places)
        scale = engine.model.layers[0].scale
        both = (scale[wanted.expert_ids.long()] * wanted.expert_weights).sum(-1) ** 2
        torch.testing.assert_close(output[:4, 0], both[:4], rtol=1e-5, atol=0)
        counted = route(logits, SPECS[0], setting.config, request_ids=places).raw_stats
        if setting.mode != "off":
            assert torch.equal(enabled.counters, counted.expand(2, 8))
    assert list(engine.graphs.values()) == [graph]
    enabled.disable()


def test_contract_off_at_the_start_can_be_turned_on(trtllm: Any) -> None:
    engine = engine_of(trtllm, cutlass(trtllm))
    enabled = Enabled(engine.model, XShareConfig(EXPERTS), has_dial=True)
    enabled.dial.turn(Setting(XShareConfig(EXPERTS)))
    logits = torch.randn(8, EXPERTS)
    engine.step(logits, range(70, 78))
    enabled.dial.turn(Setting(XShareConfig(6)))
    engine.step(logits, range(70, 78))
    before, after = (len(ids.unique()) for ids, _ in engine.model.layers[0].calls)
    assert after < before
    enabled.disable()


# ---- A server ----------------------------------------------------------------------------------------------


class Rank:
    def __init__(self, rank: int, folder: RunFolder, travels: bool = False) -> None:
        self.said: list[str] = []
        self.turned: list[tuple[int, Setting]] = []
        setting = Setting.from_yaml(folder.config_path)
        self.travels = travels
        self.watch = DialWatch(self, setting, folder, rank, self.said.append)  # type: ignore[arg-type]

    def check(self, setting: Setting) -> None:
        setting.config.check(SPECS[0])

    def turn(self, setting: Setting) -> None:
        self.turned.append((self.watch.step_number if hasattr(self, "watch") else -1, setting))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr(dial_module, "SECONDS", 0.0)
    config = tmp_path / "xshare.yaml"
    config.write_text("coverage: 0.9\n")
    made = RunFolder(config)
    made.begin(2, "abc")
    return made


def test_ranks_turn_before_the_same_step(folder: RunFolder) -> None:
    """Whichever of them is ahead, by as much as the collectives of a step let it."""
    ranks = [Rank(0, folder), Rank(1, folder)]
    for step in range(7):
        for rank in ranks:
            rank.watch.step(True)
        assert step < 7
    folder.config_path.write_text("coverage: 0.8\nmode: shadow\n")
    for _ in range(3 * LOOK_STEPS):
        for rank in reversed(ranks):
            rank.watch.step(True)
    new = Setting(XShareConfig(coverage=0.8), "shadow")
    assert ranks[0].turned == ranks[1].turned == [(-1, Setting(XShareConfig(coverage=0.9))), (64, new)]
    assert "rank 1 from step 64 on: {" in ranks[1].said[0]
    folder.config_path.write_text("coverage: 0.85\nmode: off\n")
    for _ in range(3 * LOOK_STEPS):
        for rank in ranks:
            rank.watch.step(True)
    assert [rank.watch.setting.mode for rank in ranks] == ["off", "off"]
    assert ranks[0].turned[-1] == ranks[1].turned[-1] and ranks[0].watch.generation == 2


@pytest.mark.parametrize(
    ("text", "why"),
    (
        ("coverage: 1.5\n", "coverage must be less than or equal to 1"),
        ("coverage: [\n", "not valid YAML"),
        ("coverage: 0.8\nmode: half\n", "mode: must be on, shadow, off, not 'half'"),
        ("coverage: 0.8\nwarmup: 2\n", "warmup: can only be changed by starting the server anew"),
        ("budget: 2\n", "budget must be at least top_k=4"),
        ("", "expected keys and values"),
    ),
)
def test_a_bad_file_is_refused_and_the_old_values_stay(text: str, why: str, folder: RunFolder) -> None:
    rank = Rank(0, folder)
    folder.config_path.write_text(text)
    for _ in range(3 * LOOK_STEPS):
        rank.watch.step(True)
    assert len(rank.turned) == 1 and why in str(rank.watch.refused)
    assert len(rank.said) == 1 and "is refused, the old values stay" in rank.said[0]
    folder.config_path.write_text("coverage: 0.75\n")
    for _ in range(3 * LOOK_STEPS):
        rank.watch.step(True)
    assert rank.watch.refused is None and rank.watch.setting.config.coverage == 0.75


def test_a_rank_that_sees_the_change_too_late_says_so(folder: RunFolder) -> None:
    """Rather than compute its part of a row with other experts than its peers."""
    rank = Rank(1, folder)
    run = folder.server()["run"]  # type: ignore[index]
    proposal = {"run": run, "generation": 1, "at_step": LOOK_STEPS, "setting": {"coverage": 0.8}}
    for _ in range(LOOK_STEPS + 1):
        rank.watch.step(True)
    (folder.path / "dial.json").write_text(json.dumps(proposal))
    with pytest.raises(RuntimeError, match=r"rank 1 saw at step 64 that it should have turned .* at step 32"):
        for _ in range(LOOK_STEPS):
            rank.watch.step(True)
    (folder.path / "dial.json").write_text(json.dumps(proposal | {"run": "earlier"}))
    Rank(1, folder).watch.step(True)


def test_steps_without_rows_count_where_the_values_travel(folder: RunFolder) -> None:
    """A rank without requests makes steps of padding, and may be the one whose values count; elsewhere such
    steps are a warm-up's, which not every rank need make."""
    for travels, turned in ((False, 1), (True, 2)):
        first, second = Rank(0, folder, travels), Rank(1, folder, travels)
        first.watch.step(False)
        folder.config_path.write_text(f"coverage: {0.6 + 0.1 * travels}\n")
        for _ in range(3 * LOOK_STEPS):
            first.watch.step(False)
        for _ in range(5 * LOOK_STEPS + 7):  # far ahead of the first, and never refused
            second.watch.step(travels)
        assert len(first.turned) == len(second.turned) == turned
    assert "rank 1 with the first rank of its group: {" in second.said[0]
