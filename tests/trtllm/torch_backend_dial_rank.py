"""RANK FOLDER: one of two ranks under attention data parallelism, against the stand-in, with the dial of a
server that follows its file. Writes what every step gave and counted."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from xshare_trtllm import XShareConfig
from xshare_trtllm.trtllm.setting import Setting

SETTINGS = (
    Setting(XShareConfig(coverage=0.9)),
    Setting(XShareConfig(coverage=0.6)),
    Setting(XShareConfig(10), "shadow"),
    Setting(XShareConfig(10), "off"),
    Setting(XShareConfig(6, coverage=0.95)),
)
DUMMY = 2**64 - 1
STEPS_OF_A_SETTING = 24


def requests_of(step: int, rank: int) -> list[int]:
    """Four sequences of each rank, some of padding; the first rank has no request at times."""
    if rank == 0 and step // 10 % 2:
        return [0, DUMMY, DUMMY, DUMMY]
    return [70 + rank, 80 + rank, 90 + rank, DUMMY if step % 3 else 95 + rank]


def logits_of(step: int, rank: int) -> Tensor:
    return torch.randn(4, 32, generator=torch.Generator().manual_seed(2 * step + rank))


def rows_of(step: int) -> tuple[Tensor, Tensor]:
    """All ranks' logits, and request ids with -1 for padding."""
    requests = [request for rank in range(2) for request in requests_of(step, rank)]
    ids = [-1 if request in (0, DUMMY) else place for place, request in enumerate(requests)]
    return torch.cat([logits_of(step, rank) for rank in range(2)]), torch.tensor(ids, dtype=torch.int32)


def write(setting: Setting, path: Path) -> None:
    import yaml

    aside = path.with_suffix(".new")
    aside.write_text(yaml.safe_dump(setting.to_dict()))
    aside.rename(path)


def main(rank: int, folder: Path) -> None:
    from tensorrt_llm._torch.modules.fused_moe.moe import CutlassFusedMoE
    from tensorrt_llm._torch.modules.fused_moe.routing import RenormalizeMoeRoutingMethod
    from tensorrt_llm._torch.pyexecutor.model_engine import Model, PyTorchModelEngine

    from xshare_trtllm.trtllm import dial
    from xshare_trtllm.trtllm.run_folder import RunFolder
    from xshare_trtllm.trtllm.torch_backend import Enabled
    from xshare_trtllm.trtllm.torch_rows import after_prepare

    dial.SECONDS, dial.LOOK_STEPS = 0.0, 5 + 2 * rank  # a rank looks when it likes
    mapping = SimpleNamespace(
        enable_attention_dp=True,
        tp_size=2,
        tp_group=[0, 1],
        pp_size=1,
        rank=rank,
        world_size=2,
        moe_ep_size=1,
    )
    method = RenormalizeMoeRoutingMethod(4)
    layer = CutlassFusedMoE(routing_method=method, num_experts=32, mapping=mapping, layer_idx=0)
    engine = PyTorchModelEngine(model=Model(layer), mapping=mapping)
    run = RunFolder(folder / "xshare.yaml")
    if rank == 0:
        write(SETTINGS[0], run.config_path)
        run.begin(2, "abc")
    while run.server() is None:
        time.sleep(0.01)
    enabled = Enabled(engine.model, SETTINGS[0].config, has_dial=True)
    watch = dial.DialWatch(enabled.dial, SETTINGS[0], run, rank, print)
    after_prepare(watch.step)
    operator, steps = random.Random(rank), []
    for index, setting in enumerate(SETTINGS):
        edit_at = operator.randrange(STEPS_OF_A_SETTING // 3) if rank == 1 else -1  # nobody else's business
        for number in range(index * STEPS_OF_A_SETTING, (index + 1) * STEPS_OF_A_SETTING):
            if number % STEPS_OF_A_SETTING == edit_at and index:
                write(setting, run.config_path)
            enabled.counters.zero_()
            output = engine.step(logits_of(number, rank), requests_of(number, rank))
            steps.append({"output": output[:, 0].clone(), "counted": enabled.counters[0].clone()})
    torch.save({"steps": steps, "generation": watch.generation}, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
