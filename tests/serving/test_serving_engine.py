"""Continuous batching: what comes out is what each sequence alone would give."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from xshare_trtllm import XShareConfig
from xshare_trtllm.evaluation import MODEL_DIR, greedy_decode, held_out, load_model
from xshare_trtllm.hf import Decoder, attach
from xshare_trtllm.routing import contiguous_placement
from xshare_trtllm.serving.engine import Engine, sample
from xshare_trtllm.serving.generation import Busy, Chunk, Limits, Request
from xshare_trtllm.serving.text import load_tokenizer, token_texts
from xshare_trtllm.trtllm.setting import Setting

LIMITS = Limits(max_batch_size=4, max_queue_size=8, max_input_len=40, max_output_len=40)
TOKENIZER = load_tokenizer(MODEL_DIR)
TEXTS = token_texts(TOKENIZER)
PROMPTS = [tuple(TOKENIZER.encode(document.text[:60]).ids[:16]) for document in held_out()[:8]]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.set_num_threads(1)
    return Decoder(load_model()[0], 80)


@pytest.fixture
def engine(decoder: Decoder) -> Iterator[Engine]:
    running = Engine(decoder, TEXTS, limits=LIMITS)
    yield running
    running.close()


class Reader:
    """Collects one answer."""

    def __init__(self) -> None:
        self.chunks: queue.Queue[Chunk] = queue.Queue()

    def __call__(self, chunk: Chunk) -> None:
        self.chunks.put(chunk)

    def first(self) -> Chunk:
        return self.chunks.get(timeout=20)

    def all(self) -> tuple[list[int], Chunk]:
        """The tokens and the last chunk."""
        tokens: list[int] = []
        while True:
            chunk = self.first()
            tokens += chunk.token_ids
            if chunk.finish:
                return tokens, chunk


def ask(engine: Engine, request: Request) -> tuple[list[int], Chunk]:
    reader = Reader()
    engine.submit(request, reader)
    return reader.all()


def alone(decoder: Decoder, prompt: tuple[int, ...], steps: int) -> list[int]:
    tokens: list[int] = greedy_decode(decoder, torch.tensor([prompt]), steps)[0][0].tolist()
    return tokens


def test_a_batch_gives_what_each_sequence_alone_gives(engine: Engine, decoder: Decoder) -> None:
    """Eight sequences of different lengths in four rows: they join and leave at different steps."""
    lengths = [3, 17, 1, 9, 40, 2, 25, 12]
    readers = [Reader() for _ in PROMPTS]
    for prompt, length, reader in zip(PROMPTS, lengths, readers, strict=True):
        engine.submit(Request(prompt[: 2 + length % 14], length), reader)
    answers = [reader.all() for reader in readers]
    for prompt, length, (tokens, last) in zip(PROMPTS, lengths, answers, strict=True):
        assert last.finish == "length"
        assert tokens == alone(decoder, prompt[: 2 + length % 14], length)
    statistics = engine.statistics
    assert statistics.finished == {"length": 8} and statistics.output_tokens == sum(lengths)
    assert statistics.layers[0][7] == sum(length - 1 for length in lengths)
    assert (statistics.running, statistics.waiting) == (0, 0)


def test_a_budget_is_kept_for_the_whole_batch(decoder: Decoder) -> None:
    gpus = contiguous_placement(64, 8)
    engine = Engine(decoder, TEXTS, Setting(XShareConfig(20, warmup=1)), LIMITS, expert_gpu=gpus)
    readers = [Reader() for _ in range(4)]
    for prompt, reader in zip(PROMPTS, readers, strict=False):
        engine.submit(Request(prompt, 30), reader)
    for reader in readers:
        reader.all()
    engine.close()
    for before, after, *_, rows, asides, steps in engine.statistics.layers:
        assert rows == 4 * 29 and asides == 0 and steps < 60
        assert 8 * steps <= after < before and after <= 20 * steps


def test_ends_at_the_end_token_and_at_stop_words(engine: Engine, decoder: Decoder) -> None:
    expected = alone(decoder, PROMPTS[0], 20)
    end = expected[10]
    tokens, last = ask(engine, Request(PROMPTS[0], 20, end_id=end))
    assert tokens == expected[: expected.index(end)] and last.finish == "end_id"
    word = (TEXTS[expected[3]] + TEXTS[expected[4]][:1]).decode()
    seen = [b"".join(TEXTS[token] for token in expected[: count + 1]) for count in range(20)]
    length = next(count + 1 for count, text in enumerate(seen) if word.encode() in text)
    tokens, last = ask(engine, Request(PROMPTS[0], 20, stop_words=("never said", word, "")))
    assert tokens == expected[:length] and (last.finish, last.stop_word) == ("stop_words", word)


def test_the_end_token_does_not_come_before_min_tokens(engine: Engine, decoder: Decoder) -> None:
    expected = alone(decoder, PROMPTS[0], 20)
    end = expected[3]
    first = expected.index(end)
    tokens, last = ask(engine, Request(PROMPTS[0], 20, min_tokens=first + 5, end_id=end))
    assert tokens[:first] == expected[:first] and len(tokens) >= first + 5 and end not in tokens
    assert last.finish in ("end_id", "length")


def test_bad_words_do_not_appear_and_the_rest_is_as_it_was(engine: Engine, decoder: Decoder) -> None:
    expected = alone(decoder, PROMPTS[0], 20)
    text = b"".join(TEXTS[token] for token in expected)
    word = (TEXTS[expected[5]] + TEXTS[expected[6]]).decode()  # across two tokens
    tokens, _ = ask(engine, Request(PROMPTS[0], 20, bad_words=("never said", word)))
    said = b"".join(TEXTS[token] for token in tokens)
    assert word.encode() in text and word.encode() not in said and len(tokens) == 20
    assert tokens[:5] == expected[:5]


def test_times_are_in_order(engine: Engine) -> None:
    started = time.monotonic_ns()
    times = ask(engine, Request(PROMPTS[0], 5))[1].times
    assert times is not None
    moments = [started, times.first_scheduled, times.first_token, times.last_token, time.monotonic_ns()]
    assert moments == sorted(moments)


def test_another_configuration_holds_from_the_next_step_on(decoder: Decoder) -> None:
    engine = Engine(decoder, TEXTS, None, LIMITS)

    def used() -> tuple[int, int]:
        before = engine.statistics.layers[0]
        readers = [Reader() for _ in range(4)]
        for prompt, reader in zip(PROMPTS, readers, strict=False):
            engine.submit(Request(prompt, 30), reader)
        for reader in readers:
            reader.all()
        while engine.statistics.layers[0][9] - before[9] < 29:  # counted when the last step has ended
            time.sleep(0.01)
        own, active, *_, steps = (a - b for a, b in zip(engine.statistics.layers[0], before, strict=True))
        assert active <= own and steps >= 29
        return own, active

    own, active = used()
    assert active == own
    for mode in ("on", "shadow", "off"):
        engine.configure(Setting(XShareConfig(10, warmup=0), mode))
        own, active = used()
        assert active == own if mode == "off" else active < own
        assert engine.statistics.setting == Setting(XShareConfig(10, warmup=0), mode)
    with pytest.raises(ValueError, match="budget must be at least top_k=8"):
        engine.configure(Setting(XShareConfig(4)))
    engine.close()


def answers_of_one_batch(engine: Engine, length: int) -> list[list[int]]:
    """Of four sequences that are admitted together, so that every step has the rows of all."""
    all_wait = threading.Event()
    engine.submit(Request(PROMPTS[0], 1), lambda chunk: all_wait.wait(20) and None)
    readers = [Reader() for _ in range(4)]
    for prompt, reader in zip(PROMPTS, readers, strict=False):
        engine.submit(Request(prompt, length), reader)
    all_wait.set()
    return [reader.all()[0] for reader in readers]


@pytest.mark.parametrize("limited", [range(4), (0,), (3,)], ids=["all layers", "the first", "the last"])
def test_shadow_says_what_off_says_and_counts_what_on_would(decoder: Decoder, limited: Sequence[int]) -> None:
    """A layer sees the same rows in all modes where those before it are not limited, in the first step."""
    config = XShareConfig([10 if layer in limited else 64 for layer in range(4)], warmup=0)
    said, counted = {}, {}
    for mode in ("off", "shadow", "on"):
        engine = Engine(decoder, TEXTS, Setting(config, mode), LIMITS)
        answers_of_one_batch(engine, 2)
        engine.close()
        counted[mode] = engine.statistics.layers
        engine = Engine(decoder, TEXTS, Setting(config, mode), LIMITS)
        said[mode] = answers_of_one_batch(engine, 30)
        engine.close()
    assert said["shadow"] == said["off"] and said["on"] != said["off"]
    same = range(limited[0] + 1)
    assert [counted["shadow"][layer] for layer in same] == [counted["on"][layer] for layer in same]
    for layer, (before, after, *_, rows, asides, steps) in enumerate(counted["shadow"]):
        assert (after < before) == (layer in limited)
        assert (rows, asides, steps) == (4, layer not in limited, 1)
        assert counted["off"][layer][:2] == (before, before)


def test_sampling_repeats_with_its_seed_whoever_is_beside_it(engine: Engine) -> None:
    request = Request(PROMPTS[1], 20, temperature=1.0, seed=5)
    assert len({tuple(ask(engine, replace(request, seed=None))[0]) for _ in range(3)}) > 1
    first = ask(engine, request)[0]
    others = [Reader() for _ in range(3)]
    for prompt, reader in zip(PROMPTS[2:], others, strict=False):
        engine.submit(Request(prompt, 20, top_k=5, seed=9), reader)
    assert ask(engine, request)[0] == first
    assert ask(engine, replace(request, seed=6))[0] != first
    for reader in others:
        reader.all()


def test_sample_draws_from_what_top_k_and_top_p_leave() -> None:
    logits = torch.tensor([0.1, 0.2, 0.15, 0.5, 0.05]).log()
    generator = torch.Generator().manual_seed(1)

    def drawn(**options: Any) -> Tensor:
        request = Request((1,), 1, **options)
        draws = [sample(logits, request, generator) for _ in range(2000)]
        return torch.bincount(torch.tensor(draws), minlength=5) / 2000

    # 2000 draws: the standard deviation of a share is at most 0.011
    expected = {
        (("temperature", 1.0),): [0.1, 0.2, 0.15, 0.5, 0.05],
        (("temperature", 0.5),): [0.031, 0.123, 0.069, 0.769, 0.008],
        (("top_k", 2),): [0, 2 / 7, 0, 5 / 7, 0],
        (("top_p", 0.6),): [0, 2 / 7, 0, 5 / 7, 0],
        (("top_p", 0.5),): [0, 0, 0, 1, 0],
        (("top_k", 3), ("top_p", 0.9)): [0, 4 / 17, 3 / 17, 10 / 17, 0],
    }
    for options, shares in expected.items():
        torch.testing.assert_close(
            drawn(**dict(options)), torch.tensor(shares, dtype=torch.float32), atol=0.05, rtol=0
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ()}, "the prompt has 0 tokens: must be from 1 to 40"),
        ({"prompt": (1,) * 41}, "the prompt has 41 tokens"),
        ({"prompt": (1, -1)}, "input_ids: must be from 0 to 4095"),
        ({"prompt": (1, 4096)}, "input_ids: must be from 0 to 4095"),
        ({"max_tokens": 0}, "max_tokens=0: must be from 1 to 40"),
        ({"max_tokens": 41}, "max_tokens=41"),
        ({"min_tokens": 4}, "min_tokens=4: must be from 0 to max_tokens=3"),
        ({"min_tokens": -1}, "min_tokens=-1"),
        ({"end_id": 4096}, "end_id=4096"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 1.01}, "top_p=1.01"),
    ],
)
def test_what_means_nothing_is_refused(engine: Engine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.submit(replace(Request((1, 2), 3), **options), Reader())


class Gate(Reader):
    """Holds the engine's thread at the first chunk, so that a test can act between two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.is_reached, self.is_open = threading.Event(), threading.Event()

    def __call__(self, chunk: Chunk) -> None:
        super().__call__(chunk)
        self.is_reached.set()
        assert self.is_open.wait(20)


def hold(engine: Engine, max_tokens: int = 3) -> Gate:
    gate = Gate()
    engine.submit(Request(PROMPTS[0], max_tokens), gate)
    assert gate.is_reached.wait(20)
    return gate


def test_a_full_queue_refuses(engine: Engine) -> None:
    gate = hold(engine)
    readers = [Reader() for _ in range(8)]
    for reader in readers:
        engine.submit(Request(PROMPTS[1], 2), reader)
    with pytest.raises(Busy, match="8 requests are waiting: try again later"):
        engine.submit(Request(PROMPTS[1], 2), Reader())
    gate.is_open.set()
    assert all(len(reader.all()[0]) == 2 for reader in readers)


def test_cancels_what_runs_and_what_waits(engine: Engine, decoder: Decoder) -> None:
    gate = hold(engine, 30)
    running, waiting, other = Reader(), Reader(), Reader()
    generations = [engine.submit(Request(PROMPTS[1], 30), running)]
    engine.submit(Request(PROMPTS[2], 30), other)
    generations += [engine.submit(Request(PROMPTS[3], 30), waiting)]
    generations[1].cancel()
    gate.is_open.set()
    running.first()
    generations[0].cancel()
    assert running.all()[1].finish == waiting.all()[1].finish == "cancelled"
    assert other.all()[0] == alone(decoder, PROMPTS[2], 30)
    assert gate.all()[0] == alone(decoder, PROMPTS[0], 30)


def test_a_failing_model_ends_its_batch_only(
    engine: Engine, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, beside = hold(engine), Reader()
    engine.submit(Request(PROMPTS[1], 5), beside)
    with monkeypatch.context() as patch:
        patch.setattr(decoder.layers[1], "forward", lambda *_: 1 / 0)
        gate.is_open.set()
        last = gate.all()[1]
        assert last.finish == "error" and "the model failed: division by zero" in last.error
        assert beside.all()[1].finish == "error"
    assert ask(engine, Request(PROMPTS[2], 10))[0] == alone(decoder, PROMPTS[2], 10)


def test_close_ends_everything_and_detaches(decoder: Decoder) -> None:
    engine = Engine(decoder, TEXTS, Setting(XShareConfig(20)), LIMITS)
    gate, waiting = hold(engine, 40), Reader()
    engine.submit(Request(PROMPTS[1], 5), waiting)
    closing = threading.Thread(target=engine.close)
    closing.start()
    gate.is_open.set()
    closing.join(timeout=20)
    assert not closing.is_alive()
    assert gate.all()[1].error == waiting.all()[1].error == "the server stopped the model"
    with pytest.raises(Busy, match="closing"):
        engine.submit(Request(PROMPTS[1], 5), Reader())
    attach(decoder, XShareConfig(20)).detach()


def test_a_cache_that_is_too_small_is_refused(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match=r"Decoder\(capacity=80\) must hold 81 tokens"):
        Engine(decoder, TEXTS, limits=replace(LIMITS, max_output_len=41))
    with pytest.raises(ValueError, match=r"Limits\(max_queue_size=0\): must be at least 1"):
        Limits(max_queue_size=0)
