"""Triton model repositories, complete: configuration, models, and a script that starts the server."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from shlex import quote
from typing import Any, Literal, get_args

from xshare_trtllm.config import XShareConfig
from xshare_trtllm.serving import tensors
from xshare_trtllm.serving.generation import Limits
from xshare_trtllm.serving.tensors import OPTIONS, TOKENS_TO_MODEL, TOKENS_TO_TEXT, Tensor
from xshare_trtllm.serving.text import special_token

BackEnd = Literal["tensorrtllm", "trtllm-torch", "cpu"]
BACK_ENDS: tuple[str, ...] = get_args(BackEnd)
MODELS = ("preprocessing", "tensorrt_llm", "postprocessing", "ensemble", "tensorrt_llm_bls")
LAUNCH = "launch.sh"

_OPTIONS_MODULE = "xshare_options"  # the package with XShare's configuration, for TensorRT-LLM's workers
_LONGEST_TOKEN = 32  # bytes of text that one token of a prompt may stand for, before it is refused unread
_TEXT_INSTANCES = 1


@dataclass(frozen=True, slots=True)
class Repository:
    """What to write.

    back_end   `tensorrtllm` (an engine folder, TensorRT-LLM's C++ back end), `trtllm-torch` (a Hugging Face
               folder, its LLM API) or `cpu` (the shipped model, or a folder like it)
    engine     the folder that the model is in
    tokenizer  the folder with tokenizer.json and tokenizer_config.json
    config     what XShare may do; None: the model's own routing. An engine has it inside
    limits     of `cpu` and `trtllm-torch`; max_batch_size of all
    streaming  decoupled models: a request may ask for a stream. Without it, plain `infer` calls work
    ep_size    GPUs that the experts are spread over: budgets and statistics per GPU on `cpu`,
               moe_expert_parallel_size on `trtllm-torch`
    tp_size    GPUs of `trtllm-torch`
    plugin     libnvinfer_plugin_xshare.so, for `tensorrtllm`
    """

    back_end: str
    engine: Path
    tokenizer: Path
    config: XShareConfig | None = None
    limits: Limits = field(default_factory=Limits)
    streaming: bool = True
    ep_size: int = 1
    tp_size: int = 1
    plugin: Path | None = None


def write_repository(repository: Repository, path: Path) -> None:
    """Write it to the folder `path`, which is there whole afterwards, or not at all. One that is there
    already is replaced if `write_repository` wrote it.

    Raises ValueError, in the user's words, for an engine, tokenizer or plugin that is not one, and for a
    folder that holds something else; ImportError where `tritonclient[grpc]` is missing.
    """
    _check(repository)
    if path.exists() and any(path.iterdir()) and not (path / LAUNCH).is_file():
        raise ValueError(f"{path}: holds files that this command did not write; choose another folder")
    with _folder_aside(path) as aside:
        for name, config in _configurations(repository).items():
            _write_model(aside, name, config)
        if repository.back_end == "trtllm-torch" and repository.config is not None:
            from xshare_trtllm.trtllm import write_options

            write_options(aside / "tensorrt_llm" / "1" / _OPTIONS_MODULE, repository.config)
        script = aside / LAUNCH
        script.write_text(launch_script(repository), encoding="utf-8")
        script.chmod(0o755)


@contextmanager
def _folder_aside(path: Path) -> Iterator[Path]:
    """A folder beside `path` to write to; renamed to `path` if the block succeeds, removed if it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        aside.chmod(0o755)
        yield aside
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            os.replace(path, old)
            shutil.rmtree(old)
        os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check(repository: Repository) -> None:
    if repository.back_end not in BACK_ENDS:
        raise ValueError(f"back end {repository.back_end!r}: must be one of {', '.join(BACK_ENDS)}")
    if not (repository.engine / "config.json").is_file():
        raise ValueError(f"{repository.engine}: has no config.json")
    if repository.back_end == "tensorrtllm":
        _engine_ranks(repository.engine)
        if repository.config is not None:
            raise ValueError("an engine has its budget inside: give the budget to `trtllm-build`")
        if repository.plugin is None or not repository.plugin.is_file():
            raise ValueError(f"plugin library {repository.plugin}: is not there; build it, or name it")


def _engine_ranks(engine: Path) -> int:
    """The ranks of an engine folder. Raises ValueError where a file is missing."""
    values = json.loads((engine / "config.json").read_text(encoding="utf-8"))
    try:
        ranks = int(values["pretrained_config"]["mapping"]["world_size"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{engine}: config.json is not that of a TensorRT-LLM engine ({error})") from None
    missing = [f"rank{rank}.engine" for rank in range(ranks) if not (engine / f"rank{rank}.engine").is_file()]
    if missing:
        raise ValueError(f"{engine}: has no {missing[0]}")
    return ranks


def _write_model(repository: Path, name: str, config: Any) -> None:
    text_format = import_module("google.protobuf.text_format")
    version = repository / name / "1"
    version.mkdir(parents=True)
    text = text_format.MessageToString(config)
    (repository / name / "config.pbtxt").write_text(text, encoding="utf-8")
    if config.backend == "python":
        line = f"from xshare_trtllm.serving.models.{name} import TritonPythonModel as TritonPythonModel\n"
        (version / "model.py").write_text(line, encoding="utf-8")
    else:
        (version / ".keep").touch()


def _configurations(repository: Repository) -> dict[str, Any]:
    configurations = (
        _preprocessing(repository),
        _model(repository),
        _postprocessing(repository),
        _ensemble(repository),
        _bls(repository),
    )
    return {config.name: config for config in configurations}


def _configuration(
    repository: Repository,
    name: str,
    inputs: Iterable[Tensor],
    outputs: Iterable[Tensor],
    parameters: Mapping[str, str] | None = None,
    *,
    in_model: bool = False,
) -> Any:
    """A ModelConfig. `in_model`: scalars have the shape []."""
    try:
        schema = import_module("tritonclient.grpc.model_config_pb2")
    except ImportError as error:
        raise ImportError(f"{error}. This needs: pip install 'xshare-trtllm[serve]'") from error
    config = schema.ModelConfig(name=name, max_batch_size=repository.limits.max_batch_size)
    for tensor in inputs:
        described = config.input.add(
            name=tensor.name,
            data_type=schema.DataType.Value(tensor.type),
            dims=tensor.dims,
            optional=tensor.optional,
            allow_ragged_batch=tensor.ragged and in_model,
        )
        if tensor.scalar and in_model:
            described.reshape.SetInParent()  # to []
    for tensor in outputs:
        config.output.add(name=tensor.name, data_type=schema.DataType.Value(tensor.type), dims=tensor.dims)
    for key, value in (parameters or {}).items():
        config.parameters[key].string_value = value
    return config


def _on_cpu(config: Any, backend: str = "python") -> Any:
    config.backend = backend
    kind = import_module("tritonclient.grpc.model_config_pb2").ModelInstanceGroup.Kind.KIND_CPU
    config.instance_group.add(count=_TEXT_INSTANCES, kind=kind)
    return config


def _preprocessing(repository: Repository) -> Any:
    is_ours = repository.back_end == "cpu"
    ids = {
        name: -1 if token is None else token
        for name in ("bos", "eos", "pad")
        for token in [special_token(repository.tokenizer, f"{name}_token")]
    }
    inputs = [
        Tensor(option.to_text, option.tensor.type, option.tensor.dims, option.tensor.optional)
        for option in OPTIONS
        if option.to_text
    ]
    parameters = {
        "tokenizer_dir": str(repository.tokenizer.resolve()),
        "add_special_tokens": "true",
        "first_id": str(ids["bos"] if is_ours else -1),
        "end_id": str(ids["eos"]),
        "pad_id": str(ids["pad"] if ids["pad"] >= 0 else ids["eos"]),
        "max_input_bytes": str(repository.limits.max_input_len * _LONGEST_TOKEN),
    }
    outputs = tensors.PREPROCESSING_OUTPUTS
    config = _on_cpu(_configuration(repository, "preprocessing", inputs, outputs, parameters))
    config.dynamic_batching.SetInParent()
    return config


def _model(repository: Repository) -> Any:
    own = {tensor.name for tensor in tensors.MODEL_INPUTS}
    inputs = [
        *tensors.MODEL_INPUTS,
        *(
            Tensor(o.to_model, o.tensor.type, o.tensor.dims, True, o.tensor.scalar, o.tensor.ragged)
            for o in OPTIONS
            if o.to_model and o.to_model not in own
        ),
    ]
    is_engine = repository.back_end == "tensorrtllm"
    parameters = _engine_parameters(repository) if is_engine else _engine_settings(repository)
    config = _configuration(
        repository, "tensorrt_llm", inputs, tensors.MODEL_OUTPUTS, parameters, in_model=True
    )
    config.model_transaction_policy.decoupled = repository.streaming
    config.dynamic_batching.SetInParent()
    return _on_cpu(config, "tensorrtllm" if is_engine else "python")


def _engine_parameters(repository: Repository) -> dict[str, str]:
    """What TensorRT-LLM's C++ back end reads; the rest is left to its defaults."""
    return {
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": str(repository.engine.resolve()),
        "tokenizer_dir": str(repository.tokenizer.resolve()),
        "exclude_input_in_output": "true",
        "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
        "executor_worker_path": "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker",
    }


def _engine_settings(repository: Repository) -> dict[str, str]:
    """What our own `tensorrt_llm` model reads."""
    settings: dict[str, Any] = {
        "model": str(repository.engine.resolve()),
        "limits": asdict(repository.limits),
    }
    if repository.back_end == "cpu":
        settings["config"] = None if repository.config is None else repository.config.to_dict()
        settings["ep_size"] = repository.ep_size
    else:
        sizes = {"tensor_parallel_size": repository.tp_size, "moe_expert_parallel_size": repository.ep_size}
        settings["llm"] = sizes
        settings["options_module"] = None if repository.config is None else _OPTIONS_MODULE
    return {
        "back_end": repository.back_end,
        "settings": json.dumps(settings),
        "tokenizer_dir": str(repository.tokenizer.resolve()),
        "exclude_input_in_output": "true",
    }


def _postprocessing(repository: Repository) -> Any:
    parameters = {"tokenizer_dir": str(repository.tokenizer.resolve()), "skip_special_tokens": "true"}
    inputs, outputs = tensors.POSTPROCESSING_INPUTS, tensors.POSTPROCESSING_OUTPUTS
    config = _on_cpu(_configuration(repository, "postprocessing", inputs, outputs, parameters))
    config.dynamic_batching.SetInParent()
    return config


def _ensemble(repository: Repository) -> Any:
    inputs = [option.tensor for option in OPTIONS]
    config = _configuration(repository, "ensemble", inputs, tensors.TEXT_OUTPUTS)
    config.platform = "ensemble"
    to_text = {option.to_text: option.tensor.name for option in OPTIONS if option.to_text}
    to_model = {option.to_model: option.tensor.name for option in OPTIONS if option.to_model}
    _step(config, "preprocessing", to_text, {name: f"_{name}" for name in TOKENS_TO_MODEL})
    to_model |= {name: f"_{token}" for token, name in TOKENS_TO_MODEL.items()}
    _step(config, "tensorrt_llm", to_model, {name: f"_{text}" for name, text in TOKENS_TO_TEXT.items()})
    _step(
        config,
        "postprocessing",
        {text: f"_{text}" for text in TOKENS_TO_TEXT.values()},
        {"OUTPUT": "text_output"},
    )
    return config


def _step(config: Any, model: str, inputs: dict[str, str], outputs: dict[str, str]) -> None:
    step = config.ensemble_scheduling.step.add(model_name=model, model_version=-1)
    step.input_map.update(inputs)
    step.output_map.update(outputs)


def _bls(repository: Repository) -> Any:
    limits = repository.limits
    parameters = {
        "tensorrt_llm_model_name": "tensorrt_llm",
        "max_requests": str(limits.max_batch_size + limits.max_queue_size),
    }
    inputs = [option.tensor for option in OPTIONS]
    config = _configuration(repository, "tensorrt_llm_bls", inputs, tensors.TEXT_OUTPUTS, parameters)
    config.model_transaction_policy.decoupled = repository.streaming
    return _on_cpu(config)


def launch_script(repository: Repository) -> str:
    """The shell script that starts the server on the folder that it lies in. Needs `tritonserver` on PATH."""
    ranks = _engine_ranks(repository.engine) if repository.back_end == "tensorrtllm" else 1
    lines = [_HEAD]
    if repository.back_end == "tensorrtllm":
        lines.append(_PRELOAD.format(plugin=quote(str(repository.plugin and repository.plugin.resolve()))))
    if repository.back_end == "trtllm-torch":
        lines.append(_PYTHONPATH)
    lines.append(_SERVER)
    lines.append('exec "${server[@]}" "$@"\n' if ranks == 1 else _MPI.format(others=ranks - 1))
    return "\n".join(lines)


_HEAD = """\
#!/usr/bin/env bash
# Starts Triton on this model repository; arguments go to tritonserver. ADDRESS=0.0.0.0 serves other machines,
# without it only this one; HTTP_PORT, GRPC_PORT and METRICS_PORT are the ports.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
address=${ADDRESS:-127.0.0.1}
"""

_PRELOAD = """\
# XShare's TensorRT plugin has to be in the process before the engine is loaded.
export LD_PRELOAD={plugin}${{LD_PRELOAD:+:$LD_PRELOAD}}
"""

_PYTHONPATH = """\
# TensorRT-LLM's worker processes read XShare's configuration from a package in this folder.
export PYTHONPATH=$repository/tensorrt_llm/1${PYTHONPATH:+:$PYTHONPATH}
"""

_SERVER = """\
server=(
    tritonserver --model-repository "$repository" --disable-auto-complete-config
    --http-address "$address" --http-port "${HTTP_PORT:-8000}"
    --grpc-address "$address" --grpc-port "${GRPC_PORT:-8001}"
    --metrics-address "$address" --metrics-port "${METRICS_PORT:-8002}"
)
"""

_MPI = """\
# One process per rank; the first one serves, the others only run their part of the model.
others=(
    tritonserver --model-repository "$repository" --disable-auto-complete-config
    --model-control-mode explicit --load-model tensorrt_llm
    --allow-http false --allow-grpc false --allow-metrics false
)
exec mpirun --allow-run-as-root -n 1 "${{server[@]}}" "$@" : -n {others} "${{others[@]}}"
"""
