"""Speculative decoding: the same tokens as plain decoding, in fewer passes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xshare_trtllm import XShareConfig
from xshare_trtllm.evaluation import greedy_decode, held_out, load_model, token_batches
from xshare_trtllm.hf import Decoder, attach
from xshare_trtllm.hf.speculative import PromptLookup, speculative_decode

STEPS, DRAFT_LEN, PROMPT = 16, 3, 96


@pytest.fixture(scope="module")
def shipped():
    model, tokenizer = load_model()
    prompts = token_batches(held_out()[:8], tokenizer, PROMPT, 4)
    return Decoder(model, PROMPT + 1 + STEPS * (1 + DRAFT_LEN)), prompts


@pytest.mark.parametrize("draft_len", [0, 1, DRAFT_LEN])
def test_the_tokens_are_those_of_plain_decoding(shipped, draft_len):
    decoder, batches = shipped
    for prompts in batches:
        run = speculative_decode(decoder, prompts, STEPS, draft_len)
        longest = max(map(len, run.tokens))
        plain, _ = greedy_decode(decoder, prompts, longest)
        for own, expected in zip(run.tokens, plain.tolist(), strict=True):
            assert own == expected[: len(own)]
        assert run.new_tokens == run.steps * len(prompts) + run.accepted
        assert run.accepted <= run.drafted <= STEPS * len(prompts) * draft_len
        assert (run.accepted > 0) == (draft_len > 0)


def test_with_xshare_every_step_is_one_batch_of_requests(shipped):
    """Rows of all drafts of a step are routed together; the prefill is not; a draft of nothing is no row."""
    decoder, (prompts, _) = shipped
    config = XShareConfig(24, warmup=1, request_budget=12)
    with attach(decoder, config) as attached:
        run = speculative_decode(decoder, prompts, STEPS, DRAFT_LEN, attached)
        stats = attached.stats
    assert [layer.steps for layer in stats] == [STEPS] * 4
    for layer in stats:
        assert layer.rows * STEPS == STEPS * len(prompts) + run.drafted
        assert layer.experts_after <= 24 + layer.warmup_overflow < layer.experts_before


def test_unlimited_requests_are_a_flat_budget(shipped):
    """A request that may propose every expert proposes what the batch would choose."""
    decoder, (prompts, _) = shipped
    runs = []
    for request_budget in (None, 64):
        with attach(decoder, XShareConfig(20, warmup=1, request_budget=request_budget)) as attached:
            runs.append(speculative_decode(decoder, prompts, STEPS, DRAFT_LEN, attached).tokens)
    assert runs[0] == runs[1]


def test_the_cache_must_hold_the_longest_outcome(shipped):
    decoder, (prompts, _) = shipped
    with pytest.raises(ValueError, match=f"may need {PROMPT + 1 + (STEPS + 1) * 4} tokens"):
        speculative_decode(decoder, prompts, STEPS + 1, DRAFT_LEN)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 4), st.integers(0, 5))
def test_prompt_lookup_finds_the_newest_of_the_longest(text, longest, length):
    lookup = PromptLookup(longest)
    for start in range(0, len(text), 7):
        lookup.extend(text[start : start + 7])
    expected = []
    for recurring in range(min(longest, len(text) - 1), 0, -1):
        places = [i for i in range(recurring, len(text)) if text[i - recurring : i] == text[-recurring:]]
        if places:
            expected = text[places[-1] :][:length]
            break
    assert lookup.draft(length) == expected


@torch.inference_mode()
def test_stepwise_in_blocks_is_verification_of_right_drafts(shipped):
    """Teacher-forced quality in blocks of 1 + draft_len is what verifying right drafts computes."""
    decoder, (prompts, _) = shipped
    config = XShareConfig(20, warmup=1, request_budget=10)
    width = 1 + DRAFT_LEN
    tokens = prompts[:, : 12 * width]
    with attach(decoder, config, prefill="stepwise", step_tokens=width) as attached:
        at_once = decoder(input_ids=tokens).logits
        blocks = [layer.experts_after for layer in attached.stats]
    prompt, *drafts = tokens.split(width, dim=1)
    output = decoder(input_ids=prompt)  # the first block keeps its own routing
    cache, pieces = output.cache, [output.logits]
    with attach(decoder, config, prefill="shared") as attached:
        for piece in drafts:
            output = decoder(input_ids=piece, cache=cache)
            cache = output.cache
            pieces.append(output.logits)
        assert [layer.experts_after for layer in attached.stats] == pytest.approx(blocks, rel=0.01)
    # Sums in another order may move an expert across the edge of a set now and then: not all are close.
    close = (torch.cat(pieces, dim=1) - at_once).abs().amax(-1) < 1e-3
    assert close.float().mean() > 0.95
