"""What Triton's OpenAI frontend sends to `ensemble`, and what it needs to find in the answer, on the real
tritonserver; and the text models of an engine's ensemble there."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from triton_client import Server, Stream, free_ports, running_server, tritonserver, wait_for

from xshare_trtllm.evaluation import MODEL_DIR
from xshare_trtllm.serving.repository import Repository, write_repository
from xshare_trtllm.serving.text import load_tokenizer

PROMPT = "The history of the"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("openai")
    with running_server(folder, "--coverage", "0.97", "--contract", "inflight_batcher_llm") as running:
        yield running


def contract_request(grpc: Any, prompt: str, **openai: Any) -> list[Any]:
    """The tensors of triton-inference-server/server e1db8a60, python/openai/openai_frontend/engine/utils/
    triton.py, `_create_trtllm_generate_request`: names, types and shapes; `openai`: as in a completion."""
    tensors = {
        "text_input": np.array([[prompt.encode()]], dtype=object),
        "stream": np.array([[openai["stream"]]]),
        "max_tokens": np.array([[openai["max_tokens"]]], dtype=np.int32),
        "exclude_input_in_output": np.array([[not openai["echo"]]]),
        "return_num_input_tokens": np.array([[True]]),
        "return_num_output_tokens": np.array([[True]]),
    }
    if openai.get("stop"):
        tensors["stop_words"] = np.array([[word.encode() for word in openai["stop"]]], dtype=object)
    for name in ("top_p", "frequency_penalty", "presence_penalty", "temperature"):
        if name in openai:
            tensors[name] = np.array([[openai[name]]], dtype=np.float32)
    if "seed" in openai:
        tensors["seed"] = np.array([[openai["seed"]]], dtype=np.uint64)
    kinds = {"b": "BOOL", "i": "INT32", "f": "FP32", "u": "UINT64", "O": "BYTES"}
    inputs = []
    for name, array in tensors.items():
        inputs.append(grpc.InferInput(name, array.shape, kinds[array.dtype.kind]))
        inputs[-1].set_data_from_numpy(array)
    return inputs


def answers(server: Server, **openai: Any) -> list[tuple[str, int, int]]:
    """`(text, tokens of the prompt, tokens)` of every response that has outputs; an empty final response may
    follow, as `_validate_triton_responses_non_streaming` and `_StreamingUsageAccumulator` allow."""
    stream = Stream(server)
    stream.client.async_stream_infer(
        "ensemble", contract_request(stream.grpc, PROMPT, **openai), enable_empty_final_response=True
    )
    found, is_final = [], False
    while not is_final:
        result, error = stream.answers.get(timeout=60)
        assert error is None, error
        response = result.get_response()
        is_final = response.parameters["triton_final_response"].bool_param
        if response.outputs:
            text, *counts = (
                result.as_numpy(name) for name in ("text_output", "num_input_tokens", "num_output_tokens")
            )
            assert text.size == 1 and all(count.dtype == np.int32 and count.size == 1 for count in counts)
            found.append((text.reshape(-1)[0].decode(), *(int(count.reshape(-1)[0]) for count in counts)))
    stream.close()
    return found


def test_contract_completions_with_usage(server: Server) -> None:
    penalties = {"frequency_penalty": 0.0, "presence_penalty": 0.0}
    [(text, prompt, tokens)] = answers(server, stream=False, max_tokens=12, echo=False, **penalties)
    assert tokens == 12 and prompt == 1 + len(load_tokenizer(MODEL_DIR).encode(PROMPT).ids)
    [(echoed, *_)] = answers(server, stream=False, max_tokens=12, echo=True)
    assert echoed == PROMPT + text
    chunks = answers(server, stream=True, max_tokens=12, echo=False)
    assert "".join(chunk[0] for chunk in chunks) == text
    assert sum(chunk[2] for chunk in chunks) == 12 and {chunk[1] for chunk in chunks} == {prompt}
    word = text.split()[1]
    [(stopped, *_)] = answers(server, stream=False, max_tokens=12, echo=False, stop=["never said", word])
    assert text.startswith(stopped) and stopped.endswith(word)
    drawn = {"temperature": 1.0, "top_p": 0.9, "seed": 7}
    assert answers(server, stream=False, max_tokens=12, echo=False, **drawn) == answers(
        server, stream=False, max_tokens=12, echo=False, **drawn
    )


def test_streams_over_http_hold_what_is_new(server: Server) -> None:
    body = server.body(PROMPT, 12, stream=True)
    status, events = server.call("POST", "/v2/models/ensemble/generate_stream", body)
    texts = [json.loads(line[6:])["text_output"] for line in events.decode().splitlines() if line]
    assert status == 200 and "".join(texts) == server.generate(PROMPT, 12) and len(texts) == 12


def test_the_text_models_of_an_engine(tmp_path: Path) -> None:
    """Its `preprocessing` and `postprocessing`, without the engine."""
    import tritonclient.http as http_client

    found = tritonserver()
    engine, plugin = tmp_path / "engine", tmp_path / "plugin.so"
    engine.mkdir()
    plugin.touch()
    (engine / "rank0.engine").touch()
    config = {"pretrained_config": {"mapping": {"world_size": 1}}, "build_config": {"max_input_len": 100}}
    (engine / "config.json").write_text(json.dumps(config))
    write_repository(Repository("tensorrtllm", engine, MODEL_DIR, plugin=plugin), tmp_path / "repo")
    [port] = free_ports(1)
    command = ["timeout", "-k", "20", "120", found, "--model-repository", str(tmp_path / "repo")]
    command += ["--disable-auto-complete-config", "--allow-grpc", "false", "--allow-metrics", "false"]
    command += ["--model-control-mode", "explicit", "--http-address", "127.0.0.1", "--http-port", str(port)]
    for model in ("preprocessing", "postprocessing"):
        command += ["--load-model", model]
    environment = {**os.environ, "PATH": f"{Path(found).parent}:{os.environ['PATH']}"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    client = http_client.InferenceServerClient(f"127.0.0.1:{port}", network_timeout=60)
    try:
        wait_for(lambda: _is_ready(client, process), 90)

        def infer(model: str, **arrays: Any) -> Any:
            kinds = {"O": "BYTES", "i": "INT32"}
            inputs = []
            for name, array in arrays.items():
                inputs.append(http_client.InferInput(name, array.shape, kinds[array.dtype.kind]))
                inputs[-1].set_data_from_numpy(array)
            return client.infer(model, inputs)

        text = np.array([[PROMPT.encode()]], dtype=object)
        words = np.array([[b"Debian", b""]], dtype=object)
        length = np.array([[8]], dtype=np.int32)
        made = infer("preprocessing", QUERY=text, REQUEST_OUTPUT_LEN=length, STOP_WORDS_DICT=words)
        ids, (stop_ids, ends) = made.as_numpy("INPUT_ID"), made.as_numpy("STOP_WORDS_IDS")[0].tolist()
        tokenizer = load_tokenizer(MODEL_DIR)
        bare, behind_space = (tokenizer.encode(form).ids for form in ("Debian", " Debian"))
        assert bare != behind_space and stop_ids == [*bare, *behind_space]
        assert ends == [len(bare), len(stop_ids), *[-1] * (len(stop_ids) - 2)]
        in_text = tokenizer.encode("It is Debian").ids
        assert in_text[-len(behind_space) :] == behind_space  # where the engine stops
        back = infer(
            "postprocessing",
            TOKENS_BATCH=ids.reshape(1, 1, -1),
            SEQUENCE_LENGTH=made.as_numpy("REQUEST_INPUT_LEN"),
        )
        assert back.as_numpy("OUTPUT")[0, 0] == PROMPT.encode()
        with pytest.raises(http_client.InferenceServerException, match="at most 3200 are taken"):
            infer("preprocessing", QUERY=np.array([[b"a" * 3201]], dtype=object), REQUEST_OUTPUT_LEN=length)
    finally:
        client.close()
        process.terminate()
        process.wait(60)


def _is_ready(client: Any, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None
    try:
        return bool(client.is_server_ready())
    except OSError:
        return False
