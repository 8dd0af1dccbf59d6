"""Tokens to tokens: the model `tensorrt_llm` of the `cpu` and `trtllm-torch` back ends."""

from __future__ import annotations

import itertools
import json
import queue
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xshare_trtllm.serving.generation import Busy, Chunk, Limits, Request
from xshare_trtllm.serving.metrics import TritonPublisher
from xshare_trtllm.serving.models.common import one, parameters, pb_utils, refusal
from xshare_trtllm.serving.tensors import OPTIONS
from xshare_trtllm.serving.text import load_tokenizer, token_texts

CHECK_PERIOD = 0.05  # seconds between two looks at what clients have cancelled
METRICS_PERIOD = 2.0  # seconds between two updates of the metrics endpoint
_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
_OPTIONS = {option.to_model: option for option in OPTIONS if option.to_model}
_TAKEN = ("exclude_input_in_output", "streaming", "temperature", "runtime_top_k", "runtime_top_p", "seed")


@dataclass(slots=True)
class _Answer:
    """A request under way: where its tokens go."""

    name: str
    sender: Any
    prefix: list[int]
    is_streaming: bool
    number: int = -1
    tokens: list[int] = field(default_factory=list)


class TritonPythonModel:
    """Parameters: `back_end` (`cpu` or `trtllm-torch`), `settings` (JSON, for the back end's engine),
    `tokenizer_dir` and `exclude_input_in_output` (where the request does not say).

    Chunks arrive on the engine's thread and are sent from another one, which also looks for cancelled
    requests and updates the metrics.
    """

    def initialize(self, args: dict[str, str]) -> None:
        given = parameters(args)
        settings = json.loads(given["settings"])
        self.limits = Limits(**settings["limits"])
        self.excludes_input = given["exclude_input_in_output"] == "true"
        self.is_decoupled = pb_utils.using_decoupled_model_transaction_policy(
            json.loads(args["model_config"])
        )
        self.texts = token_texts(load_tokenizer(Path(given["tokenizer_dir"])))
        self.engine = _engine(given["back_end"], settings)
        self.publisher = TritonPublisher(pb_utils)
        self.answers: dict[int, _Answer] = {}
        self.keys = itertools.count()
        self.chunks: queue.SimpleQueue[tuple[int, Chunk] | None] = queue.SimpleQueue()
        self.sender = threading.Thread(target=self._send, name="xshare-sender", daemon=True)
        self.sender.start()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._submit(request, sender)
            except ValueError as error:
                sender.send(refusal(str(error)), flags=_FINAL)
            except Busy as error:
                sender.send(_unavailable(str(error)), flags=_FINAL)

    def finalize(self) -> None:
        self.chunks.put(None)  # first: what calls the server while it stops may never return
        self.sender.join(timeout=5)
        self.engine.close()

    def _submit(self, request: Any, sender: Any) -> None:
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        if "stop" in inputs and one("stop", inputs["stop"]):
            self._stop(request.request_id())
            sender.send(_tokens([]), flags=_FINAL)
            return
        generation = read_request(inputs, self.texts)
        generation.check(self.limits, len(self.texts))
        is_streaming = bool(one("stream", inputs["streaming"])) if "streaming" in inputs else False
        if is_streaming and not self.is_decoupled:
            raise ValueError("stream: this repository was written with --no-streaming")
        excludes = inputs.get("exclude_input_in_output")
        excludes_input = self.excludes_input if excludes is None else one("exclude_input_in_output", excludes)
        prefix = [] if excludes_input or is_streaming else list(generation.prompt)
        key = next(self.keys)
        answer = self.answers[key] = _Answer(request.request_id(), sender, prefix, is_streaming)
        try:
            answer.number = self.engine.submit(generation, lambda chunk: self.chunks.put((key, chunk)))
        except Busy:
            del self.answers[key]
            raise

    def _stop(self, name: str) -> None:
        if not name:
            raise ValueError("stop: the request needs the id of the one that it stops")
        for answer in list(self.answers.values()):
            if answer.name == name:
                self.engine.cancel(answer.number)

    def _send(self) -> None:
        check = metrics = time.monotonic()
        while True:
            try:
                item = self.chunks.get(timeout=CHECK_PERIOD)
            except queue.Empty:
                pass
            else:
                if item is None:
                    return
                self._send_chunk(*item)
            now = time.monotonic()
            if now - check > CHECK_PERIOD:
                check = now
                self._cancel_abandoned()
            if now - metrics > METRICS_PERIOD:
                metrics = now
                self.publisher.publish(self.engine.statistics)

    def _cancel_abandoned(self) -> None:
        for answer in list(self.answers.values()):
            if answer.number >= 0 and answer.sender.is_cancelled():
                self.engine.cancel(answer.number)

    def _send_chunk(self, key: int, chunk: Chunk) -> None:
        answer = self.answers[key]
        answer.tokens += chunk.token_ids
        if chunk.finish:
            del self.answers[key]
        elif not answer.is_streaming:
            return
        flags = _FINAL if chunk.finish else 0
        if chunk.finish == "error":
            answer.sender.send(_unavailable(chunk.error), flags=flags)
        else:  # with what there is where it was cancelled: Triton 2.51 does not get over an error CANCELLED
            answer.sender.send(_tokens(answer.prefix + answer.tokens), flags=flags)
        answer.tokens = []


def read_request(inputs: dict[str, Any], texts: list[bytes]) -> Request:
    """The request in the inputs of `tensorrt_llm`. Raises ValueError, naming the input as the client does,
    for one that means nothing and one that asks for what these back ends do not do."""
    for name, array in inputs.items():
        option = _OPTIONS.get(name)
        if option is None or name in _TAKEN:
            continue
        asked, neutral = option.tensor.name, option.neutral
        if neutral is None:
            raise ValueError(f"{asked}: is not supported, leave it out")
        if one(asked, array) != neutral:
            raise ValueError(f"{asked}: is not supported, must be {neutral} or left out")
    if "bad_words_list" in inputs and _words("bad_words", inputs["bad_words_list"], texts):
        raise ValueError("bad_words: is not supported, leave it out")
    length, ids = one("input_lengths", inputs["input_lengths"]), inputs.get("input_ids")
    if ids is None or not 0 <= length <= ids.size:
        raise ValueError(f"input_lengths={length}: must be from 0 to the number of input_ids")
    end_id = one("end_id", inputs["end_id"]) if "end_id" in inputs else -1
    return Request(
        prompt=tuple(ids.reshape(-1)[:length].tolist()),
        max_tokens=one("max_tokens", inputs["request_output_len"]),
        end_id=None if end_id == -1 else end_id,
        stop_words=_words("stop_words", inputs.get("stop_words_list"), texts),
        temperature=_given("temperature", inputs.get("temperature")),
        top_k=_given("top_k", inputs.get("runtime_top_k")),
        top_p=_given("top_p", inputs.get("runtime_top_p")),
        seed=_given("seed", inputs.get("seed")) or 0,
    )


def _given(name: str, array: Any) -> Any:
    return None if array is None else one(name, array)


def _words(name: str, array: Any, texts: list[bytes]) -> tuple[bytes, ...]:
    """The words in [1, 2, n]: tokens, and where each word ends, filled up with -1."""
    if array is None:
        return ()
    ids, ends = array.reshape(2, -1).tolist()
    ends = [end for end in ends if end >= 0]
    if sorted(ends) != ends or any(end > len(ids) for end in ends):
        raise ValueError(f"{name}: the ends of the words must rise, up to the number of tokens {len(ids)}")
    if any(not 0 <= token < len(texts) for token in ids):
        raise ValueError(f"{name}: tokens must be from 0 to {len(texts) - 1}")
    words = (b"".join(texts[token] for token in ids[first:end]) for first, end in zip([0, *ends], ends))  # noqa: B905
    return tuple(word for word in words if word)


def _tokens(ids: list[int]) -> Any:
    return pb_utils.InferenceResponse(
        [
            pb_utils.Tensor("output_ids", np.array([[ids]], dtype=np.int32)),
            pb_utils.Tensor("sequence_length", np.array([[len(ids)]], dtype=np.int32)),
        ]
    )


def _unavailable(message: str) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.UNAVAILABLE))


def _engine(back_end: str, settings: dict[str, Any]) -> Any:
    if back_end == "cpu":
        from xshare_trtllm.serving.worker import Worker

        return Worker(settings)
    from xshare_trtllm.serving.llm_api import LLMEngine

    return LLMEngine(settings)
