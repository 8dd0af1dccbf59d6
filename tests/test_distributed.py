"""`distributed.route` in real processes over gloo: the single rank's bits, and errors instead of hangs."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_cases import Case, assert_same, draw
from distributed_launch import join_group, launch
from torch import Tensor

from xshare_trtllm import RouterSpec, Routing, XShareConfig, distributed, ops
from xshare_trtllm import route as single_rank_route
from xshare_trtllm.config import MODES

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

SEED = int(os.environ.get("XSHARE_SEED", "0"))
CASES = 200
TIMEOUT = 2.0  # of a group in which a rank fails, seconds
SPEC, CONFIG = RouterSpec(16, 2, "softmax"), XShareConfig(6)


# ---- The same bits as on one rank --------------------------------------------------------------------------


def compare_with_one_rank(rank: int, world: int, folder: str) -> dict[str, int]:
    """Counts what the cases exercised."""
    group = join_group(rank, world, folder)
    seen = dict.fromkeys(
        ("no rows here", "no rows", "stood aside", "overflow", "gpu budget binds", "cap by coverage"), 0
    )
    for seed in range(SEED, SEED + CASES):
        case = draw(seed, world)
        expected = single_rank_route(case.logits, case.spec, case.config, **case.batch())
        logits, extras = case.of_rank(rank)
        got = distributed.route(logits, case.spec, case.config, group=group, **extras)
        assert_same(got, expected, case.slice(rank), f"seed {seed}, rank {rank} of {world}")
        stats = got.stats
        seen["no rows here"] += not len(logits)
        seen["no rows"] += not len(case.logits)
        seen["stood aside"] += stats.stood_aside
        seen["overflow"] += stats.warmup_overflow > 0
        seen["gpu budget binds"] += stats.peak_gpu_after == (case.config.gpu_budget or 0)
        by_coverage = case.config.coverage and not case.config.gpu_budget and "expert_gpu" in case.shared
        seen["cap by coverage"] += bool(by_coverage) and stats.peak_gpu_after < stats.peak_gpu_before
    dist.destroy_process_group()
    return seen


@pytest.mark.parametrize("world", (1, 2, 3, 4))
def test_equals_one_rank_with_the_whole_batch(world: int, tmp_path: Path) -> None:
    for seen in launch(world, compare_with_one_rank, world, str(tmp_path)):
        assert all(count > 0 for count in seen.values()), f"a case that never came: {seen}"


def no_second_all_reduce(rank: int, world: int, folder: str) -> None:
    """Without the whole batch's statistics all else is the same, and what is counted is S."""
    group = join_group(rank, world, folder)
    calls, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda tensor, group: calls.append(tensor.numel()) or all_reduce(tensor, group=group)
    for seed in range(40):
        case = draw(seed, world)
        logits, extras = case.of_rank(rank)
        exact = distributed.route(logits, case.spec, case.config, group=group, **extras)
        calls.clear()
        quick = distributed.route(
            logits, case.spec, case.config, group=group, **extras, whole_batch_stats=False
        )
        assert len(calls) == 1
        after, peak = quick.raw_stats[[1, 6]].tolist()
        quick.raw_stats[[1, 6]] = exact.raw_stats[[1, 6]]
        assert_same(quick, exact, slice(None), f"seed {seed}")
        assert after == quick.active_experts.sum()
        assert after >= exact.raw_stats[1] and peak >= exact.raw_stats[6]


def test_one_all_reduce(tmp_path: Path) -> None:
    launch(2, no_second_all_reduce, 2, str(tmp_path))


def test_no_host_synchronisation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tensors without data raise where one of their values is read or decides a shape: what passes can be
    captured in a CUDA graph."""
    group = join_group(0, 1, str(tmp_path))
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: None)
    for seed in range(60):
        case = draw(seed, 1)
        call = distributed._Call(case.spec, case.config, whole_batch_stats=True, has_dial=seed % 2 == 1)
        distributed._agreed.setdefault(group, set()).add(call)
        logits, extras = case.of_rank(0)
        if call.has_dial:
            extras["dial"] = as_dial(ops.pack_dial(case.config, "on"))
        extras = {name: tensor.to("meta") for name, tensor in extras.items()}
        got = distributed.route(logits.to("meta"), case.spec, case.config, group=group, **extras)
        assert got.raw_stats.is_meta and got.raw_stats.shape == (8,)
        assert got.expert_ids.is_meta and got.expert_ids.shape == (len(logits), case.spec.top_k)
    distributed._agreed.clear()  # the first call does look
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        distributed.route(logits.to("meta"), case.spec, case.config, group=group, **extras)
    dist.destroy_process_group()


# ---- A dial that is turned ---------------------------------------------------------------------------------


def draw_dial(rng: random.Random, case: Case) -> tuple[Tensor, XShareConfig, str]:
    """What a dial holds, at times beyond what a configuration takes, and what it stands for."""
    top_k, experts = case.spec.top_k, case.spec.num_experts
    coverage = rng.choice((0.0, 0.5, 0.9, 0.97, 1.0, rng.random(), -1.0, 2.0, math.nan))
    budget = rng.choice((rng.randint(top_k, experts + 1), experts, -3, 2**31 - 1))
    mode = rng.choice(("on", "on", "shadow", "off"))
    raw = ops._DIAL.pack(coverage, budget, MODES.index(mode))
    right = max(0.0, min(coverage, 1.0)) if coverage == coverage else 0.0
    values = {"coverage": right or None, "budget": max(budget, top_k)}
    return as_dial(raw), case.config.model_copy(update=values), mode


def as_dial(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def expected_with(case: Case, config: XShareConfig, mode: str) -> Routing:
    """What one rank with all rows makes of it, without a dial."""
    if mode == "off":
        return single_rank_route(case.logits, case.spec, XShareConfig.off(case.spec), **case.batch())
    wanted = single_rank_route(case.logits, case.spec, config, **case.batch())
    if mode == "on":
        return wanted
    own = single_rank_route(case.logits, case.spec, XShareConfig.off(case.spec), **case.batch())
    return dataclasses.replace(own, raw_stats=wanted.raw_stats)


def turn_at_random(rank: int, world: int, folder: str) -> dict[str, int]:
    """Every rank turns its dial when it likes; the first rank's is that of the step on all of them."""
    group, seen = join_group(rank, world, folder), dict.fromkeys(MODES, 0)
    together, mine = random.Random(SEED), random.Random(rank + 1)
    case = draw(SEED, world)
    dial, config, mode = draw_dial(together, case)
    for seed in range(SEED, SEED + CASES // 2):
        case = draw(seed, world)
        turned, config, mode = draw_dial(together, case)
        dial.copy_(turned if rank == 0 else draw_dial(mine, case)[0])
        if config.is_off(case.spec):
            mode = "off"
        logits, extras = case.of_rank(rank)
        got = distributed.route(logits, case.spec, case.config, group=group, dial=dial, **extras)
        wanted = expected_with(case, config, mode)
        assert_same(got, wanted, case.slice(rank), f"seed {seed}, rank {rank} of {world}, {mode}, {config}")
        quick = distributed.route(
            logits, case.spec, case.config, group=group, dial=dial, whole_batch_stats=False, **extras
        )
        assert torch.equal(quick.expert_ids, got.expert_ids)
        assert torch.equal(quick.raw_stats[[0, 2, 3, 4, 5, 7]], got.raw_stats[[0, 2, 3, 4, 5, 7]])
        seen[mode] += len(case.logits) > 0
    dist.destroy_process_group()
    return seen


@pytest.mark.skipif(not ops.available(), reason="libxshare.so is not built: pip install -e .")
@pytest.mark.parametrize("world", (1, 3))
def test_a_dial_is_the_first_ranks_on_every_rank(world: int, tmp_path: Path) -> None:
    for seen in launch(world, turn_at_random, world, str(tmp_path)):
        assert all(count > 0 for count in seen.values()), f"a mode that never came: {seen}"


def race(rank: int, world: int, folder: str) -> list[list[int]]:
    """The sets and statistics of many steps while a thread turns this rank's dial as fast as it can."""
    group, rng = join_group(rank, world, folder), random.Random(rank)
    configs = [XShareConfig(budget, coverage=share) for budget in (2, 4, 16) for share in (0.3, 0.9)]
    dials = [as_dial(ops.pack_dial(config, "on")) for config in configs]
    dial = dials[0].clone()
    stop = threading.Event()

    def turn() -> None:
        while not stop.is_set():
            dial.copy_(rng.choice(dials))

    thread = threading.Thread(target=turn)
    thread.start()
    found = []
    try:
        for step_number in range(150):
            generator = torch.Generator().manual_seed(world * step_number + rank)
            logits = torch.randn(3, SPEC.num_experts, generator=generator)
            made = distributed.route(logits, SPEC, CONFIG, group=group, dial=dial)
            found.append([*made.active_experts.nonzero().flatten().tolist(), -1, *made.raw_stats.tolist()])
    finally:
        stop.set()
        thread.join()
    dist.destroy_process_group()
    return found


def test_a_dial_that_is_turned_in_the_middle_of_a_step(tmp_path: Path) -> None:
    first, second = launch(2, race, 2, str(tmp_path))
    assert first == second and len({row.index(-1) for row in first}) > 2


# ---- Errors on all ranks, not hangs ------------------------------------------------------------------------


def error_of(call: Callable[[], object]) -> str:
    """The type and message of what `call` raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error")


def step(group: dist.ProcessGroup, config: XShareConfig = CONFIG, rows: int = 3, **extras: object) -> None:
    """A step that must succeed or fail on every rank."""
    distributed.route(torch.zeros(rows, SPEC.num_experts), SPEC, config, group=group, **extras)


def fail_and_go_on(rank: int, world: int, folder: str) -> None:
    """Mistakes that ranks learn of in the exchange itself, at once: the group stays usable."""
    group = join_group(rank, world, folder, seconds=100)  # the launch ends earlier: none of this may wait

    def all_raise(call: Callable[[], object], message: str, after: XShareConfig | None = CONFIG) -> None:
        error = error_of(call)
        assert error.startswith(f"RuntimeError: distributed.route: {message}"), error
        if after:
            step(group, after)

    wide = torch.zeros(3, SPEC.num_experts + (rank == 1))
    error = error_of(lambda: distributed.route(wide, SPEC, CONFIG, group=group))
    refused = "ValueError: router_logits: shape must be [rows, 16], got [3, 17]"
    failed = "RuntimeError: distributed.route: 1 of 3 ranks failed; the error raised there says why"
    assert error == (refused if rank == 1 else failed)
    step(group)

    def other(name: str, there: object, here: object) -> str:
        return f"ranks disagree: rank 1 of the group has {name}={there}, rank 0 has {name}={here}"

    for _ in range(2):  # nobody remembers it as agreed
        all_raise(lambda: step(group, XShareConfig(6 + rank)), other("budget", 7, 6))

    def other_shape() -> None:
        spec = RouterSpec(16 + 8 * rank, 2, "softmax")
        distributed.route(torch.zeros(3, spec.num_experts), spec, CONFIG, group=group)

    all_raise(other_shape, other("num_experts", 24, 16))
    hierarchical, ids = XShareConfig(6, request_budget=4), torch.arange(3)
    all_raise(
        lambda: step(group, hierarchical if rank == 1 else CONFIG, request_ids=ids),
        other("request_budget", 4, None),
    )
    version = distributed.__version__
    distributed.__version__ = "0.0.1" if rank == 1 else version
    distributed._call_hash.cache_clear()
    all_raise(lambda: step(group), other("xshare_trtllm", "0.0.1", version), after=None)
    all_raise(
        lambda: distributed.check_agreement(group, SPEC, CONFIG),
        other("xshare_trtllm", "0.0.1", version),
        after=None,
    )
    distributed.__version__ = version
    distributed._call_hash.cache_clear()
    all_raise(lambda: step(group, whole_batch_stats=rank != 1), other("whole_batch_stats", False, True))
    dial = as_dial(ops.pack_dial(CONFIG, "on"))
    all_raise(lambda: step(group, dial=dial if rank == 1 else None), other("has_dial", True, False))
    error = error_of(lambda: step(group, dial=dial[rank == 1 :]))
    refused = "ValueError: dial: must be uint8 [16] on cpu, got torch.uint8 [15] on cpu"
    assert error == (refused if rank == 1 else failed)
    step(group, dial=dial)
    placement = torch.arange(16) // 8
    mine = placement.flip(0) if rank == 1 else placement
    all_raise(
        lambda: step(group, expert_gpu=mine), "ranks disagree: rank 1 of the group has expert_gpu (a hash)="
    )
    step(group, expert_gpu=placement)
    distributed.check_agreement(group, SPEC, CONFIG, placement)


def test_mistakes_reach_every_rank_at_once(tmp_path: Path) -> None:
    launch(3, fail_and_go_on, 3, str(tmp_path), seconds=50)


def fail_and_lose_the_group(rank: int, world: int, folder: str) -> list[str]:
    """The errors of a rank that loses its group, three times."""
    errors = []

    # Rank 1 is late: it comes after the others have given up.
    group = join_group(rank, world, folder, "late", TIMEOUT)
    signals = dist.FileStore(f"{folder}/signals", world)
    step(group)
    if rank == 1:
        signals.wait(["gave up 0", "gave up 2"])
    errors.append(error_of(lambda: step(group)))
    signals.set(f"gave up {rank}", "")
    dist.destroy_process_group()

    # Rank 1 leaves before the first step.
    group = join_group(rank, world, folder, "first step", TIMEOUT)
    if rank != 1:
        errors.append(error_of(lambda: step(group)))
    dist.destroy_process_group()

    # Rank 1 dies between two steps.
    group = join_group(rank, world, folder, "death", TIMEOUT)
    step(group)
    if rank == 1:
        os._exit(7)
    errors.append(error_of(lambda: step(group)))
    return errors


def test_a_lost_rank_is_an_error_on_the_others(tmp_path: Path) -> None:
    results = launch(3, fail_and_lose_the_group, 3, str(tmp_path), seconds=50)
    assert results[1] is None
    for rank in (0, 2):
        assert len(results[rank]) == 3
        for error in results[rank]:
            message = "exchanging the sums of the rows between 3 ranks failed: a rank has died"
            assert error.startswith(f"RuntimeError: distributed.route: {message}"), error


def raise_elsewhere(rank: int, world: int, folder: str) -> str | None:
    group = join_group(rank, world, folder, seconds=100)
    step(group)
    if rank == 1:
        return None  # the process ends as after an error of the model
    return error_of(lambda: step(group))


def test_a_rank_that_ends_is_noticed_before_the_timeout(tmp_path: Path) -> None:
    first, _ = launch(2, raise_elsewhere, 2, str(tmp_path), seconds=30)
    assert "exchanging the sums of the rows between 2 ranks failed" in first


def test_needs_a_group() -> None:
    with pytest.raises(ValueError, match="is not initialised"):
        distributed.route(torch.zeros(1, 16), SPEC, CONFIG, group=None)
