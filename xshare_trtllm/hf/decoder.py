"""The shipped model's forward pass without the cost of building it anew in Python for every token.

A transformers forward pass spends more time preparing masks, positions and a growing KV cache than a small
model spends computing; on a GPU the engines have CUDA graphs against that. `Decoder` runs the same weights
with a fixed KV cache and fused projections. The MoE blocks stay the model's own modules, so that `attach`
works on it as on the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class KVCache:
    """The keys and values of every layer, and how many tokens of each sequence they hold.

    keys, values  [layers, batch, kv_heads, capacity, head_dim] fp32
    lengths       [batch] int64; lowering an entry rolls that sequence's last tokens back
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor

    def rows(self, first: int, last: int) -> KVCache:
        """Sequences `first` to `last - 1`, as a view: what is written there is written here."""
        return KVCache(self.keys[:, first:last], self.values[:, first:last], self.lengths[first:last])

    def move(self, source: int, target: int) -> None:
        """Copy one sequence over another: the last one, into the place of one that has ended."""
        length = int(self.lengths[source])
        for stored in (self.keys, self.values):
            stored[:, target, :, :length] = stored[:, source, :, :length]
        self.lengths[target] = length


@dataclass(frozen=True, slots=True)
class TreeRows:
    """What the rows of a pass are where they are trees: a row is not always after the one before it.

    depths   [batch, length] int64, how far each row is behind what the cache holds
    visible  [batch, length, length] bool, the rows of the pass that each row sees, itself included
    """

    depths: Tensor
    visible: Tensor


@dataclass(frozen=True, slots=True)
class Output:
    """logits [batch, length, vocabulary] and the cache that the next pass takes."""

    logits: Tensor
    cache: KVCache


class Decoder(nn.Module):
    """Runs a Qwen3-MoE model for a batch of sequences, each at its own place in its text.

    Shares the experts, routers and norms; keeps its own copy of the projections, transposed: for a few rows
    a product with [in, out] reads memory faster than one with [out, in].

    capacity  tokens per sequence that the KV cache holds

    Raises ValueError for another model family or one with layers that this pass does not compute.
    """

    def __init__(self, model: PreTrainedModel, capacity: int = 512) -> None:
        super().__init__()
        config: Any = model.config
        inner: Any = model.model
        if config.model_type != "qwen3_moe":
            raise ValueError(f"Decoder: runs qwen3_moe models, not {config.model_type}")
        if config.mlp_only_layers or config.attention_bias or config.use_sliding_window:
            raise ValueError("Decoder: dense layers, attention biases and sliding windows are not supported")
        self.config = config
        self.capacity = capacity
        embedding: Any = model.get_input_embeddings()
        self.embed_tokens = embedding
        self.layers = nn.ModuleList(_Layer(layer, config) for layer in inner.layers)
        self.norm = inner.norm
        self.lm_head: Tensor
        self.register_buffer("lm_head", _transposed(model.get_output_embeddings().weight), persistent=False)
        positions = torch.arange(capacity)[None]
        cosine, sine = inner.rotary_emb(embedding.weight[:1, None], positions)
        half = config.head_dim // 2
        self.cosine: Tensor
        self.sine: Tensor
        self.register_buffer("cosine", cosine[0], persistent=False)  # [capacity, head_dim]
        self.register_buffer(
            "sine", torch.cat([-sine[0, :, :half], sine[0, :, half:]], dim=-1), persistent=False
        )

    def new_cache(self, batch: int) -> KVCache:
        """An empty cache for `batch` sequences."""
        heads, size = self.config.num_key_value_heads, self.config.head_dim
        shape = (len(self.layers), batch, heads, self.capacity, size)
        return KVCache(torch.zeros(shape), torch.zeros(shape), torch.zeros(batch, dtype=torch.int64))

    def forward(
        self,
        input_ids: Tensor,
        cache: KVCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = True,
        tree: TreeRows | None = None,
    ) -> Output:
        """Logits of the next tokens after `input_ids` [batch, length], which follow what `cache` holds.

        cache           may hold more sequences than `batch`: its first ones are continued
        attention_mask  [batch, length] bool, False = padding, at the end of a row only: it has logits that
                        mean nothing, no place in the cache and no say in XShare's choice of experts
        tree            the rows are trees; their keys and values go into the cache in the order of the rows

        Raises ValueError where the cache would overflow.
        """
        batch, length = input_ids.shape
        cache = cache or self.new_cache(batch)
        place = _Place(cache.lengths[:batch], length, self.cosine, self.sine, tree)
        if place.end > self.capacity:
            raise ValueError(f"Decoder(capacity={self.capacity}): {place.end} tokens per sequence do not fit")
        hidden = self.embed_tokens(input_ids)
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            hidden = layer(hidden, keys[:batch], values[:batch], place)
        cache.lengths[:batch] += length if attention_mask is None else attention_mask.sum(-1)
        return Output(_rms_norm(hidden, self.norm) @ self.lm_head, cache)


class _Place:
    """Where in the cache the tokens of one pass go, and what each of them sees.

    end       the longest sequence after the pass
    rotation  cosine and sine, [1 or batch, length, 1, head_dim] each
    mask      [1 or batch, 1, length, end] bool, or None where every token sees all of the cache up to `end`
    """

    def __init__(
        self, lengths: Tensor, length: int, cosine: Tensor, sine: Tensor, tree: TreeRows | None = None
    ) -> None:
        starts = lengths.tolist()
        self.start, self.end = starts[0], max(starts) + length
        self.is_uniform = min(starts) == max(starts) and tree is None
        self.mask: Tensor | None = None
        if self.end > len(cosine):
            return  # refused by the caller
        if self.is_uniform:
            self.rotation = cosine[None, self.start : self.end, None], sine[None, self.start : self.end, None]
            if length > 1:
                mask = torch.ones(length, self.end, dtype=torch.bool).tril(self.start)
                self.mask = mask[None, None]
            return
        self.positions = lengths[:, None] + torch.arange(length)  # [batch, length]
        self.sequences = torch.arange(len(starts))[:, None]
        self.rotation = cosine[self.positions, None], sine[self.positions, None]
        self.mask = (torch.arange(self.end) <= self.positions[:, :, None])[:, None]
        if tree is not None:
            depths = lengths[:, None] + tree.depths
            self.rotation = cosine[depths, None], sine[depths, None]
            for sequence, start in enumerate(starts):
                self.mask[sequence, 0, :, start : start + length] = tree.visible[sequence]

    def write(self, stored: Tensor, new: Tensor) -> None:
        """Put `new` [batch, length, kv_heads, head_dim] where it belongs in the cache of its layer."""
        if self.is_uniform:
            stored[:, :, self.start : self.end] = new.transpose(1, 2)
        else:
            stored[self.sequences, :, self.positions] = new


class _Layer(nn.Module):
    """One decoder layer: attention with one fused projection, then the model's own MoE block."""

    def __init__(self, layer: Any, config: Any) -> None:
        super().__init__()
        attention = layer.self_attn
        self.heads, self.kv_heads, self.size = (
            config.num_attention_heads, config.num_key_value_heads, config.head_dim,
        )  # fmt: skip
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        qk_norm = [attention.q_norm.weight] * self.heads + [attention.k_norm.weight] * self.kv_heads
        self.qkv: Tensor
        self.qk_norm: Tensor
        self.out: Tensor
        weight = torch.cat([projection.weight for projection in projections])
        self.register_buffer("qkv", _transposed(weight), persistent=False)  # [hidden, heads * head_dim]
        self.register_buffer("out", _transposed(attention.o_proj.weight), persistent=False)
        self.register_buffer("qk_norm", torch.stack(qk_norm).detach(), persistent=False)  # [heads, head_dim]
        self.eps = attention.q_norm.variance_epsilon
        self.input_norm, self.mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.mlp = layer.mlp

    def forward(self, hidden: Tensor, keys: Tensor, values: Tensor, place: _Place) -> Tensor:
        batch, length, _ = hidden.shape
        qkv = _rms_norm(hidden, self.input_norm) @ self.qkv
        qkv = qkv.view(batch, length, -1, self.size)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        qk = functional.rms_norm(qk, (self.size,), eps=self.eps) * self.qk_norm
        qk = torch.addcmul(qk * place.rotation[0], qk.roll(self.size // 2, -1), place.rotation[1])
        query, key = qk.split([self.heads, self.kv_heads], dim=2)
        place.write(keys, key)
        place.write(values, v)
        keys, values = keys[:, :, : place.end], values[:, :, : place.end]
        attend = _attend_few if length <= 8 else _attend_many
        mixed = attend(query.transpose(1, 2), keys, values, place.mask)
        hidden = hidden + mixed.transpose(1, 2).flatten(2) @ self.out
        out: Tensor = hidden + self.mlp(_rms_norm(hidden, self.mlp_norm))
        return out


def _attend_many(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """query, result [batch, heads, length, head_dim]; keys, values [batch, kv_heads, end, head_dim]."""
    mixed: Tensor = functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, enable_gqa=True
    )
    return mixed


def _attend_few(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """The same by plain products, faster for a few tokens: the heads of one key head are its queries."""
    batch, heads, length, size = query.shape
    kv_heads = keys.shape[1]
    scores = query.reshape(batch, kv_heads, -1, size) @ keys.transpose(2, 3) * size**-0.5
    if mask is not None:
        by_head = scores.view(batch, kv_heads, heads // kv_heads, length, -1)
        scores = by_head.masked_fill(~mask[:, :, None], -torch.inf).view_as(scores)
    mixed: Tensor = scores.softmax(-1) @ values
    return mixed.view(batch, heads, length, size)


def _transposed(weight: Tensor) -> Tensor:
    return weight.detach().T.contiguous()


def _rms_norm(hidden: Tensor, norm: Any) -> Tensor:
    return functional.rms_norm(hidden, (hidden.shape[-1],), norm.weight, norm.variance_epsilon)
