"""`route` where the rows of a step are spread over ranks (attention data parallelism): the same `S` on every
rank from one all-reduce, and each rank's rows as one rank would have routed the whole batch, bit for bit.

Everything that ranks exchange is an integer sum (fixed-point utilities; how many rows name an expert), so
neither the order of the ranks nor the backend's way of adding can change a bit. The stages are torch
operations without host synchronisation: with CUDA tensors and an NCCL group, `route` can be captured in a
CUDA graph.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from xshare_trtllm import __version__
from xshare_trtllm.config import MAX_EXPERTS, MODES, NO_LIMIT, RouterSpec, XShareConfig
from xshare_trtllm.ops import DIAL_BYTES
from xshare_trtllm.reference.route import (
    experts_per_row,
    readable_rows,
    refine,
    row_utility,
    score,
    to_fixed_point,
    top_ids,
    weigh,
)
from xshare_trtllm.routing import Routing, check_layer, check_shapes, check_values

Group = dist.ProcessGroup

# What ranks add up, int64: a table of 5 by MAX_EXPERTS (`_Totals`), the first rank's dial (the others add
# zeros to its bits), then the number of real rows and of ranks that failed, the sum of the ranks'
# fingerprints and that of their squares. 20 KiB whatever the router, so that ranks that disagree still
# understand each other.
_TABLE = 5, MAX_EXPERTS
_TABLE_WORDS = math.prod(_TABLE)
_DIAL = slice(_TABLE_WORDS, _TABLE_WORDS + DIAL_BYTES // 8)
_NUM_WORDS = _DIAL.stop + 4
_CARD_BYTES = 1024


def route(
    router_logits: Tensor,
    spec: RouterSpec,
    config: XShareConfig,
    *,
    group: Group | None,
    correction_bias: Tensor | None = None,
    request_ids: Tensor | None = None,
    exempt: Tensor | None = None,
    expert_gpu: Tensor | None = None,
    dial: Tensor | None = None,
    whole_batch_stats: bool = True,
) -> Routing:
    """Routes this rank's rows of a batch that is spread over the ranks of `group`. Every rank calls it.

    The rows are as `xshare_trtllm.route` gives them for the concatenation of all ranks' rows; the set, the
    statistics and the decision to stand aside are those of the whole batch, and equal on every rank.

    router_logits      [T, E], exempt [T]: as for `xshare_trtllm.route`, of this rank's rows; T may be 0
    request_ids        [T] int; a request lives on one rank: equal ids on two ranks are two requests
    correction_bias    [E] float, expert_gpu [E] int: the same on every rank
    group              the ranks; None = all of them
    dial               uint8 [16] as for `xshare_trtllm.ops.route`, on all ranks or on none. The first rank's
                       counts: it travels with the sums, so that all ranks route a step by the same values,
                       whenever each of them is written
    whole_batch_stats  False saves a second all-reduce, of E numbers after the routing is decided:
                       `experts_after` and `peak_gpu_after` then count `S`, which some rank's rows may not use
                       in full

    A rank that fails in here takes part in the all-reduce all the same, and every rank raises at once, as
    they do where ranks disagree on the arguments or on the version of the package; the group stays usable. A
    rank that never comes, or dies, makes the others raise RuntimeError, at the latest after the timeout of
    the group, which is of no use afterwards.

    With CUDA tensors, what they hold is not checked; the first call with a `spec` and `config` waits for the
    device, later ones find a rank that failed or deviates by an assertion on the device; the timeout is that
    of NCCL's watchdog. Call `check_agreement` or `route` once before a graph is captured.

    Raises ValueError as `xshare_trtllm.route`, RuntimeError where ranks disagree or one of them failed.
    """
    group = resolve_group(group)
    words = torch.zeros(_NUM_WORDS, dtype=torch.int64, device=router_logits.device)
    call = _Call(spec, config, whole_batch_stats, dial is not None)
    problem = rows = None
    try:
        _check_arguments(router_logits, spec, config, correction_bias, request_ids, exempt, expert_gpu)
        _check_dial(dial, router_logits.device)
        rows = _score(router_logits, spec, correction_bias, request_ids, exempt, expert_gpu)
        _add_rows(words, rows, spec, config, request_ids)
        if dial is not None and dist.get_rank(group) == 0:
            words[_DIAL].view(torch.uint8).copy_(dial)
        _add_fingerprint(words, call, rows.gpu)
    except Exception as error:  # the others wait for this rank, so it brings them the news before it raises
        problem = error
        words.zero_()[-3] = 1
    _all_reduce(words, group, "the sums of the rows")
    if problem is not None:
        raise problem
    assert rows is not None
    _check_words(words, group, call, rows.gpu)
    totals, limits = _totals(words, spec, config), _limits(words, spec, config, dial is not None)
    stands_aside = _stands_aside(totals.real_rows, config, limits)
    gpu = None if expert_gpu is None else rows.gpu
    chosen_set = torch.where(stands_aside, totals.own, _select(totals, gpu, spec.top_k, config, limits))
    active = chosen_set if limits.is_shadow is None else torch.where(limits.is_shadow, totals.own, chosen_set)
    ids, weights = _refine(rows, active, spec)

    after = chosen_set
    if whole_batch_stats:
        would_be = ids if dial is None else _refine(rows, chosen_set, spec)[0]
        named = _named(would_be, rows.real, spec.num_experts)
        _all_reduce(named, group, "the experts in use")
        after = named > 0
    stats = _statistics(totals, rows.gpu, config, limits, stands_aside, chosen_set, after)
    return Routing(ids.to(torch.int32), weights, active, stats)


def _check_arguments(
    router_logits: Tensor,
    spec: RouterSpec,
    config: XShareConfig,
    correction_bias: Tensor | None,
    request_ids: Tensor | None,
    exempt: Tensor | None,
    expert_gpu: Tensor | None,
) -> None:
    """As `xshare_trtllm.route` does; what tensors on a device hold is not looked at."""
    check_shapes(router_logits, spec, config, correction_bias, request_ids, exempt, expert_gpu)
    check_layer(spec, config)
    if router_logits.is_cpu:
        check_values(correction_bias, request_ids, expert_gpu)


def _check_dial(dial: Tensor | None, device: torch.device) -> None:
    if dial is None:
        return
    if dial.dtype is not torch.uint8 or dial.shape != (DIAL_BYTES,) or dial.device != device:
        raise ValueError(
            f"dial: must be uint8 [{DIAL_BYTES}] on {device}, "
            f"got {dial.dtype} {list(dial.shape)} on {dial.device}"
        )


# ---- One rank's part ---------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """This rank's rows, scored. gpu [E] int64 is the same on every rank."""

    real: Tensor  # [T] bool
    exempt: Tensor  # [T] bool, real rows that keep their own top-k
    logits: Tensor  # [T, E] fp32
    affinity: Tensor  # [T, E] fp32
    ranking: Tensor  # [T, E] fp32
    own: Tensor  # [T, k], the model's own choice, best first
    gpu: Tensor


def _score(
    router_logits: Tensor,
    spec: RouterSpec,
    correction_bias: Tensor | None,
    request_ids: Tensor | None,
    exempt: Tensor | None,
    expert_gpu: Tensor | None,
) -> _Rows:
    """Stage 1 on this rank's rows."""
    readable = readable_rows(router_logits, request_ids)
    logits = torch.where(readable[:, None], router_logits.float(), 0.0) + 0.0
    affinity, ranking = score(logits, correction_bias, spec)
    real = readable & ((ranking > -torch.inf).sum(dim=-1) >= spec.top_k)
    exempt = torch.zeros_like(real) if exempt is None else exempt & real
    gpu = _placement(expert_gpu, spec, router_logits.device)
    return _Rows(real, exempt, logits, affinity, ranking, top_ids(ranking, spec.top_k), gpu)


def _placement(expert_gpu: Tensor | None, spec: RouterSpec, device: torch.device) -> Tensor:
    """[E] int64: the GPU of each expert; all on one without `expert_gpu`."""
    if expert_gpu is None:
        return torch.zeros(spec.num_experts, dtype=torch.int64, device=device)
    return expert_gpu.to(device, torch.int64).clamp(0, spec.num_experts - 1)


def _add_rows(
    words: Tensor, rows: _Rows, spec: RouterSpec, config: XShareConfig, request_ids: Tensor | None
) -> None:
    """This rank's part of the table and of the number of real rows, in place."""
    participating = rows.real & ~rows.exempt
    own = rows.own
    fixed = to_fixed_point(row_utility(rows.logits, rows.affinity, own, spec, config))
    fixed = fixed * participating[:, None]
    table = words[:_TABLE_WORDS].view(_TABLE)[:, : spec.num_experts]
    table[0] = fixed.sum(dim=0)
    table[1] = _named(own, rows.real, spec.num_experts)
    table[2] = _named(own[:, : config.warmup], participating, spec.num_experts)
    table[3] = _named(own, rows.exempt, spec.num_experts)
    if config.request_budget is not None:
        assert request_ids is not None
        table[4] = _proposed_utility(fixed, request_ids, config.request_budget)
    words[-4] = rows.real.sum()


def _named(ids: Tensor, rows: Tensor, num_experts: int) -> Tensor:
    """[E] int64: how many of the rows [T] bool name each expert in ids [T, n]."""
    return (experts_per_row(ids, num_experts) & rows[:, None]).sum(dim=0)


def _proposed_utility(fixed: Tensor, request_ids: Tensor, request_budget: int) -> Tensor:
    """Stage 3 on this rank's requests: u [E] int64. Rows that take no part are zeros in fixed [T, E]."""
    ordered, order = request_ids.sort()
    starts = torch.zeros_like(ordered, dtype=torch.int64)
    starts[1:] = ordered[1:] != ordered[:-1]
    per_request = torch.zeros_like(fixed).index_add_(0, starts.cumsum(0), fixed[order])
    proposed = experts_per_row(top_ids(per_request, request_budget), fixed.shape[1])
    return (per_request * proposed).sum(dim=0)


# ---- The whole batch, on every rank alike ------------------------------------------------------------------


class _Totals(NamedTuple):
    """The table and the number of rows, of all ranks together."""

    column_sums: Tensor  # g, [E] int64
    own: Tensor  # [E] bool, experts in the real rows' own top-k
    warm: Tensor  # [E] bool, the warm-up
    free: Tensor  # [E] bool, experts of exempt rows
    utility: Tensor  # u, [E] int64
    real_rows: Tensor  # int64


def _totals(words: Tensor, spec: RouterSpec, config: XShareConfig) -> _Totals:
    sums, own, warm, free, proposed = words[:_TABLE_WORDS].view(_TABLE)[:, : spec.num_experts]
    utility = sums if config.request_budget is None else proposed
    return _Totals(sums, own > 0, warm > 0, free > 0, utility, words[-4])


class _Limits(NamedTuple):
    """What a dial stands in for; with a dial, tensors without a dimension."""

    budget: int | Tensor
    coverage: float | Tensor | None  # None or 0 = off
    is_off: bool | Tensor
    is_shadow: Tensor | None


def _limits(words: Tensor, spec: RouterSpec, config: XShareConfig, has_dial: bool) -> _Limits:
    if not has_dial:
        return _Limits(config.layer_budget, config.coverage, config.is_off(spec), None)
    coverage = words[_DIAL][:1].view(torch.float64)[0]
    budget, mode = words[_DIAL][1:].view(torch.int32)
    # Whatever it holds is put right, as core/dial.h does.
    coverage = torch.where(coverage > 0, coverage.clamp(max=1.0), 0.0)
    budget = budget.clamp(min=spec.top_k)
    is_off = mode == MODES.index("off")
    if config.gpu_budget is None and config.request_budget is None:
        is_off = is_off | ((budget >= spec.num_experts) & (coverage == 0))
    return _Limits(budget, coverage, is_off, mode == MODES.index("shadow"))


def _stands_aside(num_real_rows: Tensor, config: XShareConfig, limits: _Limits) -> Tensor:
    """Stage 0, bool."""
    too_many = num_real_rows > (NO_LIMIT if config.max_rows is None else config.max_rows)
    return too_many | limits.is_off


def _select(totals: _Totals, gpu: Tensor | None, top_k: int, config: XShareConfig, limits: _Limits) -> Tensor:
    """Stage 4, S [E] bool, as ranks in the walk instead of a walk. gpu [E], None without `expert_gpu`.

    Until it stops, the walk takes every expert that its GPU has room for. So whether a GPU has room depends
    only on how many of its candidates come earlier; and where the walk stops, which it does once and for all,
    depends only on the number and the utility of those that fit and come earlier.
    """
    u, included = totals.utility, totals.free | totals.warm
    counted = totals.warm & ~totals.free
    ids = torch.arange(len(u), device=u.device)
    earlier = (u > u[:, None]) | ((u == u[:, None]) & (ids < ids[:, None]))  # [e, f]: f is walked before e
    fits, coverage = (u > 0) & ~included, limits.coverage
    gpu_budget: int | Tensor | None = config.gpu_budget
    if coverage is not None and gpu is not None and gpu_budget is None:
        gpu_budget, coverage = _gpu_cap(totals, earlier, gpu, top_k, coverage), None
    if gpu_budget is not None:
        assert gpu is not None
        same_gpu = gpu == gpu[:, None]
        fits = fits & ((same_gpu & (counted | (earlier & fits))).sum(dim=1) < gpu_budget)
    earlier = earlier & fits
    added = fits & (counted.sum() + earlier.sum(dim=1) < limits.budget)
    if coverage is not None:
        added = added & ~_is_enough(included | earlier, u, top_k, coverage)
    return included | added


def _gpu_cap(totals: _Totals, earlier: Tensor, gpu: Tensor, top_k: int, coverage: float | Tensor) -> Tensor:
    """The smallest number of each GPU's most useful experts, beyond the free ones, that is enough: every
    number is tried, [E numbers, E], and those that are not enough are the smaller ones."""
    useful = (totals.utility > 0) & ~totals.free
    place = ((gpu == gpu[:, None]) & earlier & useful).sum(dim=1)
    caps = torch.arange(len(gpu), device=gpu.device)[:, None]
    kept = (useful & (place < caps)) | totals.free
    at_least = (useful | totals.free).sum().clamp(max=top_k)
    return (~_is_enough(kept, totals.utility, at_least, coverage)).sum()


def _is_enough(sets: Tensor, utility: Tensor, at_least: int | Tensor, coverage: float | Tensor) -> Tensor:
    """Of sets [n, E] bool: [n] bool, whether they keep the coverage in so many experts or more. Without a
    coverage nothing is enough."""
    kept, total = (utility * sets).sum(dim=1), utility.sum()
    covers = (kept.double() >= coverage * total.double()) & (coverage > 0)
    return (sets.sum(dim=1) >= at_least) & covers


def _refine(rows: _Rows, active: Tensor, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    """Stage 5 on this rank's rows: ids and weights [T, k]. Rows that are not served name active experts."""
    chosen, valid = refine(rows.ranking, active, spec.top_k)
    weights = weigh(rows.logits, rows.affinity, chosen, valid, spec)
    served = (rows.real & valid.any(dim=-1))[:, None]
    chosen = torch.where(served, chosen, _lowest_ids(active, spec.top_k))
    return chosen, torch.where(served, weights, 0.0)


def _lowest_ids(active: Tensor, top_k: int) -> Tensor:
    """[k]: the lowest ids of the set [E] bool, the last one repeated; 0 if the set is empty."""
    last = (active.sum() - 1).clamp(min=0)
    slots = torch.arange(top_k, device=active.device)
    return top_ids(active.to(torch.int8), top_k)[torch.minimum(slots, last)]


def _statistics(
    totals: _Totals,
    gpu: Tensor,
    config: XShareConfig,
    limits: _Limits,
    stands_aside: Tensor,
    active: Tensor,
    after: Tensor,
) -> Tensor:
    """[8] int64, as every backend gives them (`RoutingStats.decode`)."""
    counted = totals.warm & ~totals.free
    overflow = (counted.sum() - limits.budget).clamp(min=0)
    if config.gpu_budget is not None:
        overflow = overflow + (_per_gpu(counted, gpu) - config.gpu_budget).clamp(min=0).sum()
    shares = ~stands_aside
    return torch.stack(
        [
            totals.own.sum(),
            after.sum(),
            (totals.column_sums * active).sum() * shares,
            totals.column_sums.sum() * shares,
            overflow * shares,
            _per_gpu(totals.own, gpu).max(),
            _per_gpu(after, gpu).max(),
            totals.real_rows + (stands_aside.long() << 32),
        ]
    )


def _per_gpu(experts: Tensor, gpu: Tensor) -> Tensor:
    """[E] int64: how many of the experts [E] bool each GPU holds."""
    return torch.zeros_like(gpu).index_add_(0, gpu, experts.long())


# ---- Agreement and failure ---------------------------------------------------------------------------------


class _Call(NamedTuple):
    """What all ranks must have in common in one call, beside the placement of the experts."""

    spec: RouterSpec
    config: XShareConfig
    whole_batch_stats: bool
    has_dial: bool


_agreed: WeakKeyDictionary[Group, set[_Call]] = WeakKeyDictionary()


def check_agreement(
    group: Group | None,
    spec: RouterSpec,
    config: XShareConfig,
    expert_gpu: Tensor | None = None,
    whole_batch_stats: bool = True,
    has_dial: bool = False,
) -> None:
    """Makes sure that all ranks run the same version of this package with the same arguments. Every rank
    calls it; `route` does the same in every call.

    Raises RuntimeError on every rank, naming what differs, or where a rank does not come.
    """
    group = resolve_group(group)
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    call = _Call(spec, config, whole_batch_stats, has_dial)
    words = torch.zeros(_NUM_WORDS, dtype=torch.int64, device=device)
    gpu = _placement(expert_gpu, spec, device)
    _add_fingerprint(words, call, gpu)
    _all_reduce(words, group, "the configurations")
    _check_words(words, group, call, gpu)


def _add_fingerprint(words: Tensor, call: _Call, gpu: Tensor) -> None:
    fingerprint = (_placement_hash(gpu) + _call_hash(call)) % 2**24
    words[-2] = fingerprint
    words[-1] = fingerprint * fingerprint


@lru_cache(maxsize=4096)
def _call_hash(call: _Call) -> int:
    return int.from_bytes(hashlib.sha256(_describe(call)).digest()[:3], "little")


def _placement_hash(gpu: Tensor) -> Tensor:
    return (gpu * _random_weights(gpu.device)[: len(gpu)]).sum()


@lru_cache(maxsize=64)
def _random_weights(device: torch.device) -> Tensor:
    """[MAX_EXPERTS] int64, fixed: two placements differ in their weighted sums."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2**24, (MAX_EXPERTS,), generator=generator).to(device)


def _check_words(words: Tensor, group: Group, call: _Call, gpu: Tensor) -> None:
    """No rank failed, and all fingerprints are equal: n times the sum of squares is the square of the sum for
    equal numbers only."""
    ranks, agreed = dist.get_world_size(group), _agreed.setdefault(group, set())
    if not words.is_cpu and call in agreed:
        _, failed, total, squares = words[-4:]
        torch._assert_async((failed == 0) & (ranks * squares == total * total))
        return
    _, failed, total, squares = words[-4:].tolist()
    if failed:
        raise RuntimeError(
            f"distributed.route: {failed} of {ranks} ranks failed; the error raised there says why"
        )
    if ranks * squares != total * total:
        raise RuntimeError(f"distributed.route: ranks disagree: {_difference(group, call, gpu)}")
    agreed.add(call)


def _difference(group: Group, call: _Call, gpu: Tensor) -> str:
    """What the first rank that deviates from rank 0 has, in words; every rank asks."""
    card = _describe(call) + f"expert_gpu (a hash)={int(_placement_hash(gpu))}".encode()
    padded = bytearray(card[:_CARD_BYTES].ljust(_CARD_BYTES, b"\n"))
    mine = torch.frombuffer(padded, dtype=torch.uint8).to(gpu.device)
    cards = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    with _exchange("the configurations", group):
        dist.all_gather(cards, mine, group=group)
    first, *others = [bytes(each.tolist()).decode().split("\n") for each in cards]
    for rank, other in enumerate(others, start=1):
        pairs = [pair for pair in zip(other, first, strict=False) if pair[0] != pair[1]]
        if pairs:
            here, there = (", ".join(pair[side] for pair in pairs) for side in (0, 1))
            return f"rank {rank} of the group has {here}, rank 0 has {there}"
    return "their configurations are too long to tell where"


def _describe(call: _Call) -> bytes:
    """One line per field: `name=value`."""
    fields: dict[str, object] = {"xshare_trtllm": __version__} | call.spec.model_dump()
    fields |= call.config.model_dump()
    fields |= {"whole_batch_stats": call.whole_batch_stats, "has_dial": call.has_dial}
    return "".join(f"{name}={value}\n" for name, value in fields.items()).encode()


def _all_reduce(tensor: Tensor, group: Group, what: str) -> None:
    with _exchange(what, group):
        dist.all_reduce(tensor, group=group)


@contextmanager
def _exchange(what: str, group: Group) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"distributed.route: exchanging {what} between {dist.get_world_size(group)} ranks failed: a rank "
            "has died, has raised elsewhere, or did not come within the group's timeout. The group cannot be "
            f"used any more. The backend says: {error}"
        ) from error


def resolve_group(group: Group | None) -> Group:
    """The group that None stands for. Raises ValueError where there is none, or this rank is not in it."""
    found = dist.group.WORLD if group is None else group
    if found is None:
        raise ValueError("group=None: torch.distributed is not initialised, call init_process_group first")
    if dist.get_rank(found) < 0:
        raise ValueError("group: this rank is not in it")
    return found
