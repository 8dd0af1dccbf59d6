"""What speculative decoding costs and gains on an MoE model: every verified row adds the experts of its own.

A step verifies the rows of every request's draft in one pass, behind some passes of a draft model. Where the
pass costs more than plain decoding by more than the tokens it accepts, speculation loses. The experts in use
are those of fitted routers (`cost.Loads`) for consecutive tokens of as many documents as there are requests;
a tree's rows are taken for such a run of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import Tensor

from xshare_trtllm.config import XShareConfig
from xshare_trtllm.evaluation.traces import ExpertLoad, simulate
from xshare_trtllm.planning.cost import (
    GPUS,
    VALUE_BYTES,
    Assumptions,
    Parallel,
    Predictor,
    StepCost,
    step_cost,
)
from xshare_trtllm.planning.shapes import shape

DRAFT_VOCABULARY = 32_000  # of an EAGLE3 draft model's head


@dataclass(frozen=True, slots=True)
class Draft:
    """How requests speculate.

    rows      that one request verifies in a step: its draft's (a chain or a tree) and the last token's
    accepted  tokens that a request gains in a step, the model's own included: 1 to rows
    passes    of the draft model in a step, one after another

    Raises ValueError, naming the argument.
    """

    rows: int
    accepted: float
    passes: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.passes < 0:
            raise ValueError(f"Draft(rows={self.rows}, passes={self.passes}): at least 1, and at least 0")
        if not 1 <= self.accepted <= self.rows:
            raise ValueError(f"Draft(accepted={self.accepted}): must be from 1 to rows={self.rows}")


@dataclass(frozen=True, slots=True)
class Drafting:
    """Seconds that drafting takes beyond the bytes that it reads, fitted to SpecForge issue 339: `step`
    once per step (the host, accepting), `draft_pass` per pass."""

    step: float = 4.5e-3
    draft_pass: float = 0.17e-3


@dataclass(frozen=True, slots=True)
class SpeculativeStep:
    """One batch: plain decoding, speculation with the model's own routing, and with XShare.

    experts are distinct experts per MoE layer; seconds are per step, drafting included, of which `plain_host`
    and `draft_host` come from no byte and no operation
    """

    batch: int
    draft: Draft
    plain_experts: float
    own_experts: float
    shared_experts: float
    plain: float
    own: float
    shared: float
    plain_host: float
    draft_host: float

    @property
    def own_speedup(self) -> float:
        """Tokens per second over those of plain decoding."""
        return self.draft.accepted * self.plain / self.own

    @property
    def shared_speedup(self) -> float:
        return self.draft.accepted * self.plain / self.shared

    @property
    def own_speedup_without_host(self) -> float:
        """As `own_speedup`, for a runtime without any time of its own."""
        return self._without_host(self.own)

    @property
    def shared_speedup_without_host(self) -> float:
        return self._without_host(self.shared)

    def _without_host(self, seconds: float) -> float:
        bare = seconds - self.plain_host - self.draft_host
        return self.draft.accepted * (self.plain - self.plain_host) / bare

    @property
    def own_break_even(self) -> float:
        """Tokens per step from which speculation pays."""
        return self.own / self.plain

    @property
    def shared_break_even(self) -> float:
        return self.shared / self.plain


@dataclass
class SpeculativePredictor:
    """Speculation on the model and GPU of `predictor`."""

    predictor: Predictor
    drafting: Drafting = Drafting()

    @cached_property
    def _steps(self) -> dict[tuple[int, int], Tensor]:
        return {}

    def load(self, batch: int, rows: int, config: XShareConfig) -> ExpertLoad:
        """Of `batch` documents with `rows` consecutive tokens each, as one step."""
        loads = self.predictor.loads
        if (batch, rows) not in self._steps:
            steps = max(2, min(16, 256 // (batch * rows)))
            logits = loads._routers.logits(batch * steps, rows)
            self._steps[batch, rows] = logits.reshape(len(logits), steps, batch * rows, -1)
        return simulate(self._steps[batch, rows], loads.spec, config, loads._placement, loads.gpus)

    def at(self, batch: int, draft: Draft, config: XShareConfig) -> SpeculativeStep:
        """Raises ValueError for a configuration that does not fit the router."""
        config.check(self.predictor.shape.router)
        off = XShareConfig.off(self.predictor.shape.router)
        plain = self.predictor.loads.at(batch, off)
        own, shared = (self.load(batch, draft.rows, each) for each in (off, config))
        drafting, before = self.drafting_time(draft), self._cost(batch, 1, plain, False)
        return SpeculativeStep(
            batch,
            draft,
            plain.experts,
            own.experts,
            shared.experts,
            before.total,
            self._cost(batch, draft.rows, own, False).total + drafting,
            self._cost(batch, draft.rows, shared, True).total + drafting,
            before.overhead,
            self.drafting.step + draft.passes * self.drafting.draft_pass,
        )

    def drafting_time(self, draft: Draft) -> float:
        """Seconds: one dense layer and a small head per pass, beside what is fitted."""
        shape, predictor = self.predictor.shape, self.predictor
        parameters = shape.attention_parameters + shape.hidden * DRAFT_VOCABULARY
        bandwidth = predictor.gpu.memory_bandwidth * predictor.assumptions.memory
        read = parameters * VALUE_BYTES / predictor.parallel.tensor / bandwidth
        return self.drafting.step + draft.passes * (self.drafting.draft_pass + read)

    def _cost(self, batch: int, rows: int, load: ExpertLoad, shares_experts: bool) -> StepCost:
        """The rows of a request read its cache once."""
        return step_cost(
            self.predictor.shape,
            self.predictor.gpu,
            batch * rows,
            load.peak_experts,
            load.peak_rows,
            context=max(1, round(self.predictor.context / rows)),
            shares_experts=shares_experts,
            parallel=self.predictor.parallel,
            assumptions=self.predictor.assumptions,
        )


# ---- Public tables ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Published:
    """Output tokens per second of Qwen3-30B-A3B in bfloat16 with SGLang on H100s, with EAGLE3 and without."""

    source: str
    gpus: int
    batch: int
    draft: Draft
    plain: float
    speculative: float

    @property
    def speedup(self) -> float:
        return self.speculative / self.plain


_FORGE, _SLIM = "SpecForge issue 339", "AngelSlim issue 163"
# sgl-project/SpecForge issue 339 (2025-12-01), 20 questions of MT-Bench: the first six are fitted to.
FITTED = tuple(
    Published(_FORGE, 2, 1, draft, 222.47, measured)
    for draft, measured in (
        (Draft(4, 1.86, 3), 159.78),
        (Draft(8, 2.20, 3), 172.99),
        (Draft(4, 1.99, 3), 207.62),
        (Draft(16, 2.52, 7), 191.90),
        (Draft(12, 2.42, 6), 171.54),
        (Draft(60, 3.2, 8), 177.5),
    )
)
# The same issue's other rows, and Tencent/AngelSlim issue 163 (2025-12-08): predicted, not fitted to.
UNSEEN = (
    Published(_FORGE, 2, 4, Draft(4, 1.86, 3), 566.21, 447.90),
    Published(_FORGE, 2, 4, Draft(8, 2.27, 3), 566.21, 426.46),
    Published(_SLIM, 4, 1, Draft(4, 2.017, 3), 218.89, 170.35),
    Published(_SLIM, 4, 1, Draft(8, 2.216, 3), 218.89, 185.28),
    Published(_SLIM, 4, 1, Draft(16, 2.542, 4), 218.89, 185.64),
    Published(_SLIM, 4, 1, Draft(64, 3.034, 7), 218.89, 193.31),
    Published(_SLIM, 4, 4, Draft(16, 2.556, 4), 507.49, 476.37),
    Published(_SLIM, 4, 8, Draft(16, 2.578, 4), 677.14, 673.14),
    Published(_SLIM, 4, 32, Draft(16, 2.560, 4), 1128.30, 927.11),
    Published(_SLIM, 4, 64, Draft(16, 2.553, 4), 1237.84, 1307.95),
)
PUBLISHED_CONTEXT = 512  # a question of MT-Bench and half of its answer, about


def published_setup(gpus: int, drafting: Drafting | None = None) -> SpeculativePredictor:
    """What the tables were measured on; the overhead per layer is that of plain decoding at batch 1 there."""
    model = shape("qwen3-30b-a3b")
    bare = Assumptions(layer_overhead=0.0)
    predictor = Predictor(model, GPUS["h100"], PUBLISHED_CONTEXT, Parallel(tensor=gpus), bare)
    step = predictor.at(1, XShareConfig.off(model.router)).before.total
    plain = next(each.plain for each in (*FITTED, *UNSEEN) if (each.gpus, each.batch) == (gpus, 1))
    predictor.assumptions = replace(bare, layer_overhead=(1 / plain - step) / model.layers)
    return SpeculativePredictor(predictor, drafting or Drafting())


def fit_drafting() -> Drafting:
    """Least squares over FITTED: what verification and the draft's bytes leave of the steps' time."""
    setup = published_setup(2, Drafting(0.0, 0.0))
    off = XShareConfig.off(setup.predictor.shape.router)
    left = [
        each.batch * each.draft.accepted / each.speculative - setup.at(1, each.draft, off).own
        for each in FITTED
    ]
    columns = np.array([[1.0, each.draft.passes] for each in FITTED])
    step, draft_pass = np.linalg.lstsq(columns, np.array(left), rcond=None)[0]
    return Drafting(float(step), float(draft_pass))


def validate() -> list[tuple[Published, float]]:
    """The public speed-ups that were not fitted to, and their predictions."""
    setups = {gpus: published_setup(gpus) for gpus in {each.gpus for each in UNSEEN}}
    off = XShareConfig.off(shape("qwen3-30b-a3b").router)
    return [(each, setups[each.gpus].at(each.batch, each.draft, off).own_speedup) for each in UNSEEN]
