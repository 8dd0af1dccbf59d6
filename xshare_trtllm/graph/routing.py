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

_LARGEST = float(np.finfo(np.float32).max)


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
        self.banned = ops.binary("Less", logits, self._float(-_LARGEST))
        self.readable = self._readable_rows(logits)
        self.logits = ops.where(self.readable, logits, self._float(0.0))
        self.affinity, self.ranking = self._score(tensors.get("correction_bias"))
        self.real = self._real_rows()
        exempt = self._rows(tensors.get("exempt"))
        self.exempt = None if exempt is None else self._and(exempt, self.real)
        self.participating = self.real if exempt is None else self._and(self.real, self._not(exempt))
        _, self.own = ops.top_k(self.ranking, spec.top_k, axis=1)

    def outputs(self) -> Outputs:
        ops = self.ops
        active = self._active()
        chosen, valid, served = self._refine(active)
        weights = self._weigh(chosen, valid)
        ids = ops.where(served, chosen, self._lowest_ids(active))
        weights = ops.where(served, weights, self._float(0.0))
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
        return self._or(self._and(aside, before), self._and(self._not(aside), active))

    def _selected(self) -> Any:
        """[1, E] bool: exempt experts, warm-up, and the best others within the limits."""
        warm = self._experts_of(self.participating, self.config.warmup)
        free = None
        if self.exempt is not None:
            free = self._experts_of(self.exempt, self.spec.top_k)
        counted = warm if free is None else self._and(warm, self._not(free))
        chosen = warm if free is None else self._or(warm, free)
        return self._or(chosen, self._greedy(self._column_utility(), free, chosen, counted))

    # ---- Utility ------------------------------------------------------------------------------------------

    def _column_utility(self) -> Any:
        """u [1, E] int64, over the participating rows."""
        fixed = self._affinity() if self.config.utility == "affinity" else self._squared_weights()
        if self.config.request_budget is None:
            return self.ops.reduce_sum(fixed, axis=0)
        return self._proposed(fixed, min(self.config.request_budget, self.experts))

    def _affinity(self) -> Any:
        """[T, E] int64; 0 in rows that take no part."""
        ops = self.ops
        fixed = ops.binary("Mul", self._fixed_point(self.affinity), ops.cast(self.participating, "int32"))
        return ops.cast(fixed, "int64")

    def _squared_weights(self) -> Any:
        """[T, E] int64: of the row's own choice; 0 elsewhere and in rows that take no part."""
        ops = self.ops
        weights = self._choice_weights(self.own, None)
        fixed = self._fixed_point(ops.binary("Mul", weights, weights))
        fixed = ops.binary("Mul", fixed, ops.cast(self.participating, "int32"))
        return ops.cast(self._spread(self.own, fixed, self.experts), "int64")

    def _fixed_point(self, utility: Any) -> Any:
        """round(d * 2^20), half up, int32."""
        ops = self.ops
        x = ops.binary("Mul", utility, self._float(2.0**20))
        whole = ops.unary("Floor", x)
        rounds_down = ops.binary("Less", ops.binary("Sub", x, whole), self._float(0.5))
        return ops.binary("Add", ops.cast(whole, "int32"), ops.cast(self._not(rounds_down), "int32"))

    def _proposed(self, fixed: Any, request_budget: int) -> Any:
        """Each request's column sums, at the experts that it proposes. All rows of a request find the same
        sums; its first row speaks for it."""
        ops = self.ops
        ids, rows = self.request_ids, self.participating
        same = ops.binary("Equal", ids, ops.transpose(ids))
        same = self._and(same, self._and(rows, ops.transpose(rows)))
        per_request = self._exact_matmul(ops.cast(same, "float32"), fixed)
        _, best = ops.top_k(per_request, request_budget, axis=1)

        number = ops.cumulative_sum(ops.cast(self._or(rows, self._true()), "int32"), axis=0)
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

    # ---- The walk by utility. [E, E] is [expert, other expert] --------------------------------------------

    def _greedy(self, utility: Any, free: Any, chosen: Any, counted: Any) -> Any:
        """[1, E] bool: the experts that the walk adds to the chosen ones."""
        ops, config = self.ops, self.config
        before = self._walked_before(utility)
        eligible = self._and(ops.binary("Greater", utility, self._int(0)), self._not(chosen))
        coverage, gpu_budget = config.coverage, None
        if config.gpu_budget is not None:
            gpu_budget = self._int(config.gpu_budget)
        elif coverage is not None and self.expert_gpu is not None:
            gpu_budget, coverage = self._gpu_cap(utility, before, free, coverage), None
        if gpu_budget is not None:
            ahead = self._and(self._same_gpu(), self._or(counted, self._and(before, eligible)))
            eligible = self._and(eligible, ops.binary("Less", self._count(ahead), gpu_budget))

        ahead, added = self._and(before, eligible), eligible
        if config.layer_budget < self.experts:
            room = ops.binary("Sub", self._int(config.layer_budget), self._count(counted))
            added = self._and(added, ops.binary("Less", self._count(ahead), room))
        if coverage is not None:
            so_far = self._or(chosen, ahead)
            ends = self._is_enough(so_far, utility, self._int(self.spec.top_k), coverage)
            added = self._and(added, self._not(ends))
        return added

    def _walked_before(self, utility: Any) -> Any:
        """[E, E] bool: the other expert comes first."""
        ops = self.ops
        place = ops.constant(np.arange(self.experts, 0, -1, dtype=np.int64)[None])
        key = ops.binary("Add", ops.binary("Mul", utility, self._int(2 * MAX_EXPERTS)), place)
        return ops.binary("Greater", key, ops.transpose(key))

    def _same_gpu(self) -> Any:
        """[E, E] bool"""
        gpu = self.ops.reshape(self.expert_gpu, (1, self.experts))
        return self.ops.binary("Equal", gpu, self.ops.transpose(gpu))

    def _gpu_cap(self, utility: Any, before: Any, free: Any, coverage: float) -> Any:
        """[1, 1] int64: the smallest number of each GPU's most useful experts, beyond the free ones, that is
        enough. Every number is tried, [E numbers, E]; those that are not enough are the smaller ones."""
        ops = self.ops
        useful = ops.binary("Greater", utility, self._int(0))
        if free is not None:
            useful = self._and(useful, self._not(free))
        place = self._count(self._and(self._same_gpu(), self._and(before, useful)))
        caps = ops.constant(np.arange(self.experts, dtype=np.int64)[:, None])
        kept, everything = self._and(useful, ops.binary("Less", place, caps)), useful
        if free is not None:
            kept, everything = self._or(kept, free), self._or(useful, free)
        at_least = ops.binary("Min", self._int(self.spec.top_k), self._count(everything))
        too_small = self._not(self._is_enough(kept, utility, at_least, coverage))
        return self._count(too_small)

    def _is_enough(self, sets: Any, utility: Any, at_least: Any, coverage: float) -> Any:
        """Of sets [n, E] bool: [1, n] bool, whether they keep the coverage in so many experts or more."""
        ops = self.ops
        kept = ops.reduce_sum(ops.binary("Mul", ops.cast(sets, "int64"), utility), axis=1)
        wanted = least_share(ops, ops.reduce_sum(utility, axis=1), coverage)
        is_short = self._or(
            ops.binary("Less", ops.transpose(kept), wanted), ops.binary("Less", self._count(sets), at_least)
        )
        return self._not(is_short)

    # ---- Stage 1: score -----------------------------------------------------------------------------------

    def _readable_rows(self, logits: Any) -> Any:
        """[T, 1] bool: rows of a request without NaN or +inf, and with k experts that are not banned."""
        ops = self.ops
        broken = self._or(ops.unary("IsNaN", logits), ops.binary("Greater", logits, self._float(_LARGEST)))
        usable = self._not(self._or(broken, self.banned))
        readable = self._and(
            ops.binary("Less", self._number_in_row(broken), self._int(1, "int32")),
            ops.binary("Greater", self._number_in_row(usable), self._int(self.spec.top_k - 1, "int32")),
        )
        if self.request_ids is None:
            return readable
        return self._and(readable, ops.binary("Greater", self.request_ids, self._int(-1, "int32")))

    def _real_rows(self) -> Any:
        """[T, 1] bool: the groups, too, leave them k experts."""
        if self.spec.num_groups == 1:
            return self.readable
        left = self.ops.binary("Greater", self.ranking, self._float(-np.inf))
        count = self._number_in_row(left)
        enough = self.ops.binary("Greater", count, self._int(self.spec.top_k - 1, "int32"))
        return self._and(self.readable, enough)

    def _score(self, bias: Any) -> tuple[Any, Any]:
        ops, rule = self.ops, self.spec.rule
        affinity = getattr(self, f"_{rule.affinity}")()
        ranking = self.logits if rule.ranked_by == "logits" else affinity
        if bias is not None:
            ranking = ops.binary("Add", ranking, ops.reshape(bias, (1, self.experts)))
        if bias is not None and rule.ranked_by == "logits":  # what is not banned stays finite
            ranking = ops.binary("Min", self._float(_LARGEST), ranking)
            ranking = ops.binary("Max", self._float(-_LARGEST), ranking)
        ranking = ops.where(self.banned, self._float(-np.inf), ranking)
        return affinity, self._limit_to_groups(ranking)

    def _limit_to_groups(self, ranking: Any) -> Any:
        ops, spec = self.ops, self.spec
        if spec.num_groups == 1:
            return ranking
        groups, size = spec.num_groups, spec.experts_per_group
        best_of = spec.rule.group_best_of
        best, _ = ops.top_k(ops.reshape(ranking, (-1, groups, size)), best_of, axis=2)
        score = self._column(best, 0, axis=2)
        if best_of == 2:
            score = ops.binary("Add", score, self._column(best, 1, axis=2))
        score = ops.reshape(score, (-1, groups))
        is_open = ops.binary("Greater", score, self._float(-np.inf))
        _, ids = ops.top_k(score, spec.top_k_groups, axis=1)
        allowed = self._and(is_open, self._mask_of(ids, self.readable, spec.top_k_groups, groups))
        allowed = self._and(
            ops.reshape(allowed, (-1, groups, 1)), ops.constant(np.ones((1, 1, size), np.bool_))
        )
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

    def _sqrt_softplus(self) -> Any:
        """The reference's: log(1 + e) by a polynomial in (e / (2 + e))^2."""
        ops = self.ops
        e = self._exp(ops.unary("Neg", ops.unary("Abs", self.logits)))
        s = ops.binary("Div", e, ops.binary("Add", self._float(2.0), e))
        t = ops.binary("Mul", s, s)
        p = self._float(0.268675476)
        for c in (0.282339573, 0.400076717, 0.666666389, 2.0):
            p = ops.binary("Add", ops.binary("Mul", p, t), self._float(c))
        positive = ops.binary("Max", self.logits, self._float(0.0))
        return ops.unary("Sqrt", ops.binary("Add", positive, ops.binary("Mul", s, p)))

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

    # ---- Stage 5: refine ----------------------------------------------------------------------------------

    def _refine(self, active: Any) -> tuple[Any, Any, Any]:
        """ids [T, k] int32, which slots hold a choice [T, k] bool, and the real rows that have one."""
        ops = self.ops
        nothing = self._float(-np.inf)
        values, chosen = ops.top_k(ops.where(active, self.ranking, nothing), self.spec.top_k, axis=1)
        valid = ops.binary("Greater", values, nothing)
        found = self._number_in_row(valid)
        last = ops.binary("Max", ops.binary("Sub", found, self._int(1, "int32")), self._int(0, "int32"))
        served = self._and(self.real, ops.binary("Greater", found, self._int(0, "int32")))
        return ops.where(valid, chosen, ops.gather_elements(chosen, last)), valid, served

    def _weigh(self, chosen: Any, valid: Any) -> Any:
        weights = self._choice_weights(chosen, valid)
        return self.ops.binary("Mul", weights, self._float(self.spec.routed_scaling_factor))

    def _choice_weights(self, chosen: Any, valid: Any) -> Any:
        """[T, k] float32 before scaling; 0 in slots that are not valid, where that is given."""
        ops = self.ops
        rule = self.spec.rule
        if rule.affinity != "softmax" or rule.ranked_by != "logits":
            weights = ops.gather_elements(self.affinity, chosen)
        else:
            z = ops.gather_elements(self.logits, chosen)
            below = ops.binary("Sub", z, ops.reduce_max(z, axis=1))
            if valid is not None:  # a row without any choice may hold -inf alone
                below = ops.where(valid, below, self._float(0.0))
            weights = self._exp(below)
        if valid is not None:
            weights = ops.where(valid, weights, self._float(0.0))
        return self._divide_by_sum(weights) if rule.renormalises else weights

    def _divide_by_sum(self, weights: Any) -> Any:
        """[T, k] float32"""
        ops = self.ops
        total = self._column(weights, 0, axis=1)
        for slot in range(1, self.spec.top_k):  # in slot order: float addition is not associative
            total = ops.binary("Add", total, self._column(weights, slot, axis=1))
        is_zero = ops.binary("Equal", total, self._float(0.0))
        return ops.where(is_zero, self._float(0.0), ops.binary("Div", weights, total))

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
        counts = self.ops.constant((np.arange(slots) < (slots if used is None else used))[None])
        updates = self.ops.cast(self._and(rows, counts), "int32")
        return self.ops.cast(self._spread(ids, updates, width), "bool")

    def _spread(self, ids: Any, updates: Any, width: int) -> Any:
        """[T, width] int32: the updates [T, n] int32 at the ids [T, n]; 0 elsewhere."""
        nothing = self._and(self.readable, self.ops.constant(np.zeros((1, width), np.bool_)))
        return self.ops.scatter_elements(self.ops.cast(nothing, "int32"), ids, updates)

    def _number_in_row(self, members: Any) -> Any:
        """Of [T, n] bool: [T, 1] int32."""
        return self.ops.reduce_sum(self.ops.cast(members, "int32"), axis=1)

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

    def _or(self, a: Any, b: Any) -> Any:
        return self.ops.binary("Or", a, b)

    def _not(self, a: Any) -> Any:
        return self.ops.unary("Not", a)


def least_share(ops: Ops, total: Any, share: float) -> Any:
    """Of total [n, 1] int64 below 2^50: the least integers not below share * total as float64 rounds it.

    In int64, since TensorRT has no float64. The share is a float32, mantissa / 2^shift, from 2^-16 to 1.
    """

    def integer(value: int) -> Any:
        return ops.constant(np.array([[value]], np.int64))

    mantissa, denominator = float(np.float32(share)).as_integer_ratio()
    high = ops.binary("Div", total, integer(denominator))
    low = ops.binary("Sub", total, ops.binary("Mul", high, integer(denominator)))
    low = ops.binary("Mul", low, integer(mantissa))
    carry = ops.binary("Div", low, integer(denominator))
    rest = ops.binary("Sub", low, ops.binary("Mul", carry, integer(denominator)))
    whole = ops.binary("Add", ops.binary("Mul", high, integer(mantissa)), carry)

    # A product of n bits before the point has 53 - n behind it: a rest up to half of the last one is lost.
    shift = denominator.bit_length() - 1
    lost, bounds = integer(0), 2 ** np.arange(53 - shift, 50, dtype=np.int64)
    if len(bounds):
        steps = np.diff(bounds // bounds[0], prepend=0)
        reached = ops.cast(ops.binary("Less", ops.constant(bounds[None] - 1), whole), "int64")
        lost = ops.reduce_sum(ops.binary("Mul", reached, ops.constant(steps[None])), axis=1)
    return ops.binary("Add", whole, ops.cast(ops.binary("Greater", rest, lost), "int64"))
