"""What a request asks for and what comes back: the words that the engines, the worker and Triton share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
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
    min_tokens   before so many tokens are generated, `end_id` is not chosen
    end_id       the token that ends the text, and is not part of it; None = none
    stop_words   the token that completes one of these texts is the last
    bad_words    texts that the answer does not contain
    temperature  divides the logits, 0 = greedy; None = 1
    top_k        sample from that many best tokens, 1 = greedy; None or 0 = all
    top_p        sample from the best tokens that together have this probability, 0 = greedy; None = 1
    seed         of the sampling; equal requests with equal seeds give equal draws; None = always another
    penalties    `repetition_penalty`, `presence_penalty`, `frequency_penalty`, for engines that know them

    Greedy where temperature, top_k and top_p are all None, as in TensorRT-LLM's PyTorch backend.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    min_tokens: int = 0
    end_id: int | None = None
    stop_words: tuple[str, ...] = ()
    bad_words: tuple[str, ...] = ()
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    penalties: dict[str, float] = field(default_factory=dict)

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
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens}: must be from 0 to max_tokens={self.max_tokens}")
        if self.end_id is not None and not 0 <= self.end_id < vocabulary:
            raise ValueError(f"end_id={self.end_id}: must be from 0 to {vocabulary - 1}, or -1 for none")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: must be a number from 0 on")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: must be from 0 on")
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be from 0 to 1")


@dataclass(frozen=True, slots=True)
class Times:
    """When a request was admitted to the batch, and when its first and last token came: nanoseconds of the
    machine's monotonic clock."""

    first_scheduled: int
    first_token: int
    last_token: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next piece of an answer.

    token_ids  tokens since the last chunk; together they are whole UTF-8 characters, except at the very end
    text       the same as text
    finish     why the answer ends with this chunk; None: more will come
    stop_word  where `finish` is `stop_words`: which one
    times      with the last chunk, where the engine measures them
    error      where `finish` is `error`: what went wrong, in the user's words
    """

    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish: FinishReason | None = None
    stop_word: str = ""
    times: Times | None = None
    error: str = ""


OnChunk = Callable[[Chunk], None]


class Busy(RuntimeError):
    """The engine cannot take the request now; later it can."""
