"""`LLMEngine` over a stand-in for TensorRT-LLM, which cannot be installed here: the names and fields that it
uses, of TensorRT-LLM's sampling_params.py (000a01d6) and executor/result.py."""

from __future__ import annotations

import asyncio
import queue
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from xshare_trtllm.serving.generation import Busy, Chunk, Limits, Request, Times
from xshare_trtllm.serving.llm_api import LLMEngine

LIMITS = {"max_batch_size": 1, "max_queue_size": 1, "max_input_len": 8, "max_output_len": 8}
SETTINGS = {"llm": {"model": "m"}, "limits": LIMITS, "config": {"coverage": 0.9}, "xshare": None}


@dataclass(kw_only=True)
class SamplingParams:
    """The fields that are used, with upstream's defaults; another name is a TypeError, as there."""

    end_id: int | None = None
    max_tokens: int = 32
    bad: list[str] | None = None
    stop: list[str] | None = None
    include_stop_str_in_output: bool = False
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    temperature: float | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    ignore_eos: bool = False
    return_perf_metrics: bool = False


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
    seen = SimpleNamespace(asked=[], steps=[], results=[])

    class LLM:
        def __init__(self, **arguments: Any) -> None:
            seen.arguments = arguments
            self.tokenizer = SimpleNamespace(tokenizer=range(100), encode=lambda text: [len(text)])

        def generate_async(self, inputs: list[int], sampling_params: Any, streaming: bool) -> Result:
            seen.asked.append((inputs, sampling_params, streaming))
            seen.results.append(Result(seen.steps))
            return seen.results[-1]

        def shutdown(self) -> None:
            seen.is_shut_down = True

    module = ModuleType("tensorrt_llm")
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt_llm", module)
    yield seen


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
    assert engine.statistics.finished == {"stop_words": 1} and engine.statistics.coverage == 0.9


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
