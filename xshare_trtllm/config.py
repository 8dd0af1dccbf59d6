"""Every knob, checked: what a router computes (`RouterSpec`), what XShare may do to it (`XShareConfig`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from xshare_trtllm.families import router_fields

MAX_EXPERTS = 512
MAX_TOP_K = 16
NO_LIMIT = 2**31 - 1

Scoring = Literal[
    "softmax",
    "softmax_renorm",
    "topk_softmax",
    "sigmoid_bias",
    "softmax_bias",
    "softmax_bias_renorm",
    "topk_sigmoid",
    "sqrt_softplus_bias",
]
SCORINGS: tuple[str, ...] = get_args(Scoring)


class ScoringRule(NamedTuple):
    """What a scoring is made of; everything that depends on it reads `RULES`.

    affinity       of each logit, over the row or by itself
    ranked_by      what the top-k sorts by
    has_bias       a correction bias is added to that
    group_best_of  a group's score is the sum of so many of its best; 0 = it has no groups
    renormalises   divides the weights of a choice by their sum
    """

    affinity: Literal["softmax", "sigmoid", "sqrt_softplus"]
    ranked_by: Literal["affinity", "logits"]
    has_bias: bool
    group_best_of: int
    renormalises: bool

    @property
    def is_bounded(self) -> bool:
        """True where no affinity is above 1."""
        return self.affinity != "sqrt_softplus"


RULES: Mapping[str, ScoringRule] = {
    "softmax": ScoringRule("softmax", "affinity", False, 1, False),
    "softmax_renorm": ScoringRule("softmax", "affinity", False, 1, True),
    "topk_softmax": ScoringRule("softmax", "logits", False, 0, True),
    "sigmoid_bias": ScoringRule("sigmoid", "affinity", True, 2, True),
    "softmax_bias": ScoringRule("softmax", "affinity", True, 2, False),
    "softmax_bias_renorm": ScoringRule("softmax", "affinity", True, 2, True),
    "topk_sigmoid": ScoringRule("sigmoid", "logits", True, 0, False),
    "sqrt_softplus_bias": ScoringRule("sqrt_softplus", "affinity", True, 2, True),
}

Utility = Literal["squared_weight", "affinity"]
UTILITIES: tuple[str, ...] = get_args(Utility)
# Of a server that runs: XShare, the model's own routing with what XShare would count, or without.
MODES = ("on", "shadow", "off")


class RouterSpec(BaseModel):
    """What the router of one MoE layer computes, before XShare.

    num_experts           routed experts of the layer, 1 to 512
    top_k                 experts per token, 1 to 16
    scoring               one of `SCORINGS`, what the router makes of its logits
    num_groups            expert groups of a group-limited router (DeepSeek: `n_group`); 1 = no limit
    top_k_groups          groups that a token may use (DeepSeek: `topk_group`)
    routed_scaling_factor multiplies every expert weight

    Raises ValueError, naming the argument, its value and what is right.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    num_experts: int = Field(ge=1, le=MAX_EXPERTS)
    top_k: int = Field(ge=1, le=MAX_TOP_K)
    scoring: Scoring
    num_groups: int = Field(default=1, ge=1)
    top_k_groups: int = Field(default=1, ge=1)
    routed_scaling_factor: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        scoring: str,
        num_groups: int = 1,
        top_k_groups: int = 1,
        routed_scaling_factor: float = 1.0,
    ) -> None:
        _validated(
            super().__init__,
            "RouterSpec",
            num_experts=num_experts,
            top_k=top_k,
            scoring=scoring,
            num_groups=num_groups,
            top_k_groups=top_k_groups,
            routed_scaling_factor=routed_scaling_factor,
        )

    @property
    def rule(self) -> ScoringRule:
        return RULES[self.scoring]

    @property
    def experts_per_group(self) -> int:
        return self.num_experts // self.num_groups

    @property
    def is_group_limited(self) -> bool:
        """True where the groups rule an expert out for some token."""
        return self.top_k_groups < self.num_groups

    @model_validator(mode="after")
    def _fits_together(self) -> RouterSpec:
        if self.top_k > self.num_experts:
            raise _wrong(self, "top_k", f"top_k must be at most num_experts={self.num_experts}")
        best_of = self.rule.group_best_of
        if self.num_groups > 1 and best_of == 0:
            raise _wrong(self, "num_groups", f"{self.scoring} has no expert groups, num_groups must be 1")
        if self.num_experts % self.num_groups:
            raise _wrong(self, "num_groups", f"num_groups must divide num_experts={self.num_experts}")
        if self.num_groups > 1 and self.experts_per_group < best_of:
            raise _wrong(
                self,
                "num_groups",
                f"{self.scoring} scores a group by its best two experts, "
                f"num_groups must be at most {self.num_experts // 2}",
            )
        if self.top_k_groups > self.num_groups:
            raise _wrong(self, "top_k_groups", f"top_k_groups must be at most num_groups={self.num_groups}")
        reachable = self.top_k_groups * self.experts_per_group
        if self.top_k > reachable:
            raise _wrong(
                self,
                "top_k",
                f"top_k must be at most {reachable}, the experts in "
                f"top_k_groups={self.top_k_groups} groups of {self.experts_per_group}",
            )
        return self

    @classmethod
    def from_hf_config(cls, config: object) -> RouterSpec:
        """The router of a Hugging Face model, from its configuration: a transformers object, or config.json
        as a dict.

        A multimodal model is read through to its text model. Raises ValueError for a model_type that is not
        known (listing those that are), for a missing field (a guess would route silently wrong) and for a
        router that no scoring function here expresses.
        """
        return cls(**router_fields(config))


def _as_budget(value: object) -> object:
    if value is None:
        return None
    layers: object = value
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)):
        layers = tuple(value)
    values = layers if isinstance(layers, tuple) else (layers,)
    if not values or any(not isinstance(v, int) or isinstance(v, bool) or v < 1 for v in values):
        raise ValueError("must be a positive integer, or one positive integer per layer")
    return layers


class XShareConfig(BaseModel):
    """What XShare may do in a layer and step. Immutable; check it against a router with `check`.

    budget          experts that may be active in the layer (`m`), an int or one per layer; None = no limit
    warmup          experts per token that are kept whatever the batch says (`k0`)
    request_budget  experts that one request proposes (`m_r`, speculative decoding); None = off
    gpu_budget      experts that may be active on one GPU (`m_g`, expert parallelism); None = no limit
    coverage        the share of the rows' utility that is enough (`c`), 0 < c <= 1; None = off. Where the GPU
                    of each expert is given and `gpu_budget` is not, it sets that budget
    max_rows        with more real rows than this the model's own routing is the output; None = no limit
    utility         what an expert is worth to a row: `squared_weight`, the square of its weight in the row's
                    own top-k as the model has it, or `affinity` (the paper's), the score of every expert

    At least one of `coverage`, `budget` and `gpu_budget` must be set.
    Raises ValueError, naming the argument, its value and what is right.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    budget: Annotated[int | tuple[int, ...] | None, BeforeValidator(_as_budget)] = None
    warmup: int = Field(default=1, ge=0)
    request_budget: int | None = Field(default=None, ge=1)
    gpu_budget: int | None = Field(default=None, ge=1)
    coverage: float | None = Field(default=None, gt=0, le=1)
    max_rows: int | None = Field(default=None, ge=1)
    utility: Utility = "squared_weight"

    def __init__(
        self,
        budget: int | Iterable[int] | None = None,
        warmup: int = 1,
        request_budget: int | None = None,
        gpu_budget: int | None = None,
        coverage: float | None = None,
        max_rows: int | None = None,
        utility: str = "squared_weight",
    ) -> None:
        _validated(
            super().__init__,
            "XShareConfig",
            budget=budget,
            warmup=warmup,
            request_budget=request_budget,
            gpu_budget=gpu_budget,
            coverage=coverage,
            max_rows=max_rows,
            utility=utility,
        )

    @model_validator(mode="after")
    def _limits_something(self) -> XShareConfig:
        if (self.budget, self.gpu_budget, self.coverage) == (None, None, None):
            raise ValueError(
                "XShareConfig: nothing is limited; set coverage (0.97 = keep 97 % of what rows ask for), "
                "budget or gpu_budget"
            )
        return self

    @classmethod
    def off(cls, spec: RouterSpec) -> XShareConfig:
        """The model's own routing."""
        return cls(budget=spec.num_experts)

    def is_off(self, spec: RouterSpec) -> bool:
        """True where this configuration of one layer can never change the routing."""
        limits = (self.request_budget, self.gpu_budget, self.coverage)
        return (
            limits == (None, None, None)
            and self.budget is not None
            and min(self._budgets()) >= spec.num_experts
        )

    @property
    def layer_budget(self) -> int:
        """The budget of a layer as a number, NO_LIMIT where there is none.

        Raises ValueError where the budgets are one per layer: `for_layer` gives one layer's configuration.
        """
        if isinstance(self.budget, tuple):
            raise ValueError(
                "XShareConfig(budget=one per layer): a layer needs its own configuration, config.for_layer(i)"
            )
        return NO_LIMIT if self.budget is None else min(self.budget, NO_LIMIT)

    def _budgets(self) -> tuple[int, ...]:
        if self.budget is None:
            return ()
        return self.budget if isinstance(self.budget, tuple) else (self.budget,)

    def for_layer(self, layer: int) -> XShareConfig:
        """The configuration of MoE layer number `layer` (from 0): the same, with that layer's one budget."""
        if layer < 0:
            raise ValueError(f"XShareConfig.for_layer({layer}): layers count from 0")
        if not isinstance(self.budget, tuple):
            return self
        if layer >= len(self.budget):
            raise ValueError(
                f"XShareConfig.for_layer({layer}): budget names {len(self.budget)} layers, "
                f"the last is {len(self.budget) - 1}"
            )
        return self.model_copy(update={"budget": self.budget[layer]})

    def check(self, spec: RouterSpec) -> None:
        """Raises ValueError where this configuration does not fit the router."""
        for layer, budget in enumerate(self._budgets()):
            if budget < spec.top_k:
                where = f"budget[{layer}]" if isinstance(self.budget, tuple) else "budget"
                raise ValueError(
                    f"XShareConfig({where}={budget}): budget must be at least top_k={spec.top_k}"
                )
        if self.utility == "affinity" and not spec.rule.is_bounded:
            raise _wrong(
                self,
                "utility",
                f"the scores of {spec.scoring} have no bound, one row could outweigh all; use squared_weight",
            )
        if self.warmup > spec.top_k:
            raise _wrong(self, "warmup", f"warmup must be at most top_k={spec.top_k}")
        if self.warmup == 0 and spec.num_groups > 1:
            raise _wrong(
                self,
                "warmup",
                "a group-limited router needs warmup of at least 1, or a row may find no expert",
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the options that are off; `from_dict` gives the same configuration back."""
        values = self.model_dump(exclude_none=True)
        if isinstance(self.budget, tuple):
            values["budget"] = list(self.budget)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> XShareConfig:
        """Raises ValueError for keys that are not known, by name, and where nothing is limited."""
        if not isinstance(values, Mapping):
            raise ValueError(f"XShareConfig: expected keys and values, got {type(values).__name__}")
        known = tuple(cls.model_fields)
        unknown = [repr(key) for key in values if key not in known]
        if unknown:
            raise ValueError(f"XShareConfig: unknown key {', '.join(unknown)}; known are {', '.join(known)}")
        return cls(**values)

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The configuration as YAML text, written to `path` where given."""
        import yaml  # type: ignore[import-untyped,unused-ignore]

        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_yaml(cls, source: str | Path) -> XShareConfig:
        """From a YAML file (a Path, or a name that ends in .yaml or .yml) or from YAML text."""
        import yaml  # type: ignore[import-untyped,unused-ignore]

        is_file = isinstance(source, Path) or ("\n" not in source and source.endswith((".yaml", ".yml")))
        text = Path(source).read_text(encoding="utf-8") if is_file else str(source)
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"XShareConfig: not valid YAML: {error}") from error
        return cls.from_dict(values)


def _wrong(model: BaseModel, field: str, problem: str) -> ValueError:
    return ValueError(f"{type(model).__name__}({field}={getattr(model, field)!r}): {problem}")


def _validated(init: Any, name: str, **values: Any) -> None:
    """Runs pydantic's own `__init__` and turns its report into one readable line."""
    try:
        init(**values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        if problem["loc"]:
            field = str(problem["loc"][0])
            message = f"{name}({field}={values[field]!r}): {field} {message}"
        raise ValueError(message) from None
