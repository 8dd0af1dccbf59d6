"""The model's process: what it says when the model does not load, and that nobody tries for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from xshare_trtllm.evaluation import MODEL_DIR
from xshare_trtllm.serving import worker
from xshare_trtllm.serving.metrics import Statistics
from xshare_trtllm.serving.worker import Worker, _sum

SETTINGS = {"model": str(MODEL_DIR), "config": None, "ep_size": 1, "limits": {"max_batch_size": 4}}


def test_a_model_that_does_not_load_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=f"the model does not load: .*{tmp_path}"):
        Worker({**SETTINGS, "model": str(tmp_path)})


def test_a_process_that_dies_before_the_model_is_there_is_not_started_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended 3 times before the model was loaded"):
        Worker(SETTINGS)


def test_totals_go_on_after_a_restart() -> None:
    one = Statistics(((1, 2, 3),), {"length": 2}, 10, running=3)
    other = Statistics(((10, 20, 30),), {"length": 1, "error": 4}, 5, running=1, waiting=2)
    total = _sum(one, other, restarts=1)
    assert total == Statistics(((11, 22, 33),), {"length": 3, "error": 4}, 15, 1, 2, 1)
    assert _sum(one, Statistics()).layers == one.layers
