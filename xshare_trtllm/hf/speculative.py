"""Speculative decoding in a batch: cheap drafts, verified by one pass of the model."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from xshare_trtllm.hf.attach import Attachment
from xshare_trtllm.hf.decoder import Decoder


@dataclass(frozen=True, slots=True)
class Speculation:
    """What a run of `speculative_decode` made.

    tokens    the new tokens of each sequence, of different lengths
    seconds   time of the steps, drafting included, prefill not
    steps     verification passes
    drafted   draft tokens that were verified, over all sequences
    accepted  draft tokens that were kept
    """

    tokens: list[list[int]]
    seconds: float
    steps: int
    drafted: int
    accepted: int

    @property
    def new_tokens(self) -> int:
        """Tokens made by the steps: all but each sequence's first, which the prefill made."""
        return sum(len(tokens) - 1 for tokens in self.tokens)

    @property
    def tokens_per_step(self) -> float:
        """Tokens that one sequence gains in one step: the accepted drafts and the model's own."""
        return self.new_tokens / (self.steps * len(self.tokens))


class PromptLookup:
    """Drafts what followed the last tokens of a text when they last occurred in it (Saxena, 2023).

    longest  tokens that must recur; where they do not, one fewer is tried, down to one
    """

    def __init__(self, longest: int = 3) -> None:
        self.longest = longest
        self._text: list[int] = []
        self._followers: dict[tuple[int, ...], int] = {}  # where the text goes on after these tokens

    def extend(self, tokens: list[int]) -> None:
        """The text goes on with `tokens`."""
        for token in tokens:
            end = len(self._text)  # what ends here is followed by `token`; the newest place wins
            for length in range(1, min(self.longest, end) + 1):
                self._followers[tuple(self._text[end - length :])] = end
            self._text.append(token)

    def draft(self, length: int) -> list[int]:
        """Up to `length` tokens that may come next; none where the last token is new to the text."""
        for recurring in range(min(self.longest, len(self._text)), 0, -1):
            start = self._followers.get(tuple(self._text[-recurring:]))
            if start is not None:
                return self._text[start : start + length]
        return []


@torch.inference_mode()
def speculative_decode(
    decoder: Decoder,
    prompts: Tensor,
    steps: int,
    draft_len: int,
    attached: Attachment | None = None,
) -> Speculation:
    """Greedy decoding with drafts of up to `draft_len` tokens per sequence and step, verified in one pass.

    A step keeps, for each sequence, the drafts up to the first that is not the model's own choice, and then
    the model's own choice; the cache is rolled back to there. With the model's own routing the tokens are
    those of plain greedy decoding. With XShare attached, the rows of all drafts of a step are one batch, the
    rows of a sequence are one request, and the prefill keeps the model's own routing.

    prompts  int64 [batch, length], without padding

    Raises ValueError where the decoder's capacity is smaller than the prompt and
    `steps * (1 + draft_len)` tokens.
    """
    batch, length = prompts.shape
    needed = length + steps * (1 + draft_len)
    if needed > decoder.capacity:
        raise ValueError(f"Decoder(capacity={decoder.capacity}): the steps may need {needed} tokens")
    if attached is not None:
        attached.prefill = "exempt"
    output = decoder(input_ids=prompts)
    cache = output.cache
    tokens = output.logits[:, -1].argmax(-1, keepdim=True).tolist()
    lookups = [PromptLookup() for _ in range(batch)]
    for lookup, prompt, new in zip(lookups, prompts.tolist(), tokens, strict=True):
        lookup.extend(prompt + new)
    if attached is not None:
        attached.prefill = "shared"
    drafted = accepted = 0
    started = time.perf_counter()
    for _ in range(steps):
        drafts = [lookup.draft(draft_len) for lookup in lookups]
        pieces = [[own[-1], *draft] for own, draft in zip(tokens, drafts, strict=True)]
        input_ids, mask = _padded(pieces)
        before = cache.lengths.clone()
        logits = decoder(input_ids=input_ids, cache=cache, attention_mask=mask).logits
        kept = [_verified(*pair) for pair in zip(drafts, logits.argmax(-1).tolist(), strict=True)]
        cache.lengths.copy_(before + torch.tensor([len(new) for new in kept]))
        for own, lookup, new in zip(tokens, lookups, kept, strict=True):
            own.extend(new)
            lookup.extend(new)
        drafted += sum(map(len, drafts))
        accepted += sum(len(new) - 1 for new in kept)
    return Speculation(tokens, time.perf_counter() - started, steps, drafted, accepted)


def _padded(pieces: list[list[int]]) -> tuple[Tensor, Tensor | None]:
    """The pieces as one tensor [batch, longest], and the mask of what is no padding, None where all is."""
    longest = max(map(len, pieces))
    input_ids = torch.tensor([piece + [0] * (longest - len(piece)) for piece in pieces])
    lengths = torch.tensor([len(piece) for piece in pieces])
    if int(lengths.min()) == longest:
        return input_ids, None
    return input_ids, torch.arange(longest) < lengths[:, None]


def _verified(draft: list[int], choices: list[int]) -> list[int]:
    """The drafts up to the first that differs from the model's choice, and then that choice."""
    kept = 0
    while kept < len(draft) and draft[kept] == choices[kept]:
        kept += 1
    return choices[: kept + 1]
