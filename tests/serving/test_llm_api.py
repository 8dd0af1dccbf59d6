"""`LLMEngine` over a stand-in for TensorRT-LLM, which cannot be installed here: the names and fields that it
uses, of TensorRT-LLM's sampling_params.py (000a01d6) and executor/result.py. With the routing's metrics and
its dial on the real tritonserver."""

from __future__ import annotations

import asyncio
import json
import queue
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from triton_client import Stream, running_server, wait_for

from xshare_trtllm import XShareConfig
from xshare_trtllm.evaluation import MODEL_DIR
from xshare_trtllm.serving import llm_api
from xshare_trtllm.serving.generation import Busy, Chunk, Limits, Request, Times
from xshare_trtllm.serving.llm_api import LLMEngine
from xshare_trtllm.serving.llm_ranks import Routing, read_routing
from xshare_trtllm.trtllm import startup
from xshare_trtllm.trtllm.run_folder import RunFolder
from xshare_trtllm.trtllm.setting import Setting
from xshare_trtllm.trtllm.startup import HOOK_LINE

STAND_IN = Path(__file__).parent / "llm_stand_in"
LIMITS = {"max_batch_size": 1, "max_queue_size": 1, "max_input_len": 8, "max_output_len": 8}
SETTINGS = {"llm": {"model": "m"}, "limits": LIMITS, "end_id": 7, "xshare": None}


@dataclass
class Output:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    request_perf_metrics: Any = None


class Result:
    """A RequestOutput: grows while it is read."""

    def __init__(self, steps: list[Output]) -> None:
        self.steps, self.outputs, self.is_aborted = steps, [Output()], False

    async def __aiter__(self) -> AsyncIterator[Result]:
        for step in self.steps:
            await asyncio.sleep(0)
            self.outputs = [step]
            yield self

    def abort(self) -> None:
        self.is_aborted = True


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """`tensorrt_llm`, and what was asked of it."""
    seen = SimpleNamespace(asked=[], steps=[], results=[], is_dead=False)

    class LLM:
        def __init__(self, **arguments: Any) -> None:
            seen.arguments = arguments
            self.tokenizer = SimpleNamespace(tokenizer=range(100), encode=lambda text: [len(text)])

        def generate_async(self, inputs: list[int], sampling_params: Any, streaming: bool) -> Result:
            seen.asked.append((inputs, sampling_params, streaming))
            seen.results.append(Result(seen.steps))
            return seen.results[-1]

        def _check_health(self) -> bool:
            return not seen.is_dead

        def shutdown(self) -> None:
            seen.is_shut_down = True

    monkeypatch.syspath_prepend(str(STAND_IN))
    monkeypatch.delitem(sys.modules, "tensorrt_llm", raising=False)
    monkeypatch.setattr(import_module("tensorrt_llm"), "LLM", LLM)
    yield seen
    sys.modules.pop("tensorrt_llm", None)


def ask(engine: LLMEngine, request: Request) -> list[Chunk]:
    chunks: queue.Queue[Chunk] = queue.Queue()
    engine.submit(request, chunks.put)
    found = [chunks.get(timeout=20)]
    while not found[-1].finish:
        found.append(chunks.get(timeout=20))
    return found


def test_contract_a_stream_and_its_end(made: SimpleNamespace) -> None:
    times = SimpleNamespace(
        first_scheduled_time=timedelta(microseconds=1),
        first_token_time=timedelta(microseconds=2),
        last_token_time=timedelta(seconds=3),
    )
    metrics = SimpleNamespace(timing_metrics=times)
    made.steps = [
        Output("a", [1]),
        Output("a", [1, 2]),  # half a character: the text does not grow yet
        Output("aé", [1, 2, 3]),
        Output("aé stop", [1, 2, 3, 4], "stop", "stop", metrics),
    ]
    engine = LLMEngine(SETTINGS)
    chunks = ask(engine, Request((5, 6), 8, stop_words=("stop",), bad_words=("bad",), min_tokens=2))
    assert [(chunk.token_ids, chunk.text) for chunk in chunks] == [
        ((1,), "a"),
        ((2, 3), "é"),
        ((4,), " stop"),
    ]
    assert (chunks[-1].finish, chunks[-1].stop_word) == ("stop_words", "stop")
    assert chunks[-1].times == Times(1000, 2000, 3_000_000_000)
    [(inputs, parameters, streaming)] = made.asked
    assert inputs == [5, 6] and streaming
    assert parameters.stop == ["stop"] and parameters.bad == ["bad"] and parameters.min_tokens == 2
    assert parameters.ignore_eos and parameters.include_stop_str_in_output
    assert engine.encode("four") == [4] and engine.vocabulary == 100
    engine.close()
    assert made.is_shut_down and made.arguments == {"model": "m"}
    assert engine.statistics.finished == {"stop_words": 1}


def test_contract_ends_penalties_and_seeds(made: SimpleNamespace) -> None:
    engine = LLMEngine(SETTINGS)
    for reason, stop_reason, finish in (
        ("stop", None, "end_id"),
        ("stop", 7, "end_id"),
        ("length", None, "length"),
    ):
        made.steps = [Output("a", [1], reason, stop_reason)]
        assert (
            ask(engine, Request((1,), 4, end_id=2, penalties={"presence_penalty": 0.5}))[-1].finish == finish
        )
    made.steps = [Output("a", [1], "timeout")]
    assert "the answer ended with timeout" in ask(engine, Request((1,), 4))[-1].error
    first, *_, last = (parameters for _, parameters, _ in made.asked)
    assert first.end_id == 2 and not first.ignore_eos and first.presence_penalty == 0.5
    assert engine._parameters(Request((1,), 4, end_id=7)).end_id is None  # the model's own
    assert not engine._parameters(Request((1,), 4, end_id=7)).ignore_eos
    assert first.seed != last.seed  # without one TensorRT-LLM draws the same for all
    made.steps = [Output("a", [1], "length")]
    ask(engine, Request((1,), 4, seed=5))
    assert made.asked[-1][1].seed == 5
    engine.close()


def test_a_full_queue_refuses_and_cancels_reach_the_request(made: SimpleNamespace) -> None:
    engine = LLMEngine(SETTINGS)
    engine._loop.call_soon_threadsafe(engine._loop.stop)  # nothing is read any more
    engine._thread.join(20)
    numbers = [engine.submit(Request((1,), 4), lambda chunk: None) for _ in range(2)]
    with pytest.raises(Busy, match="2 requests are under way"):
        engine.submit(Request((1,), 4), lambda chunk: None)
    engine.cancel(numbers[1])
    assert [result.is_aborted for result in made.results] == [False, True]
    assert Limits(**LIMITS).max_queue_size == 1


@pytest.mark.parametrize("is_rank", [False, True], ids=["the LLM says so", "a rank's process is gone"])
def test_contract_a_death_ends_what_it_has_and_is_told(
    made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, folder: RunFolder, is_rank: bool
) -> None:
    monkeypatch.setattr(llm_api, "PERIOD", 0.05)
    monkeypatch.setattr("xshare_trtllm.trtllm.use", lambda path: None)
    report(folder, 0)
    report(folder, 1)
    has_died, chunks = threading.Event(), queue.Queue[Chunk]()
    engine = LLMEngine({**SETTINGS, "xshare": folder.config_path}, has_died.set)
    made.steps = [Output("a", [1])]
    engine._follow = no_answer  # type: ignore[assignment,method-assign]
    engine.submit(Request((1,), 4), chunks.put)
    assert not has_died.wait(0.2)
    if is_rank:
        report(folder, 1, pid=2**22 + 1)  # no process has such a number
    else:
        made.is_dead = True
    assert has_died.wait(20)
    assert chunks.get(timeout=1).error == "the model's process ended; try again"
    with pytest.raises(Busy, match="the model's process has ended"):
        engine.submit(Request((1,), 4), chunks.put)
    engine.close()
    assert chunks.empty()


def test_what_cannot_be_read_is_said_once_and_looked_at_again(
    made: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    folder: RunFolder,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(llm_api, "PERIOD", 0.02)
    monkeypatch.setattr("xshare_trtllm.trtllm.use", lambda path: None)
    for rank in range(2):
        report(folder, rank)
    engine = LLMEngine({**SETTINGS, "xshare": folder.config_path})
    assert engine.statistics.setting is not None
    report(folder, 0, counted=[0, 1])  # of another version, say
    wait_for(lambda: engine.statistics.setting is None, 10)
    report(folder, 0)
    wait_for(lambda: engine.statistics.setting is not None, 10)
    engine.close()
    assert capsys.readouterr().err.count("xshare: the workers cannot be seen: zip()") == 1


async def no_answer(_number: int) -> None:
    """In place of an LLM's, which may hang where a rank is gone."""


# ---- The routing's metrics and its dial --------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Of a server of two ranks that has begun."""
    made = RunFolder(tmp_path / "xshare.yaml")
    Setting(XShareConfig(coverage=0.9)).to_yaml(made.config_path)
    made.begin(2, "abc")
    return made


def report(folder: RunFolder, rank: int, **changes: Any) -> None:
    """As workers.py and torch_statistics.py write it; each rank under a name of its own."""
    layers = changes.pop("by_layer", [[80, 60, 30, 40, 2, 9, 7, 16, 0]])
    statistics = {
        "steps": 4,
        "recent_steps": 4,
        "silent_layers": changes.pop("silent", []),
        "by_layer": layers,
    }
    values = {
        "state": "on",
        "rank": rank,
        "stage": 0,
        "layers": len(layers),
        "counted": list(range(len(layers))),
        "config_hash": "abc",
        "setting": {"coverage": 0.9, "mode": "on"},
        "refused": None,
        "statistics": statistics,
    }
    folder.report(**values | changes)
    written = max(folder.path.glob("*-*.json"), key=lambda path: path.stat().st_mtime_ns)
    written.rename(folder.path / f"host-{rank}.json")


def test_ranks_of_one_stage_are_read_once(folder: RunFolder) -> None:
    assert read_routing(folder) == Routing()
    report(folder, 0)
    assert read_routing(folder).setting is None  # a rank is missing
    report(folder, 1)
    counts = (80, 60, 30, 40, 2, 9, 7, 16, 0, 4)
    assert read_routing(folder) == Routing((counts,), Setting(XShareConfig(coverage=0.9)), False)


def test_layers_of_all_stages_are_in_order(folder: RunFolder) -> None:
    report(folder, 1, stage=1, by_layer=[[2] * 9])
    report(folder, 0, layers=3, counted=[0, 2], by_layer=[[1] * 9, [3] * 9])
    nothing = (0,) * 10
    assert read_routing(folder).layers == ((*[1] * 9, 4), nothing, (*[3] * 9, 4), (*[2] * 9, 4))


@pytest.mark.parametrize(
    "wrong", [{"silent": [0]}, {"setting": {"coverage": 0.5, "mode": "on"}}, {"refused": "no YAML"}]
)
def test_a_rank_that_differs_is_seen(folder: RunFolder, wrong: dict[str, Any]) -> None:
    report(folder, 0)
    report(folder, 1, **wrong)
    routing = read_routing(folder)
    assert routing.is_refused == ("refused" in wrong)
    assert (routing.setting is None) == ("refused" not in wrong)


def test_contract_metrics_and_dial_on_the_real_server(tmp_path: Path) -> None:
    """The workers are real but for TensorRT-LLM's own code: their statistics come from the layer's counters,
    and they follow the file that the control request writes."""
    (tmp_path / "sitecustomize.py").write_text(HOOK_LINE)  # as an installation has it in site-packages
    (tmp_path / "tensorrt_llm").symlink_to(STAND_IN / "tensorrt_llm")
    (tmp_path / "xshare_trtllm").symlink_to(Path(startup.__file__).parents[1])
    arguments = ["--backend", "trtllm-torch", "--engine", str(MODEL_DIR), "--coverage", "0.9", "--control"]
    with running_server(tmp_path, *arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path)) as server:
        rows, own, active = (
            f'xshare_{name}_total{{layer="0"}}' for name in ("rows", "experts_before", "experts_after")
        )
        ended = 'xshare_requests_total{finish="length"}'

        def say() -> dict[str, float]:
            """What eight requests of 80 tokens at once have counted."""
            before = server.metrics()
            with ThreadPoolExecutor(8) as pool:
                texts = list(pool.map(lambda n: server.generate(f"The number {n}", 80, end_id=-1), range(8)))
            assert all(text.startswith(f"The number {number}") for number, text in enumerate(texts))

            def counted() -> dict[str, float]:
                return {name: value - before.get(name, 0) for name, value in server.metrics().items()}

            return wait_for(lambda: now if (now := counted())[ended] >= 8 and now.get(rows) else None)

        def turn(**request: Any) -> tuple[int, str]:
            body = json.dumps({"text_input": "", **request}).encode()
            status, answer = server.call("POST", "/v2/models/tensorrt_llm/generate", body)
            return status, json.loads(answer).get("text_output") or json.loads(answer)["error"]

        def state() -> tuple[float, ...]:
            metrics = server.metrics()
            return tuple(metrics.get(f"xshare_{name}", -1) for name in ("enabled", "shadow", "coverage"))

        counted = say()
        assert 0 < counted[active] < 0.9 * counted[own] and state() == (1, 0, 0.9)
        for mode, expected, saves in (("shadow", (0, 1, 0.5), True), ("off", (0, 0, 1), False)):
            answer = turn(xshare=mode, xshare_coverage=0.5)
            assert answer[0] == 200 and f"mode: {mode}" in answer[1].replace("'", "")
            deadline = time.monotonic() + 30
            while state() != expected and time.monotonic() < deadline:
                say()  # workers look at their file when they make steps
            assert state() == expected
            counted = say()
            assert (counted[active] < 0.9 * counted[own]) == saves
        assert "coverage must be less than or equal to 1" in turn(xshare_coverage=2.0)[1]
        file = next(tmp_path.glob("repository/*/1/xshare.yaml"))
        Setting(XShareConfig(coverage=0.5, warmup=0), "on").to_yaml(file)  # an operator's own edit
        wait_for(lambda: say() and server.metrics()["xshare_dial_refused"] == 1)
        assert state() == (0, 0, 1)
        file.write_text("coverage: 0.5\n")
        stream = Stream(server)
        stream.send("The end", 2000, end_id=-1)
        stream.take()
        (tmp_path / "llm-is-dead").touch()
        assert "the model's process ended; try again" in stream.read()[1]
        stream.close()
        wait_for(lambda: not server.is_ready())
        wait_for(server.is_ready, 60)
        say()
        assert server.metrics()["xshare_engine_restarts_total"] == 1 and state() == (1, 0, 0.5)
