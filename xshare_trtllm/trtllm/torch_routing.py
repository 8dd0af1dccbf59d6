"""The routing method of one MoE layer under XShare, as TensorRT-LLM's PyTorch backend calls it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from xshare_trtllm import ops
from xshare_trtllm.config import XShareConfig
from xshare_trtllm.routing import Routing, mask_logits, route
from xshare_trtllm.trtllm.torch_rows import rows_of_this_step
from xshare_trtllm.trtllm.torch_support import has_bias, router_spec


class LayerRouting:
    """One MoE layer's routing under XShare."""

    def __init__(
        self,
        routing_method: Any,
        num_experts: int,
        config: XShareConfig,
        expert_gpu: Tensor | None,
        group: Any,
    ) -> None:
        self.method = routing_method
        self.spec, self.has_bias = router_spec(routing_method, num_experts), has_bias(routing_method)
        config.check(self.spec)
        self.config, self.expert_gpu, self.group = config, expert_gpu, group
        self.is_off = config.is_off(self.spec)
        self.dial: Tensor | None = None  # uint8 [16] on the model's device, see `ops.pack_dial`
        self.counters: Tensor | None = None  # int64 [8] on the model's device: all statistics, added up
        self._step_rows: int | None = None  # of the forward pass under way
        self._first_row = 0
        self._chunks: list[Tensor] = []  # statistics of the forward pass under way

    @contextmanager
    def forward(self, num_rows: int) -> Iterator[None]:
        """The layer's forward pass over `num_rows` rows: what is routed in it follows on one another.

        Chunks may run on two streams at a time (fused_moe_cutlass.py, moe_scheduler.py), where additions to
        one tensor would be lost, so they are added up by the stream of the pass, which has waited for both.
        """
        self._step_rows = num_rows
        try:
            yield
            for stats in self._chunks:
                self._add(stats)
        finally:
            self._step_rows, self._first_row = None, 0
            self._chunks.clear()

    def route(self, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids int32 [T, k] and weights fp32 [T, k] of the next T rows."""
        arguments = self._arguments(router_logits)
        if self.group is not None:
            from xshare_trtllm import distributed

            outside = {"group": self.group, "dial": self.dial, "whole_batch_stats": False}
            routing = distributed.route(router_logits, self.spec, self.config, **arguments, **outside)
        elif self.dial is None:
            routing = route(router_logits, self.spec, self.config, **arguments)
        else:
            routing = Routing(*ops.route(router_logits, self.spec, self.config, **arguments, dial=self.dial))
        self._count(routing.raw_stats)
        return routing.expert_ids, routing.expert_weights

    def mask(self, router_logits: Tensor) -> Tensor:
        """The logits of the whole step, `-inf` where a row may not go."""
        if self.is_off:
            return router_logits
        arguments = self._arguments(router_logits)
        if router_logits.is_cuda or ops.available():
            outside = {"dial": self.dial, "counters": self.counters}
            return ops.mask_logits(router_logits, self.spec, self.config, **arguments, **outside)
        return mask_logits(router_logits, self.spec, self.config, **arguments)

    def _count(self, stats: Tensor) -> None:
        if self._step_rows is None:
            self._add(stats)
        else:
            self._chunks.append(stats)

    def _add(self, stats: Tensor) -> None:
        if self.counters is None:
            return
        if stats.is_cuda:  # its memory may belong to the other stream
            stats.record_stream(torch.cuda.current_stream(stats.device))
        self.counters.add_(stats)

    def _arguments(self, router_logits: Tensor) -> dict[str, Any]:
        first, count = self._first_row, len(router_logits)
        if self._step_rows is not None:
            self._first_row += count
        bias = self.method.e_score_correction_bias if self.has_bias else None  # a property that asks the gate
        arguments = {"correction_bias": bias, "expert_gpu": self.expert_gpu}
        rows = rows_of_this_step()
        if rows is None:
            return arguments
        if self._step_rows is not None and self._step_rows < rows.num_rows:  # the model left rows out: which?
            exempt = torch.ones(count, dtype=torch.bool, device=router_logits.device)
            return arguments | {"exempt": exempt, "request_ids": torch.zeros_like(exempt, dtype=torch.int32)}
        return arguments | rows.slice(first, count)


class XShareMoeRoutingMethod:
    """A routing method of TensorRT-LLM that routes by XShare.

    An instance is also one of the wrapped method's class and shares its state, so that `experts_per_token`,
    `routing_method_type`, `top_k`, parameters and every isinstance check are the wrapped method's.

    wrapped      a BaseMoeRoutingMethod
    num_experts  routed experts of the layer
    config       of this layer (`XShareConfig.for_layer`)
    expert_gpu   [E] int32 on the model's device, for `gpu_budget`
    group        torch.distributed ranks that the rows of a step are spread over (attention data parallelism)

    Raises ValueError where the method or the configuration does not fit.
    """

    wrapped: Any
    layer: LayerRouting

    def __new__(cls, wrapped: Any, *_: Any, **__: Any) -> XShareMoeRoutingMethod:
        kind = type(cls.__name__, (cls, type(wrapped)), {})
        made: XShareMoeRoutingMethod = object.__new__(kind)
        return made

    def __init__(
        self,
        wrapped: Any,
        num_experts: int,
        config: XShareConfig,
        *,
        expert_gpu: Tensor | None = None,
        group: Any = None,
    ) -> None:
        layer = LayerRouting(wrapped, num_experts, config, expert_gpu, group)
        # Not through nn.Module: `wrapped` is no child, or its parameters would be found twice.
        vars(self).update(vars(wrapped), wrapped=wrapped, layer=layer)

    def apply(self, router_logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """token_selected_experts int32 [T, k] and token_final_scales [T, k] (fp32, or what the wrapped method
        gives) of router_logits [T, E]."""
        if self.layer.is_off:
            own: tuple[Tensor, Tensor] = self.wrapped.apply(router_logits, *args, **kwargs)
            return own
        ids, weights = self.layer.route(router_logits)
        return ids, weights.to(getattr(self.wrapped, "output_dtype", torch.float32))

    @property
    def requires_separated_routing(self) -> bool:
        """Asks TRTLLM-gen (where the version looks for it) to call `apply` instead of routing by itself."""
        return True
