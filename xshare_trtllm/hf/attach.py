"""XShare inside a transformers model: every router instance calls `route` in place of its own top-k."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from xshare_trtllm.config import RouterSpec, XShareConfig
from xshare_trtllm.routing import route

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
    step_tokens: int = 1,
) -> Attachment:
    """Puts XShare into every MoE layer of a transformers model, until `detach()` or the end of a `with`.

    Works on the families that `RouterSpec.from_hf_config` knows and transformers 5 implements. Row `(b, l)`
    of a forward pass belongs to request `b`; where a 2-D `attention_mask` says that it is padding, it is
    padding.

    config      budgets per layer count MoE layers only
    prefill     what to do with a pass of more than one token per sequence:
                `exempt`    the model's own routing (prefill; it is not counted in the statistics)
                `shared`    all rows of the pass are one batch (verification of draft tokens)
                `stepwise`  `step_tokens` positions are a step of their own: what decoding (1) or verifying
                            drafts (1 + draft length) of the same tokens would compute, in a single pass
    expert_gpu  [E] int, the GPU that holds each expert
    step_tokens positions of a step for `stepwise`

    A pass of one token per sequence is always one batch.

    Raises ValueError for a model without known routers, one that is attached already, or a configuration
    that does not fit.
    """
    return Attachment(model, config, prefill, expert_gpu, step_tokens)


@dataclass(frozen=True, slots=True)
class LayerStats:
    """Means over the counted steps of one MoE layer; the fields are those of `RoutingStats`."""

    steps: int
    experts_before: float
    experts_after: float
    kept_utility: float
    warmup_overflow: float
    peak_gpu_before: float
    peak_gpu_after: float
    rows: float


@dataclass(slots=True)
class _Pass:
    """The forward pass under way: its rows and what to do with them."""

    prefill: Prefill
    step_tokens: int
    batch: int = 0
    length: int = 0
    is_masked: bool = False
    request_ids: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int32))
    """[batch, length], -1 = padding"""

    def see(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the shape and the padding of the pass that begins: a forward pre-hook."""
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        mask = kwargs.get("attention_mask")
        is_masked = isinstance(mask, Tensor) and mask.dim() == 2
        if tokens.shape[:2] == (self.batch, self.length) and not is_masked and not self.is_masked:
            return
        self.batch, self.length = tokens.shape[:2]
        self.is_masked = is_masked
        request_ids = torch.arange(self.batch, dtype=torch.int32)[:, None].repeat(1, self.length)
        if isinstance(mask, Tensor) and is_masked:
            request_ids[mask[:, -self.length :].cpu() == 0] = -1
        self.request_ids = request_ids.to(tokens.device)


class _Router:
    """What one layer's router calls in place of its `forward`."""

    def __init__(
        self,
        router: nn.Module,
        model_type: str,
        spec: RouterSpec,
        config: XShareConfig,
        expert_gpu: Tensor | None,
    ) -> None:
        self.router: Any = router
        self.own_forward = router.forward
        self.spec, self.config, self.expert_gpu = spec, config, expert_gpu
        self.in_fp32 = model_type in _FP32_ROUTERS
        self.gives_fp32 = model_type in _FP32_WEIGHTS
        self.has_bias = getattr(router, "bias", None) is not None
        self.has_correction_bias = getattr(router, "e_score_correction_bias", None) is not None
        self.reset_stats()

    def reset_stats(self) -> None:
        self.steps = 0
        self._raw_stats: list[Tensor] = []

    def total(self) -> Tensor:
        """The sum of the raw statistics of all steps, int64 [8]."""
        if not self._raw_stats:
            return torch.zeros(8, dtype=torch.int64)
        self._raw_stats = [torch.stack(self._raw_stats).sum(0)]
        return self._raw_stats[0]

    def forward(self, this_pass: _Pass, hidden_states: Tensor) -> Any:
        """`(router_logits, weights, ids)`, as every router of transformers 5."""
        is_prefill = this_pass.length > 1
        if is_prefill and this_pass.prefill == "exempt":
            return self.own_forward(hidden_states)
        hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        router_logits = self._router_logits(hidden_states)
        if is_prefill and this_pass.prefill == "stepwise":
            own = self.own_forward(hidden_states)
            ids, weights = self._route_stepwise(this_pass, router_logits, own)
        else:
            ids, weights = self._route(router_logits, this_pass.request_ids.flatten())
        if not self.gives_fp32:
            weights = weights.to(hidden_states.dtype)
        return router_logits, weights, ids.long()

    def _router_logits(self, hidden_states: Tensor) -> Tensor:
        weight = self.router.weight
        bias = self.router.bias if self.has_bias else None
        if self.in_fp32:
            return nn.functional.linear(hidden_states.float(), weight.float(), bias)
        return nn.functional.linear(hidden_states, weight, bias)

    def _route(self, router_logits: Tensor, request_ids: Tensor) -> tuple[Tensor, Tensor]:
        routing = route(
            router_logits.detach(),
            self.spec,
            self.config,
            correction_bias=self.router.e_score_correction_bias if self.has_correction_bias else None,
            request_ids=request_ids,
            expert_gpu=self.expert_gpu,
        )
        self._raw_stats.append(routing.raw_stats)
        self.steps += 1
        if len(self._raw_stats) == 1024:
            self.total()
        return routing.expert_ids, routing.expert_weights

    def _route_stepwise(self, this_pass: _Pass, router_logits: Tensor, own: Any) -> tuple[Tensor, Tensor]:
        """Every `step_tokens` positions a step of their own, but for the first, which is the prompt: ids and
        weights `[batch * length, k]`."""
        batch, width = this_pass.batch, this_pass.step_tokens
        steps = router_logits.view(batch, this_pass.length, -1).split(width, dim=1)
        requests = this_pass.request_ids.split(width, dim=1)
        first = [part.view(batch, this_pass.length, -1)[:, :width].flatten(0, 1) for part in (own[2], own[1])]
        routed = [
            self._route(step.flatten(0, 1).contiguous(), rows.flatten())
            for step, rows in zip(steps[1:], requests[1:], strict=True)
        ]
        ids, weights = (
            torch.cat([part.view(batch, -1, self.spec.top_k) for part in parts], dim=1)
            for parts in zip(first, *routed, strict=True)
        )
        return ids.flatten(0, 1), weights.flatten(0, 1)


class Attachment:
    """XShare in one model. `stats` has one `LayerStats` per MoE layer."""

    def __init__(
        self,
        model: nn.Module,
        config: XShareConfig,
        prefill: Prefill,
        expert_gpu: Tensor | None,
        step_tokens: int,
    ) -> None:
        if step_tokens < 1:
            raise ValueError(f"step_tokens={step_tokens}: a step has at least one position")
        model_config: Any = model.config
        spec = RouterSpec.from_hf_config(model_config)
        config.check(spec)
        modules = find_routers(model)
        if isinstance(config.budget, tuple) and len(config.budget) != len(modules):
            raise ValueError(
                f"XShareConfig(budget=): names {len(config.budget)} layers, "
                f"the model has {len(modules)} MoE layers"
            )
        if any("forward" in vars(module) for module in modules):
            raise ValueError(
                "attach: the model's routers are replaced already; detach the earlier attachment"
            )
        if expert_gpu is not None:
            expert_gpu = expert_gpu.to(torch.int32)
        self._routers = [
            _Router(module, model_config.model_type, spec, config.for_layer(layer), expert_gpu)
            for layer, module in enumerate(modules)
        ]
        self._pass = _Pass(_checked(prefill), step_tokens)
        for router in self._routers:
            router.router.forward = partial(router.forward, self._pass)
        self._hook = model.register_forward_pre_hook(self._pass.see, with_kwargs=True)

    @property
    def prefill(self) -> Prefill:
        """What the next pass of several tokens per sequence will be; may be set, between two passes."""
        return self._pass.prefill

    @prefill.setter
    def prefill(self, prefill: Prefill) -> None:
        self._pass.prefill = _checked(prefill)

    def detach(self) -> None:
        """Give the model its own routers back; harmless when repeated."""
        self._hook.remove()
        for router in self._routers:
            vars(router.router).pop("forward", None)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    @property
    def stats(self) -> list[LayerStats]:
        """Means since the attachment or the last `reset_stats()`; zeros where no step was counted."""
        return [_mean(*total) for total in self.totals]

    @property
    def totals(self) -> list[tuple[Tensor, int]]:
        """Per MoE layer: the sum of the raw statistics (`Routing.raw_stats`), and of how many steps."""
        return [(router.total(), router.steps) for router in self._routers]

    def reset_stats(self) -> None:
        """Forget the steps counted so far."""
        for router in self._routers:
            router.reset_stats()


def find_routers(model: nn.Module) -> list[nn.Module]:
    """The router of each MoE layer, in the layers' order; raises ValueError where there is none."""
    suffixes = ("TopKRouter", "TopkRouter")
    routers = [module for module in model.modules() if type(module).__name__.endswith(suffixes)]
    if not routers:
        raise ValueError(f"{type(model).__name__} has no router module that ends in {' or '.join(suffixes)}")
    return routers


def _checked(prefill: Prefill) -> Prefill:
    if prefill not in get_args(Prefill):
        raise ValueError(f"prefill={prefill!r}: must be one of {', '.join(get_args(Prefill))}")
    return prefill


def _mean(total: Tensor, steps: int) -> LayerStats:
    before, after, kept, affinity, overflow, peak_before, peak_after, rows = total.tolist()
    n = max(steps, 1)
    return LayerStats(
        steps=steps,
        experts_before=before / n,
        experts_after=after / n,
        kept_utility=kept / affinity if affinity else 1.0,
        warmup_overflow=overflow / n,
        peak_gpu_before=peak_before / n,
        peak_gpu_after=peak_after / n,
        rows=(rows & 0xFFFFFFFF) / n,
    )
