"""tensorrt_llm/executor/worker.py: `worker_main` loads the model; what a failing worker does, for tests:
TLLM_FAULT is `die RANK` (before it has loaded) or `late RANK` (a second later than the others)."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def worker_main(rank: int, world_size: int) -> Any:
    import importlib

    engines = importlib.import_module("tensorrt_llm._torch.pyexecutor.model_engine")
    fault, _, whom = os.environ.get("TLLM_FAULT", "").partition(" ")
    if whom == str(rank):
        if fault == "die":
            os._exit(9)
        time.sleep(1)
    single = importlib.import_module("tensorrt_llm._torch.utils").SINGLE
    mapping = SimpleNamespace(**vars(single) | {"rank": rank, "world_size": world_size})
    return engines.PyTorchModelEngine(model=engines.make_model(mapping), mapping=mapping)


def node_main(rank: int, world_size: int) -> None:
    """llmapi/mgmn_leader_node.py and mgmn_worker_node.py: a rank that was started before the server."""
    folder = Path(os.environ["TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR"])
    while not (folder / "task").exists():
        time.sleep(0.02)
    engine = worker_main(rank, world_size)
    if rank == 0:
        (folder / "ready").touch()
    while engine and not (folder / "stop").exists():
        time.sleep(0.02)


if __name__ == "__main__":
    if "TLLM_SPAWN_PROXY_PROCESS" in os.environ:
        sys.exit(node_main(*json.loads(sys.argv[1])))
    engine = worker_main(*json.loads(sys.argv[1]))
    print("READY", flush=True)
    sys.stdin.read()
