"""The files of a model repository: parsed back with Triton's own schema, started with a stand-in for the
server that only says how it was called."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from xshare_trtllm import XShareConfig
from xshare_trtllm.cli import main
from xshare_trtllm.evaluation import MODEL_DIR
from xshare_trtllm.serving import repository as module
from xshare_trtllm.serving.repository import BACK_ENDS, MODELS, Repository, launch_script, write_repository

schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs tritonclient[grpc]")
text_format = pytest.importorskip("google.protobuf.text_format")


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    folder = tmp_path / "the engine"
    folder.mkdir()
    config = {"pretrained_config": {"mapping": {"world_size": 2}}, "build_config": {}}
    (folder / "config.json").write_text(json.dumps(config))
    for rank in range(2):
        (folder / f"rank{rank}.engine").touch()
    return folder


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    library = tmp_path / "libnvinfer_plugin_xshare.so"
    library.touch()
    return library


@pytest.fixture(params=BACK_ENDS)
def repository(request: pytest.FixtureRequest, engine: Path, plugin: Path) -> Repository:
    if request.param == "tensorrtllm":
        return Repository(request.param, engine, MODEL_DIR, plugin=plugin)
    return Repository(request.param, MODEL_DIR, MODEL_DIR, XShareConfig(24, warmup=2), ep_size=8, tp_size=8)


def read(path: Path) -> dict[str, Any]:
    return {
        name: text_format.Parse((path / name / "config.pbtxt").read_text(), schema.ModelConfig())
        for name in MODELS
    }


def tensors(described: Any) -> dict[str, tuple[int, tuple[int, ...]]]:
    return {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in described}


def test_the_models_fit_together(repository: Repository, tmp_path: Path) -> None:
    """Every tensor that the ensemble moves is an input and an output of the same type, and nothing that a
    model needs is left out."""
    write_repository(repository, tmp_path / "repo")
    configs = read(tmp_path / "repo")
    ensemble = configs["ensemble"]
    known = {name: kind for name, (kind, _) in tensors(ensemble.input).items()}
    for step in ensemble.ensemble_scheduling.step:
        model = configs[step.model_name]
        inputs, outputs = tensors(model.input), tensors(model.output)
        for name, source in step.input_map.items():
            assert inputs[name][0] == known[source], (step.model_name, name)
        assert {tensor.name for tensor in model.input if not tensor.optional} <= set(step.input_map)
        for name, target in step.output_map.items():
            known[target] = outputs[name][0]
    assert all(known[name] == kind for name, (kind, _) in tensors(ensemble.output).items())
    used = {source for step in ensemble.ensemble_scheduling.step for source in step.input_map.values()}
    assert set(tensors(ensemble.input)) <= used
    assert tensors(ensemble.input) == tensors(configs["tensorrt_llm_bls"].input)
    assert tensors(ensemble.output) == tensors(configs["tensorrt_llm_bls"].output)


def test_the_three_back_ends_look_the_same_to_a_client(engine: Path, plugin: Path, tmp_path: Path) -> None:
    looks = []
    for back_end in BACK_ENDS:
        folder = engine if back_end == "tensorrtllm" else MODEL_DIR
        write_repository(Repository(back_end, folder, MODEL_DIR, plugin=plugin), tmp_path / back_end)
        configs = read(tmp_path / back_end)
        looks.append({name: (tensors(c.input), tensors(c.output)) for name, c in configs.items()})
        assert all(
            configs[name].model_transaction_policy.decoupled for name in ("tensorrt_llm", "tensorrt_llm_bls")
        )
    assert looks[0] == looks[1] == looks[2]


def test_contract_tensors_of_tensorrt_llms_examples(tmp_path: Path) -> None:
    """NVIDIA/TensorRT-LLM, triton_backend/all_models/inflight_batcher_llm/ensemble/config.pbtxt at 2a9abd95:
    names, types and shapes that clients use."""
    write_repository(Repository("cpu", MODEL_DIR, MODEL_DIR), tmp_path / "repo")
    configs, kind = read(tmp_path / "repo"), schema.DataType.Value
    inputs = tensors(configs["ensemble"].input)
    expected = {
        "TYPE_STRING": {"text_input": 1, "decoder_text_input": 1, "bad_words": -1, "stop_words": -1},
        "TYPE_INT32": dict.fromkeys(
            ("max_tokens", "end_id", "pad_id", "top_k", "min_tokens", "beam_width"), 1
        ),
        "TYPE_FP32": dict.fromkeys(
            ("top_p", "temperature", "length_penalty", "repetition_penalty", "presence_penalty"), 1
        ),
        "TYPE_BOOL": dict.fromkeys(("stream", "exclude_input_in_output", "return_log_probs"), 1),
        "TYPE_UINT64": {"seed": 1, "lora_task_id": 1},
    }
    for type_name, names in expected.items():
        for name, dim in names.items():
            assert inputs[name] == (kind(type_name), (dim,)), name
    needed = {tensor.name for tensor in configs["ensemble"].input if not tensor.optional}
    assert needed == {"text_input", "max_tokens"}
    assert tensors(configs["ensemble"].output) == {"text_output": (kind("TYPE_STRING"), (-1,))}
    model = tensors(configs["tensorrt_llm"].input)
    for name in (
        "input_ids",
        "input_lengths",
        "request_output_len",
        "runtime_top_k",
        "streaming",
        "len_penalty",
    ):
        assert name in model
    outputs = tensors(configs["tensorrt_llm"].output)
    assert outputs["output_ids"] == (kind("TYPE_INT32"), (-1, -1))
    assert outputs["sequence_length"] == (kind("TYPE_INT32"), (-1,))


def test_parameters_of_the_back_ends(engine: Path, plugin: Path, tmp_path: Path) -> None:
    write_repository(Repository("tensorrtllm", engine, MODEL_DIR, plugin=plugin), tmp_path / "a")
    model = read(tmp_path / "a")["tensorrt_llm"]
    assert model.backend == "tensorrtllm"
    assert model.parameters["gpt_model_path"].string_value == str(engine)
    config = XShareConfig([24, 24, 20, 20], warmup=2)
    write_repository(Repository("trtllm-torch", MODEL_DIR, MODEL_DIR, config, tp_size=4), tmp_path / "b")
    settings = json.loads(read(tmp_path / "b")["tensorrt_llm"].parameters["settings"].string_value)
    assert settings["llm"] == {"tensor_parallel_size": 4, "moe_expert_parallel_size": 1}
    options = tmp_path / "b" / "tensorrt_llm" / "1" / settings["options_module"]
    assert XShareConfig.from_yaml(options / "xshare.yaml") == config
    write_repository(Repository("cpu", MODEL_DIR, MODEL_DIR, config), tmp_path / "c")
    settings = json.loads(read(tmp_path / "c")["tensorrt_llm"].parameters["settings"].string_value)
    assert XShareConfig.from_dict(settings["config"]) == config and settings["model"] == str(MODEL_DIR)


def launched(path: Path, tmp_path: Path, **environment: str) -> list[str]:
    """What `launch.sh` of the repository calls: the environment that matters, then the arguments."""
    stand_in = tmp_path / "bin"
    stand_in.mkdir(exist_ok=True)
    for name in ("tritonserver", "mpirun"):
        says = f'#!/bin/sh\nprintf "%s\\n" "$LD_PRELOAD" "$PYTHONPATH" {name} "$@"\n'
        (stand_in / name).write_text(says)
        (stand_in / name).chmod(0o755)
    variables = {"PATH": f"{stand_in}:{os.environ['PATH']}", **environment}
    command = ["bash", str(path / "launch.sh"), "--log-verbose", "1"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.splitlines()


def test_the_server_listens_on_loopback_unless_told_otherwise(repository: Repository, tmp_path: Path) -> None:
    path = tmp_path / "a repo"
    write_repository(repository, path)
    said = launched(path, tmp_path)
    for service in ("http", "grpc", "metrics"):
        assert said[said.index(f"--{service}-address") + 1] == "127.0.0.1"
    assert said[said.index("--model-repository") + 1] == str(path) and "--log-verbose" in said
    said = launched(path, tmp_path, ADDRESS="0.0.0.0", HTTP_PORT="9000")
    assert said[said.index("--http-address") + 1] == "0.0.0.0"
    assert said[said.index("--http-port") + 1] == "9000"
    if repository.back_end == "trtllm-torch":
        assert said[1] == str(path / "tensorrt_llm" / "1")


def test_an_engines_server_has_the_plugin_and_a_process_per_rank(
    engine: Path, plugin: Path, tmp_path: Path
) -> None:
    repository = Repository("tensorrtllm", engine, MODEL_DIR, plugin=plugin)
    write_repository(repository, tmp_path / "repo")
    said = launched(tmp_path / "repo", tmp_path)
    assert said[0] == str(plugin) and said[2] == "mpirun"
    assert said[said.index(":") : said.index(":") + 4] == [":", "-n", "1", "tritonserver"]
    config = {"pretrained_config": {"mapping": {"world_size": 1}}}
    (engine / "config.json").write_text(json.dumps(config))
    assert "mpirun" not in launch_script(repository)


def test_whole_or_absent(repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "repo"
    write_repository(repository, path)
    before = (path / "preprocessing" / "config.pbtxt").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(module, "launch_script", lambda _: 1 / 0)
        changed = replace(repository, limits=replace(repository.limits, max_batch_size=3))
        for target in (path, tmp_path / "other"):
            with pytest.raises(ZeroDivisionError):
                write_repository(changed, target)
    assert not (tmp_path / "other").exists()
    assert (path / "preprocessing" / "config.pbtxt").read_text() == before
    write_repository(changed, path)
    assert (path / "preprocessing" / "config.pbtxt").read_text() != before
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("important")
    with pytest.raises(ValueError, match="holds files that this command did not write"):
        write_repository(Repository("cpu", MODEL_DIR, MODEL_DIR), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "important"


def test_what_is_no_engine_is_refused(engine: Path, plugin: Path, tmp_path: Path) -> None:
    path = tmp_path / "repo"
    with pytest.raises(ValueError, match="is not that of a TensorRT-LLM engine"):
        write_repository(Repository("tensorrtllm", MODEL_DIR, MODEL_DIR, plugin=plugin), path)
    with pytest.raises(ValueError, match=r"plugin library .*: is not there"):
        write_repository(Repository("tensorrtllm", engine, MODEL_DIR), path)
    with pytest.raises(ValueError, match="has its budget inside"):
        write_repository(Repository("tensorrtllm", engine, MODEL_DIR, XShareConfig(24), plugin=plugin), path)
    with pytest.raises(ValueError, match=r"has no tokenizer_config\.json"):
        write_repository(Repository("tensorrtllm", engine, engine, plugin=plugin), path)
    (engine / "rank1.engine").unlink()
    with pytest.raises(ValueError, match=r"has no rank1\.engine"):
        write_repository(Repository("tensorrtllm", engine, MODEL_DIR, plugin=plugin), path)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        write_repository(Repository("cpu", tmp_path, MODEL_DIR), path)
    assert not path.exists()


def test_the_command(tmp_path: Path, engine: Path, plugin: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(main, ["triton", "--repo", str(tmp_path / "repo"), *arguments])
        return result.exit_code, result.output

    code, output = run("--budget", "24", "--no-streaming", "--max-batch-size", "4")
    assert code == 0 and "Start it: bash" in output
    configs = read(tmp_path / "repo")
    assert not configs["tensorrt_llm"].model_transaction_policy.decoupled
    assert configs["ensemble"].max_batch_size == 4
    code, output = run("--backend", "tensorrtllm")
    assert code == 2 and "needs --engine" in output
    code, output = run("--budget", "24", "--max-queue-size", "0")
    assert code == 1 and "max_queue_size=0" in output
    arguments = ("--backend", "tensorrtllm", "--engine", str(engine), "--plugin", str(plugin))
    assert run(*arguments, "--tokenizer", str(MODEL_DIR))[0] == 0
