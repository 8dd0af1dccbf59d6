"""Tokens to text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from xshare_trtllm.serving.models.common import parameters, pb_utils, refusal
from xshare_trtllm.serving.text import load_tokenizer


class TritonPythonModel:
    """Parameters: `tokenizer_dir` and `skip_special_tokens`."""

    def initialize(self, args: dict[str, str]) -> None:
        given = parameters(args)
        self.tokenizer = load_tokenizer(Path(given["tokenizer_dir"]))
        self.skip_special_tokens = given["skip_special_tokens"] == "true"

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        lengths, tokens = inputs["SEQUENCE_LENGTH"], inputs["TOKENS_BATCH"]
        if lengths.min(initial=0) < 0 or lengths.shape != tokens.shape[:2]:
            return refusal("SEQUENCE_LENGTH: must be one length from 0 on for each row of TOKENS_BATCH")
        if tokens.min(initial=0) < 0:
            return refusal("TOKENS_BATCH: must be from 0 on")
        beams = tokens.reshape(lengths.size, tokens.shape[-1])
        texts = [
            self.tokenizer.decode(ids[:length].tolist(), skip_special_tokens=self.skip_special_tokens)
            for ids, length in zip(beams, lengths.reshape(-1), strict=True)
        ]
        output = np.array([text.encode() for text in texts], dtype=object).reshape(lengths.shape)
        return pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", output)])
