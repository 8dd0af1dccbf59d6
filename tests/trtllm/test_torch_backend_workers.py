"""XShare on several ranks, in a real process group, against the stand-in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from xshare_trtllm import RouterSpec, XShareConfig, route

HERE = Path(__file__).parent
STAND_IN = HERE / "torch_stand_in"


def environment(*folders: Path, **variables: str) -> dict[str, str]:
    paths = [*map(str, folders), str(STAND_IN), *sys.path]
    return (
        os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"} | variables
    )


def test_contract_attention_data_parallelism(tmp_path: Path) -> None:
    """Two ranks with rows of their own, one idle, route as one rank with all rows would: real processes in a
    real process group, led together by what stands for MPI."""
    script = HERE / "torch_backend_rank.py"
    variables = environment(TENSORRT_LLM_BCAST=str(tmp_path / "address"), GLOO_SOCKET_IFNAME="lo")
    ranks = [
        subprocess.Popen([sys.executable, str(script), str(rank), str(tmp_path)], env=variables)
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=100) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
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


def test_the_package_needs_no_torch() -> None:
    code = "import sys, xshare_trtllm.trtllm as t; assert 'torch' not in sys.modules; t.nothing"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, timeout=60)
    assert "has no attribute 'nothing'" in done.stderr, done.stderr
