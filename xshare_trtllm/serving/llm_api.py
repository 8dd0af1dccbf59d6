"""The engine of the `trtllm-torch` back end: TensorRT-LLM's LLM API, with XShare in its MoE layers.

Written against TensorRT-LLM 1.2 (tensorrt_llm/llmapi/llm.py: `LLM(model, tensor_parallel_size, ...)`,
`generate_async(inputs, sampling_params, streaming=)`; RequestOutput.outputs[0] has all `token_ids` so far and
`finish_reason`). Not run yet: it needs a GPU and TensorRT-LLM.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from typing import Any

from xshare_trtllm.serving.generation import Busy, Chunk, FinishReason, Limits, OnChunk, Request
from xshare_trtllm.serving.metrics import Statistics
from xshare_trtllm.serving.text import Transcript, load_tokenizer, token_texts


class LLMEngine:
    """`submit`, `cancel`, `close` and `statistics` of the `cpu` back end's `Worker`, over `LLM`.

    settings  `model` (folder), `llm` (arguments of LLM), `limits`, `options_module` (the package that
              `xshare_trtllm.trtllm.write_options` wrote; None: the model's own routing)
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        from pathlib import Path

        if settings["options_module"] is not None:
            import_module(settings["options_module"])  # before LLM is made, so that its workers have it
        llm_api: Any = import_module("tensorrt_llm")
        self._sampling_params = llm_api.SamplingParams
        self._limits = Limits(**settings["limits"])
        self._texts = token_texts(load_tokenizer(Path(settings["model"])))
        self._llm = llm_api.LLM(
            settings["model"], max_batch_size=self._limits.max_batch_size, **settings["llm"]
        )
        self._numbers = itertools.count()
        self._running: dict[int, Any] = {}
        self._finished: Counter[str] = Counter()
        self._output_tokens = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="xshare-llm", daemon=True)
        self._thread.start()

    @property
    def statistics(self) -> Statistics:
        """Without layers: the routing statistics stay on the GPUs."""
        return Statistics(
            finished=dict(self._finished), output_tokens=self._output_tokens, running=len(self._running)
        )

    def submit(self, request: Request, on_chunk: OnChunk) -> int:
        limits = self._limits
        if len(self._running) >= limits.max_batch_size + limits.max_queue_size:
            raise Busy(f"{len(self._running)} requests are under way: try again later")
        number = next(self._numbers)
        result = self._llm.generate_async(list(request.prompt), self._parameters(request), streaming=True)
        self._running[number] = result
        transcript = Transcript(self._texts, request.stop_words)
        asyncio.run_coroutine_threadsafe(self._follow(number, request, transcript, on_chunk), self._loop)
        return number

    def cancel(self, number: int) -> None:
        result = self._running.get(number)
        if result is not None:
            result.abort()

    def close(self) -> None:
        for number in list(self._running):
            self.cancel(number)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._llm.shutdown()

    def _parameters(self, request: Request) -> Any:
        return self._sampling_params(
            max_tokens=request.max_tokens,
            end_id=-1 if request.end_id is None else request.end_id,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            seed=request.seed,
            detokenize=False,
        )

    async def _follow(self, number: int, request: Request, transcript: Transcript, on_chunk: OnChunk) -> None:
        try:
            count, finish = await self._pass_on(number, request, transcript, on_chunk)
            self._output_tokens += count
        except Exception as error:  # a request without an answer would hang
            finish = "error"
            on_chunk(Chunk(finish="error", error=f"{type(error).__name__}: {error}"))
        self._finished[finish] += 1
        self._running.pop(number, None)

    async def _pass_on(
        self, number: int, request: Request, transcript: Transcript, on_chunk: Callable[[Chunk], None]
    ) -> tuple[int, FinishReason]:
        seen = 0
        async for output in self._running[number]:
            tokens, reason = output.outputs[0].token_ids, output.outputs[0].finish_reason
            finish = _finish(reason) if reason else None
            for token in tokens[seen:]:
                seen += 1
                if token == request.end_id:
                    finish = "end_id"
                elif transcript.add(token):
                    finish = "stop_words"
                    self.cancel(number)
                    break
            chunk = transcript.take(finish)
            if chunk is not None:
                on_chunk(chunk)
            if finish is not None:
                return seen, finish
        raise RuntimeError("the answer ended without a reason")


def _finish(reason: str) -> FinishReason:
    """TensorRT-LLM's finish_reason in our words."""
    words: dict[str, FinishReason] = {"stop": "end_id", "length": "length", "cancelled": "cancelled"}
    if reason not in words:
        raise RuntimeError(f"the answer ended with {reason}")
    return words[reason]
