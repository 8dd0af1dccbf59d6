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


@dataclass(slots=True)
class KVCache:
    """Keys and values of every layer, [layers, batch, kv_heads, capacity, head_dim] each; `length` tokens
    are in it.

    Lowering `length` rolls the last tokens back.
    """

    keys: Tensor
    values: Tensor
    length: int = 0


@dataclass(frozen=True, slots=True)
class Output:
    """logits [batch, length, vocabulary] and the cache that the next pass takes."""

    logits: Tensor
    cache: KVCache


class Decoder(nn.Module):
    """Runs a Qwen3-MoE model for sequences of equal length.

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
        return KVCache(torch.zeros(shape), torch.zeros(shape))

    def forward(self, input_ids: Tensor, cache: KVCache | None = None, use_cache: bool = True) -> Output:
        """Logits of the next tokens after `input_ids` [batch, length], which follow what `cache` holds.

        Raises ValueError where the cache would overflow.
        """
        batch, length = input_ids.shape
        cache = cache or self.new_cache(batch)
        end = cache.length + length
        if end > self.capacity:
            raise ValueError(f"Decoder(capacity={self.capacity}): {end} tokens per sequence do not fit")
        rotation = self.cosine[cache.length : end, None], self.sine[cache.length : end, None]
        mask = None
        if length > 1:
            mask = torch.ones(length, end, dtype=torch.bool).tril(cache.length)
        hidden = self.embed_tokens(input_ids)
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            hidden = layer(hidden, keys, values, cache.length, rotation, mask)
        cache.length = end
        return Output(_rms_norm(hidden, self.norm) @ self.lm_head, cache)


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

    def forward(
        self,
        hidden: Tensor,
        keys: Tensor,
        values: Tensor,
        start: int,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None,
    ) -> Tensor:
        batch, length, _ = hidden.shape
        end = start + length
        qkv = _rms_norm(hidden, self.input_norm) @ self.qkv
        qkv = qkv.view(batch, length, -1, self.size)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        qk = functional.rms_norm(qk, (self.size,), eps=self.eps) * self.qk_norm
        qk = torch.addcmul(qk * rotation[0], qk.roll(self.size // 2, -1), rotation[1])
        keys[:, :, start:end] = qk[:, :, self.heads :].transpose(1, 2)
        values[:, :, start:end] = v.transpose(1, 2)
        query = qk[:, :, : self.heads].transpose(1, 2)
        if (
            length == 1
        ):  # the query heads of one key head are its queries; for so few, plain products are faster
            query = query.reshape(batch, self.kv_heads, -1, self.size)
            scores = query @ keys[:, :, :end].transpose(2, 3) * self.size**-0.5
            mixed = scores.softmax(-1) @ values[:, :, :end]
        else:
            mixed = functional.scaled_dot_product_attention(
                query, keys[:, :, :end], values[:, :, :end], attn_mask=mask, enable_gqa=True
            )
        mixed = mixed.reshape(batch, self.heads, length, self.size).transpose(1, 2).flatten(2)
        hidden = hidden + mixed @ self.out
        out: Tensor = hidden + self.mlp(_rms_norm(hidden, self.mlp_norm))
        return out


def _transposed(weight: Tensor) -> Tensor:
    return weight.detach().T.contiguous()


def _rms_norm(hidden: Tensor, norm: Any) -> Tensor:
    return functional.rms_norm(hidden, (hidden.shape[-1],), norm.weight, norm.variance_epsilon)
