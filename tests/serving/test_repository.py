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
import yaml
from click.testing import CliRunner

from xshare_trtllm import XShareConfig
from xshare_trtllm.cli import main
from xshare_trtllm.evaluation import MODEL_DIR
from xshare_trtllm.serving import repository as module
from xshare_trtllm.serving.contracts import CONTRACTS
from xshare_trtllm.serving.repository import BACK_ENDS, Repository, launch_script, write_repository
from xshare_trtllm.trtllm.setting import Setting

schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs tritonclient[grpc]")
text_format = pytest.importorskip("google.protobuf.text_format")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    folder = tmp_path / "the engine"
    folder.mkdir()
    config = {"pretrained_config": {"mapping": {"world_size": 2}}, "build_config": {"max_input_len": 1000}}
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
        file.parent.name: text_format.Parse(file.read_text(), schema.ModelConfig())
        for file in path.glob("*/config.pbtxt")
    }


def tensors(described: Any) -> dict[str, tuple[int, tuple[int, ...]]]:
    return {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in described}


def test_the_engines_models_fit_together(engine: Path, plugin: Path, tmp_path: Path) -> None:
    """Every tensor that the ensemble moves is an input and an output of the same type, and nothing that a
    model needs is left out."""
    write_repository(Repository("tensorrtllm", engine, MODEL_DIR, plugin=plugin), tmp_path / "repo")
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
    asked = {name for name in tensors(ensemble.input) if name.startswith("guided_")}
    assert not asked
    queues = {name: c.dynamic_batching.default_queue_policy.max_queue_size for name, c in configs.items()}
    assert queues == {"ensemble": 0, "preprocessing": 128, "tensorrt_llm": 128, "postprocessing": 0}


def test_an_engine_looks_to_a_client_as_the_other_back_ends(
    engine: Path, plugin: Path, tmp_path: Path
) -> None:
    """The text model's inputs but for those of guided decoding and `stop`, and the outputs of the others."""
    write_repository(Repository("tensorrtllm", engine, MODEL_DIR, plugin=plugin), tmp_path / "engine")
    theirs = read(tmp_path / "engine")["ensemble"]
    contract = "inflight_batcher_llm"
    write_repository(Repository("cpu", MODEL_DIR, MODEL_DIR, contract=contract), tmp_path / "cpu")
    ours = read(tmp_path / "cpu")["ensemble"]
    inputs = tensors(ours.input)
    assert {name: inputs[name] for name in tensors(theirs.input)} == tensors(theirs.input)
    assert {name.split("_")[0] for name in inputs.keys() - tensors(theirs.input).keys()} == {"guided", "stop"}
    assert tensors(ours.output).items() <= tensors(theirs.output).items()


def test_contract_llmapi_of_tensorrt_llms_examples(tmp_path: Path) -> None:
    """NVIDIA/TensorRT-LLM, triton_backend/all_models/llmapi/tensorrt_llm/config.pbtxt at 0a710573: names,
    types and shapes, all of them."""
    kind = schema.DataType.Value
    inputs = {
        "TYPE_STRING": {"text_input": -1, "image_url": -1, "sampling_param_stop": -1}
        | dict.fromkeys(("lora_name", "lora_path", "lora_ckpt_source"), 1),
        "TYPE_BOOL": dict.fromkeys(
            (
                "streaming",
                "sampling_param_exclude_input_from_output",
                "sampling_param_return_perf_metrics",
                "return_finish_reason",
                "return_stop_reason",
                "return_cumulative_logprob",
                "stop",
            ),
            1,
        ),
        "TYPE_INT32": dict.fromkeys((f"sampling_param_{n}" for n in ("best_of", "top_k", "max_tokens")), 1),
        "TYPE_FP32": dict.fromkeys(
            (
                f"sampling_param_{name}"
                for name in ("temperature", "top_p", "frequency_penalty", "presence_penalty")
            ),
            1,
        ),
        "TYPE_UINT64": {"sampling_param_seed": 1, "lora_id": 1},
    }
    outputs = {
        "TYPE_STRING": {"text_output": -1, "finish_reason": -1, "stop_reason": -1},
        "TYPE_FP32": {"cumulative_logprob": -1, "kv_cache_hit_rate": -1, "acceptance_rate": 1},
        "TYPE_INT32": {f"kv_cache_{n}": -1 for n in ("reused_block", "missed_block")}
        | {f"kv_cache_alloc_{n}_blocks": -1 for n in ("new", "total")}
        | {"total_accepted_draft_tokens": 1, "total_draft_tokens": 1},
        "TYPE_INT64": {
            f"{name}_time_ns": 1 for name in ("arrival", "first_scheduled", "first_token", "last_token")
        },
    }
    for back_end in ("cpu", "trtllm-torch"):
        write_repository(Repository(back_end, MODEL_DIR, MODEL_DIR), tmp_path / back_end)
        config = read(tmp_path / back_end)["tensorrt_llm"]
        assert config.max_batch_size == 0 and config.model_transaction_policy.decoupled
        for described, expected in ((config.input, inputs), (config.output, outputs)):
            found = tensors(described)
            for type_name, dims in expected.items():
                assert {name: found[name] for name in dims} == {
                    name: (kind(type_name), (dim,)) for name, dim in dims.items()
                }
        assert [tensor.name for tensor in config.input if not tensor.optional] == ["text_input"]
        ours = set(tensors(config.input)) - {name for dims in inputs.values() for name in dims}
        ours |= set(tensors(config.output)) - {name for dims in outputs.values() for name in dims}
        assert ours == {
            *("return_num_input_tokens", "return_num_output_tokens", "num_input_tokens", "num_output_tokens"),
            *(f"sampling_param_{name}" for name in ("bad", "min_tokens", "end_id", "repetition_penalty")),
        }


def test_contract_inflight_batcher_of_tensorrt_llms_examples(
    engine: Path, plugin: Path, tmp_path: Path
) -> None:
    """NVIDIA/TensorRT-LLM, triton_backend/all_models/inflight_batcher_llm: ensemble/config.pbtxt at 2a9abd95
    and tensorrt_llm/config.pbtxt at 0c8de69a: names, types and shapes that clients use."""
    write_repository(Repository("tensorrtllm", engine, MODEL_DIR, plugin=plugin), tmp_path / "repo")
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
    model = tensors(configs["tensorrt_llm"].input)
    names = [
        "input_ids",
        "input_lengths",
        "request_output_len",
        "runtime_top_k",
        "streaming",
        "len_penalty",
        "stop",
    ]
    assert {*names, "stop"} <= set(model)
    outputs = tensors(configs["tensorrt_llm"].output)
    int32, fp32, int64 = (kind(f"TYPE_{name}") for name in ("INT32", "FP32", "INT64"))
    assert outputs == {
        "output_ids": (int32, (-1, -1)),
        "sequence_length": (int32, (-1,)),
        "cum_log_probs": (fp32, (-1,)),
        "output_log_probs": (fp32, (-1, -1)),
        "context_logits": (fp32, (-1, -1)),
        "generation_logits": (fp32, (-1, -1, -1)),
        **dict.fromkeys(("batch_index", "sequence_index"), (int32, (1,))),
        **{f"kv_cache_{n}_blocks": (int32, (1,)) for n in ("alloc_new", "reused", "alloc_total")},
        **{
            f"{name}_time_ns": (int64, (1,))
            for name in ("arrival", "first_scheduled", "first_token", "last_token")
        },
        "acceptance_rate": (fp32, (1,)),
        **dict.fromkeys(("total_accepted_draft_tokens", "total_draft_tokens"), (int32, (1,))),
        **dict.fromkeys(("num_input_tokens", "num_output_tokens"), (int32, (1,))),
    }
    passed_on = {**outputs}
    del passed_on["output_ids"], passed_on["sequence_length"]
    assert tensors(configs["ensemble"].output) == {"text_output": (kind("TYPE_STRING"), (-1,)), **passed_on}


def test_contract_parameters_that_the_cpp_back_end_does_not_load_without(
    engine: Path, plugin: Path, tmp_path: Path
) -> None:
    """TensorRT-LLM 1.x, triton_backend/inflight_batcher_llm/src/model_instance_state.cc,
    getGuidedDecodingConfigFromParams: reads these outside any try, and takes empty ones for none."""
    repository = Repository("tensorrtllm", engine, MODEL_DIR, plugin=plugin)
    write_repository(repository, tmp_path / "repo")
    model = read(tmp_path / "repo")["tensorrt_llm"]
    assert model.backend == "tensorrtllm"
    assert model.parameters["gpt_model_path"].string_value == str(engine)
    for name in ("tokenizer_dir", "xgrammar_tokenizer_info_path", "guided_decoding_backend"):
        assert name in model.parameters
    assert model.parameters["guided_decoding_backend"].string_value == ""
    preprocessing = read(tmp_path / "repo")["preprocessing"]
    assert preprocessing.parameters["max_input_bytes"].string_value == str(32 * 1000)
    guided = {"guided_decoding_backend": "xgrammar", "xgrammar_tokenizer_info_path": "info.json"}
    write_repository(replace(repository, settings=guided), tmp_path / "guided")
    for name in ("ensemble", "tensorrt_llm"):
        assert "guided_decoding_guide" in tensors(read(tmp_path / "guided")[name].input)


def test_settings_are_kept_when_the_repository_is_written_again(
    engine: Path, plugin: Path, tmp_path: Path
) -> None:
    path = tmp_path / "repo"
    settings = {"kv_cache_free_gpu_mem_fraction": 0.8, "enable_kv_cache_reuse": True}
    repository = Repository("tensorrtllm", engine, MODEL_DIR, plugin=plugin, settings=settings)
    write_repository(repository, path)
    write_repository(replace(repository, settings={"enable_kv_cache_reuse": False}), path)
    parameters = read(path)["tensorrt_llm"].parameters
    assert parameters["kv_cache_free_gpu_mem_fraction"].string_value == "0.8"
    assert parameters["enable_kv_cache_reuse"].string_value == "false"
    write_repository(Repository("trtllm-torch", MODEL_DIR, MODEL_DIR), path)
    arguments = yaml.safe_load((path / "tensorrt_llm" / "1" / "model.yaml").read_text())
    assert "enable_kv_cache_reuse" not in arguments


def test_what_the_engines_of_the_text_model_read(tmp_path: Path) -> None:
    config = XShareConfig([24, 24, 20, 20], warmup=2)
    nested = {"kv_cache_config.free_gpu_memory_fraction": 0.8, "kv_cache_config.dtype": "fp8"}
    write_repository(
        Repository("trtllm-torch", MODEL_DIR, MODEL_DIR, config, tp_size=4, settings=nested), tmp_path / "b"
    )
    folder = tmp_path / "b" / "tensorrt_llm" / "1"
    assert yaml.safe_load((folder / "model.yaml").read_text()) == {
        "model": str(MODEL_DIR),
        "tensor_parallel_size": 4,
        "moe_expert_parallel_size": 1,
        "max_batch_size": 16,
        "kv_cache_config": {"free_gpu_memory_fraction": 0.8, "dtype": "fp8"},
    }
    assert Setting.from_yaml(folder / "xshare.yaml") == Setting(config)
    with pytest.raises(ValueError, match="model is a value, not a group"):
        clash = Repository("trtllm-torch", MODEL_DIR, MODEL_DIR, settings={"model.name": 1})
        write_repository(clash, tmp_path / "clash")
    write_repository(Repository("cpu", MODEL_DIR, MODEL_DIR, config), tmp_path / "c")
    settings = json.loads(read(tmp_path / "c")["tensorrt_llm"].parameters["settings"].string_value)
    assert Setting.from_dict(settings["setting"]) == Setting(config) and settings["model"] == str(MODEL_DIR)


@pytest.mark.parametrize("contract", CONTRACTS)
def test_the_first_request_is_tritons_own(contract: str, tmp_path: Path) -> None:
    write_repository(Repository("cpu", MODEL_DIR, MODEL_DIR, contract=contract), tmp_path / "repo")
    [config] = read(tmp_path / "repo").values()
    [warm_up] = config.model_warmup
    assert warm_up.batch_size == 1  # 0 would be no request
    inputs = tensors(config.input)
    for name, tensor in warm_up.inputs.items():
        assert tensor.data_type == inputs[name][0] and list(tensor.dims) == [1]
        data = (tmp_path / "repo" / config.name / "warmup" / tensor.input_data_file).read_bytes()
        assert data in (b"\x03\0\0\0The", b"\x04\0\0\0")


def launched(path: Path, tmp_path: Path, **environment: str) -> list[str]:
    """What `launch.sh` of the repository calls: the environment that matters, then the arguments."""
    stand_in = tmp_path / "bin"
    stand_in.mkdir(exist_ok=True)
    (stand_in / "python3").write_text('#!/bin/sh\nprintf "%s\\n" "$PYTHONPATH" "$@"\n')
    (stand_in / "python3").chmod(0o755)
    variables = {"PATH": f"{stand_in}:{os.environ['PATH']}", **environment}
    command = ["bash", str(path / "launch.sh"), "--log-verbose", "1"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.splitlines()


def test_the_server_listens_on_loopback_unless_told_otherwise(repository: Repository, tmp_path: Path) -> None:
    path = tmp_path / "a repo"
    write_repository(repository, path)
    said = launched(path, tmp_path)
    models = list(repository.models)
    assert said[1:4] == ["-m", "xshare_trtllm.serving.supervise", "127.0.0.1:8000"]
    assert said[4 : 5 + len(models)] == [*models, "--"]
    for service in ("http", "grpc", "metrics"):
        assert said[said.index(f"--{service}-address") + 1] == "127.0.0.1"
    assert said[said.index("--model-repository") + 1] == str(path) and "--log-verbose" in said
    assert said.count("@control") == 1
    said = launched(path, tmp_path, ADDRESS="0.0.0.0", HTTP_PORT="9000")
    assert said[said.index("--http-address") + 1] == "0.0.0.0" and said[3] == "127.0.0.1:9000"
    assert said[said.index("--http-port") + 1] == "9000"


def test_an_engines_server_has_the_plugin_and_a_process_per_rank(
    engine: Path, plugin: Path, tmp_path: Path
) -> None:
    repository = Repository("tensorrtllm", engine, MODEL_DIR, plugin=plugin)
    write_repository(repository, tmp_path / "repo")
    said = launched(tmp_path / "repo", tmp_path)
    start, other = said.index("mpirun"), said.index(":")
    preloaded = ["env", f"LD_PRELOAD={plugin}", "tritonserver"]
    assert said[start + 4 : start + 7] == preloaded and start < said.index("@control") < other
    assert said[other : other + 6] == [":", "-n", "1", *preloaded]
    config = json.loads((engine / "config.json").read_text())
    config["pretrained_config"]["mapping"]["world_size"] = 1
    (engine / "config.json").write_text(json.dumps(config))
    assert "mpirun" not in launch_script(repository)


def test_whole_or_absent(repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "repo"
    write_repository(repository, path)
    config = path / repository.models[0] / "config.pbtxt"
    before = config.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(module, "launch_script", lambda _: 1 / 0)
        changed = replace(repository, streaming=False, limits=replace(repository.limits, max_batch_size=3))
        for target in (path, tmp_path / "other"):
            with pytest.raises(ZeroDivisionError):
                write_repository(changed, target)
    assert not (tmp_path / "other").exists()
    assert config.read_text() == before
    write_repository(changed, path)
    assert config.read_text() != before
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("important")
    with pytest.raises(ValueError, match="holds files that this command did not write"):
        write_repository(Repository("cpu", MODEL_DIR, MODEL_DIR), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "important"


def test_what_is_no_engine_is_refused(engine: Path, plugin: Path, tmp_path: Path) -> None:
    path = tmp_path / "repo"
    with pytest.raises(ValueError, match="is not that of a TensorRT-LLM engine"):
        write_repository(Repository("tensorrtllm", MODEL_DIR, MODEL_DIR), path)
    with pytest.raises(ValueError, match=r"plugin library .*: is not there"):
        write_repository(Repository("tensorrtllm", engine, MODEL_DIR), path)
    with pytest.raises(ValueError, match="has its budget inside"):
        write_repository(Repository("tensorrtllm", engine, MODEL_DIR, XShareConfig(24), plugin=plugin), path)
    with pytest.raises(ValueError, match=r"has no tokenizer_config\.json"):
        write_repository(Repository("tensorrtllm", engine, engine, plugin=plugin), path)
    accumulating = Repository(
        "tensorrtllm", engine, MODEL_DIR, plugin=plugin, settings={"accumulate_tokens": True}
    )
    with pytest.raises(ValueError, match="accumulate_tokens: an engine's stream holds what is new"):
        write_repository(accumulating, path)
    with pytest.raises(ValueError, match="control: is not for an engine"):
        write_repository(Repository("tensorrtllm", engine, MODEL_DIR, plugin=plugin, control=True), path)
    (engine / "rank1.engine").unlink()
    with pytest.raises(ValueError, match=r"has no rank1\.engine"):
        write_repository(Repository("tensorrtllm", engine, MODEL_DIR, plugin=plugin), path)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        write_repository(Repository("cpu", tmp_path, MODEL_DIR), path)
    with pytest.raises(ValueError, match="the back end cpu has no such settings"):
        write_repository(Repository("cpu", MODEL_DIR, MODEL_DIR, settings={"a": 1}), path)
    assert not path.exists()


def test_a_dial_that_workers_cannot_turn_is_refused(tmp_path: Path) -> None:
    repository = Repository("trtllm-torch", MODEL_DIR, MODEL_DIR, control=True)
    with pytest.raises(ValueError, match="control: needs a configuration"):
        write_repository(repository, tmp_path / "repo")
    repository = replace(repository, config=XShareConfig(coverage=0.9))
    spread = replace(repository, settings={"enable_attention_dp": True}, mode="shadow")
    write_repository(spread, tmp_path / "spread")  # there the first rank's values travel to the others
    with pytest.raises(ValueError, match="mode 'loud': must be one of on, shadow, off"):
        write_repository(replace(repository, mode="loud"), tmp_path / "repo")
    assert not (tmp_path / "repo").exists()
    write_repository(repository, tmp_path / "repo")
    inputs = tensors(read(tmp_path / "repo")["tensorrt_llm"].input)
    assert {"xshare", "xshare_coverage"} <= inputs.keys()


@pytest.mark.parametrize("back_end", ["cpu", "trtllm-torch"])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (XShareConfig(4), "budget must be at least top_k=8"),
        (XShareConfig(24, warmup=9), "warmup must be at most top_k=8"),
        (XShareConfig([24, 24]), "names 2 layers, the model has 4 MoE layers"),
    ],
)
def test_a_configuration_that_does_not_fit_the_model_is_refused(
    back_end: str, config: XShareConfig, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write_repository(Repository(back_end, MODEL_DIR, MODEL_DIR, config), tmp_path / "repo")
    assert not (tmp_path / "repo").exists()


def test_moe_layers_are_counted_as_the_models_do() -> None:
    assert module._moe_layers({"num_hidden_layers": 61, "first_k_dense_replace": 3}) == 58
    assert module._moe_layers({"num_hidden_layers": 8, "decoder_sparse_step": 2, "mlp_only_layers": [3]}) == 3
    assert module._moe_layers({"num_hidden_layers": 24}) == 24


def test_a_broken_configuration_file_is_named_and_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in MODEL_DIR.iterdir():
        (model / file.name).symlink_to(file)
    (model / "config.json").unlink()
    for text, message in (("", "is not JSON"), ("[1]", "must hold an object")):
        (model / "config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"model/config\.json: {message}"):
            write_repository(Repository("cpu", model, model), tmp_path / "repo")
    (model / "config.json").write_text("\ufeff" + (MODEL_DIR / "config.json").read_text())
    write_repository(Repository("cpu", model, model), tmp_path / "repo")


def test_the_command(tmp_path: Path, engine: Path, plugin: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(main, ["triton", "--repo", str(tmp_path / "a repo"), *arguments])
        return result.exit_code, result.output

    code, output = run("--coverage", "0.97", "--no-streaming", "--max-rows", "48", "--utility", "affinity")
    assert code == 0 and f"Start it: bash '{tmp_path}/a repo/launch.sh'" in output
    config = read(tmp_path / "a repo")["tensorrt_llm"]
    assert not config.model_transaction_policy.decoupled
    settings = json.loads(config.parameters["settings"].string_value)
    asked = XShareConfig(coverage=0.97, max_rows=48, utility="affinity")
    assert Setting.from_dict(settings["setting"]) == Setting(asked)
    assert run("--coverage", "0.9", "--mode", "shadow")[0] == 0
    [config] = read(tmp_path / "a repo").values()
    settings = json.loads(config.parameters["settings"].string_value)
    assert Setting.from_dict(settings["setting"]) == Setting(XShareConfig(coverage=0.9), "shadow")
    for wrong, code, message in (
        (("--backend", "tensorrtllm"), 2, "needs --engine"),
        (("--budget", "24", "--max-queue-size", "0"), 1, "max_queue_size=0"),
        (("--warmup", "2"), 1, "nothing is limited"),
        (("--mode", "shadow"), 1, "mode: needs a configuration, such as a coverage"),
        (("--budget", "4"), 1, "budget must be at least top_k=8"),
        (("--set", "a"), 2, "must be NAME=VALUE"),
        (("--recipe", str(ROOT / "engines/DeepSeek-R1.sm_90.yaml")), 2, "is for --backend trtllm-torch"),
    ):
        assert run(*wrong)[0] == code and message in run(*wrong)[1]
    arguments = ("--backend", "tensorrtllm", "--engine", str(engine), "--plugin", str(plugin))
    assert run(*arguments, "--tokenizer", str(MODEL_DIR), "--set", "max_beam_width=1")[0] == 0
    assert run(*arguments, "--contract", "llmapi")[0] == 2


def test_a_recipes_options_go_into_the_arguments_of_llm(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).symlink_to(MODEL_DIR / name)
    router = {"n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4}
    router |= {"routed_scaling_factor": 2.5, "norm_topk_prob": True, "scoring_func": "sigmoid"}
    layers = {"num_hidden_layers": 61, "first_k_dense_replace": 3, "max_position_embeddings": 163840}
    config = {"model_type": "deepseek_v3", "topk_method": "noaux_tc", **router, **layers}
    (model / "config.json").write_text(json.dumps(config))
    recipe = ROOT / "engines/DeepSeek-R1.sm_90.yaml"
    arguments = ["--backend", "trtllm-torch", "--engine", str(model), "--recipe", str(recipe)]
    more = ["--set", "max_num_tokens=4096", "--set", "kv_cache_config.free_gpu_memory_fraction=0.85"]
    repo = str(tmp_path / "repo")
    result = CliRunner().invoke(main, ["triton", "--repo", repo, *arguments, *more])
    assert result.exit_code == 0, result.output
    written = yaml.safe_load((tmp_path / "repo/tensorrt_llm/1/model.yaml").read_text())
    options = yaml.safe_load(recipe.read_text())["options"]
    assert options.items() <= written.items() and options
    assert written["tensor_parallel_size"] == written["moe_expert_parallel_size"] == 8
    assert written["max_num_tokens"] == 4096 and written["max_seq_len"] == 8192
    assert written["kv_cache_config"]["free_gpu_memory_fraction"] == 0.85
    assert (tmp_path / "repo/tensorrt_llm/1/xshare.yaml").is_file()
