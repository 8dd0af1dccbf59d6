"""The shipped model is trained, specialised and within its size, and the held-out text is what it says it
is."""

import gzip
from collections import Counter

import pytest
import torch

from xshare_trtllm import RouterSpec, XShareConfig
from xshare_trtllm.evaluation import (
    MODEL_DIR,
    held_out,
    load_model,
    teacher_forced,
    token_batches,
    token_bytes,
)
from xshare_trtllm.evaluation.training.data import load_recipe
from xshare_trtllm.hf import attach

LENGTH = 128


@pytest.fixture(scope="module")
def loaded():
    return load_model()


def test_shape_and_size(loaded):
    model, _ = loaded
    spec = RouterSpec.from_hf_config(model.config)
    assert (spec.num_experts, spec.top_k, model.config.num_hidden_layers) == (64, 8, 4)
    assert sum(path.stat().st_size for path in MODEL_DIR.glob("*.safetensors")) <= 32 * 2**20


def test_held_out_pieces():
    counts = Counter(document.domain for document in held_out())
    assert counts == dict.fromkeys(("c", "english", "french", "german", "html", "python", "sql"), 16)
    assert len({document.source for document in held_out()}) == 112
    packages = {package["name"]: package["domain"] for package in load_recipe()["packages"]}
    assert all(packages[d.source.split(":")[0]] == d.domain for d in held_out())


def test_token_bytes_are_the_bytes_of_the_text(loaded):
    _, tokenizer = loaded
    sizes = token_bytes(tokenizer)
    for document in held_out()[::9]:
        ids = tokenizer(document.text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == document.text
        assert int(sizes[ids].sum()) == len(document.text.encode())


def test_better_than_gzip_and_specialised(loaded):
    model, tokenizer = loaded
    spec = RouterSpec.from_hf_config(model.config)
    batches = token_batches(held_out(), tokenizer, LENGTH)
    off = XShareConfig.off(spec)
    with attach(model, off, prefill="stepwise") as attached:
        quality = teacher_forced(model, batches, token_bytes(tokenizer))
    mixed = [layer.experts_before for layer in attached.stats]
    text = b"".join(tokenizer.decode(row[1:]).encode() for batch in batches for row in batch)
    assert quality.bits_per_byte < 8 * len(gzip.compress(text, 9)) / len(text)
    german = token_batches(tuple(d for d in held_out() if d.domain == "german"), tokenizer, LENGTH)
    with attach(model, off, prefill="stepwise") as attached:
        teacher_forced(model, german, token_bytes(tokenizer))
    single = [layer.experts_before for layer in attached.stats]
    uniform = 64 * (1 - (1 - 8 / 64) ** 16)
    for own, all_domains in zip(single, mixed, strict=True):
        assert own < 0.95 * all_domains < 0.95 * uniform


def test_too_short_documents_are_refused(loaded):
    with pytest.raises(ValueError, match="fewer than length=100000"):
        token_batches(held_out(), loaded[1], 100000)


def test_a_whole_budget_is_the_model_itself(loaded):
    """The native routing and experts against transformers' own, on real text."""
    model, tokenizer = loaded
    tokens = token_batches(held_out(), tokenizer, 48)[0]
    with torch.inference_mode():
        model.set_experts_implementation("eager")
        expected = model(input_ids=tokens).logits
        model.set_experts_implementation("xshare")
        with attach(model, XShareConfig(64), prefill="stepwise"):
            got = model(input_ids=tokens).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
