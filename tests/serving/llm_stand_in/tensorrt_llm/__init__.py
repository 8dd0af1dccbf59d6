"""A stand-in for `tensorrt_llm.LLM`, which needs NVIDIA's index and a GPU: names, fields and order of calls
of TensorRT-LLM's llmapi/llm.py, sampling_params.py (000a01d6) and executor/result.py, over the stand-in for
its PyTorch backend in tests/trtllm/torch_stand_in. One layer of 32 experts makes a step for all requests
under way; what they say is their own prompt, again and again.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

__path__.append(str(Path(__file__).resolve().parents[3] / "trtllm" / "torch_stand_in" / "tensorrt_llm"))

STEP = 0.002  # seconds
DEAD = Path("llm-is-dead")  # a file that a test makes


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
class CompletionOutput:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    request_perf_metrics: Any = None


class RequestOutput:
    """Grows while it is read."""

    def __init__(self, prompt: list[int], length: int, decode: Any) -> None:
        self.prompt, self.length, self._decode = prompt, length, decode
        self.outputs = [CompletionOutput()]

    def grow(self) -> bool:
        """One token; False: it was the last, or the request is aborted."""
        output = self.outputs[0]
        if output.finish_reason is None:
            tokens = [*output.token_ids, self.prompt[len(output.token_ids) % len(self.prompt)]]
            reason = "length" if len(tokens) == self.length else None
            self.outputs = [CompletionOutput(self._decode(tokens), tokens, reason)]
        return self.outputs[0].finish_reason is None

    def abort(self) -> None:
        self.outputs[0].finish_reason = "cancelled"

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        seen = None
        while seen is None or seen.finish_reason is None:
            await asyncio.sleep(STEP)
            if self.outputs[0] is not seen or seen.finish_reason is not None:
                seen = self.outputs[0]
                yield self


class _Tokenizer:
    def __init__(self, folder: str) -> None:
        from tokenizers import Tokenizer

        made = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self.tokenizer = range(made.get_vocab_size())
        self.encode = lambda text: made.encode(text).ids
        self.decode = made.decode


class LLM:
    def __init__(self, model: str, **arguments: Any) -> None:
        from tensorrt_llm.executor.executor import GenerationExecutor
        from xshare_trtllm.trtllm import dial, torch_statistics

        torch_statistics.SECONDS, dial.SECONDS = 0.2, 0.1  # a test does not wait for seconds
        self.tokenizer = _Tokenizer(model)
        llm_args = SimpleNamespace(launcher="single")
        self._executor = GenerationExecutor.create("engine", model_world_size=1, llm_args=llm_args)
        DEAD.unlink(missing_ok=True)
        self._running: dict[int, RequestOutput] = {}
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def generate_async(
        self, inputs: list[int], sampling_params: SamplingParams, streaming: bool
    ) -> RequestOutput:
        made = RequestOutput(inputs, sampling_params.max_tokens, self.tokenizer.decode)
        self._running[id(made) % 2**31] = made
        return made

    def _check_health(self) -> bool:
        """As llmapi/llm.py: whether the executor has not been shut down."""
        return not DEAD.exists()

    def shutdown(self) -> None:
        self._is_closing.set()
        self._thread.join(timeout=5)

    def _work(self) -> None:
        import torch

        torch.manual_seed(0)
        while not self._is_closing.wait(STEP):
            running = dict(self._running)
            if running:
                self._executor.engine.step(torch.randn(len(running), 32), list(running))
            for number, result in () if DEAD.exists() else running.items():
                if not result.grow():
                    del self._running[number]
