"""Speculation in the cost model: bytes counted by hand, the public tables, the command."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from click.testing import CliRunner

from xshare_trtllm import XShareConfig
from xshare_trtllm.cli import main
from xshare_trtllm.planning.cost import GPUS, Assumptions, Gpu, Predictor
from xshare_trtllm.planning.shapes import shape
from xshare_trtllm.planning.speculation import (
    FITTED,
    UNSEEN,
    Draft,
    Drafting,
    SpeculativePredictor,
    fit_drafting,
    validate,
)

COUNTING = Gpu("counting", 1e12, 1.0, 1e30, 1e30, 1.0)  # a second is a byte
EXACT = Assumptions(memory=1, compute=1, link=1, collective=0, routing=0, layer_overhead=0)
QWEN = shape("qwen3-30b-a3b")


def test_a_verified_row_adds_its_experts_and_no_cache() -> None:
    predictor = Predictor(QWEN, COUNTING, context=1024, assumptions=EXACT)
    step = SpeculativePredictor(predictor, Drafting(0, 0)).at(2, Draft(4, 2.0, 0), XShareConfig(coverage=0.9))
    assert 8 < step.plain_experts < step.shared_experts < step.own_experts <= 64
    added = (step.own_experts - step.plain_experts) * QWEN.bytes_per_expert * QWEN.moe_layers
    assert step.own - step.plain == pytest.approx(added)
    assert step.own - step.shared == pytest.approx(
        (step.own_experts - step.shared_experts) * QWEN.bytes_per_expert * QWEN.moe_layers
    )
    assert step.own_break_even == step.own / step.plain
    assert step.own_speedup == 2.0 / step.own_break_even and step.shared_speedup > step.own_speedup


def test_drafting_reads_a_layer_and_a_head_per_pass() -> None:
    predictor = Predictor(QWEN, COUNTING, assumptions=EXACT)
    none, three = (
        SpeculativePredictor(predictor, Drafting(10.0, 2.0)).drafting_time(Draft(4, 2.0, passes))
        for passes in (0, 3)
    )
    assert none == 10.0
    assert three - none == pytest.approx(3 * (2 + 2 * (QWEN.attention_parameters + 2048 * 32000)))


def test_host_time_is_left_out_where_asked() -> None:
    bare = Predictor(QWEN, GPUS["thor"], assumptions=Assumptions(layer_overhead=0, routing=0))
    slow = Predictor(QWEN, GPUS["thor"], assumptions=Assumptions(layer_overhead=1e-3, routing=0))
    draft, config = Draft(4, 2.0, 3), XShareConfig(coverage=0.9)
    a = SpeculativePredictor(bare, Drafting(0, 0)).at(1, draft, config)
    b = SpeculativePredictor(slow).at(1, draft, config)
    assert b.own_speedup_without_host == pytest.approx(a.own_speedup)
    assert b.shared_speedup_without_host == pytest.approx(a.shared_speedup)


def test_the_fitted_numbers_are_the_defaults_and_the_unseen_are_near() -> None:
    fitted = fit_drafting()
    assert fitted.step == pytest.approx(Drafting().step, abs=0.2e-3)
    assert fitted.draft_pass == pytest.approx(Drafting().draft_pass, abs=0.05e-3)
    errors = [abs(public.speedup - ours) for public, ours in validate() if public.batch <= 8]
    assert sum(errors) / len(errors) < 0.12 and max(errors) < 0.17
    assert len(errors) == 8 and len(UNSEEN) == 10 and len(FITTED) == 6


@pytest.mark.parametrize("wrong", ({"accepted": 5.0}, {"accepted": 0.5}, {"rows": 0}, {"passes": -1}))
def test_impossible_drafts(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"Draft\("):
        replace(Draft(4, 2.0, 3), **wrong)


def predict(*arguments: object) -> str:
    result = CliRunner().invoke(main, ["predict", *map(str, arguments)], env={"COLUMNS": "200"})
    assert "Traceback" not in result.output
    return result.output


def test_command() -> None:
    setup = ("--model", "qwen3-30b-a3b", "--gpu", "spark", "--batch", 1, "--coverage", 0.9)
    output = predict(*setup, "--draft-rows", 8, "--accepted", 1.5, "--draft-passes", 3)
    assert "1 x DGX Spark: 8 rows per request, 1.5 tokens accepted" in output
    assert re.search(r"Batch 1: leave speculation off\. It pays from [1-9]\.\d\d accepted", output)
    assert "Known error: 0." in output and "4: 0.79 (0." in output
    assert "speculation needs both" in predict(*setup, "--draft-rows", 8)
    assert "must be from 1 to rows=8" in predict(*setup, "--draft-rows", 8, "--accepted", 9)
