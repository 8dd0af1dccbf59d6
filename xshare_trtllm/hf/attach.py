"""XShare inside a transformers model: every router instance calls `route` in place of its own top-k."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from xshare_trtllm.config import RouterSpec, XShareConfig
from xshare_trtllm.hf.generation import watch_generate
from xshare_trtllm.hf.passes import Choice, Pass, Passes, Prefill, Step, callable_modules, checked
from xshare_trtllm.hf.routers import RouterKind, check_sizes, find_routers, router_kind
from xshare_trtllm.routing import route


def attach(
    model: nn.Module,
    config: XShareConfig,
    *,
    prefill: Prefill = "exempt",
    expert_gpu: Tensor | None = None,
    step_tokens: int = 1,
    shadow: bool = False,
) -> Attachment:
    """Puts XShare into every MoE layer of a transformers model, until `detach()` or the end of a `with`.

    Works on the families of docs/families.md. Row `(b, l)` of a forward pass belongs to request `b`; where a
    2-D `attention_mask` says that it is padding, it is padding, and so is a sequence that has reached its end
    in `generate`. In continuous batching (`generate_batch`) each sequence of a pass is a request, those of
    more than one token are prefill. Where nothing is limited the output is the model's own, ties included.

    config      budgets per layer count MoE layers only
    prefill     what to do with a pass of more than one token per sequence:
                `exempt`    the model's own routing (prefill; it is not counted in the statistics)
                `shared`    all rows of the pass are one batch (verification of draft tokens)
                `stepwise`  `step_tokens` positions are a step of their own: what decoding (1) or verifying
                            drafts (1 + draft length) of the same tokens would compute, in a single pass
    expert_gpu  [E] int, the GPU that holds each expert
    step_tokens positions of a step for `stepwise`, whose first one is the prompt and keeps its own routing
    shadow      the model's own routing, with the statistics that XShare would have (XSHARE_SHADOW)

    A pass of one token per sequence is always one batch.

    A layer or block that is called by itself keeps its own routing: a pass begins where the model is called.

    Raises ValueError for a model without known routers, one that is attached already, or a configuration
    that does not fit; a pass raises RuntimeError where the routers are not called, or not as expected.
    """
    return Attachment(model, config, prefill, expert_gpu, step_tokens, shadow)


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


class _Router:
    """What one layer's router is in place of its own method."""

    def __init__(
        self,
        module: nn.Module,
        kind: RouterKind,
        passes: Passes,
        spec: RouterSpec,
        config: XShareConfig,
        expert_gpu: Tensor | None,
        shadow: bool,
    ) -> None:
        self.module, self.kind, self.passes = module, kind, passes
        self.own: Any = getattr(module, kind.method)
        self.before = vars(module).get(kind.method)
        self.is_off = config.is_off(spec)
        self.keeps_own = shadow or self.is_off
        self.spec = spec if kind.scales else spec.model_copy(update={"routed_scaling_factor": 1.0})
        self.config, self.expert_gpu = config, expert_gpu
        self._lock = threading.Lock()
        self.reset_stats()
        setattr(module, kind.method, self)

    def restore(self) -> None:
        """Give the module its own method back, unless somebody has replaced it since."""
        if vars(self.module).get(self.kind.method) is self:
            delattr(self.module, self.kind.method)
            if self.before is not None:
                setattr(self.module, self.kind.method, self.before)

    def reset_stats(self) -> None:
        with self._lock:
            self.steps = 0
            self._raw_stats: list[Tensor] = []

    def total(self) -> tuple[Tensor, int]:
        """The sum of the raw statistics of all steps, int64 [8], and how many these were."""
        with self._lock:
            return self._sum(), self.steps

    def _sum(self) -> Tensor:
        if not self._raw_stats:
            return torch.zeros(8, dtype=torch.int64)
        self._raw_stats = [torch.stack(self._raw_stats).sum(0)]
        return self._raw_stats[0]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The router's own output, with XShare's choice in it where the pass has rows that share a set."""
        output = self.own(*args, **kwargs)
        this_pass = self.passes.current
        if this_pass is None:
            return output
        this_pass.calls += 1
        own = self.kind.read(self.module, args, output)
        if this_pass.steps is None:  # where text and images go to other experts, not all rows come here
            return output
        self._check(own, this_pass)
        bias = self.kind.bias(self.module, args)
        parts = this_pass.split(own)
        chosen = [
            part if step is None else self._route(step, part, bias)
            for step, part in zip(this_pass.steps, parts, strict=True)
        ]
        if all(new is old for new, old in zip(chosen, parts, strict=True)):
            return output
        together = this_pass.join(chosen)
        return self.kind.write(self.module, output, together.weights, together.ids)

    def _check(self, own: Choice, this_pass: Pass) -> None:
        rows, spec = this_pass.batch * this_pass.length, self.spec
        wanted = ((rows, spec.num_experts), (rows, spec.top_k), (rows, spec.top_k))
        got = tuple(tuple(part.shape) for part in own)
        if got != wanted:
            raise RuntimeError(
                f"attach: {self.kind.module} gives logits, weights and ids of shapes {got}, not {wanted}"
            )

    def _route(self, step: Step, own: Choice, bias: Tensor | None) -> Choice:
        """XShare's choice, or `own` itself where nothing is limited: there the model decides its ties."""
        device = own.logits.device
        exempt = None if step.exempt is None else step.exempt.to(device)
        routing = route(
            own.logits.detach(),
            self.spec,
            self.config,
            correction_bias=bias,
            request_ids=step.request_ids.to(device),
            exempt=exempt,
            expert_gpu=self.expert_gpu,
        )
        self._count(routing.raw_stats)
        max_rows = self.config.max_rows
        if self.keeps_own or (max_rows is not None and step.real_rows > max_rows):
            return own
        ids = routing.expert_ids.to(own.ids.dtype)
        weights = self.kind.weights(self.module, Choice(own.logits, routing.expert_weights, ids))
        weights = weights.to(own.weights.dtype)
        if exempt is not None:
            weights = torch.where(exempt[:, None], own.weights, weights)
            ids = torch.where(exempt[:, None], own.ids, ids)
        return Choice(own.logits, weights, ids)

    def _count(self, raw_stats: Tensor) -> None:
        with self._lock:
            self._raw_stats.append(raw_stats)
            self.steps += 1
            if len(self._raw_stats) == 1024:
                self._sum()


class Attachment:
    """XShare in one model. `stats` has one `LayerStats` per MoE layer. Any number of threads may call the
    model at the same time: each pass is a batch of its own."""

    def __init__(
        self,
        model: nn.Module,
        config: XShareConfig,
        prefill: Prefill,
        expert_gpu: Tensor | None,
        step_tokens: int,
        shadow: bool,
    ) -> None:
        spec = RouterSpec.from_hf_config(model.config)
        config.check(spec)
        kind = router_kind(model)
        modules = find_routers(model)
        check_sizes(modules, spec)
        if isinstance(config.budget, tuple) and len(config.budget) != len(modules):
            raise ValueError(
                f"XShareConfig(budget=): names {len(config.budget)} layers, "
                f"the model has {len(modules)} MoE layers"
            )
        if any(isinstance(vars(module).get(kind.method), _Router) for module in modules):
            raise ValueError("attach: XShare is in this model already; detach the earlier attachment")
        if expert_gpu is not None:
            expert_gpu = expert_gpu.to(torch.int32)
        self._passes = Passes(prefill, step_tokens, len(modules))
        self._routers = [
            _Router(module, kind, self._passes, spec, config.for_layer(layer), expert_gpu, shadow)
            for layer, module in enumerate(modules)
        ]
        is_off = all(router.is_off for router in self._routers)
        self._undo: list[Callable[[], None]] = [router.restore for router in self._routers]
        for module in callable_modules(model, modules):
            self._undo += [hook.remove for hook in self._passes.watch(module)]
            self._undo.append(watch_generate(module, self._passes, is_off=is_off))

    @property
    def prefill(self) -> Prefill:
        """What the next pass of several tokens per sequence will be; may be set, between two passes."""
        return self._passes.prefill

    @prefill.setter
    def prefill(self, prefill: Prefill) -> None:
        self._passes.prefill = checked(prefill)

    def detach(self) -> None:
        """Give the model its own routers back; harmless when repeated."""
        while self._undo:
            self._undo.pop()()

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
        return [router.total() for router in self._routers]

    def reset_stats(self) -> None:
        """Forget the steps counted so far."""
        for router in self._routers:
            router.reset_stats()


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
