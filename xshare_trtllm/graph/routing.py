"""All stages of XShare in tensor operators without loops, the same for ONNX and for TensorRT.

Every tensor is a matrix: rows [T, 1], experts [1, E], slots [T, k], scores [T, E]. Where the reference walks
the experts one by one, here each expert counts those that would be walked before it, in [E, E].
Operators that round once each (ONNX Runtime on a CPU) give the bits of the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from xshare_trtllm.config import MAX_EXPERTS, RouterSpec, XShareConfig
from xshare_trtllm.graph.inputs import GraphInputs
from xshare_trtllm.graph.ops import Ops

INPUT_NAMES = ("router_logits", "correction_bias", "request_ids", "exempt", "expert_gpu")
OUTPUT_NAMES = ("expert_ids", "expert_weights", "active_experts")


class Outputs(NamedTuple):
    """expert_ids [T, k] int32, expert_weights [T, k] float32, active_experts [E] bool"""

    expert_ids: Any
    expert_weights: Any
    active_experts: Any


def route(ops: Ops, spec: RouterSpec, config: XShareConfig, tensors: Mapping[str, Any]) -> Outputs:
    """Builds the graph. `tensors` holds router_logits [T, E] and the optional inputs, by name.

    Raises ValueError where they do not fit the router and its configuration.
    """
    optional = {name: name in tensors for name in INPUT_NAMES[1:]}
    GraphInputs(**optional).check(spec, config)
    return _Routing(ops, spec, config, tensors).outputs()


class _Routing:
    def __init__(self, ops: Ops, spec: RouterSpec, config: XShareConfig, tensors: Mapping[str, Any]) -> None:
        self.ops, self.spec, self.config = ops, spec, config
        self.experts = spec.num_experts
        self.request_ids = self._rows(tensors.get("request_ids"))
        self.expert_gpu = tensors.get("expert_gpu")
        logits = ops.cast(tensors["router_logits"], "float32")
        self.real = self._real_rows(logits)
        exempt = self._rows(tensors.get("exempt"))
        self.exempt = None if exempt is None else self._and(exempt, self.real)
        self.participating = self.real if exempt is None else self._and(self.real, self._not(exempt))
        self.logits = ops.where(self.real, logits, self._float(0.0))
        self.affinity, self.ranking = self._score(tensors.get("correction_bias"))
        _, self.own = ops.top_k(self.ranking, spec.top_k, axis=1)

    def outputs(self) -> Outputs:
        ops = self.ops
        active = self._active()
        chosen, valid = self._refine(active)
        weights = self._weigh(chosen, valid)
        ids = ops.where(self.real, chosen, self._lowest_ids(active))
        weights = ops.where(self.real, weights, self._float(0.0))
        return Outputs(ids, weights, ops.reshape(active, (self.experts,)))

    # ---- Stages 0 and 2 to 4: the set S -------------------------------------------------------------------

    def _active(self) -> Any:
        """[1, E] bool"""
        config, top_k = self.config, self.spec.top_k
        before = self._experts_of(self.real, top_k)
        if config.is_off(self.spec):
            return before
        active = self._selected()
        if config.max_rows is None:
            return active
        rows = self.ops.reduce_sum(self.ops.cast(self.real, "int64"), axis=0)
        aside = self.ops.binary("Greater", rows, self._int(config.max_rows))
        return self.ops.binary("Or", self._and(aside, before), self._and(self._not(aside), active))

    def _selected(self) -> Any:
        """[1, E] bool: exempt experts, warm-up, and the best others within the budgets."""
        ops, config = self.ops, self.config
        warm = self._experts_of(self.participating, config.warmup)
        free = None
        if self.exempt is not None:
            free = self._experts_of(self.exempt, self.spec.top_k)
        counted = warm if free is None else self._and(warm, self._not(free))
        chosen = warm if free is None else ops.binary("Or", warm, free)
        fixed = ops.binary("Mul", self._fixed_point(), ops.cast(self.participating, "int64"))
        utility = self._utility(fixed)
        return ops.binary("Or", chosen, self._greedy(utility, chosen, counted))

    def _utility(self, fixed: Any) -> Any:
        """u [1, E] int64 from the affinities [T, E] int64 of the participating rows."""
        if self.config.request_budget is None:
            return self.ops.reduce_sum(fixed, axis=0)
        return self._proposed(fixed, min(self.config.request_budget, self.experts))

    def _proposed(self, fixed: Any, request_budget: int) -> Any:
        """Each request's column sums, at the experts that it proposes. All rows of a request find the same
        sums; its first row speaks for it."""
        ops = self.ops
        ids, rows = self.request_ids, self.participating
        same = ops.binary("Equal", ids, ops.transpose(ids))
        same = self._and(same, self._and(rows, ops.transpose(rows)))
        per_request = self._exact_matmul(ops.cast(same, "float32"), fixed)
        _, best = ops.top_k(per_request, request_budget, axis=1)

        number = ops.cumulative_sum(ops.cast(ops.binary("Or", rows, self._true()), "int32"), axis=0)
        earlier = self._and(same, ops.binary("Less", ops.transpose(number), number))
        is_later = ops.reduce_sum(ops.cast(earlier, "int32"), axis=1)
        first = self._and(rows, ops.binary("Equal", is_later, self._int(0, "int32")))
        proposed = self._mask_of(best, first, request_budget, self.experts)
        return ops.reduce_sum(ops.binary("Mul", per_request, ops.cast(proposed, "int64")), axis=0)

    def _exact_matmul(self, same: Any, fixed: Any) -> Any:
        """same [T, T] of 0 and 1 times fixed [T, E] <= 2^20: in two halves of 10 bits, whose sums a float32
        holds for up to 16384 rows."""
        ops = self.ops
        as_float = ops.cast(fixed, "float32")
        high = ops.unary("Floor", ops.binary("Mul", as_float, self._float(2.0**-10)))
        low = ops.binary("Sub", as_float, ops.binary("Mul", high, self._float(2.0**10)))
        high_sum, low_sum = (ops.cast(ops.matmul(same, half), "int64") for half in (high, low))
        return ops.binary("Add", ops.binary("Mul", high_sum, self._int(1024)), low_sum)

    def _greedy(self, utility: Any, chosen: Any, counted: Any) -> Any:
        """[1, E] bool: the experts that the walk by utility adds. [E, E] is [expert, other expert]."""
        ops, config = self.ops, self.config
        assert isinstance(config.budget, int)
        place = ops.constant(np.arange(self.experts, 0, -1, dtype=np.int64)[None])
        key = ops.binary("Add", ops.binary("Mul", utility, self._int(2 * MAX_EXPERTS)), place)
        candidate = self._and(self._not(chosen), ops.binary("Greater", utility, self._int(0)))
        before = ops.binary("Greater", key, ops.transpose(key))  # the other expert is walked first

        eligible = candidate
        if config.gpu_budget is not None:
            eligible = self._and(candidate, self._fits_its_gpu(before, candidate, counted, config.gpu_budget))
        rank = self._count(self._and(before, eligible))
        room = ops.binary("Sub", self._int(config.budget), self._count(counted))
        added = self._and(eligible, ops.binary("Less", rank, room))
        if config.min_coverage is None:
            return added
        return self._and(added, self._not(self._covered(utility, chosen, self._and(before, eligible))))

    def _fits_its_gpu(self, before: Any, candidate: Any, counted: Any, gpu_budget: int) -> Any:
        """[1, E] bool: fewer than the budget are on the expert's GPU, counted or to be added before it."""
        ops = self.ops
        gpu = ops.reshape(self.expert_gpu, (1, self.experts))
        same_gpu = ops.binary("Equal", gpu, ops.transpose(gpu))
        ahead = ops.binary("Or", counted, self._and(before, candidate))
        return ops.binary("Less", self._count(self._and(same_gpu, ahead)), self._int(gpu_budget))

    def _covered(self, utility: Any, chosen: Any, ahead: Any) -> Any:
        """[1, E] bool: what is in S when the walk reaches the expert keeps enough. Compared in float64."""
        ops, share = self.ops, self.config.min_coverage
        assert share is not None
        in_set = ops.binary("Or", chosen, ahead)
        kept = ops.reduce_sum(ops.binary("Mul", ops.cast(in_set, "int64"), utility), axis=1)
        total = ops.reduce_sum(utility, axis=1)
        wanted = ops.binary("Mul", ops.cast(total, "float64"), ops.constant(np.array([[share]], np.float64)))
        is_short = ops.binary("Less", ops.cast(ops.transpose(kept), "float64"), wanted)
        return self._not(is_short)

    # ---- Stage 1: score -----------------------------------------------------------------------------------

    def _real_rows(self, logits: Any) -> Any:
        ops = self.ops
        broken = ops.binary("Or", ops.unary("IsNaN", logits), ops.unary("IsInf", logits))
        count = ops.reduce_sum(ops.cast(broken, "int32"), axis=1)
        finite = ops.binary("Equal", count, self._int(0, "int32"))
        if self.request_ids is None:
            return finite
        return self._and(finite, ops.binary("Greater", self.request_ids, self._int(-1, "int32")))

    def _score(self, bias: Any) -> tuple[Any, Any]:
        ops, spec = self.ops, self.spec
        if spec.scoring != "sigmoid_bias":
            affinity = self._softmax()
            return affinity, self._limit_to_groups(
                self.logits if spec.scoring == "topk_softmax" else affinity
            )
        affinity = self._sigmoid()
        ranking = affinity
        if bias is not None:
            ranking = ops.binary("Add", affinity, ops.reshape(bias, (1, self.experts)))
        return affinity, self._limit_to_groups(ranking)

    def _limit_to_groups(self, ranking: Any) -> Any:
        ops, spec = self.ops, self.spec
        if spec.num_groups == 1:
            return ranking
        groups, size = spec.num_groups, spec.experts_per_group
        best_of = 2 if spec.scoring == "sigmoid_bias" else 1
        best, _ = ops.top_k(ops.reshape(ranking, (-1, groups, size)), best_of, axis=2)
        score = self._column(best, 0, axis=2)
        if best_of == 2:
            score = ops.binary("Add", score, self._column(best, 1, axis=2))
        _, ids = ops.top_k(ops.reshape(score, (-1, groups)), spec.top_k_groups, axis=1)
        allowed = ops.reshape(self._mask_of(ids, self.real, spec.top_k_groups, groups), (-1, groups, 1))
        allowed = self._and(allowed, ops.constant(np.ones((1, 1, size), np.bool_)))
        return ops.where(ops.reshape(allowed, (-1, self.experts)), ranking, self._float(-np.inf))

    def _softmax(self) -> Any:
        ops = self.ops
        e = self._exp(ops.binary("Sub", self.logits, ops.reduce_max(self.logits, axis=1)))
        terms = ops.cast(ops.unary("Round", ops.binary("Mul", e, self._float(2.0**40))), "int64")
        total = ops.cast(ops.reduce_sum(terms, axis=1), "float32")
        # Not one divided by the sum: ONNX Runtime makes e / sum of that, which rounds otherwise.
        return ops.binary("Mul", e, ops.binary("Div", self._float(2.0**40), total))

    def _sigmoid(self) -> Any:
        ops, one = self.ops, self._float(1.0)
        e = self._exp(ops.unary("Neg", ops.unary("Abs", self.logits)))
        r = ops.binary("Div", one, ops.binary("Add", one, e))
        return ops.where(ops.binary("Less", self.logits, self._float(0.0)), ops.binary("Mul", e, r), r)

    def _exp(self, x: Any) -> Any:
        """e^x for x <= 0 by the reference's polynomial; the power of two comes from a table."""
        ops = self.ops
        too_small = ops.binary("Less", x, self._float(-87.0))
        x = ops.binary("Max", x, self._float(-87.0))
        n = ops.unary("Round", ops.binary("Mul", x, self._float(1.44269504)))
        r = ops.binary("Sub", x, ops.binary("Mul", n, self._float(0.693359375)))
        r = ops.binary("Sub", r, ops.binary("Mul", n, self._float(-2.12194440e-4)))
        p = self._float(1.9875691500e-4)
        for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            p = ops.binary("Add", ops.binary("Mul", p, r), self._float(c))
        y = ops.binary("Mul", p, ops.binary("Mul", r, r))
        y = ops.binary("Add", ops.binary("Add", y, r), self._float(1.0))
        powers = ops.constant(np.float32(2.0) ** -np.arange(127, dtype=np.float32))
        scale = ops.gather(powers, ops.cast(ops.unary("Neg", n), "int32"), axis=0)
        return ops.where(too_small, self._float(0.0), ops.binary("Mul", y, scale))

    def _fixed_point(self) -> Any:
        """round(A * 2^20), half up, int64."""
        ops = self.ops
        x = ops.binary("Mul", self.affinity, self._float(2.0**20))
        whole = ops.unary("Floor", x)
        rounds_down = ops.binary("Less", ops.binary("Sub", x, whole), self._float(0.5))
        return ops.binary("Add", ops.cast(whole, "int64"), ops.cast(self._not(rounds_down), "int64"))

    # ---- Stage 5: refine ----------------------------------------------------------------------------------

    def _refine(self, active: Any) -> tuple[Any, Any]:
        """ids [T, k] int32 and which slots hold a choice [T, k] bool."""
        ops = self.ops
        nothing = self._float(-np.inf)
        values, chosen = ops.top_k(ops.where(active, self.ranking, nothing), self.spec.top_k, axis=1)
        valid = ops.binary("Greater", values, nothing)
        found = ops.reduce_sum(ops.cast(valid, "int32"), axis=1)
        last = ops.binary("Max", ops.binary("Sub", found, self._int(1, "int32")), self._int(0, "int32"))
        return ops.where(valid, chosen, ops.gather_elements(chosen, last)), valid

    def _weigh(self, chosen: Any, valid: Any) -> Any:
        ops, spec = self.ops, self.spec
        if spec.scoring == "topk_softmax":
            z = ops.gather_elements(self.logits, chosen)
            weights = self._exp(ops.binary("Sub", z, ops.reduce_max(z, axis=1)))
        else:
            weights = ops.gather_elements(self.affinity, chosen)
        weights = ops.where(valid, weights, self._float(0.0))
        if spec.scoring != "softmax":
            total = self._column(weights, 0, axis=1)
            for slot in range(1, spec.top_k):  # in slot order: float addition is not associative
                total = ops.binary("Add", total, self._column(weights, slot, axis=1))
            is_zero = ops.binary("Equal", total, self._float(0.0))
            weights = ops.where(is_zero, self._float(0.0), ops.binary("Div", weights, total))
        return ops.binary("Mul", weights, self._float(spec.routed_scaling_factor))

    def _lowest_ids(self, active: Any) -> Any:
        """[1, k] int32: the lowest ids of S, the last one repeated; 0 where S is empty."""
        ops, top_k = self.ops, self.spec.top_k
        order = ops.constant(np.arange(self.experts, 0, -1, dtype=np.float32)[None])
        _, ids = ops.top_k(ops.where(active, order, self._float(0.0)), top_k, axis=1)
        last = ops.binary("Sub", ops.cast(self._count(active), "int32"), self._int(1, "int32"))
        last = ops.binary("Max", last, self._int(0, "int32"))
        slots = ops.binary("Min", ops.constant(np.arange(top_k, dtype=np.int32)[None]), last)
        return ops.gather_elements(ids, slots)

    # ---- Sets and numbers ---------------------------------------------------------------------------------

    def _experts_of(self, rows: Any, used: int) -> Any:
        """[1, E] bool: the experts in the first `used` slots of the own choice of the rows [T, 1] bool."""
        named = self._mask_of(self.own, rows, self.spec.top_k, self.experts, used)
        count = self.ops.reduce_sum(self.ops.cast(named, "int32"), axis=0)
        return self.ops.binary("Greater", count, self._int(0, "int32"))

    def _mask_of(self, ids: Any, rows: Any, slots: int, width: int, used: int | None = None) -> Any:
        """[T, width] bool: the same per row, for ids [T, slots] of which the first `used` count."""
        ops = self.ops
        counts = ops.constant((np.arange(slots) < (slots if used is None else used))[None])
        updates = ops.cast(self._and(rows, counts), "int32")
        nothing = ops.cast(self._and(rows, ops.constant(np.zeros((1, width), np.bool_))), "int32")
        return ops.cast(ops.scatter_elements(nothing, ids, updates), "bool")

    def _count(self, members: Any) -> Any:
        """Of [n, E] bool: [1, n] int64."""
        count = self.ops.reduce_sum(self.ops.cast(members, "int64"), axis=1)
        return self.ops.transpose(count)

    def _rows(self, vector: Any) -> Any:
        return None if vector is None else self.ops.reshape(vector, (-1, 1))

    def _column(self, a: Any, index: int, axis: int) -> Any:
        return self.ops.gather(a, self.ops.constant(np.array([index], np.int32)), axis)

    def _float(self, value: float) -> Any:
        return self.ops.constant(np.array([[value]], np.float32))

    def _int(self, value: int, dtype: str = "int64") -> Any:
        largest = np.iinfo(dtype).max
        return self.ops.constant(np.array([[min(value, largest)]], dtype))

    def _true(self) -> Any:
        return self.ops.constant(np.ones((1, 1), np.bool_))

    def _and(self, a: Any, b: Any) -> Any:
        return self.ops.binary("And", a, b)

    def _not(self, a: Any) -> Any:
        return self.ops.unary("Not", a)
