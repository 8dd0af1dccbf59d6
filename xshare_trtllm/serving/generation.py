"""What a request asks for and what comes back: the words that the engines, the worker and Triton share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["end_id", "stop_words", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine takes on.

    max_batch_size   sequences that are decoded as one batch
    max_queue_size   requests that wait for a place in it
    max_input_len    tokens of a prompt
    max_output_len   tokens that a request may generate
    """

    max_batch_size: int = 16
    max_queue_size: int = 128
    max_input_len: int = 512
    max_output_len: int = 512

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise ValueError(f"Limits({name}={getattr(self, name)}): must be at least 1")


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate.

    prompt       token ids
    max_tokens   tokens to generate at most
    end_id       the token that ends the text, and is not part of it; None = none
    stop_words   texts, UTF-8: the token that completes one of them is the last
    temperature  divides the logits, 0 = greedy; None = 1
    top_k        sample from that many best tokens, 1 = greedy; None or 0 = all
    top_p        sample from the best tokens that together have this probability, 0 = greedy; None = 1
    seed         of the sampling; equal requests with equal seeds give equal draws

    Greedy where temperature, top_k and top_p are all None, as in TensorRT-LLM's PyTorch backend.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    end_id: int | None = None
    stop_words: tuple[bytes, ...] = ()
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    @property
    def is_greedy(self) -> bool:
        given = (self.temperature, self.top_k, self.top_p)
        return given == (None, None, None) or self.temperature == 0 or self.top_k == 1 or self.top_p == 0

    def check(self, limits: Limits, vocabulary: int) -> None:
        """Raises ValueError where the request is outside the limits or means nothing, naming the input."""
        length = len(self.prompt)
        if not 1 <= length <= limits.max_input_len:
            raise ValueError(f"the prompt has {length} tokens: must be from 1 to {limits.max_input_len}")
        if min(self.prompt) < 0 or max(self.prompt) >= vocabulary:
            raise ValueError(f"input_ids: must be from 0 to {vocabulary - 1}")
        if not 1 <= self.max_tokens <= limits.max_output_len:
            raise ValueError(f"max_tokens={self.max_tokens}: must be from 1 to {limits.max_output_len}")
        if self.end_id is not None and not 0 <= self.end_id < vocabulary:
            raise ValueError(f"end_id={self.end_id}: must be from 0 to {vocabulary - 1}, or -1 for none")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: must be a number from 0 on")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: must be from 0 on")
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be from 0 to 1")


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next piece of an answer.

    token_ids  tokens since the last chunk; together they are whole UTF-8 characters, except at the very end
    text       the same as text
    finish     why the answer ends with this chunk; None: more will come
    error      where `finish` is `error`: what went wrong, in the user's words
    """

    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish: FinishReason | None = None
    error: str = ""


OnChunk = Callable[[Chunk], None]


class Busy(RuntimeError):
    """The engine cannot take the request now; later it can."""
