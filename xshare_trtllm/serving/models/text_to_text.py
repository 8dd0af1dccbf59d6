"""Text in, text out, in one model: tokens, decoding and streams of the `cpu` and `trtllm-torch` back ends.

No model calls another one here. A Python model that calls decoupled models (BLS) does not survive clients
that go away in Triton 2.51: its threads wait for ever in Triton's iterators of responses, or its process
dies. (triton-inference-server/python_backend: cancelling such calls came with 7f21b67, objects used after
they are freed were mended in 47f9e03 and 4b3337c, of March and June 2026.)
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xshare_trtllm.config import MODES, XShareConfig
from xshare_trtllm.serving.contracts import CONTRACTS, CONTROL, NEUTRAL, PENALTIES, READ, Contract
from xshare_trtllm.serving.generation import Busy, Chunk, Limits, Request
from xshare_trtllm.serving.metrics import TritonPublisher
from xshare_trtllm.serving.models.common import one, parameters, pb_utils, refusal, text
from xshare_trtllm.serving.text import load_tokenizer
from xshare_trtllm.trtllm.setting import Setting

CHECK_PERIOD = 0.02  # seconds between two looks at what clients have cancelled
METRICS_PERIOD = 0.2  # seconds between two updates of the metrics endpoint: a short request is seen
MAX_TOKENS = 32  # of a request that does not say: SamplingParams' default
_LONGEST_TOKEN = 32  # bytes of text that one token of a prompt may stand for, before it is refused unread
_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
_WANTED = (
    "return_finish_reason",
    "return_stop_reason",
    "return_perf_metrics",
    "return_num_input_tokens",
    "return_num_output_tokens",
)


@dataclass(slots=True)
class _Answer:
    """A request under way: where its text goes, and what of it there is."""

    name: str
    sender: Any
    is_streaming: bool
    wanted: frozenset[str]
    input_tokens: int
    arrival: int
    text: str
    number: int = -1
    output_tokens: int = 0


@dataclass(slots=True)
class _Inputs:
    """What a request holds, by our names."""

    contract: Contract
    arrays: dict[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        """The one value of an input."""
        return one(self.contract.name(name), self.arrays[name]) if name in self.arrays else default

    def text(self, name: str) -> str:
        return text(self.contract.name(name), self.get(name, ""))

    def words(self, name: str) -> tuple[str, ...]:
        """The texts of an input that may hold several; empty ones ask for nothing."""
        words = self.arrays[name].reshape(-1) if name in self.arrays else ()
        return tuple(filter(None, (text(self.contract.name(name), word) for word in words)))


class TritonPythonModel:
    """Parameters: `contract` (`CONTRACTS`), `back_end` (`cpu` or `trtllm-torch`) and `settings` (JSON, for
    the back end's engine). `trtllm-torch` reads the arguments of LLM from model.yaml beside model.py.

    Chunks arrive on the engine's thread and are sent from another one, which also looks for cancelled
    requests and updates the metrics. Only that thread asks Triton whether a request is cancelled, and never
    after its last response: Triton 2.51 then reads what it has freed.
    """

    def initialize(self, args: dict[str, str]) -> None:
        given = parameters(args)
        self.contract = CONTRACTS[given["contract"]]
        settings = json.loads(given["settings"])
        self.limits = Limits(**settings["limits"])
        self.is_decoupled = pb_utils.using_decoupled_model_transaction_policy(
            json.loads(args["model_config"])
        )
        self.names = {tensor.name: ours for ours, tensor in self.contract.inputs.items()}
        self.names |= {tensor.name: tensor.name for tensor in CONTROL}
        self.end_id = settings["end_id"]
        self.answers: dict[int, _Answer] = {}
        self.keys = itertools.count()
        self.chunks: queue.SimpleQueue[tuple[int, Chunk] | None] = queue.SimpleQueue()
        self.is_over = threading.Event()
        if given["back_end"] == "cpu":
            self._start_cpu(settings)
        else:
            self._start_llm(settings, Path(args["model_repository"]) / args["model_version"])
        self.publisher: TritonPublisher | None = TritonPublisher(
            pb_utils, restarts=int(os.environ.get("XSHARE_RESTARTS", "0"))
        )
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
            except Exception as error:  # a request without an answer would hang
                failed = pb_utils.TritonError(f"{type(error).__name__}: {error}")
                sender.send(pb_utils.InferenceResponse(error=failed), flags=_FINAL)

    def finalize(self) -> None:
        self.chunks.put(None)
        self.sender.join(timeout=5)
        self.publisher = None  # while Triton listens: 2.51 crashes on metrics that outlive its connection
        self.engine.close()

    def _start_cpu(self, settings: dict[str, Any]) -> None:
        from xshare_trtllm.serving.worker import Worker

        tokenizer = load_tokenizer(Path(settings["tokenizer"]))
        first = [settings["first_id"]] if settings["first_id"] is not None else []
        self.penalties: tuple[str, ...] = ()
        self.encode: Callable[[str], list[int]] = lambda prompt: first + tokenizer.encode(prompt).ids
        self.engine: Any = Worker(settings, self.is_over.set)

    def _start_llm(self, settings: dict[str, Any], folder: Path) -> None:
        import yaml  # type: ignore[import-untyped,unused-ignore]

        from xshare_trtllm.serving.llm_api import LLMEngine

        arguments = yaml.safe_load((folder / "model.yaml").read_text(encoding="utf-8"))
        self.penalties = PENALTIES
        xshare = None if settings["setting"] is None else folder / "xshare.yaml"
        self.engine = LLMEngine({**settings, "llm": arguments, "xshare": xshare}, self.is_over.set)
        self.encode = self.engine.encode

    def _submit(self, request: Any, sender: Any) -> None:
        arrival = time.monotonic_ns()
        arrays = {self.names[tensor.name()]: tensor.as_numpy() for tensor in request.inputs()}
        inputs = _Inputs(self.contract, arrays)
        if inputs.get("stop"):
            self._stop(request.request_id())
            sender.send(self._response({"text_output": ""}), flags=_FINAL)
            return
        if arrays.keys() & {tensor.name for tensor in CONTROL}:
            sender.send(self._response({"text_output": self._configure(inputs)}), flags=_FINAL)
            return
        generation = self._read(inputs)
        is_streaming = bool(inputs.get("stream", False))
        if is_streaming and not self.is_decoupled:
            name = self.contract.name("stream")
            raise ValueError(f"{name}: this repository was written with --no-streaming")
        excludes_input = inputs.get("exclude_input_in_output", True)
        shown = "" if excludes_input or is_streaming else inputs.text("text_input")
        wanted = frozenset(name for name in _WANTED if inputs.get(name, False))
        key = next(self.keys)
        answer = _Answer(
            request.request_id(), sender, is_streaming, wanted, len(generation.prompt), arrival, shown
        )
        self.answers[key] = answer
        try:
            answer.number = self.engine.submit(generation, lambda chunk: self.chunks.put((key, chunk)))
        except Exception:
            del self.answers[key]
            raise

    def _read(self, inputs: _Inputs) -> Request:
        """Raises ValueError, naming the input as the client does, for a request that means nothing and one
        that asks for what the back end does not do."""
        penalties = self._penalties(inputs)
        end_id = inputs.get("end_id", self.end_id)
        request = Request(
            prompt=tuple(self._prompt(inputs)),
            max_tokens=inputs.get("max_tokens", min(MAX_TOKENS, self.limits.max_output_len)),
            min_tokens=inputs.get("min_tokens", 0),
            end_id=None if end_id == -1 else end_id,
            stop_words=inputs.words("stop_words"),
            bad_words=inputs.words("bad_words"),
            temperature=inputs.get("temperature"),
            top_k=inputs.get("top_k"),
            top_p=inputs.get("top_p"),
            seed=inputs.get("seed"),
            penalties=penalties,
        )
        request.check(self.limits, self.engine.vocabulary)
        return request

    def _penalties(self, inputs: _Inputs) -> dict[str, float]:
        """The penalties that the request asks for, after a look at what it must not ask for."""
        asked = {}
        for name in inputs.arrays.keys() - READ:
            if name not in NEUTRAL:
                raise ValueError(f"{self.contract.name(name)}: is not supported, leave it out")
            value, neutral = inputs.get(name), NEUTRAL[name]
            if value == neutral:
                continue
            if name not in self.penalties:
                called = self.contract.name(name)
                raise ValueError(f"{called}: is not supported, must be {neutral} or left out")
            asked[name] = value
        return asked

    def _prompt(self, inputs: _Inputs) -> list[int]:
        data, most = inputs.get("text_input"), self.limits.max_input_len * _LONGEST_TOKEN
        if len(data) > most:
            raise ValueError(f"text_input: has {len(data)} bytes, at most {most} are taken")
        prompt = inputs.text("text_input")
        if not prompt:
            raise ValueError("text_input: is empty")
        return self.encode(prompt)

    def _stop(self, name: str) -> None:
        if not name:
            raise ValueError("stop: the request needs the id of the one that it stops")
        for answer in list(self.answers.values()):
            if answer.name == name:
                self.engine.cancel(answer.number)

    def _configure(self, inputs: _Inputs) -> str:
        """Turn XShare's dial as the request says, and leave what it does not name; what it stands on now."""
        now: Setting | None = self.engine.setting
        mode = "on" if now is None else now.mode
        if "xshare" in inputs.arrays:
            mode = text("xshare", one("xshare", inputs.arrays["xshare"]))
        if mode not in MODES:
            raise ValueError(f"xshare={mode!r}: must be {', '.join(MODES)}")
        if "xshare_coverage" in inputs.arrays:
            coverage = round(float(one("xshare_coverage", inputs.arrays["xshare_coverage"])), 6)  # of an fp32
            options = {} if now is None else now.config.to_dict()
            config = XShareConfig.from_dict({**options, "coverage": coverage})
        elif now is not None:
            config = now.config
        else:
            raise ValueError(f"xshare={mode}: this repository has no configuration, give xshare_coverage")
        setting = Setting(config, mode)
        self.engine.configure(setting)
        return setting.to_yaml().strip()

    def _send(self) -> None:
        try:
            self._send_chunks()
        except Exception:  # nobody would get an answer any more: the server is started anew (supervise.py)
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    def _send_chunks(self) -> None:
        check = metrics = 0.0
        while True:
            try:
                item = self.chunks.get(timeout=CHECK_PERIOD)
            except queue.Empty:
                if self.is_over.is_set():
                    os._exit(1)  # no engine any more
            else:
                if item is None:
                    return
                self._send_chunk(*item)
            now = time.monotonic()
            if now - check > CHECK_PERIOD:
                check = now
                self._cancel_abandoned()
            if now - metrics > METRICS_PERIOD and self.publisher is not None:
                metrics = now
                size = self.limits.max_batch_size
                self.publisher.publish(self.engine.statistics, len(self.answers), size)

    def _cancel_abandoned(self) -> None:
        for answer in list(self.answers.values()):
            if answer.number >= 0 and answer.sender.is_cancelled():
                self.engine.cancel(answer.number)

    def _send_chunk(self, key: int, chunk: Chunk) -> None:
        answer = self.answers[key]
        answer.text += chunk.text
        answer.output_tokens += len(chunk.token_ids)
        if chunk.finish:
            del self.answers[key]
        elif not answer.is_streaming:
            return
        flags = _FINAL if chunk.finish else 0
        if chunk.finish == "error":
            answer.sender.send(_unavailable(chunk.error), flags=flags)
            return
        if chunk.stop_word and self.contract.is_cumulative:
            answer.text = answer.text.rpartition(chunk.stop_word)[0]
        # With what there is where it was cancelled: Triton 2.51 does not get over an error CANCELLED.
        answer.sender.send(self._response(_values(answer, chunk)), flags=flags)
        if not self.contract.is_cumulative:
            answer.text, answer.output_tokens = "", 0

    def _response(self, values: dict[str, Any]) -> Any:
        shape = (1, 1) if self.contract.is_batched else (1,)
        known = {tensor.name for tensor in self.contract.outputs}
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, _array(value, shape)) for name, value in values.items() if name in known]
        )


def _values(answer: _Answer, chunk: Chunk) -> dict[str, Any]:
    """The outputs of a response. Before the last one, what is known at the end only reads `None`, as
    upstream's does."""
    values: dict[str, Any] = {"text_output": answer.text}
    if "return_finish_reason" in answer.wanted:
        reasons = {"end_id": "stop", "stop_words": "stop"}
        values["finish_reason"] = reasons.get(str(chunk.finish), str(chunk.finish))
    if "return_stop_reason" in answer.wanted:
        values["stop_reason"] = chunk.stop_word or "None"
    if "return_num_input_tokens" in answer.wanted:
        values["num_input_tokens"] = np.int32(answer.input_tokens)
    if "return_num_output_tokens" in answer.wanted:
        values["num_output_tokens"] = np.int32(answer.output_tokens)
    if "return_perf_metrics" in answer.wanted and chunk.times is not None:
        values["arrival_time_ns"] = np.int64(answer.arrival)
        values["first_scheduled_time_ns"] = np.int64(chunk.times.first_scheduled)
        values["first_token_time_ns"] = np.int64(chunk.times.first_token)
        values["last_token_time_ns"] = np.int64(chunk.times.last_token)
    return values


def _array(value: Any, shape: tuple[int, ...]) -> Any:
    array = np.array([value.encode()], dtype=object) if isinstance(value, str) else np.array([value])
    return array.reshape(shape)


def _unavailable(message: str) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.UNAVAILABLE))
