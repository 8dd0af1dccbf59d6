"""MoE modules: who calls `routing_method.apply`, and when, in tensorrt_llm/_torch/modules/fused_moe/.

- interface.py at 00a3c47dbb (1.0.0rc): `MoE.forward`; at 567239fcd4 (after): `forward` calls `forward_impl`,
  under torch.compile through an operator that finds the layer by its number.
- fused_moe_cutlass.py at 000a01de66 (1.0.0rc4): `forward` splits the step into chunks, each applies; even
  ones on another stream (here: `where`), which is waited for at the end.
- fused_moe_triton.py at 00131d71bc: the quantisation method routes from the logits.
- fused_moe_trtllm_gen.py at 026946f023: `forward_impl` applies only where rows are exchanged first.
- configurable_moe.py at 04c2347be3 and moe_scheduler.py at 0150f78ea2 (after 1.2): a layer around a backend.

Experts multiply a row by a number of their own, so that a wrong id or weight is seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tensorrt_llm._torch.modules.fused_moe.routing import DeepSeekV3MoeRoutingMethod
from tensorrt_llm._torch.utils import SINGLE, get_model_extra_attrs, is_torch_compiling


class MoE(nn.Module):
    def __init__(
        self,
        *,
        routing_method: Any,
        num_experts: int,
        hidden_size: int = 4,
        mapping: Any = SINGLE,
        layer_idx: int | None = None,
        moe_max_num_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.routing_method = routing_method
        self.num_experts = num_experts
        self.layer_idx = layer_idx
        self.mapping = mapping
        self.ep_size = mapping.moe_ep_size
        self.use_dp = mapping.enable_attention_dp
        self.parallel_size = mapping.tp_size
        self.num_slots = num_experts
        self.layer_load_balancer = None
        self.moe_max_num_tokens = moe_max_num_tokens or 8192
        self.scale = nn.Parameter(1.0 + torch.arange(num_experts, dtype=torch.float32), requires_grad=False)
        self.calls: list[tuple[Tensor, Tensor]] = []  # ids and weights that reached the experts
        self.where, self.places = "main", list[str]()

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        self.calls.append((ids, weights))
        return x * (self.scale[ids.long()] * weights).sum(-1, keepdim=True)

    def split_chunk(self, split_token_num: int, split_num_chunks: int) -> list[int]:
        size, more = divmod(split_token_num, split_num_chunks)
        return [size + 1] * more + [size] * (split_num_chunks - more)

    def forward_chunk(self, x: Tensor, router_logits: Tensor) -> Tensor:
        ids, weights = self.routing_method.apply(router_logits)
        assert ids.shape == weights.shape == (len(router_logits), self.routing_method.experts_per_token)
        assert weights.dtype == torch.float32 and ids.dtype == torch.int32
        return self.experts(x, ids, weights)

    def run_chunks(self, x: Tensor, router_logits: Tensor) -> Tensor:
        num_chunks = -(-len(x) // self.moe_max_num_tokens) or 1
        sizes = self.split_chunk(len(x), num_chunks)
        pairs = list(zip(x.split(sizes), router_logits.split(sizes), strict=True))
        outputs = []
        for index, (chunk, logits) in enumerate(pairs):
            self.where = "aux" if index % 2 == 0 and num_chunks > 1 else "main"
            self.places.append(self.where)
            is_used = len(chunk) > 0
            if not is_used and self.use_dp:  # every rank takes as many turns: the first chunk stands in
                chunk, logits = pairs[0]
            outputs += [self.forward_chunk(chunk, logits)][: 1 if is_used else 0]
        self.where = "main, joined"
        return torch.cat(outputs) if outputs else x


class CutlassFusedMoE(MoE):
    def forward(
        self,
        x: Tensor,
        router_logits: Tensor,
        do_finalize: bool = True,
        output_dtype: torch.dtype | None = None,
        all_rank_num_tokens: list[int] | None = None,
        all_rank_max_num_tokens: int | None = None,
        use_dp_padding: bool | None = None,
    ) -> Tensor:
        return self.run_chunks(x, router_logits)


@torch.library.custom_op("trtllm::moe_custom_op", mutates_args=())
def moe_custom_op(
    layer_idx: str,
    x: Tensor,
    router_logits: Tensor,
    do_finalize: bool,
    output_dtype: torch.dtype | None,
    all_rank_num_tokens: list[int] | None,
    use_dp_padding: bool | None,
) -> list[Tensor]:
    attributes = get_model_extra_attrs()
    assert attributes is not None
    output: Tensor = attributes["moe_layers"][layer_idx]().forward_impl(
        x,
        router_logits,
        do_finalize=do_finalize,
        output_dtype=output_dtype,
        all_rank_num_tokens=all_rank_num_tokens,
        use_dp_padding=use_dp_padding,
    )
    return [output]


@moe_custom_op.register_fake
def _(layer_idx: str, x: Tensor, *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape)]


class _WithImpl(MoE):
    @property
    def register_to_config(self) -> bool:
        return self.layer_idx is not None

    def forward(
        self,
        x: Tensor,
        router_logits: Tensor,
        do_finalize: bool = True,
        output_dtype: torch.dtype | None = None,
        all_rank_num_tokens: list[int] | None = None,
        use_dp_padding: bool | None = None,
    ) -> Tensor:
        if self.register_to_config and is_torch_compiling():
            options = (do_finalize, output_dtype, all_rank_num_tokens, use_dp_padding)
            compiled: Tensor = moe_custom_op(str(self.layer_idx), x, router_logits, *options)[0]
            return compiled
        return self.forward_impl(
            x,
            router_logits,
            do_finalize=do_finalize,
            output_dtype=output_dtype,
            all_rank_num_tokens=all_rank_num_tokens,
            use_dp_padding=use_dp_padding,
        )

    def forward_impl(
        self, x: Tensor, router_logits: Tensor, *, do_finalize: bool = True, **kwargs: Any
    ) -> Tensor:
        return self.run_chunks(x, router_logits)

    def kernel_routing(self, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        """top-k of the logits, softmax over them."""
        best, ids = router_logits.float().topk(self.routing_method.experts_per_token)
        return ids.to(torch.int32), best.softmax(-1)


class DeepGemmFusedMoE(_WithImpl):
    pass


class TritonFusedMoE(_WithImpl):
    def forward_chunk(self, x: Tensor, router_logits: Tensor) -> Tensor:
        return self.experts(x, *self.kernel_routing(router_logits))


class TRTLLMGenFusedMoE(_WithImpl):
    def forward_impl(
        self, x: Tensor, router_logits: Tensor, *, do_finalize: bool = True, **kwargs: Any
    ) -> Tensor:
        if self.use_dp and self.parallel_size > 1:
            return self.run_chunks(x, router_logits)
        return self.experts(x, *self.kernel_routing(router_logits))

    def run_moe(self, x: Tensor, ids: Tensor | None, weights: Tensor | None, router_logits: Tensor) -> Tensor:
        if ids is None or weights is None:
            ids, weights = self.kernel_routing(router_logits)
        return self.experts(x, ids, weights.float())

    def _supports_load_balancer(self) -> bool:
        return bool(self.use_dp and self.parallel_size > 1)

    def try_fused_kimi_route_quant(self, x: Tensor, router_logits: Tensor) -> tuple[Tensor, Tensor] | None:
        if isinstance(self.routing_method, DeepSeekV3MoeRoutingMethod):
            return self.kernel_routing(router_logits)
        return None


class MarlinFusedMoE(_WithImpl):
    pass


class ConfigurableMoE(_WithImpl):
    """The layer; the backend inside it has no layer_idx and the same routing method."""

    def __init__(self, backend: type[TRTLLMGenFusedMoE], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.backend = backend(**kwargs | {"layer_idx": None})

    def forward_chunk(self, x: Tensor, router_logits: Tensor, input_ids: Tensor | None = None) -> Tensor:
        ids = weights = None
        if self.backend._supports_load_balancer() or self.routing_method.requires_separated_routing:
            fused = self.backend.try_fused_kimi_route_quant(x, router_logits)
            ids, weights = fused or self.routing_method.apply(router_logits, input_ids)
            assert ids.shape[1] == self.routing_method.experts_per_token and ids.shape == weights.shape
        return self.backend.run_moe(x, ids, weights, router_logits)
