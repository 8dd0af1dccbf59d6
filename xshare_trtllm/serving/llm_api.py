"""The engine of the `trtllm-torch` back end: TensorRT-LLM's LLM API, with XShare in its MoE layers.

Written against TensorRT-LLM 1.2: tensorrt_llm/llmapi/llm.py (`LLM(model, tensor_parallel_size, ...)`,
`generate_async(inputs, sampling_params, streaming=)`, `tokenizer.encode(text)`), sampling_params.py
(000a01d6), executor/result.py (RequestOutput.outputs[0] has all `text` and `token_ids` so far,
`finish_reason`, `stop_reason` and, with `return_perf_metrics`, `request_perf_metrics.timing_metrics`). Not
run yet: it needs a GPU and TensorRT-LLM.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import sys
import threading
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

from xshare_trtllm.serving.generation import Busy, Chunk, FinishReason, Limits, OnChunk, Request, Times
from xshare_trtllm.serving.llm_ranks import Routing, read_routing
from xshare_trtllm.serving.metrics import Statistics
from xshare_trtllm.trtllm.run_folder import RunFolder
from xshare_trtllm.trtllm.setting import Setting

PERIOD = 1.0  # seconds between two looks at the workers


class LLMEngine:
    """`submit`, `cancel`, `configure`, `close` and `statistics` of the `cpu` back end's `Worker`, over `LLM`.

    settings  `llm` (arguments of LLM), `limits`, `end_id` (the tokenizer's), `xshare` (the YAML file with
              XShare's setting; None: the model's own routing)
    on_death  called on a thread of this object when the LLM, or a rank of it, has ended unasked, after its
              requests got their errors
    """

    def __init__(self, settings: dict[str, Any], on_death: Callable[[], None] = lambda: None) -> None:
        self._xshare: Path | None = settings["xshare"] and Path(settings["xshare"]).resolve()
        if self._xshare is not None:
            from xshare_trtllm.trtllm import use

            use(self._xshare)  # before LLM is made, so that its workers have it
        llm_api: Any = import_module("tensorrt_llm")
        self._sampling_params = llm_api.SamplingParams
        self._limits = Limits(**settings["limits"])
        self._end_id: int | None = settings["end_id"]
        self._llm = llm_api.LLM(**settings["llm"])
        self._on_death = on_death
        self._numbers = itertools.count()
        self._running: dict[int, Any] = {}
        self._open: dict[int, OnChunk] = {}
        self._is_over = False
        self._finished: Counter[str] = Counter()
        self._output_tokens = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="xshare-llm", daemon=True)
        self._thread.start()
        self._routing = self._read_routing()
        self._is_closing = threading.Event()
        self._watch = threading.Thread(target=self._look, name="xshare-workers", daemon=True)
        self._watch.start()

    @property
    def statistics(self) -> Statistics:
        """Of the routing: what the ranks' last reports say."""
        routing = self._routing
        return Statistics(
            routing.layers,
            dict(self._finished),
            self._output_tokens,
            setting=routing.setting,
            is_refused=routing.is_refused,
        )

    @property
    def setting(self) -> Setting | None:
        """What the workers' file says; they have it, or will soon, or refuse it. Raises ValueError where it
        says nothing, OSError where it cannot be read."""
        return None if self._xshare is None else Setting.from_yaml(self._xshare)

    def configure(self, setting: Setting) -> None:
        """Another setting, which the workers take over at a step of theirs (trtllm/dial.py)."""
        assert self._xshare is not None, "a repository without a configuration has no control"
        setting.to_yaml(self._xshare)

    @property
    def vocabulary(self) -> int:
        """Tokens that there are."""
        return len(self._llm.tokenizer.tokenizer)

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt, by the model's own tokenizer."""
        tokens: list[int] = self._llm.tokenizer.encode(text)
        return tokens

    def submit(self, request: Request, on_chunk: OnChunk) -> int:
        limits = self._limits
        if self._is_over:
            raise Busy("the model's process has ended: try again later")
        if len(self._running) >= limits.max_batch_size + limits.max_queue_size:
            raise Busy(f"{len(self._running)} requests are under way: try again later")
        number = next(self._numbers)
        self._running[number] = self._llm.generate_async(
            list(request.prompt), self._parameters(request), streaming=True
        )
        self._open[number] = on_chunk
        asyncio.run_coroutine_threadsafe(self._follow(number), self._loop)
        return number

    def cancel(self, number: int) -> None:
        result = self._running.get(number)
        if result is not None:
            result.abort()

    def close(self) -> None:
        self._is_closing.set()
        self._watch.join(timeout=5)
        for number in list(self._running):
            self.cancel(number)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._llm.shutdown()

    def _parameters(self, request: Request) -> Any:
        seed = (
            secrets.randbits(63) if request.seed is None else request.seed
        )  # without one, all draws are equal
        return self._sampling_params(
            max_tokens=request.max_tokens,
            min_tokens=request.min_tokens or None,
            # Its own goes with others, which its generation_config.json names (sampling_params.py, `_setup`).
            end_id=None if request.end_id == self._end_id else request.end_id,
            ignore_eos=request.end_id is None,
            stop=list(request.stop_words) or None,
            bad=list(request.bad_words) or None,
            include_stop_str_in_output=True,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            seed=seed,
            return_perf_metrics=True,
            **request.penalties,
        )

    def _read_routing(self) -> Routing:
        return Routing() if self._xshare is None else read_routing(RunFolder(self._xshare))

    def _look(self) -> None:
        """On a thread of its own: a slow file system delays no answer."""
        is_well: Callable[[], bool] = getattr(self._llm, "_check_health", lambda: True)  # from 1.1 on
        said = ""
        while not self._is_closing.wait(PERIOD):
            try:
                self._routing = self._read_routing()
                if self._routing.dead or not is_well():
                    break
            except (
                Exception
            ) as error:  # a file system that is away, say: the metrics show it, the watch goes on
                self._routing = Routing()
                if said != (said := f"the workers cannot be seen: {error}"):
                    _say(said)
        if self._is_closing.is_set():
            return
        who = ", ".join(f"rank {rank}" for rank in self._routing.dead) or "the LLM"
        _say(f"{who} has ended")
        self._is_over = True
        for number in list(self._open):
            self._hand_on(number, Chunk(finish="error", error="the model's process ended; try again"))
        self._on_death()

    def _hand_on(self, number: int, chunk: Chunk) -> None:
        """To the client, once at most after the last one."""
        on_chunk = self._open.pop(number, None) if chunk.finish else self._open.get(number)
        if on_chunk is not None:
            on_chunk(chunk)

    async def _follow(self, number: int) -> None:
        try:
            count, finish = await self._pass_on(number)
            self._output_tokens += count
        except Exception as error:  # a request without an answer would hang
            finish = "error"
            self._hand_on(number, Chunk(finish="error", error=f"{type(error).__name__}: {error}"))
        self._finished[finish] += 1
        self._running.pop(number, None)

    async def _pass_on(self, number: int) -> tuple[int, FinishReason]:
        """The tokens of the answer, and why it ended."""
        seen_tokens = seen_text = 0
        async for result in self._running[number]:
            output = result.outputs[0]
            finish = _finish(output) if output.finish_reason else None
            tokens, text = tuple(output.token_ids[seen_tokens:]), output.text[seen_text:]
            if finish or text:
                word = output.stop_reason if finish == "stop_words" else ""
                times = _times(output) if finish else None
                self._hand_on(number, Chunk(tokens, text, finish, word, times))
                seen_tokens, seen_text = len(output.token_ids), len(output.text)
            if finish is not None:
                return seen_tokens, finish
        raise RuntimeError("the answer ended without a reason")


def _say(message: str) -> None:
    print(f"xshare: {message}", file=sys.stderr, flush=True)


def _finish(output: Any) -> FinishReason:
    """TensorRT-LLM's finish_reason in our words: a stop reason is the stop word, or the id of a token."""
    if output.finish_reason == "stop":
        return "stop_words" if isinstance(output.stop_reason, str) else "end_id"
    words: dict[str, FinishReason] = {"length": "length", "cancelled": "cancelled"}
    if output.finish_reason not in words:
        raise RuntimeError(f"the answer ended with {output.finish_reason}")
    return words[output.finish_reason]


def _times(output: Any) -> Times | None:
    metrics = getattr(output, "request_perf_metrics", None)
    if metrics is None:
        return None
    times = metrics.timing_metrics
    each = (times.first_scheduled_time, times.first_token_time, times.last_token_time)
    return Times(*(time // timedelta(microseconds=1) * 1000 for time in each))
