"""`distributed.route` over NCCL, eager and from a CUDA graph, against one rank on the host.

    pytest -q tests/gpu/test_distributed_nccl.py

Written ahead of a run on GPUs; over gloo the same code is tested in tests/test_distributed.py.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
sys.path.append(str(Path(__file__).resolve().parent.parent))

if torch.cuda.device_count() < 2:
    pytest.skip("needs 2 GPUs", allow_module_level=True)

import torch.distributed as dist  # noqa: E402
from distributed_cases import Case, assert_same, draw  # noqa: E402
from distributed_launch import launch  # noqa: E402

from xshare_trtllm import Routing, distributed, ops  # noqa: E402
from xshare_trtllm import route as single_rank_route  # noqa: E402

CASES = 200


def join(rank: int, world: int, folder: str) -> dist.ProcessGroup:
    torch.cuda.set_device(rank)
    store = dist.FileStore(f"{folder}/nccl", world)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    group = dist.group.WORLD
    assert group is not None
    return group


def on_host(routing: Routing) -> Routing:
    return Routing(*(getattr(routing, name).cpu() for name in Routing.__slots__))


def on_device(case: Case, rank: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logits, extras = case.of_rank(rank)
    return logits.cuda(), {name: tensor.cuda() for name, tensor in extras.items()}


def compare(rank: int, world: int, folder: str) -> None:
    group = join(rank, world, folder)
    for seed in range(CASES):
        case = draw(seed, world)
        expected = single_rank_route(case.logits, case.spec, case.config, **case.batch())
        logits, extras = on_device(case, rank)
        got = distributed.route(logits, case.spec, case.config, group=group, **extras)
        assert_same(on_host(got), expected, case.slice(rank), f"seed {seed}, rank {rank}")
    dist.destroy_process_group()


def capture(rank: int, world: int, folder: str) -> None:
    """One graph, replayed on new logits of the same shape, with a dial that every rank turns by itself."""
    group = join(rank, world, folder)
    case = next(case for case in (draw(seed, world) for seed in range(1000)) if all(case.rows))
    logits, extras = on_device(case, rank)
    configs = [case.config.model_copy(update={"coverage": share}) for share in (0.4, 0.7, 0.95)]
    packed = [bytearray(ops.pack_dial(config, "on")) for config in configs]
    dials = [torch.frombuffer(each, dtype=torch.uint8).cuda() for each in packed]
    extras["dial"] = dials[0].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        distributed.route(logits, case.spec, case.config, group=group, **extras)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = distributed.route(logits, case.spec, case.config, group=group, **extras)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        case.logits = torch.randn(case.logits.shape, generator=generator).to(case.logits.dtype)
        logits.copy_(case.logits[case.slice(rank)])
        extras["dial"].copy_(dials[(seed + rank) % 3])  # the first rank's counts
        graph.replay()
        expected = single_rank_route(case.logits, case.spec, configs[seed % 3], **case.batch())
        assert_same(on_host(got), expected, case.slice(rank), f"replay {seed}, rank {rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("function", [compare, capture])
def test_equals_one_rank(function, tmp_path: Path) -> None:
    launch(2, function, 2, str(tmp_path), seconds=300)
