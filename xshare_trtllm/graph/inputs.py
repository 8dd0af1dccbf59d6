"""Which of the optional tensors a routing graph has, and what a graph refuses."""

from __future__ import annotations

from dataclasses import dataclass

from xshare_trtllm.config import RouterSpec, XShareConfig

LEAST_COVERAGE = 2.0**-16  # so that its product with a sum of utilities fits an int64


@dataclass(frozen=True, slots=True)
class GraphInputs:
    """The optional inputs of a routing graph, in this order after router_logits [T, E].

    correction_bias [E] float32, request_ids [T] int32 (-1 = padding), exempt [T] bool, expert_gpu [E] int32
    """

    correction_bias: bool = False
    request_ids: bool = False
    exempt: bool = False
    expert_gpu: bool = False

    def names(self) -> list[str]:
        return [name for name in self.__slots__ if getattr(self, name)]

    @classmethod
    def needed_by(cls, spec: RouterSpec, config: XShareConfig, *, exempt: bool = False) -> GraphInputs:
        """What the router and the stages that are switched on cannot do without. With `expert_gpu` besides, a
        coverage limits the fullest GPU."""
        return cls(
            correction_bias=spec.rule.has_bias,
            request_ids=config.request_budget is not None,
            exempt=exempt,
            expert_gpu=config.gpu_budget is not None,
        )

    def check(self, spec: RouterSpec, config: XShareConfig) -> None:
        """Raises ValueError where router, configuration and inputs do not fit together."""
        config.check(spec)
        if isinstance(config.budget, tuple):
            raise ValueError(
                "XShareConfig(budget=one per layer): a graph routes one layer, use config.for_layer(i)"
            )
        if config.coverage is not None and config.coverage < LEAST_COVERAGE:
            raise ValueError(
                f"XShareConfig(coverage={config.coverage}): a graph takes coverages from {LEAST_COVERAGE} on"
            )
        if self.correction_bias and not spec.rule.has_bias:
            raise ValueError(f"correction_bias: {spec.scoring} scoring has none")
        if config.request_budget is not None and not self.request_ids:
            raise ValueError(
                f"XShareConfig(request_budget={config.request_budget}): the graph needs request_ids"
            )
        if config.gpu_budget is not None and not self.expert_gpu:
            raise ValueError(f"XShareConfig(gpu_budget={config.gpu_budget}): the graph needs expert_gpu")
