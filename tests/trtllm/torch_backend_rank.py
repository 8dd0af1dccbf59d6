"""RANK FOLDER: one of two ranks under attention data parallelism, against the stand-in. Writes what its rows
were routed to."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from tensorrt_llm._torch.modules.fused_moe.moe import CutlassFusedMoE
from tensorrt_llm._torch.modules.fused_moe.routing import RenormalizeMoeRoutingMethod
from tensorrt_llm._torch.pyexecutor.model_engine import CUDA_GRAPH_DUMMY_REQUEST_ID, Model, PyTorchModelEngine

from xshare_trtllm import XShareConfig
from xshare_trtllm.trtllm import enable

REQUESTS = ([70, 71, 72, CUDA_GRAPH_DUMMY_REQUEST_ID], [0])  # the second rank is idle, with a dummy


def logits(rank: int) -> torch.Tensor:
    return torch.randn(len(REQUESTS[rank]), 32, generator=torch.Generator().manual_seed(rank))


def main(rank: int, folder: Path) -> None:
    mapping = SimpleNamespace(
        enable_attention_dp=True,
        tp_size=2,
        tp_group=[0, 1],
        pp_size=1,
        rank=rank,
        world_size=2,
        moe_ep_size=2,
    )
    layers = [
        CutlassFusedMoE(
            routing_method=RenormalizeMoeRoutingMethod(4), num_experts=32, mapping=mapping, layer_idx=index
        )
        for index in range(2)
    ]
    engine = PyTorchModelEngine(model=Model(*layers), mapping=mapping)
    with enable(engine.model, XShareConfig((8, 12), gpu_budget=7)):
        engine.step(logits(rank), REQUESTS[rank])
    torch.save([layer.calls[0] for layer in layers], folder / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
