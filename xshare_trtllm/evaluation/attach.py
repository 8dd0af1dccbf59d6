"""XShare inside a transformers model: every router instance calls `route` in place of its own top-k."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from xshare_trtllm.config import RouterSpec, XShareConfig
from xshare_trtllm.routing import Routing, route

Prefill = Literal["exempt", "shared", "stepwise"]

# Routers that compute in fp32 whatever the model's dtype, and give fp32 weights (transformers 5).
_FP32_ROUTERS = frozenset({"deepseek_v2", "deepseek_v3", "glm4_moe"})
_FP32_WEIGHTS = _FP32_ROUTERS | {"mixtral"}


def attach(
    model: nn.Module,
    config: XShareConfig,
    *,
    prefill: Prefill = "exempt",
    expert_gpu: Tensor | None = None,
) -> Attachment:
    """Puts XShare into every MoE layer of a transformers model, until `detach()` or the end of a `with`.

    Works on the families that `RouterSpec.from_hf_config` knows and transformers 5 implements. Row `(b, l)`
    of a forward pass belongs to request `b`; where a 2-D `attention_mask` says that it is padding, it is
    padding.

    config      budgets per layer count MoE layers only
    prefill     what to do with a pass of more than one token per sequence:
                `exempt`    the model's own routing (prefill; it is not counted in the statistics)
                `shared`    all rows of the pass are one batch (verification of draft tokens)
                `stepwise`  every position is a step of its own: what decoding the same tokens would
                            compute, with one row per sequence and step, in a single pass
    expert_gpu  [E] int, the GPU that holds each expert

    Raises ValueError for a model without known routers, one that is attached already, or a configuration
    that does not fit.
    """
    return Attachment(model, config, prefill, expert_gpu)


@dataclass(frozen=True, slots=True)
class LayerStats:
    """Means over the counted steps of one MoE layer; the fields are those of `RoutingStats`."""

    steps: int
    experts_before: float
    experts_after: float
    kept_affinity: float
    warmup_overflow: float
    peak_gpu_before: float
    peak_gpu_after: float
    rows: float


class Attachment:
    """XShare in one model. `stats` has one `LayerStats` per MoE layer."""

    def __init__(
        self, model: nn.Module, config: XShareConfig, prefill: Prefill, expert_gpu: Tensor | None
    ) -> None:
        if prefill not in get_args(Prefill):
            raise ValueError(f"prefill={prefill!r}: must be one of {', '.join(get_args(Prefill))}")
        model_config: Any = model.config
        self.spec = RouterSpec.from_hf_config(model_config)
        self.prefill = prefill
        self._routers = find_routers(model)
        if any("forward" in vars(router) for router in self._routers):
            raise ValueError(
                "attach: the model's routers are replaced already; detach the earlier attachment"
            )
        config.check(self.spec)
        if isinstance(config.budget, tuple) and len(config.budget) != len(self._routers):
            raise ValueError(
                f"XShareConfig(budget=): names {len(config.budget)} layers, "
                f"the model has {len(self._routers)} MoE layers"
            )
        self._configs = [config.for_layer(layer) for layer in range(len(self._routers))]
        self._expert_gpu = expert_gpu
        self._batch, self._length, self._masked = 0, 0, False  # of the pass under way
        self._request_ids = torch.empty(0, 0, dtype=torch.int32)  # [batch, length], -1 = padding
        self._model_type = str(model_config.model_type)
        self.reset_stats()
        for layer, router in enumerate(self._routers):
            router.forward = partial(self._forward, layer, router.forward, router)
        self._hook = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def detach(self) -> None:
        """Give the model its own routers back; harmless when repeated."""
        self._hook.remove()
        for router in self._routers:
            vars(router).pop("forward", None)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    @property
    def stats(self) -> list[LayerStats]:
        """Means since the attachment or the last `reset_stats()`; zeros where no step was counted."""
        return [_mean(total, steps) for total, steps in zip(self._totals, self._steps, strict=True)]

    def reset_stats(self) -> None:
        """Forget the steps counted so far."""
        self._totals = [torch.zeros(8, dtype=torch.int64) for _ in self._routers]
        self._steps = [0] * len(self._routers)

    def _see(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the shape and the padding of the pass that begins."""
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        mask = kwargs.get("attention_mask")
        is_2d = isinstance(mask, Tensor) and mask.dim() == 2
        if tokens.shape[:2] != (self._batch, self._length) or is_2d or self._masked:
            self._batch, self._length = tokens.shape[:2]
            request_ids = torch.arange(self._batch, dtype=torch.int32)[:, None].repeat(1, self._length)
            if isinstance(mask, Tensor) and is_2d:
                request_ids[mask[:, -self._length :].cpu() == 0] = -1
            self._request_ids = request_ids.to(tokens.device)
            self._masked = is_2d

    def _forward(
        self, layer: int, own_forward: Callable[[Tensor], Any], router: nn.Module, hidden_states: Tensor
    ) -> Any:
        """In place of the router's `forward`: `(router_logits, weights, ids)`."""
        if self._length > 1 and self.prefill == "exempt":
            return own_forward(hidden_states)
        hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        router_logits = self._router_logits(router, hidden_states)
        if self._length > 1 and self.prefill == "stepwise":
            ids, weights = self._route_stepwise(layer, router, router_logits)
        else:
            routing = self._route(layer, router, router_logits, self._request_ids.flatten())
            ids, weights = routing.expert_ids, routing.expert_weights
        if self._model_type not in _FP32_WEIGHTS:
            weights = weights.to(hidden_states.dtype)
        return router_logits, weights, ids.long()

    def _router_logits(self, router: nn.Module, hidden_states: Tensor) -> Tensor:
        weight: Any = router.weight
        bias: Any = getattr(router, "bias", None)
        if self._model_type in _FP32_ROUTERS:
            return nn.functional.linear(hidden_states.float(), weight.float(), bias)
        return nn.functional.linear(hidden_states, weight, bias)

    def _route(self, layer: int, router: nn.Module, router_logits: Tensor, request_ids: Tensor) -> Routing:
        routing = route(
            router_logits.detach(),
            self.spec,
            self._configs[layer],
            correction_bias=getattr(router, "e_score_correction_bias", None),
            request_ids=request_ids,
            expert_gpu=self._expert_gpu,
        )
        self._totals[layer] += routing.raw_stats
        self._steps[layer] += 1
        return routing

    def _route_stepwise(self, layer: int, router: nn.Module, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Every position its own step: ids and weights `[batch * length, k]`."""
        steps = router_logits.view(self._batch, self._length, -1).transpose(0, 1).contiguous()
        requests = self._request_ids.T.contiguous()
        routings = [self._route(layer, router, steps[t], requests[t]) for t in range(self._length)]
        ids = torch.stack([routing.expert_ids for routing in routings], dim=1)
        weights = torch.stack([routing.expert_weights for routing in routings], dim=1)
        return ids.flatten(0, 1), weights.flatten(0, 1)


def find_routers(model: nn.Module) -> list[nn.Module]:
    """The router of each MoE layer, in the layers' order; raises ValueError where there is none."""
    suffixes = ("TopKRouter", "TopkRouter")
    routers = [module for module in model.modules() if type(module).__name__.endswith(suffixes)]
    if not routers:
        raise ValueError(f"{type(model).__name__} has no router module that ends in {' or '.join(suffixes)}")
    return routers


def _mean(total: Tensor, steps: int) -> LayerStats:
    before, after, kept, affinity, overflow, peak_before, peak_after, rows = total.tolist()
    n = max(steps, 1)
    return LayerStats(
        steps=steps,
        experts_before=before / n,
        experts_after=after / n,
        kept_affinity=kept / affinity if affinity else 1.0,
        warmup_overflow=overflow / n,
        peak_gpu_before=peak_before / n,
        peak_gpu_after=peak_after / n,
        rows=(rows & 0xFFFFFFFF) / n,
    )
