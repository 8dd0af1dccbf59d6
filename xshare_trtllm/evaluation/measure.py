"""What a setting costs in quality and what it gains in speed, on any transformers model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, eq=False)
class Quality:
    """Next-token prediction over documents of equal length.

    nats         fp64 [documents], negative log-likelihood of each text
    bytes        int64 [documents], size of each text
    predictions  int64 [documents, tokens], the token with the highest logit
    targets      int64 [documents, tokens]
    """

    nats: Tensor
    bytes: Tensor
    predictions: Tensor
    targets: Tensor

    @property
    def bits_per_byte(self) -> float:
        return float(self.nats.sum() / self.bytes.sum()) / math.log(2)

    @property
    def accuracy(self) -> float:
        """Share of tokens that have the highest logit."""
        return float(self.hits.mean())

    @property
    def hits(self) -> Tensor:
        """fp64 [documents], the accuracy on each."""
        return (self.predictions == self.targets).double().mean(1)


@dataclass(frozen=True, slots=True)
class Change:
    """Relative changes against a baseline on the same documents, with 95 % intervals (bootstrap of pairs)."""

    bits_per_byte: float
    bits_interval: tuple[float, float]
    accuracy: float
    accuracy_interval: tuple[float, float]


def compare(quality: Quality, base: Quality, resamples: int = 2000) -> Change:
    """How `quality` differs from `base`: documents are drawn with replacement, both sides the same ones."""
    documents = len(base.nats)
    picks = torch.randint(documents, (resamples, documents), generator=torch.Generator().manual_seed(0))
    bounds = torch.tensor([0.025, 0.975], dtype=torch.float64)

    def relative(mine: Tensor, theirs: Tensor) -> tuple[float, tuple[float, float]]:
        low, high = (mine[picks].sum(1) / theirs[picks].sum(1) - 1).quantile(bounds).tolist()
        return float(mine.sum() / theirs.sum()) - 1, (low, high)

    bits, bits_interval = relative(quality.nats, base.nats)
    accuracy, accuracy_interval = relative(quality.hits, base.hits)
    return Change(bits, bits_interval, accuracy, accuracy_interval)


@torch.inference_mode()
def teacher_forced(model: nn.Module, batches: Iterable[Tensor], token_bytes: Tensor) -> Quality:
    """Quality over batches of token ids `[batch, 1 + length]`; the first token of each row is not predicted.

    With XShare attached `stepwise`, every position is routed as the decode step that it would be.
    """
    parts = []
    for tokens in batches:
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.float()
        targets = tokens[:, 1:]
        nats = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        size = token_bytes[targets.cpu()].sum(1)
        parts.append((nats.double().sum(1).cpu(), size, logits.argmax(-1).cpu(), targets.cpu()))
    return Quality(*(torch.cat(part) for part in zip(*parts, strict=True)))


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
