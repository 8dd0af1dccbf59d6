"""The model's process: what it says when the model does not load, and what its death means."""

from __future__ import annotations

import os
import queue
import signal
import threading
from pathlib import Path

import pytest

from xshare_trtllm import XShareConfig
from xshare_trtllm.evaluation import MODEL_DIR
from xshare_trtllm.serving import worker
from xshare_trtllm.serving.generation import Busy, Chunk, Request
from xshare_trtllm.serving.worker import Worker
from xshare_trtllm.trtllm.setting import Setting

LIMITS = {"max_batch_size": 4}
SETTINGS = {"model": str(MODEL_DIR), "setting": None, "ep_size": 1, "limits": LIMITS}


def test_a_model_that_does_not_load_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=f"the model does not load: .*{tmp_path}"):
        Worker({**SETTINGS, "model": str(tmp_path)})


def test_a_process_that_dies_before_the_model_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended before the model was loaded"):
        Worker(SETTINGS)


def test_its_death_ends_what_it_has_and_is_told() -> None:
    has_died = threading.Event()
    chunks: queue.Queue[Chunk] = queue.Queue()
    running = Worker(SETTINGS, has_died.set)
    running.submit(Request((1, 2), 500), chunks.put)
    assert chunks.get(timeout=30).finish is None
    os.kill(running.pid, signal.SIGKILL)
    assert has_died.wait(20)
    *_, last = [chunks.get(timeout=1) for _ in range(chunks.qsize())]
    assert last.error == "the model's process ended; try again"
    with pytest.raises(Busy, match="the model's process has ended"):
        running.submit(Request((1, 2), 5), chunks.put)
    with pytest.raises(Busy, match="the model's process has ended"):
        running.configure(Setting(XShareConfig(16)))
    assert running.setting is None
    running.close()
