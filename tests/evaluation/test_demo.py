"""`xshare demo` end to end, shortened: the real model, fewer tokens and settings."""

import json

import pytest
from click.testing import CliRunner

from xshare_trtllm import XShareConfig
from xshare_trtllm.cli import main
from xshare_trtllm.evaluation import demo

FIELDS = {
    "name",
    "config",
    "active_experts",
    "bits_per_byte",
    "accuracy",
    "tokens_per_second",
    "peak_gpu_experts",
}


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(demo, "LENGTH", 48)
    monkeypatch.setattr(demo, "PROMPT", 8)
    monkeypatch.setattr(demo, "STEPS", 6)
    settings = {
        "own routing": None,
        "budget 24": XShareConfig(24),
        "3 per GPU": XShareConfig(24, gpu_budget=3),
    }
    monkeypatch.setattr(demo, "SETTINGS", settings)


def test_report_table_and_picture(short, tmp_path):
    path = tmp_path / "out" / "report.json"
    result = CliRunner().invoke(main, ["demo", "--json", str(path)])
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    own, flat, per_gpu = report["settings"]
    assert all(set(setting) >= FIELDS for setting in report["settings"])
    assert own["config"] == {"budget": 64, "warmup": 1, "utility": "squared_weight"}
    assert (own["active_ratio"], own["accuracy_ratio"], own["greedy_agreement"]) == (1, 1, 1)
    assert flat["active_experts"] <= 24 + flat["warmup_overflow"] < own["active_experts"]
    assert per_gpu["peak_gpu_experts"] < flat["peak_gpu_experts"] < own["peak_gpu_experts"]
    assert 0 < flat["kept_utility"] < own["kept_utility"] == 1
    assert all(setting["tokens_per_second"] > 0 for setting in report["settings"])
    for text in ("own routing", "budget 24", "3 per GPU"):
        assert text in result.output
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.json", "report.png"], (
        "nothing left aside"
    )


def test_a_failed_run_leaves_the_old_report(short, tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    path.write_text("old")
    monkeypatch.setattr(demo, "_rows", lambda *_: 1 / 0)
    assert CliRunner().invoke(main, ["demo", "--json", str(path)]).exit_code != 0
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
