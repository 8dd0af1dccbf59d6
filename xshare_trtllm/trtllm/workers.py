"""XShare in the processes of a TensorRT-LLM server: in each that loads a model, and in the parent, which
serves nothing before all of them have acknowledged.

startup.py calls the functions `patch_*` with TensorRT-LLM's own modules once they have been imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from xshare_trtllm import __version__
from xshare_trtllm.trtllm import startup
from xshare_trtllm.trtllm.run_folder import WAIT_SECONDS, RunFolder, settings_hash
from xshare_trtllm.trtllm.setting import Setting

_WAIT_VARIABLE = "TRTLLM_XSHARE_WAIT"


def use(config_path: str | Path) -> None:
    """Every LLM that this process makes from now on runs with XShare as the YAML file `config_path` says, in
    all of its workers, or is refused.

    Raises ValueError for a file that is no configuration; RuntimeError where XShare would not reach the
    workers.
    """
    path = Path(config_path).resolve()
    _read_setting(path)
    _check_started_ranks(path)
    startup.check_hook()
    os.environ[startup.VARIABLE] = str(path)
    startup.install()


def _check_started_ranks(path: Path) -> None:
    """trtllm-llmapi-launch has started the ranks before this process, with the variables of its own start."""
    if "TLLM_SPAWN_PROXY_PROCESS" not in os.environ or os.environ.get(startup.VARIABLE) == str(path):
        return
    raise RuntimeError(
        f"XShare would not get into the ranks that trtllm-llmapi-launch has started already: export "
        f"{startup.VARIABLE}={path} before mpirun or srun starts it, on every host"
    )


def run_console_script(arguments: list[str]) -> None:
    """Runs the console script that the first argument names, with the rest of the arguments."""
    from importlib.metadata import entry_points

    found = list(entry_points(group="console_scripts", name=arguments[0]))
    if not found:
        raise SystemExit(f"{arguments[0]}: no such command in this Python environment")
    sys.argv = arguments
    sys.exit(found[0].load()())


def _read_setting(path: Path) -> dict[str, Any]:
    try:
        return Setting.from_yaml(path).to_dict()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _folder() -> RunFolder:
    return RunFolder(Path(os.environ[startup.VARIABLE]))


def _logger() -> Any:
    return import_module("tensorrt_llm.logger").logger


# ---- A process that loads a model -------------------------------------------------------------------------


def patch_model_engine(module: ModuleType) -> None:
    """XShare goes into every model that is loaded here, before it is warmed up and its CUDA graphs are
    captured. Draft models keep their own routing."""
    engine = _need(module, "PyTorchModelEngine")
    own = engine.__init__
    if startup.VARIABLE in os.environ:
        _folder().report(state="waiting")

    @wraps(own)
    def load_and_enable(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        if startup.VARIABLE in os.environ and not getattr(self, "is_draft_model", False):
            _enable(self, _folder())

    engine.__init__ = load_and_enable


def _enable(engine: Any, folder: RunFolder) -> None:
    from xshare_trtllm.trtllm.torch_backend import Enabled

    try:
        setting = Setting.from_yaml(folder.config_path)
        engine.xshare = Enabled(engine.model, setting.config, has_dial=True)
    except Exception as error:
        folder.report(state="failed", error=f"{type(error).__name__}: {error}")
        raise
    _follow(engine, setting, folder)


def _follow(engine: Any, setting: Setting, folder: RunFolder) -> None:
    """Acknowledges, turns the dial as the operator's file says, and reports what the layers count."""
    from xshare_trtllm.trtllm.dial import DialWatch
    from xshare_trtllm.trtllm.torch_rows import after_prepare
    from xshare_trtllm.trtllm.torch_statistics import Reporter

    (rank, world_size), logger = _rank(engine), _logger()
    watch = DialWatch(engine.xshare.dial, setting, folder, rank, logger.info)
    about = {
        "state": "on",
        "rank": rank,
        "world_size": world_size,
        "stage": int(getattr(getattr(engine, "mapping", None), "pp_rank", 0)),
        "layers": len(engine.xshare),
        "counted": engine.xshare.counted,
        "backends": engine.xshare.backends(),
        "config_hash": settings_hash(setting.to_dict()),
    }

    def report(statistics: dict[str, Any]) -> None:
        dial = {"setting": watch.setting.to_dict(), "generation": watch.generation, "refused": watch.refused}
        folder.report(**about, **dial, statistics=statistics)

    after_prepare(watch.step)
    Reporter(engine.xshare, report).start()
    logger.info(f"XShare {__version__}: rank {rank}, {len(engine.xshare)} MoE layers, {setting.to_dict()}")


def _rank(engine: Any) -> tuple[int, int]:
    mapping = getattr(engine, "mapping", None)
    return (0, 1) if mapping is None else (int(mapping.rank), int(mapping.world_size))


# ---- The parent -------------------------------------------------------------------------------------------


def patch_executor(module: ModuleType) -> None:
    """No LLM is handed out before all of its ranks have acknowledged."""
    executor = _need(module, "GenerationExecutor")
    own: Callable[..., Any] = _need(executor, "create")

    @wraps(own)
    def create_and_wait(*args: Any, **kwargs: Any) -> Any:
        if startup.VARIABLE not in os.environ:
            return own(*args, **kwargs)
        folder = _folder()
        values = _read_setting(folder.config_path)
        _check_arguments(kwargs.get("llm_args"))
        folder.begin(int(kwargs.get("model_world_size", 1)), settings_hash(values))
        made = own(*args, **kwargs)
        try:
            reports = folder.wait(float(os.environ.get(_WAIT_VARIABLE, WAIT_SECONDS)))
        except BaseException:
            made.shutdown()
            raise
        _logger().info(
            f"XShare {__version__}: on in all {len(reports)} ranks; xshare doctor --serving {os.getpid()}"
        )
        return made

    executor.create = staticmethod(create_and_wait)


def _check_arguments(llm_args: Any) -> None:
    """Refuses what would never acknowledge: other back ends, and Ray workers that somebody starts later, for
    reinforcement learning (executor/ray/executor.py)."""
    backend = getattr(llm_args, "backend", None)
    if backend not in (None, "pytorch"):
        raise RuntimeError(f"XShare: backend={backend} is not supported, it is in the PyTorch backend")
    placement = getattr(llm_args, "ray_placement_config", None)
    if getattr(placement, "defer_workers_init", False):
        raise RuntimeError(
            "XShare: ray_placement_config.defer_workers_init is not supported, nobody would wait for "
            "the workers"
        )


def patch_openai_server(module: ModuleType) -> None:
    """`GET /xshare` and `GET /xshare/metrics` beside the server's own routes."""
    server = _need(module, "OpenAIServer")
    own: Callable[[Any], None] = _need(server, "register_routes")

    @wraps(own)
    def register_routes(self: Any) -> None:
        own(self)
        self.app.add_api_route("/xshare", _folder().status, methods=["GET"])
        self.app.add_api_route("/xshare/metrics", _metrics, methods=["GET"])

    server.register_routes = register_routes


def _metrics() -> Any:
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from starlette.responses import Response  # type: ignore[import-not-found,unused-ignore]

    from xshare_trtllm.trtllm.metrics import registry

    return Response(generate_latest(registry(_folder())), media_type=CONTENT_TYPE_LATEST)


def _need(owner: Any, name: str) -> Any:
    """`owner.name`. Raises RuntimeError where this version of TensorRT-LLM does not have it."""
    found = getattr(owner, name, None)
    if found is None:
        where = getattr(owner, "__name__", owner)
        raise RuntimeError(
            f"XShare: {where}.{name} is not there, this version of TensorRT-LLM is not known, see "
            "xshare doctor"
        )
    return found
