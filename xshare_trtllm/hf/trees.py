"""Speculative decoding with draft trees: one pass verifies many continuations of every sequence."""

from __future__ import annotations

import heapq
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from xshare_trtllm.hf.attach import Attachment
from xshare_trtllm.hf.decoder import Decoder, KVCache, TreeRows
from xshare_trtllm.hf.speculative import Speculation


@dataclass(frozen=True, slots=True)
class Tree:
    """tokens of the nodes, the last accepted one first; the parent of each, before it, and -1 of the first"""

    tokens: list[int]
    parents: list[int]

    def rows(self) -> tuple[Tensor, Tensor]:
        """depths [nodes] and visible [nodes, nodes], as `TreeRows` has them."""
        visible = torch.eye(len(self.tokens), dtype=torch.bool)
        depths = torch.zeros(len(self.tokens), dtype=torch.int64)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                visible[node] |= visible[parent]
                depths[node] = depths[parent] + 1
        return depths, visible


class NgramTrees:
    """Drafts trees from what followed the last tokens in other texts: the likeliest nodes first.

    longest  tokens that must recur; where they never did, one fewer is tried, down to one
    """

    def __init__(self, texts: Iterable[list[int]], longest: int = 3) -> None:
        self.longest = longest
        counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for text in texts:
            for end in range(1, len(text)):
                for length in range(1, min(longest, end) + 1):
                    counts[tuple(text[end - length : end])][text[end]] += 1
        self._followers = {
            context: [(token, count / counter.total()) for token, count in counter.most_common(8)]
            for context, counter in counts.items()
        }

    def draft(self, text: list[int], nodes: int) -> Tree:
        """A tree of exactly `nodes` nodes behind `text`, its last token the first node. Where the texts know
        no more continuations, the last ones are repeated: a runtime's trees have a fixed size."""
        tree = Tree([text[-1]], [-1])
        contexts = [tuple(text[-self.longest :])]
        waiting = [(-share, 0, token) for token, share in self._after(contexts[0])]
        heapq.heapify(waiting)
        while waiting and len(tree.tokens) < nodes:
            score, parent, token = heapq.heappop(waiting)
            tree.tokens.append(token)
            tree.parents.append(parent)
            contexts.append((*contexts[parent], token)[-self.longest :])
            for child, share in self._after(contexts[-1]):
                heapq.heappush(waiting, (score * share, len(contexts) - 1, child))
        while len(tree.tokens) < nodes:
            tree.tokens.append(tree.tokens[-1])
            tree.parents.append(len(tree.tokens) - 2)
        return tree

    def _after(self, context: tuple[int, ...]) -> list[tuple[int, float]]:
        for first in range(len(context)):
            if found := self._followers.get(context[first:]):
                return found
        return []


@torch.inference_mode()
def tree_decode(
    decoder: Decoder,
    prompts: Tensor,
    steps: int,
    drafts: NgramTrees,
    nodes: int,
    attached: Attachment | None = None,
) -> Speculation:
    """Greedy decoding with a tree of `nodes` rows per sequence, verified in one pass.

    A step keeps the path of the tree that the model agrees with, and then the model's own choice. With the
    model's own routing the tokens are those of plain greedy decoding. With XShare attached, the rows of all
    trees of a step are one batch, those of a sequence one request, and the prefill keeps its own routing.

    prompts  int64 [batch, length], without padding

    Seconds are of this process' processor, so that other load does not count. Raises ValueError where the
    decoder's capacity is too small.
    """
    batch, length = prompts.shape
    needed = length + steps * nodes
    if needed > decoder.capacity:
        raise ValueError(f"Decoder(capacity={decoder.capacity}): the steps may need {needed} tokens")
    if attached is not None:
        attached.prefill = "exempt"
    output = decoder(input_ids=prompts)
    cache = output.cache
    texts = [
        [*prompt, new]
        for prompt, new in zip(prompts.tolist(), output.logits[:, -1].argmax(-1).tolist(), strict=True)
    ]
    if attached is not None:
        attached.prefill = "shared"
    accepted, started = 0, time.process_time()
    for _ in range(steps):
        trees = [drafts.draft(text, nodes) for text in texts]
        depths, visible = (torch.stack(parts) for parts in zip(*(tree.rows() for tree in trees), strict=True))
        before = cache.lengths.clone()
        tokens = torch.tensor([tree.tokens for tree in trees])
        logits = decoder(input_ids=tokens, cache=cache, tree=TreeRows(depths, visible)).logits
        for sequence, (tree, choices) in enumerate(zip(trees, logits.argmax(-1).tolist(), strict=True)):
            path = verified(tree, choices)
            _keep(cache, sequence, int(before[sequence]), path)
            texts[sequence] += [*(tree.tokens[node] for node in path[1:]), choices[path[-1]]]
            accepted += len(path) - 1
    seconds = time.process_time() - started
    return Speculation(
        [text[length:] for text in texts], seconds, steps, steps * batch * (nodes - 1), accepted
    )


def verified(tree: Tree, choices: list[int]) -> list[int]:
    """The nodes, from the first on, that the model would have made; `choices` are its own after each node."""
    path = [0]
    while True:
        children = (
            node
            for node, parent in enumerate(tree.parents)
            if parent == path[-1] and tree.tokens[node] == choices[path[-1]]
        )
        child = next(children, None)
        if child is None:
            return path
        path.append(child)


def _keep(cache: KVCache, sequence: int, start: int, path: list[int]) -> None:
    """The path's keys and values one after another, the rest of the tree forgotten."""
    for stored in (cache.keys, cache.values):
        kept = stored[:, sequence, :, [start + node for node in path]]
        stored[:, sequence, :, start : start + len(path)] = kept
    cache.lengths[sequence] = start + len(path)
