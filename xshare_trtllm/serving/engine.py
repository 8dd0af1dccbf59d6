"""Continuous batching on the CPU: a thread owns the model; sequences join and leave between its steps."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xshare_trtllm.config import RouterSpec, XShareConfig
from xshare_trtllm.hf.attach import Attachment, attach
from xshare_trtllm.hf.decoder import Decoder
from xshare_trtllm.routing import contiguous_placement
from xshare_trtllm.serving.generation import Busy, Chunk, FinishReason, Limits, OnChunk, Request, Times
from xshare_trtllm.serving.metrics import Statistics, StatisticsClock
from xshare_trtllm.serving.text import Transcript
from xshare_trtllm.trtllm.setting import Setting


class Generation:
    """A request under way. `cancel` ends it before the next step, from any thread."""

    def __init__(self, request: Request, on_chunk: OnChunk, texts: Sequence[bytes]) -> None:
        self.request, self._on_chunk = request, on_chunk
        self._transcript = Transcript(texts, request.stop_words, request.bad_words)
        self._sampler = torch.Generator()
        if request.seed is None:
            self._sampler.seed()
        else:
            self._sampler.manual_seed(request.seed)
        self._scheduled = self._first = time.monotonic_ns()
        self.generated = 0
        self.token = -1
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    def admit(self) -> None:
        """Its prompt is computed next."""
        self._scheduled = time.monotonic_ns()

    def next_token(self, logits: Tensor, best: int) -> int:
        """Greedy or sampled, from `logits` [vocabulary] fp32 whose greatest is at `best`."""
        request = self.request
        barred = self._barred()
        if 0 < len(barred) < len(logits):
            logits = logits.index_fill(0, torch.tensor(sorted(barred)), -torch.inf)
            best = int(logits.argmax())
        return best if request.is_greedy else sample(logits, request, self._sampler)

    def _barred(self) -> set[int]:
        """Tokens that may not come next."""
        request = self.request
        barred = self._transcript.barred() if request.bad_words else set()
        if request.end_id is not None and self.generated < request.min_tokens:
            barred.add(request.end_id)
        return barred

    def add(self, token: int) -> FinishReason | None:
        """Take a token and hand on what can be shown of the text; the reason where it was the last."""
        self.token = token
        if not self.generated:
            self._first = time.monotonic_ns()
        finish: FinishReason | None = None
        if token == self.request.end_id:
            finish = "end_id"
        else:
            self.generated += 1
            if self._transcript.add(token):
                finish = "stop_words"
            elif self.generated == self.request.max_tokens:
                finish = "length"
        self._show(finish)
        return finish

    def end(self, finish: FinishReason, error: str = "") -> None:
        if error:
            self._on_chunk(Chunk(finish=finish, error=error))
        else:
            self._show(finish)

    def _show(self, finish: FinishReason | None) -> None:
        times = Times(self._scheduled, self._first, time.monotonic_ns()) if finish else None
        chunk = self._transcript.take(finish, times)
        if chunk is not None:
            self._on_chunk(chunk)


class Engine:
    """Decodes requests in one batch, through XShare.

    decoder     used by the engine's thread alone from now on
    texts       the bytes of each token, by `token_texts`
    setting     what XShare does; None: the model's own routing, which is counted all the same
    expert_gpu  [E] int, the GPU that holds each expert, for budgets and statistics per GPU
    after_step  called by the engine's thread when all chunks of a step have been handed on

    The prompt of a new sequence is computed by itself, with the model's own routing (exempt), before the next
    step. Chunks arrive on the engine's thread; what `on_chunk` does there, every sequence waits for.

    Raises ValueError where the decoder's cache is smaller than the limits need, or the configuration does
    not fit the model.
    """

    def __init__(
        self,
        decoder: Decoder,
        texts: Sequence[bytes],
        setting: Setting | None = None,
        limits: Limits | None = None,
        *,
        expert_gpu: Tensor | None = None,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.limits = limits or Limits()
        needed = self.limits.max_input_len + self.limits.max_output_len
        if decoder.capacity < needed:
            raise ValueError(f"Engine: Decoder(capacity={decoder.capacity}) must hold {needed} tokens")
        self._decoder, self._texts, self._after_step = decoder, texts, after_step
        self._expert_gpu = expert_gpu
        self._attached = self._attach(setting)
        self._asked: list[Setting] = []  # by `configure`, for the engine's thread
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []
        self._changed = threading.Condition()
        self._is_closing = False
        self._clock = StatisticsClock(self._attached, setting)
        self._thread = threading.Thread(target=self._run, name="xshare-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_chunk: OnChunk) -> Generation:
        """Queue a request. Raises ValueError for one outside the limits, Busy where the queue is full."""
        request.check(self.limits, self.vocabulary)
        generation = Generation(request, on_chunk, self._texts)
        with self._changed:
            if self._is_closing:
                raise Busy("the engine is closing")
            if len(self._waiting) >= self.limits.max_queue_size:
                raise Busy(f"{self.limits.max_queue_size} requests are waiting: try again later")
            self._waiting.append(generation)
            self._changed.notify()
        return generation

    def configure(self, setting: Setting) -> None:
        """Another setting from the next step on.

        Raises ValueError where it does not fit the model.
        """
        setting.config.check(RouterSpec.from_hf_config(self._decoder.config))
        with self._changed:
            self._asked = [setting]
            self._changed.notify()

    def _attach(self, setting: Setting | None) -> Attachment:
        if setting is None or setting.mode == "off":
            setting = Setting(XShareConfig.off(RouterSpec.from_hf_config(self._decoder.config)))
        is_shadow = setting.mode == "shadow"
        return attach(self._decoder, setting.config, expert_gpu=self._expert_gpu, shadow=is_shadow)

    def _reconfigure(self) -> None:
        with self._changed:
            asked, self._asked = self._asked, []
        for setting in asked:
            self._attached.detach()
            self._attached = self._attach(setting)
            self._clock.attach(self._attached, setting)

    def close(self) -> None:
        """End what runs and waits with an error, and give the model its own routing back."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()
        self._attached.detach()

    @property
    def vocabulary(self) -> int:
        """Tokens that there are."""
        return len(self._texts)

    @property
    def statistics(self) -> Statistics:
        """Totals since the start, at most a second old while the engine works, exact when it is idle."""
        return self._clock.statistics

    @torch.inference_mode()
    def _run(self) -> None:
        self._cache = self._decoder.new_cache(self.limits.max_batch_size)
        while self._wait():
            try:
                self._reconfigure()
                self._forget_cancelled()
                self._admit()
                if self._running:
                    self._step()
            except Exception as error:  # the model failed: that is the end of this batch, not of the engine
                self._fail(f"the model failed: {error}")
            self._clock.tick(len(self._running), len(self._waiting))
            self._after_step()
        self._fail("the server stopped the model")
        self._after_step()

    def _wait(self) -> bool:
        """Until there is something to do; False: the engine closes."""
        with self._changed:
            while not (self._waiting or self._running or self._asked or self._is_closing):
                self._changed.wait()
            return not self._is_closing

    def _forget_cancelled(self) -> None:
        """Those that wait: they take no place from others."""
        with self._changed:
            cancelled = [generation for generation in self._waiting if generation.is_cancelled]
            for generation in cancelled:
                self._waiting.remove(generation)
        for generation in cancelled:
            self._end(generation, "cancelled")

    def _admit(self) -> None:
        """Fill the free rows from the queue."""
        while len(self._running) < self.limits.max_batch_size:
            with self._changed:
                if not self._waiting:
                    return
                generation = self._waiting.popleft()
            self._prefill(generation)

    def _prefill(self, generation: Generation) -> None:
        row = len(self._running)
        place = self._cache.rows(row, row + 1)
        place.lengths.zero_()
        self._running.append(generation)
        generation.admit()
        logits = self._decoder(torch.tensor([generation.request.prompt]), cache=place).logits[0, -1]
        token = generation.next_token(logits, int(logits.argmax()))
        self._take(row, token)

    def _step(self) -> None:
        """One token for every sequence."""
        for row in reversed(range(len(self._running))):
            if self._running[row].is_cancelled:
                self._end(self._leave(row), "cancelled")
        if not self._running:
            return
        tokens = torch.tensor([[generation.token] for generation in self._running])
        logits = self._decoder(tokens, cache=self._cache).logits[:, -1]
        best = logits.argmax(-1).tolist()
        chosen = [g.next_token(*of_row) for g, *of_row in zip(self._running, logits, best, strict=True)]
        for row in reversed(range(len(chosen))):
            self._take(row, chosen[row])

    def _take(self, row: int, token: int) -> None:
        generation = self._running[row]
        finish = generation.add(token)
        if finish is not None:
            self._clock.count(finish, generation.generated)
            self._leave(row)

    def _leave(self, row: int) -> Generation:
        """Free a row; the last sequence moves into it."""
        generation, last = self._running[row], len(self._running) - 1
        if row != last:
            self._cache.move(last, row)
            self._running[row] = self._running[last]
        self._running.pop()
        return generation

    def _end(self, generation: Generation, finish: FinishReason, error: str = "") -> None:
        self._clock.count(finish, generation.generated)
        generation.end(finish, error)

    def _fail(self, error: str) -> None:
        with self._changed:
            failed = [*self._running, *(self._waiting if self._is_closing else ())]
            if self._is_closing:
                self._waiting.clear()
        self._running.clear()
        for generation in failed:
            self._end(generation, "error", error)


def sample(logits: Tensor, request: Request, generator: torch.Generator) -> int:
    """A token from `logits` [vocabulary] fp32 under the request's temperature, top_k and top_p, in that
    order."""
    logits = logits / (1.0 if request.temperature is None else request.temperature)
    count = min(request.top_k or len(logits), len(logits))
    values, tokens = logits.topk(count)
    probabilities = values.softmax(-1)
    if request.top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities * (before < request.top_p)
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


def load_engine(settings: dict[str, Any], after_step: Callable[[], None] = lambda: None) -> Engine:
    """The engine of the `cpu` back end.

    settings  `model` (folder), `setting` (of a Setting; None: the model's own routing), `limits`, `ep_size`
    """
    from pathlib import Path

    from xshare_trtllm.evaluation.model import load_model
    from xshare_trtllm.serving.text import load_tokenizer, token_texts

    torch.set_num_threads(1)  # steps of milliseconds: more threads wait for each other more than they help
    folder, limits = Path(settings["model"]), Limits(**settings["limits"])
    model, _ = load_model(folder)
    decoder = Decoder(model, limits.max_input_len + limits.max_output_len)
    setting = None if settings["setting"] is None else Setting.from_dict(settings["setting"])
    spec = RouterSpec.from_hf_config(decoder.config)
    return Engine(
        decoder,
        token_texts(load_tokenizer(folder)),
        setting,
        limits,
        expert_gpu=contiguous_placement(spec.num_experts, settings["ep_size"]),
        after_step=after_step,
    )
