"""Text to text, through the other models: the business-logic form of the ensemble.

It does what an ensemble cannot: a cancelled request stops the model, and a character whose bytes come in two
responses is shown once it is whole, whatever the back end.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from xshare_trtllm.serving.models.common import parameters, pb_utils
from xshare_trtllm.serving.tensors import OPTIONS, TOKENS_TO_MODEL, TOKENS_TO_TEXT

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
_TO_TEXT = {option.tensor.name: option.to_text for option in OPTIONS if option.to_text}
_TO_MODEL = {option.tensor.name: option.to_model for option in OPTIONS if option.to_model}
_HALF = "\ufffd"  # what the bytes of half a character decode to
_LONGEST = 4  # tokens that one character may need; more of them are no character


class _Failure(Exception):
    """Another model's error, to be handed on."""


class TritonPythonModel:
    """Parameters: `tensorrt_llm_model_name`, `max_requests` (that run at the same time)."""

    def initialize(self, args: dict[str, str]) -> None:
        given = parameters(args)
        self.model = given["tensorrt_llm_model_name"]
        self.is_decoupled = pb_utils.using_decoupled_model_transaction_policy(
            json.loads(args["model_config"])
        )
        self.pool = ThreadPoolExecutor(int(given["max_requests"]), "xshare-bls")

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            self.pool.submit(self._respond, request, request.get_response_sender())

    def finalize(self) -> None:
        self.pool.shutdown(cancel_futures=True)

    def _respond(self, request: Any, sender: Any) -> None:
        try:
            self._generate(request, sender)
        except _Failure as failure:
            sender.send(pb_utils.InferenceResponse(error=failure.args[0]), flags=_FINAL)
        except Exception as error:  # a request without an answer would hang
            failed = pb_utils.TritonError(f"{type(error).__name__}: {error}")
            sender.send(pb_utils.InferenceResponse(error=failed), flags=_FINAL)

    def _generate(self, request: Any, sender: Any) -> None:
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        prompt = self._call("preprocessing", _renamed(inputs, _TO_TEXT), list(TOKENS_TO_MODEL))
        tokens = _renamed(prompt, TOKENS_TO_MODEL)
        name = uuid.uuid4().hex
        held = np.empty((1, 1, 0), dtype=np.int32)
        is_cancelled = False
        for ids in self._stream(name, tokens | _renamed(inputs, _TO_MODEL)):
            if not is_cancelled and sender.is_cancelled():
                is_cancelled = True
                self._stop(name, tokens)
            if is_cancelled:
                continue
            held = np.concatenate([held, ids], axis=-1)
            output = self._text(held)
            is_half = output.reshape(-1)[0].decode().endswith(_HALF) and held.shape[-1] < _LONGEST
            if is_half and self.is_decoupled:
                continue
            self._show(sender, output)
            held = held[:, :, :0]
        if held.size:
            self._show(sender, self._text(held))
        if self.is_decoupled:
            sender.send(flags=_FINAL)

    def _show(self, sender: Any, output: Any) -> None:
        response = pb_utils.InferenceResponse([pb_utils.Tensor("text_output", output)])
        sender.send(response, flags=0 if self.is_decoupled else _FINAL)

    def _text(self, ids: Any) -> Any:
        lengths = np.full(ids.shape[:2], ids.shape[-1], dtype=np.int32)
        return self._call("postprocessing", {"TOKENS_BATCH": ids, "SEQUENCE_LENGTH": lengths}, ["OUTPUT"])[
            "OUTPUT"
        ]

    def _stream(self, name: str, inputs: dict[str, Any]) -> Iterator[Any]:
        """`output_ids` [1, beams, n] of every response of the model, cut to their lengths."""
        responses, failures = self._responses(name, inputs), []
        try:
            for response in responses:
                if response.has_error():
                    failures.append(response.error())
                elif outputs := _outputs(response):
                    yield outputs["output_ids"][..., : outputs["sequence_length"].max(initial=0)]
        finally:
            for _ in responses:  # one that is not read to its end keeps Triton's process from ending
                pass
        if failures:
            raise _Failure(failures[0])

    def _stop(self, name: str, tokens: dict[str, Any]) -> None:
        for _ in self._responses(name, {**tokens, "stop": np.array([[True]])}):
            pass

    def _responses(self, name: str, inputs: dict[str, Any]) -> Iterator[Any]:
        request = _request(self.model, inputs, list(TOKENS_TO_TEXT), name)
        if self.is_decoupled:
            yield from request.exec(decoupled=True)
        else:
            yield request.exec()

    def _call(self, model: str, inputs: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
        return _outputs(_request(model, inputs, outputs).exec())


def _renamed(arrays: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names[name]: array for name, array in arrays.items() if name in names}


def _request(model: str, inputs: dict[str, Any], outputs: list[str], name: str = "") -> Any:
    tensors = [pb_utils.Tensor(*item) for item in inputs.items()]
    return pb_utils.InferenceRequest(
        model_name=model, request_id=name, requested_output_names=outputs, inputs=tensors
    )


def _outputs(response: Any) -> dict[str, Any]:
    if response.has_error():
        raise _Failure(response.error())
    return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
