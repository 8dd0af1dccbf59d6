"""Text to tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from xshare_trtllm.serving.models.common import one, parameters, pb_utils, refusal, text
from xshare_trtllm.serving.tensors import OPTIONS
from xshare_trtllm.serving.text import load_tokenizer

_NAMES = {option.to_text: option.tensor.name for option in OPTIONS if option.to_text}
_UNSUPPORTED = ("DECODER_QUERY", "EMBEDDING_BIAS_WORDS", "EMBEDDING_BIAS_WEIGHTS")


class TritonPythonModel:
    """Parameters: `tokenizer_dir`, `end_id`, `pad_id` (where the request has none; -1 = none) and
    `max_input_bytes` (longer prompts are refused before they cost time)."""

    def initialize(self, args: dict[str, str]) -> None:
        given = parameters(args)
        self.tokenizer = load_tokenizer(Path(given["tokenizer_dir"]))
        self.ids = {"END_ID": int(given["end_id"]), "PAD_ID": int(given["pad_id"])}
        self.max_input_bytes = int(given["max_input_bytes"])

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        try:
            outputs = self._encode({tensor.name(): tensor.as_numpy() for tensor in request.inputs()})
        except ValueError as error:
            return refusal(str(error))
        return pb_utils.InferenceResponse([pb_utils.Tensor(*output) for output in outputs.items()])

    def _encode(self, inputs: dict[str, Any]) -> dict[str, Any]:
        for name in _UNSUPPORTED:
            if name in inputs:
                raise ValueError(f"{_NAMES[name]}: is not supported, leave it out")
        query = one("text_input", inputs["QUERY"])
        if len(query) > self.max_input_bytes:
            raise ValueError(f"text_input: has {len(query)} bytes, at most {self.max_input_bytes} are taken")
        prompt = text("text_input", query)
        if not prompt:
            raise ValueError("text_input: is empty")
        ids = self.tokenizer.encode(prompt).ids
        return {
            "INPUT_ID": np.array([ids], dtype=np.int32),
            "REQUEST_INPUT_LEN": np.array([[len(ids)]], dtype=np.int32),
            "REQUEST_OUTPUT_LEN": inputs["REQUEST_OUTPUT_LEN"],
            "BAD_WORDS_IDS": self._words("bad_words", inputs.get("BAD_WORDS_DICT")),
            "STOP_WORDS_IDS": self._words("stop_words", inputs.get("STOP_WORDS_DICT")),
            "OUT_END_ID": inputs.get("END_ID", np.array([[self.ids["END_ID"]]], dtype=np.int32)),
            "OUT_PAD_ID": inputs.get("PAD_ID", np.array([[self.ids["PAD_ID"]]], dtype=np.int32)),
        }

    def _words(self, name: str, words: Any) -> Any:
        """[1, 2, n]: the tokens of all words, one after the other; where each word ends, filled up with -1.

        The engine compares tokens, and a word behind a space has others than at the beginning of a text: it
        is given as both.
        """
        ids: list[int] = []
        ends: list[int] = []
        given = [] if words is None else [text(name, word) for word in words.reshape(-1)]
        for word in given:
            both = [word, f" {word}"] if word else []  # an empty one would be a stop at once
            forms = {tuple(self.tokenizer.encode(form, add_special_tokens=False).ids): None for form in both}
            for tokens in filter(None, forms):
                ids += tokens
                ends.append(len(ids))
        length = max(len(ids), len(ends), 1)
        ids += [0] * (length - len(ids))
        ends += [-1] * (length - len(ends))
        return np.array([[ids, ends]], dtype=np.int32)
