"""The fast forward pass against the transformers model whose weights it shares."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from xshare_trtllm import XShareConfig
from xshare_trtllm.evaluation import greedy_decode
from xshare_trtllm.hf import Decoder, attach

CONFIG = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**CONFIG)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
            assert parameter.requires_grad, name
        yield model


def random_tokens(batch=3, length=20):
    return torch.randint(0, 96, (batch, length), generator=torch.Generator().manual_seed(1))


def test_same_logits_as_transformers(model):
    """Prefill, single steps, and several tokens after a prefix (verification of a draft)."""
    tokens = random_tokens()
    expected = model(input_ids=tokens).logits
    decoder = Decoder(model, capacity=20)
    cache, got = None, []
    for piece in tokens.split([7, 1, 1, 4, 1, 6], dim=1):
        output = decoder(input_ids=piece, cache=cache)
        cache = output.cache
        got.append(output.logits)
    torch.testing.assert_close(torch.cat(got, dim=1), expected, rtol=1e-4, atol=1e-4)


def test_roll_back(model):
    tokens = random_tokens()
    decoder = Decoder(model)
    cache = decoder(input_ids=tokens[:, :10]).cache
    first = decoder(input_ids=tokens[:, 10:13], cache=cache).logits
    cache.lengths.fill_(10)
    decoder(input_ids=tokens[:, :3], cache=cache)
    cache.lengths.fill_(10)
    assert torch.equal(decoder(input_ids=tokens[:, 10:13], cache=cache).logits, first)


def test_sequences_at_different_places(model):
    """Each sequence of a ragged batch, in pieces with padding, has the logits that it has alone."""
    tokens = random_tokens(batch=4, length=20)
    expected = model(input_ids=tokens).logits
    decoder = Decoder(model, capacity=32)
    cache = decoder.new_cache(5)
    counts = torch.tensor([[3, 7, 1, 5], [1, 1, 1, 1], [4, 2, 3, 1], [9, 1, 10, 2]])
    for step in counts:
        width = int(step.max())
        mask = torch.arange(width) < step[:, None]
        places = (cache.lengths[:4, None] + torch.arange(width)).clamp(max=19)
        pieces = tokens.gather(1, places)
        logits = decoder(input_ids=pieces, cache=cache, attention_mask=mask).logits
        wanted = expected[torch.arange(4)[:, None], places]
        torch.testing.assert_close(logits[mask], wanted[mask], rtol=1e-4, atol=1e-4)
    assert cache.lengths.tolist() == [*counts.sum(0).tolist(), 0]


def test_rows_and_move(model):
    """A sequence prefilled into its row by a view, moved to another, goes on as it would have."""
    tokens = random_tokens(batch=1, length=12)
    expected = model(input_ids=tokens).logits[:, 9:]
    decoder = Decoder(model, capacity=16)
    cache = decoder.new_cache(3)
    decoder(input_ids=random_tokens(batch=3, length=4), cache=cache)
    cache.lengths[2] = 0
    decoder(input_ids=tokens[:, :9], cache=cache.rows(2, 3))
    assert cache.lengths.tolist() == [4, 4, 9]
    cache.move(2, 0)
    got = decoder(input_ids=tokens[:, 9:], cache=cache.rows(0, 1)).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert cache.lengths.tolist() == [12, 4, 9]


def test_padding_has_no_say_in_the_experts(model):
    tokens = random_tokens(batch=2, length=10)
    decoder = Decoder(model)
    results = []
    for garbage in (0, 50):
        piece = tokens[:, 4:8].clone()
        piece[1, 2:] = garbage
        mask = torch.tensor([[True] * 4, [True, True, False, False]])
        cache = decoder(input_ids=tokens[:, :4]).cache
        with attach(decoder, XShareConfig(5), prefill="shared") as attached:
            logits = decoder(input_ids=piece, cache=cache, attention_mask=mask).logits
        results.append((logits[mask], attached.stats))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert [layer.rows for layer in results[0][1]] == [6, 6]


def test_xshare_attaches_as_to_the_model(model):
    """The same routing, seen in the statistics, and the same greedy output."""
    prompts = random_tokens()
    config = XShareConfig(5)
    results = []
    for runner in (model, Decoder(model)):
        with attach(runner, config) as attached:
            tokens, seconds = greedy_decode(runner, prompts, 8)
        assert seconds > 0
        results.append((tokens, attached.stats))
    assert torch.equal(results[0][0], results[1][0])
    assert [layer.experts_after for layer in results[0][1]] == [
        layer.experts_after for layer in results[1][1]
    ]
    assert [layer.steps for layer in results[1][1]] == [7, 7]


def test_refusals(model):
    with pytest.raises(ValueError, match=r"Decoder\(capacity=8\): 9 tokens per sequence do not fit"):
        Decoder(model, capacity=8)(input_ids=random_tokens(length=9))
    shape = {
        name: CONFIG[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    }
    mixtral = AutoModelForCausalLM.from_config(
        MixtralConfig(**shape, num_attention_heads=4, num_key_value_heads=2)
    )
    with pytest.raises(ValueError, match="runs qwen3_moe models, not mixtral"):
        Decoder(mixtral)
    model.config.attention_bias = True
    with pytest.raises(ValueError, match="attention biases"):
        Decoder(model)
