"""XShare on several ranks, in a real process group, against the stand-in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch_backend_dial_rank import SETTINGS, rows_of

from xshare_trtllm import RouterSpec, XShareConfig, route
from xshare_trtllm.trtllm.setting import Setting

HERE = Path(__file__).parent
STAND_IN = HERE / "torch_stand_in"


def environment(*folders: Path, **variables: str) -> dict[str, str]:
    paths = [*map(str, folders), str(STAND_IN), *sys.path]
    return (
        os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"} | variables
    )


def run_two_ranks(script: str, folder: Path) -> None:
    """Real processes in a real process group, led together by what stands for MPI."""
    variables = environment(TENSORRT_LLM_BCAST=str(folder / "address"), GLOO_SOCKET_IFNAME="lo")
    command = [sys.executable, str(HERE / script)]
    ranks = [subprocess.Popen([*command, str(rank), str(folder)], env=variables) for rank in range(2)]
    try:
        assert [rank.wait(timeout=100) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


def test_contract_attention_data_parallelism(tmp_path: Path) -> None:
    """Two ranks with rows of their own, one idle, route as one rank with all rows would."""
    run_two_ranks("torch_backend_rank.py", tmp_path)
    rows = [torch.randn(n, 32, generator=torch.Generator().manual_seed(i)) for i, n in enumerate((4, 1))]
    requests = torch.tensor([0, 1, 2, -1, -1], dtype=torch.int32)
    made = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for layer, budget in enumerate((8, 12)):
        whole = route(
            torch.cat(rows),
            RouterSpec(32, 4, "topk_softmax"),
            XShareConfig(budget, gpu_budget=7),
            request_ids=requests,
            expert_gpu=torch.arange(32) // 16,
        )
        assert torch.equal(torch.cat([rank[layer][0] for rank in made]), whole.expert_ids)
        assert torch.equal(torch.cat([rank[layer][1] for rank in made]), whole.expert_weights)


def test_contract_the_dial_under_attention_data_parallelism(tmp_path: Path) -> None:
    """An operator edits the file at moments that are nothing to the ranks, of which the first is idle at
    times. Every step is that of one setting on both ranks, as one rank with all rows would make it."""
    run_two_ranks("torch_backend_dial_rank.py", tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert [rank["generation"] for rank in ranks] == [len(SETTINGS) - 1] * 2
    spec, seen = RouterSpec(32, 4, "topk_softmax"), []
    for number, steps in enumerate(zip(*(rank["steps"] for rank in ranks), strict=True)):
        rows, requests = rows_of(number)
        counted = [step["counted"] for step in steps]
        assert torch.equal(*counted), f"step {number}"
        got = torch.cat([step["output"] for step in steps])
        now = [setting for setting in SETTINGS if step_is(rows, requests, spec, setting, got, counted[0])]
        assert now, f"step {number} is that of no setting"
        seen.append(now)
    order = [SETTINGS.index(now[0]) for now in seen if len(now) == 1]
    assert order == sorted(order) and set(order) == set(range(len(SETTINGS)))


def step_is(
    rows: torch.Tensor,
    requests: torch.Tensor,
    spec: RouterSpec,
    setting: Setting,
    got: torch.Tensor,
    counted: torch.Tensor,
) -> bool:
    """Whether outputs and statistics of the step are those of the setting."""
    off = XShareConfig.off(spec)
    made = route(rows, spec, setting.config if setting.mode == "on" else off, request_ids=requests)
    stats = route(rows, spec, off if setting.mode == "off" else setting.config, request_ids=requests)
    wanted = (torch.arange(1.0, 33.0)[made.expert_ids.long()] * made.expert_weights).sum(-1)
    real = requests >= 0
    places = [0, 2, 3, 4, 5, 7]  # `experts_after` and its peak count S there
    is_counted = torch.equal(counted[places], stats.raw_stats[places])
    return is_counted and torch.equal(got[real], wanted[real])


def test_the_package_needs_no_torch() -> None:
    code = "import sys, xshare_trtllm.trtllm as t; assert 'torch' not in sys.modules; t.nothing"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, timeout=60)
    assert "has no attribute 'nothing'" in done.stderr, done.stderr
