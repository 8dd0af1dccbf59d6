"""Triton model repositories, complete: configuration, models, and a script that starts the server."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from shlex import quote
from typing import Any, Literal, get_args

from xshare_trtllm.config import MODES, RouterSpec, XShareConfig
from xshare_trtllm.serving import tensors
from xshare_trtllm.serving.contracts import CONTRACTS, CONTROL
from xshare_trtllm.serving.generation import Limits
from xshare_trtllm.serving.tensors import OPTIONS, TOKENS_TO_MODEL, TOKENS_TO_TEXT, Option, Tensor
from xshare_trtllm.serving.text import load_tokenizer, read_json, special_token
from xshare_trtllm.trtllm.setting import Setting

BackEnd = Literal["tensorrtllm", "trtllm-torch", "cpu"]
BACK_ENDS: tuple[str, ...] = get_args(BackEnd)
ENGINE_MODELS = ("ensemble", "preprocessing", "tensorrt_llm", "postprocessing")  # in the order of unloading
LAUNCH = "launch.sh"
SETTINGS = "settings.json"  # what `--set` said, for the next writing

XSHARE = "xshare.yaml"  # XShare's configuration, for TensorRT-LLM's workers
_LONGEST_TOKEN = 32  # bytes of text that one token of a prompt may stand for, before it is refused unread
_TEXT_INSTANCES = 1
_WARM_UP = {"text_input": "The", "max_tokens": 4}  # a request of Triton's own, before the model is ready


@dataclass(frozen=True, slots=True)
class Repository:
    """What to write.

    back_end   `tensorrtllm` (an engine folder, TensorRT-LLM's C++ back end), `trtllm-torch` (a Hugging Face
               folder, its LLM API) or `cpu` (the shipped model, or a folder like it)
    engine     the folder that the model is in
    tokenizer  the folder with tokenizer.json and tokenizer_config.json; `trtllm-torch` takes the model's own
    config     what XShare may do; None: the model's own routing. An engine has it inside
    mode       `on`, `shadow` (the model's own routing, counted as XShare's would be) or `off`, at the start
    limits     of `cpu` and `trtllm-torch`; max_batch_size and max_queue_size of all
    contract   of `CONTRACTS`, what clients call the text model and its inputs; `tensorrtllm` has the old one
    streaming  decoupled models: a request may ask for a stream. Without it, plain `infer` calls work
    control    requests may turn XShare's dial (`cpu`, `trtllm-torch`)
    ep_size    GPUs that the experts are spread over: budgets and statistics per GPU on `cpu`,
               moe_expert_parallel_size on `trtllm-torch`
    tp_size    GPUs of `trtllm-torch`
    plugin     libnvinfer_plugin_xshare.so, for `tensorrtllm`
    settings   parameters of the C++ back end (`tensorrtllm`), or arguments of LLM by dotted names
               (`trtllm-torch`), over those of the repository that is replaced
    """

    back_end: str
    engine: Path
    tokenizer: Path
    config: XShareConfig | None = None
    mode: str = "on"
    limits: Limits = field(default_factory=Limits)
    contract: str = "llmapi"
    streaming: bool = True
    control: bool = False
    ep_size: int = 1
    tp_size: int = 1
    plugin: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def setting(self) -> Setting | None:
        """What the text model starts with."""
        return None if self.config is None else Setting(self.config, self.mode)

    @property
    def models(self) -> tuple[str, ...]:
        """The models' names, in the order of unloading."""
        return ENGINE_MODELS if self.back_end == "tensorrtllm" else (CONTRACTS[self.contract].model,)


def write_repository(repository: Repository, path: Path) -> None:
    """Write it to the folder `path`, which is there whole afterwards, or not at all. One that is there
    already is replaced if `write_repository` wrote it; its `settings` are kept where new ones do not say
    otherwise.

    Raises ValueError, in the user's words, for an engine, tokenizer, plugin or configuration that does not
    fit, and for a folder that holds something else; ImportError where `tritonclient[grpc]` is missing.
    """
    if path.exists() and any(path.iterdir()) and not (path / LAUNCH).is_file():
        raise ValueError(f"{path}: holds files that this command did not write; choose another folder")
    kept = read_json(path / SETTINGS) if (path / SETTINGS).is_file() else {}
    if kept.pop("back_end", "") == repository.back_end:
        repository = replace(repository, settings={**kept, **repository.settings})
    _check(repository)
    with _folder_aside(path) as aside:
        for config in _configurations(repository):
            _write_model(aside, config)
        if repository.back_end != "tensorrtllm":
            _write_text_model(aside / repository.models[0], repository)
        settings = {"back_end": repository.back_end, **repository.settings}
        (aside / SETTINGS).write_text(json.dumps(settings, indent=2), encoding="utf-8")
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
    if repository.contract not in CONTRACTS:
        raise ValueError(f"contract {repository.contract!r}: must be one of {', '.join(CONTRACTS)}")
    if not (repository.engine / "config.json").is_file():
        raise ValueError(f"{repository.engine}: has no config.json")
    _check_dial(repository)
    if repository.settings and repository.back_end == "cpu":
        raise ValueError(f"{next(iter(repository.settings))}: the back end cpu has no such settings")
    if repository.back_end != "tensorrtllm":
        _check_config(repository)
        return
    _engine_ranks(repository.engine)
    if "accumulate_tokens" in repository.settings:
        raise ValueError(
            "accumulate_tokens: an engine's stream holds what is new, in an ensemble nobody keeps the rest; "
            "for the text so far: --backend trtllm-torch"
        )
    if repository.config is not None:
        raise ValueError("an engine has its budget inside: give the budget to `trtllm-build`")
    if repository.plugin is None or not repository.plugin.is_file():
        raise ValueError(f"plugin library {repository.plugin}: is not there; build it, or name it")


def _check_dial(repository: Repository) -> None:
    """`mode` and `control`."""
    if repository.mode not in MODES:
        raise ValueError(f"mode {repository.mode!r}: must be one of {', '.join(MODES)}")
    if repository.mode == "on" and not repository.control:
        return
    asked = "control" if repository.mode == "on" else "mode"
    if repository.back_end == "tensorrtllm":
        raise ValueError(f"{asked}: is not for an engine, which has its budget inside")
    if repository.config is None and (repository.back_end != "cpu" or asked == "mode"):
        raise ValueError(f"{asked}: needs a configuration, such as a coverage")


def _check_config(repository: Repository) -> None:
    """The configuration against the model's router and its number of MoE layers."""
    model = read_json(repository.engine / "config.json")
    spec = RouterSpec.from_hf_config(model)
    config = repository.config
    if config is None:
        return
    config.check(spec)
    layers = _moe_layers(model)
    if isinstance(config.budget, tuple) and len(config.budget) != layers:
        raise ValueError(
            f"XShareConfig(budget=): names {len(config.budget)} layers, the model has {layers} MoE layers"
        )


def _moe_layers(model: Mapping[str, Any]) -> int:
    """By the names of Qwen's and DeepSeek's configurations; elsewhere every layer is one."""
    first, step = model.get("first_k_dense_replace", 0), model.get("decoder_sparse_step") or 1
    dense = model.get("mlp_only_layers") or ()
    layers = range(first, model["num_hidden_layers"])
    return sum(layer not in dense and (layer + 1) % step == 0 for layer in layers)


def _engine_config(engine: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """`pretrained_config` and `build_config` of an engine folder."""
    values = read_json(engine / "config.json")
    try:
        return values["pretrained_config"], values["build_config"]
    except KeyError as error:
        raise ValueError(f"{engine}: config.json is not that of a TensorRT-LLM engine ({error})") from None


def _engine_ranks(engine: Path) -> int:
    """The ranks of an engine folder. Raises ValueError where a file is missing."""
    try:
        ranks = int(_engine_config(engine)[0]["mapping"]["world_size"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{engine}: config.json is not that of a TensorRT-LLM engine ({error})") from None
    missing = [f"rank{rank}.engine" for rank in range(ranks) if not (engine / f"rank{rank}.engine").is_file()]
    if missing:
        raise ValueError(f"{engine}: has no {missing[0]}")
    return ranks


def _write_model(repository: Path, config: Any) -> None:
    text_format = import_module("google.protobuf.text_format")
    version = repository / config.name / "1"
    version.mkdir(parents=True)
    text = text_format.MessageToString(config)
    (repository / config.name / "config.pbtxt").write_text(text, encoding="utf-8")
    if config.backend == "python":
        module = "text_to_text" if "contract" in config.parameters else config.name
        line = f"from xshare_trtllm.serving.models.{module} import TritonPythonModel as TritonPythonModel\n"
        (version / "model.py").write_text(line, encoding="utf-8")
    else:
        (version / ".keep").touch()


def _write_text_model(folder: Path, repository: Repository) -> None:
    """What the text model needs beside its configuration: the data of its first request, LLM's arguments,
    XShare's options."""
    warm_up = folder / "warmup"
    warm_up.mkdir()
    for name, value in _WARM_UP.items():
        data = value.encode() if isinstance(value, str) else b""
        raw = struct.pack("<I", len(data)) + data if isinstance(value, str) else struct.pack("<i", value)
        (warm_up / name).write_bytes(raw)
    if repository.back_end == "trtllm-torch":
        import yaml  # type: ignore[import-untyped,unused-ignore]

        text = yaml.safe_dump(_llm_arguments(repository), sort_keys=False)
        (folder / "1" / "model.yaml").write_text(text, encoding="utf-8")
        if repository.setting is not None:
            repository.setting.to_yaml(folder / "1" / XSHARE)


def _llm_arguments(repository: Repository) -> dict[str, Any]:
    """The arguments of TensorRT-LLM's LLM: ours, then those of `settings`, each at its dotted name."""
    arguments: dict[str, Any] = {
        "model": str(repository.engine.resolve()),
        "tensor_parallel_size": repository.tp_size,
        "moe_expert_parallel_size": repository.ep_size,
        "max_batch_size": repository.limits.max_batch_size,
    }
    for name, value in repository.settings.items():
        *parents, last = name.split(".")
        place = arguments
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ValueError(f"{name}: {parent} is a value, not a group of them")
        place[last] = value
    return arguments


def _configurations(repository: Repository) -> Iterator[Any]:
    if repository.back_end != "tensorrtllm":
        yield _text_model(repository)
        return
    yield _ensemble(repository)
    yield _preprocessing(repository)
    yield _engine_model(repository)
    yield _postprocessing(repository)


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
    end, pad = (special_token(repository.tokenizer, f"{name}_token") for name in ("eos", "pad"))
    inputs = [
        Tensor(option.to_text, option.tensor.type, option.tensor.dims, option.tensor.optional)
        for option in OPTIONS
        if option.to_text
    ]
    parameters = {
        "tokenizer_dir": str(repository.tokenizer.resolve()),
        "end_id": str(-1 if end is None else end),
        "pad_id": str(next((token for token in (pad, end) if token is not None), -1)),
        "max_input_bytes": str(_longest_prompt(repository) * _LONGEST_TOKEN),
    }
    outputs = tensors.PREPROCESSING_OUTPUTS
    config = _on_cpu(_configuration(repository, "preprocessing", inputs, outputs, parameters))
    config.dynamic_batching.default_queue_policy.max_queue_size = repository.limits.max_queue_size
    return config


def _longest_prompt(repository: Repository) -> int:
    """Tokens that the engine was built for."""
    try:
        return int(_engine_config(repository.engine)[1]["max_input_len"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{repository.engine}: config.json has no max_input_len ({error})") from None


def _text_model(repository: Repository) -> Any:
    """Text in, text out, in one model."""
    contract = CONTRACTS[repository.contract]
    inputs = [*contract.inputs.values(), *(CONTROL if repository.control else ())]
    parameters = {
        "back_end": repository.back_end,
        "contract": repository.contract,
        "settings": json.dumps(_text_settings(repository)),
    }
    config = _configuration(repository, contract.model, inputs, contract.outputs, parameters)
    if not contract.is_batched:
        config.max_batch_size = 0
    config.model_transaction_policy.decoupled = repository.streaming
    warm_up = config.model_warmup.add(name="first request", batch_size=1)
    for name in _WARM_UP:
        described = warm_up.inputs[contract.name(name)]
        described.data_type = config.input[list(contract.inputs).index(name)].data_type
        described.dims.append(1)
        described.input_data_file = name
    return _on_cpu(config)


def _text_settings(repository: Repository) -> dict[str, Any]:
    """What the text model's engine reads."""
    settings: dict[str, Any] = {
        "limits": asdict(repository.limits),
        "setting": None if repository.setting is None else repository.setting.to_dict(),
    }
    if repository.back_end == "trtllm-torch":
        settings["end_id"] = special_token(repository.tokenizer, "eos_token")
        return settings
    load_tokenizer(repository.tokenizer)
    return settings | {
        "model": str(repository.engine.resolve()),
        "ep_size": repository.ep_size,
        "tokenizer": str(repository.tokenizer.resolve()),
        "first_id": special_token(repository.tokenizer, "bos_token"),
        "end_id": special_token(repository.tokenizer, "eos_token"),
    }


def _engine_model(repository: Repository) -> Any:
    """TensorRT-LLM's C++ back end, from tokens to tokens."""
    is_guided = bool(repository.settings.get("guided_decoding_backend"))
    own = {tensor.name for tensor in tensors.MODEL_INPUTS}
    inputs = [
        *tensors.MODEL_INPUTS,
        *(
            Tensor(o.to_model, o.tensor.type, o.tensor.dims, True, o.tensor.scalar, o.tensor.ragged)
            for o in _options(is_guided)
            if o.to_model and o.to_model not in own
        ),
    ]
    parameters = _engine_parameters(repository)
    config = _configuration(
        repository, "tensorrt_llm", inputs, tensors.MODEL_OUTPUTS, parameters, in_model=True
    )
    config.model_transaction_policy.decoupled = repository.streaming
    config.dynamic_batching.default_queue_policy.max_queue_size = repository.limits.max_queue_size
    return _on_cpu(config, "tensorrtllm")


def _options(is_guided: bool) -> list[Option]:
    """Guided decoding is there where the engine's back end has been told how."""
    return [option for option in OPTIONS if is_guided or not option.tensor.name.startswith("guided_")]


def _engine_parameters(repository: Repository) -> dict[str, str]:
    """What TensorRT-LLM's C++ back end reads; the rest is left to its defaults. It does not load where the
    two of guided decoding are missing, even if they are empty."""
    return {
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": str(repository.engine.resolve()),
        "tokenizer_dir": str(repository.tokenizer.resolve()),
        "exclude_input_in_output": "true",
        "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
        "executor_worker_path": "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker",
        "guided_decoding_backend": "",
        "xgrammar_tokenizer_info_path": "",
        **{name: _as_text(value) for name, value in repository.settings.items()},
    }


def _as_text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _postprocessing(repository: Repository) -> Any:
    parameters = {"tokenizer_dir": str(repository.tokenizer.resolve()), "skip_special_tokens": "true"}
    inputs, outputs = tensors.POSTPROCESSING_INPUTS, tensors.POSTPROCESSING_OUTPUTS
    config = _on_cpu(_configuration(repository, "postprocessing", inputs, outputs, parameters))
    config.dynamic_batching.SetInParent()
    return config


def _ensemble(repository: Repository) -> Any:
    options = _options(bool(repository.settings.get("guided_decoding_backend")))
    passed_on = [tensor for tensor in tensors.MODEL_OUTPUTS if tensor.name not in TOKENS_TO_TEXT]
    inputs = [option.tensor for option in options]
    config = _configuration(repository, "ensemble", inputs, (*tensors.TEXT_OUTPUTS, *passed_on))
    config.platform = "ensemble"
    to_text = {option.to_text: option.tensor.name for option in options if option.to_text}
    to_model = {option.to_model: option.tensor.name for option in options if option.to_model}
    _step(config, "preprocessing", to_text, {name: f"_{name}" for name in TOKENS_TO_MODEL})
    to_model |= {name: f"_{token}" for token, name in TOKENS_TO_MODEL.items()}
    tokens = {name: f"_{text}" for name, text in TOKENS_TO_TEXT.items()}
    _step(config, "tensorrt_llm", to_model, tokens | {tensor.name: tensor.name for tensor in passed_on})
    texts = {text: f"_{text}" for text in TOKENS_TO_TEXT.values()}
    _step(config, "postprocessing", texts, {"OUTPUT": "text_output"})
    return config


def _step(config: Any, model: str, inputs: dict[str, str], outputs: dict[str, str]) -> None:
    step = config.ensemble_scheduling.step.add(model_name=model, model_version=-1)
    step.input_map.update(inputs)
    step.output_map.update(outputs)


def launch_script(repository: Repository) -> str:
    """The shell script that starts the server on the folder that it lies in. Needs `tritonserver` on PATH."""
    ranks = _engine_ranks(repository.engine) if repository.back_end == "tensorrtllm" else 1
    lines = [_HEAD]
    if repository.back_end == "tensorrtllm":
        lines.append(_PRELOAD.format(plugin=quote(str(repository.plugin and repository.plugin.resolve()))))
    lines.append(_SERVER)
    if repository.back_end == "tensorrtllm":
        lines.append(_PRELOADED)
    if ranks > 1:
        lines.append(_MPI.format(others=ranks - 1))
    lines.append(_SUPERVISE.format(models=" ".join(repository.models)))
    return "\n".join(lines)


_HEAD = """\
#!/usr/bin/env bash
# Starts Triton on this model repository; arguments go to tritonserver. ADDRESS=0.0.0.0 serves other machines,
# without it only this one; HTTP_PORT, GRPC_PORT and METRICS_PORT are the ports. SIGTERM: no new requests,
# those that run end, within DRAIN_SECONDS (60). A dead model is restarted, RESTARTS (5) times in 10 minutes.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
address=${ADDRESS:-127.0.0.1}
"""

_PRELOAD = """\
# XShare's TensorRT plugin has to be in the process before the engine is loaded.
preload={plugin}${{LD_PRELOAD:+:$LD_PRELOAD}}
"""

_SERVER = """\
server=(
    tritonserver --model-repository "$repository" --disable-auto-complete-config @control
    --http-address "$address" --http-port "${HTTP_PORT:-8000}"
    --grpc-address "$address" --grpc-port "${GRPC_PORT:-8001}"
    --metrics-address "$address" --metrics-port "${METRICS_PORT:-8002}"
    "$@"
)
"""

_PRELOADED = """\
server=(env "LD_PRELOAD=$preload" "${server[@]}")
"""

_MPI = """\
# One process per rank; the first one serves, the others only run their part of the model.
others=(
    env "LD_PRELOAD=$preload" tritonserver --model-repository "$repository" --disable-auto-complete-config
    --model-control-mode explicit --load-model tensorrt_llm
    --allow-http false --allow-grpc false --allow-metrics false
)
server=(mpirun --allow-run-as-root -n 1 "${{server[@]}}" : -n {others} "${{others[@]}}")
"""

_SUPERVISE = """\
here=$address
[ "$here" != 0.0.0.0 ] || here=127.0.0.1
exec python3 -m xshare_trtllm.serving.supervise "$here:${{HTTP_PORT:-8000}}" {models} -- "${{server[@]}}"
"""
