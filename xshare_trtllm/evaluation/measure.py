"""What a setting costs in quality and what it gains in speed, on any transformers model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Quality:
    """Next-token prediction over some text.

    bits_per_byte  negative log-likelihood of the text
    accuracy       share of tokens that have the highest logit
    predictions    int64 [tokens], the token with the highest logit, for comparing two settings token by token
    """

    bits_per_byte: float
    accuracy: float
    predictions: Tensor


@torch.inference_mode()
def teacher_forced(model: nn.Module, batches: Iterable[Tensor], token_bytes: Tensor) -> Quality:
    """Quality over batches of token ids `[batch, 1 + length]`; the first token of each row is not predicted.

    With XShare attached `stepwise`, every position is routed as the decode step that it would be.
    """
    nats, size = 0.0, 0
    hits, predictions = [], []
    for tokens in batches:
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.float()
        targets = tokens[:, 1:]
        nats += float(nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        size += int(token_bytes[targets].sum())
        predictions.append(logits.argmax(-1).flatten())
        hits.append(predictions[-1] == targets.flatten())
    return Quality(
        bits_per_byte=nats / math.log(2) / size,
        accuracy=float(torch.cat(hits).float().mean()),
        predictions=torch.cat(predictions),
    )


@torch.inference_mode()
def greedy_decode(model: nn.Module, prompts: Tensor, steps: int) -> tuple[Tensor, float]:
    """Greedy continuation with a KV cache: `(tokens [batch, steps], seconds)`; prefill is not in the seconds.

    prompts  int64 [batch, length], without padding
    """
    output = model(input_ids=prompts, use_cache=True)
    cache = output.cache
    token = output.logits[:, -1:].argmax(-1)
    tokens = [token]
    started = time.perf_counter()
    for _ in range(steps - 1):
        output = model(input_ids=token, cache=cache, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
        tokens.append(token)
    seconds = time.perf_counter() - started
    return torch.cat(tokens, dim=1), seconds


def agreement(tokens: Tensor, baseline: Tensor) -> float:
    """Share of each row up to its first token that differs from the baseline's, averaged: 1 if all are
    equal."""
    equal = (tokens == baseline).long().cumprod(dim=-1)
    return float(equal.float().mean())


@contextmanager
def one_thread() -> Iterator[None]:
    """Steps of milliseconds, shared between threads, stall on a busy machine; one thread times fairly."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
