"""tensorrt_llm/executor/executor.py: `GenerationExecutor.create`, which returns when the workers are ready.

Its parameters as in 1.0 (005bc84889) to 1.2 and after; `create` picks the launcher by what it is told, here
by `llm_args.launcher`:

- `single`: the model is loaded in this process (TLLM_WORKER_USE_SINGLE_PROCESS=1)
- `mpi`: MpiPoolSession, llmapi/mpi_session.py at 00a1352a7d: mpi4py spawns the workers, with this process's
  sys.path and its variables that begin with TRTLLM or TLLM. The RPC proxy uses the same session
  (executor/rpc_proxy.py at 03dd9bb838)
- `variables`: workers with all variables of this process, as Ray's have
- `ray`: executor/ray_executor.py at 0777969c17, executor/ray/executor.py at 061a914e0a: a Ray actor per rank,
  all with a runtime environment of this process's variables but two; `setup_engine` loads the model. Here the
  cluster is one of this process's own, with GPUs that are not there
- `launch`: llmapi/trtllm-llmapi-launch at 020c89e64e: the ranks run already, and are told what to do
  (RemoteMpiCommSessionClient, here through files)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tensorrt_llm.executor.worker import worker_main


class GenerationExecutor:
    @staticmethod
    def create(
        engine: Any,
        executor_config: Any = None,
        batched_logits_processor: Any = None,
        model_world_size: int = 1,
        world_size: int = 0,
        mpi_session: Any = None,
        reuse_mpi_comm: bool = False,
        return_logits: bool = False,
        postproc_worker_config: Any = None,
        is_llm_executor: bool | None = None,
        hf_model_dir: Any = None,
        tokenizer: Any = None,
        llm_args: Any = None,
        **args: Any,
    ) -> Any:
        if llm_args.launcher == "single":
            return _Single()
        if llm_args.launcher == "mpi":
            return _Pool(model_world_size)
        if llm_args.launcher == "ray":
            return _RayExecutor(model_world_size)
        if llm_args.launcher == "launch":
            return _Remote(model_world_size)
        return _Actors(model_world_size, llm_args.python)


class _Single:
    def __init__(self) -> None:
        self.engine = worker_main(0, 1)

    def shutdown(self) -> None:
        print("shutdown", flush=True)


class _Pool:
    def __init__(self, model_world_size: int) -> None:
        from mpi4py.futures import MPIPoolExecutor

        env = {key: value for key, value in os.environ.items() if key.startswith(("TRTLLM", "TLLM"))}
        self.pool = MPIPoolExecutor(max_workers=model_world_size, path=sys.path, env=env)
        futures = [self.pool.submit(_mpi_worker, model_world_size) for _ in range(model_world_size)]
        assert [future.result() for future in futures] == [True] * model_world_size

    def shutdown(self) -> None:
        print("shutdown", flush=True)
        self.pool.shutdown()


def _mpi_worker(world_size: int) -> bool:
    from mpi4py import MPI

    MPI.COMM_WORLD.barrier()
    worker_main(MPI.COMM_WORLD.Get_rank(), world_size)
    return True


class _RayExecutor:
    def __init__(self, model_world_size: int) -> None:
        import ray

        os.environ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"
        runtime_env = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}
        options = {"include_dashboard": False, "namespace": "trtllm", "ignore_reinit_error": True}
        memory = {"object_store_memory": 80 * 2**20, "num_gpus": model_world_size}
        ray.init(address="local", **options, runtime_env=runtime_env, **memory)
        worker_env = ray.runtime_env.RuntimeEnv()
        node_local = ("RAY_RAYLET_PID", "RAY_NODE_IP_ADDRESS")
        worker_env["env_vars"] = {k: v for k, v in os.environ.items() if k not in node_local}
        worker_env["env_vars"].update({"TLLM_DISABLE_MPI": "1", "MASTER_ADDR": "127.0.0.1"})
        wrapper = ray.remote(_RayWorkerWrapper).options(num_gpus=1.0, runtime_env=worker_env)
        self.workers = [wrapper.remote(model_world_size, rank) for rank in range(model_world_size)]
        ray.get([worker.setup_engine.remote() for worker in self.workers])

    def shutdown(self) -> None:
        import ray

        print("shutdown", flush=True)
        ray.shutdown()


class _RayWorkerWrapper:
    def __init__(self, world_size: int, rank: int) -> None:
        self.world_size, self.rank = world_size, rank

    def setup_engine(self) -> None:
        self.engine = worker_main(self.rank, self.world_size)


class _Remote:
    """Ranks that wait for a task in the folder TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR; none comes back, so it
    waits for rank 0's answer alone."""

    def __init__(self, model_world_size: int) -> None:
        self.folder = Path(os.environ["TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR"])
        (self.folder / "task").touch()
        while not (self.folder / "ready").exists():
            time.sleep(0.02)

    def shutdown(self) -> None:
        print("shutdown", flush=True)
        (self.folder / "stop").touch()


class _Actors:
    """Ready as soon as rank 0 is, as the proxy is."""

    def __init__(self, model_world_size: int, python: list[list[str]]) -> None:
        module = "tensorrt_llm.executor.worker"
        self.actors = [
            subprocess.Popen(
                [sys.executable, *python[rank], "-m", module, json.dumps([rank, model_world_size])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for rank in range(model_world_size)
        ]
        ready = self.actors[0].stdout
        assert ready is not None and ready.readline() == b"READY\n", "Executor worker died"

    def shutdown(self) -> None:
        print("shutdown", flush=True)
        for actor in self.actors:
            actor.kill()
            actor.wait()
