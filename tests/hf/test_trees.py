"""Draft trees: the tokens of plain greedy decoding, whatever the trees are."""

from __future__ import annotations

import pytest
import torch

from xshare_trtllm import XShareConfig
from xshare_trtllm.evaluation import greedy_decode, held_out, load_model, token_batches
from xshare_trtllm.hf import Decoder, attach
from xshare_trtllm.hf.trees import NgramTrees, Tree, tree_decode, verified

PROMPT, STEPS, NODES = 40, 6, 12


@pytest.fixture(scope="module")
def model():
    return load_model()


@pytest.fixture(scope="module")
def texts(model):
    return token_batches(held_out()[:8], model[1], 200, 4)


def test_a_tree_changes_no_token(model, texts):
    decoder = Decoder(model[0], PROMPT + STEPS * NODES + 1)
    drafts = NgramTrees(texts[0].tolist() + texts[1].tolist())
    prompts = texts[0][:, :PROMPT]
    made = tree_decode(decoder, prompts, STEPS, drafts, NODES)
    assert made.accepted > 0 and made.drafted == STEPS * 4 * (NODES - 1)
    longest = max(map(len, made.tokens))
    plain, _ = greedy_decode(decoder, prompts, longest)
    for own, right in zip(made.tokens, plain.tolist(), strict=True):
        assert own == right[: len(own)]


def test_rows_of_all_trees_share_their_experts(model, texts):
    decoder = Decoder(model[0], PROMPT + STEPS * NODES + 1)
    drafts = NgramTrees(texts[1].tolist())
    with attach(decoder, XShareConfig(coverage=0.9)) as attached:
        tree_decode(decoder, texts[0][:, :PROMPT], STEPS, drafts, NODES, attached)
        stats = attached.stats
    assert all(layer.steps == STEPS and layer.rows == 4 * NODES for layer in stats)
    assert all(layer.experts_after < layer.experts_before for layer in stats)


def test_trees_have_their_size_and_their_likeliest_nodes_first():
    drafts = NgramTrees([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4]], longest=2)
    tree = drafts.draft([9, 1], 6)
    assert tree.tokens == [1, 2, 3, 4, 5, 5] and tree.parents == [-1, 0, 1, 2, 2, 4]
    depths, visible = tree.rows()
    assert depths.tolist() == [0, 1, 2, 3, 3, 4]
    assert visible[4].tolist() == [True, True, True, False, True, False]
    assert drafts.draft([7], 3).tokens == [7, 7, 7]


def test_the_path_that_the_model_agrees_with():
    tree = Tree([1, 2, 3, 4, 5], [-1, 0, 0, 1, 3])
    assert verified(tree, [2, 4, 9, 5, 8]) == [0, 1, 3, 4]
    assert verified(tree, [3, 4, 9, 5, 8]) == [0, 2]
    assert verified(tree, [7, 4, 9, 5, 8]) == [0]


def test_the_cache_must_hold_the_trees(model, texts):
    with pytest.raises(ValueError, match="the steps may need 112 tokens"):
        tree_decode(Decoder(model[0], 100), texts[0][:, :PROMPT], STEPS, NgramTrees([]), NODES)
    assert torch.is_inference_mode_enabled() is False
