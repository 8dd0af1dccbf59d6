"""The `cpu` repository on the real tritonserver, as its clients see it."""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from triton_client import Server, Stream, running_server, wait_for

from xshare_trtllm.evaluation import greedy_decode, load_model
from xshare_trtllm.hf import Decoder

BUDGET = 32
PROMPT = "The history of the"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = ["--budget", str(BUDGET), "--warmup", "2", "--ep-size", "8", "--max-batch-size", "8"]
    limits = ["--max-queue-size", "32", "--max-input-len", "128", "--max-output-len", "256"]
    with running_server(tmp_path_factory.mktemp("triton"), *arguments, *limits) as running:
        yield running


@pytest.fixture(scope="module")
def spoken() -> tuple[list[int], str]:
    """What the model itself says, 12 tokens: one row under a budget is routed as the model does."""
    model, tokenizer = load_model()
    ids = [tokenizer.bos_token_id, *tokenizer(PROMPT, add_special_tokens=False)["input_ids"]]
    tokens, _ = greedy_decode(Decoder(model, 64), torch.tensor([ids]), 12)
    return tokens[0].tolist(), tokenizer.decode(tokens[0])


@pytest.fixture(scope="module")
def expected(spoken: tuple[list[int], str]) -> str:
    return spoken[1]


def test_every_model_is_ready_and_listens_on_loopback_only(server: Server) -> None:
    models = json.loads(server.call("POST", "/v2/repository/index", {})[1])
    assert {model["name"] for model in models} == {
        "preprocessing", "tensorrt_llm", "postprocessing", "ensemble", "tensorrt_llm_bls",
    }  # fmt: skip
    assert all(model["state"] == "READY" for model in models)
    [triton] = [
        p for p in psutil.Process(server.process.pid).children(recursive=True) if p.name() == "tritonserver"
    ]
    listening = [c.laddr for c in triton.net_connections() if c.status == psutil.CONN_LISTEN]
    assert {address.port for address in listening} >= {
        server.http_port,
        server.grpc_port,
        server.metrics_port,
    }
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


def test_concurrent_requests_are_one_batch(server: Server) -> None:
    """The first requests of this server, so that its metrics are about nothing else."""
    stream = Stream(server)
    for number in range(8):
        stream.send(f"{PROMPT} {number}", 40, str(number), end_id=-1)
    left = {str(number) for number in range(8)}
    while left:
        name, _, error, is_final = stream.take()
        assert not error
        if is_final:
            left.discard(name)
    stream.close()
    tokens = "xshare_output_tokens_total"
    metrics = wait_for(lambda: now if (now := server.metrics()).get(tokens) == 8 * 40 else None, 10)
    steps = metrics['xshare_steps_total{layer="0"}']
    assert metrics['xshare_rows_total{layer="0"}'] == 8 * 39  # the prompts' last rows gave the first tokens
    assert 39 <= steps < 8 * 39 / 2  # at least two rows to a step, on average
    for layer in range(4):
        used = metrics[f'xshare_experts_after_total{{layer="{layer}"}}']
        assert 8 * steps <= used <= BUDGET * steps
        assert used < metrics[f'xshare_experts_before_total{{layer="{layer}"}}']
        peak = metrics[f'xshare_peak_gpu_experts_after_total{{layer="{layer}"}}']
        assert steps <= peak <= 8 * steps  # eight GPUs of eight experts
    assert metrics["xshare_running_requests"] == metrics["xshare_waiting_requests"] == 0


@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
def test_generate_over_http_says_what_the_model_says(server: Server, expected: str, model: str) -> None:
    assert server.generate(PROMPT, 12, model) == expected
    assert server.generate(PROMPT, 12, model, exclude_input_in_output=False) == PROMPT + expected


@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
def test_streams_over_http_and_grpc(server: Server, expected: str, model: str) -> None:
    body = {"text_input": PROMPT, "max_tokens": 12, "stream": True}
    status, events = server.call("POST", f"/v2/models/{model}/generate_stream", body)
    lines = [line.removeprefix("data: ") for line in events.decode().splitlines() if line]
    texts = [json.loads(line)["text_output"] for line in lines]
    assert status == 200 and "".join(texts) == expected and len(texts) == 12
    stream = Stream(server, model)
    stream.send(PROMPT, 12)
    assert stream.read() == (texts, "")
    stream.close()


def test_infer_over_http(server: Server) -> None:
    import tritonclient.http as http

    client = http.InferenceServerClient(f"127.0.0.1:{server.http_port}")
    query = http.InferInput("QUERY", [1, 1], "BYTES")
    query.set_data_from_numpy(np.array([[PROMPT.encode()]], dtype=object))
    length = http.InferInput("REQUEST_OUTPUT_LEN", [1, 1], "INT32")
    length.set_data_from_numpy(np.array([[8]], dtype=np.int32))
    result = client.infer("preprocessing", [query, length])
    ids = result.as_numpy("INPUT_ID")
    tokens = http.InferInput("TOKENS_BATCH", [1, 1, ids.size], "INT32")
    tokens.set_data_from_numpy(ids.reshape(1, 1, -1))
    lengths = http.InferInput("SEQUENCE_LENGTH", [1, 1], "INT32")
    lengths.set_data_from_numpy(result.as_numpy("REQUEST_INPUT_LEN"))
    assert client.infer("postprocessing", [tokens, lengths]).as_numpy("OUTPUT")[0, 0] == PROMPT.encode()
    client.close()


def test_stop_words_end_id_and_sampling(server: Server, expected: str) -> None:
    word = expected.split()[1]
    stopped = server.generate(PROMPT, 12, stop_words=word)
    assert expected.startswith(stopped) and stopped.endswith(word) and stopped != expected
    draws = {server.generate(PROMPT, 12, temperature=1.0, seed=seed) for seed in (1, 2, 3)}
    assert len(draws) > 1
    assert server.generate(PROMPT, 12, temperature=1.0, seed=1) in draws
    assert server.generate(PROMPT, 12, top_k=1, temperature=1.0) == expected


@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
def test_an_answer_that_ends_with_end_id(server: Server, spoken: tuple[list[int], str], model: str) -> None:
    """The end token is no part of the answer: the last chunk is empty, and may be the only one."""
    tokens, text = spoken
    stream = Stream(server, model)
    for place in (0, 2):
        assert tokens[place] not in tokens[:place]
        stream.send(PROMPT, 12, end_id=tokens[place])
        texts, error = stream.read()
        assert not error and len(texts) == place and text.startswith("".join(texts))
        assert server.generate(PROMPT, 12, model, end_id=tokens[place]) == "".join(texts)
    stream.close()


def test_cancelled_requests_stop_the_model(server: Server) -> None:
    name = 'xshare_requests_total{finish="cancelled"}'
    before = server.metrics().get(name, 0)
    stream = Stream(server, "tensorrt_llm_bls")
    stream.send(PROMPT, 256, end_id=-1)
    assert stream.take()[1]
    stream.close(cancel=True)
    wait_for(lambda: server.metrics().get(name, 0) == before + 1, 10)


def test_a_full_queue_refuses_and_the_others_are_served(server: Server) -> None:
    stream = Stream(server)
    for number in range(48):
        stream.send(PROMPT, 16, str(number), end_id=-1)
    finished, errors = set(), []
    while len(finished) + len(errors) < 48:
        name, _, error, is_final = stream.take()
        if error:
            errors.append(error)
        elif is_final:
            finished.add(name)
    stream.close()
    assert 32 <= len(finished) < 48
    assert all("32 requests are waiting" in error for error in errors)


BAD_REQUESTS = {
    "empty": ({"text_input": ""}, "text_input: is empty"),
    "long": ({"text_input": "word " * 200}, "the prompt has"),
    "very long": ({"text_input": "word " * 20000}, "at most 4096 are taken"),
    "negative": ({"max_tokens": -1}, "max_tokens=-1: must be from 1 to 256"),
    "huge": ({"max_tokens": 2**31 - 1}, "must be from 1 to 256"),
    "overflow": ({"max_tokens": 2**40}, ""),
    "text for a number": ({"max_tokens": "many"}, ""),
    "number for a text": ({"text_input": 17}, ""),
    "two prompts": ({"text_input": ["a", "b"]}, ""),
    "missing": ({"max_tokens": None}, ""),
    "beams": ({"beam_width": 4}, "beam_width: is not supported, must be 1 or left out"),
    "bad words": ({"bad_words": "x"}, "bad_words: is not supported"),
    "lora": ({"lora_task_id": 3}, "lora_task_id: is not supported, leave it out"),
    "decoder": ({"decoder_text_input": "x"}, "decoder_text_input: is not supported"),
    "temperature": ({"temperature": -1.0}, "temperature=-1.0: must be"),
    "top_p": ({"top_p": 1.5}, "top_p=1.5: must be from 0 to 1"),
    "end_id": ({"end_id": 10**6}, "end_id=1000000: must be from 0 to"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_an_error_to_its_client_only(server: Server, expected: str, name: str) -> None:
    change, message = BAD_REQUESTS[name]
    good = Stream(server)
    good.send(PROMPT, 12)
    body = {"text_input": PROMPT, "max_tokens": 8, **change}
    for model in ("ensemble", "tensorrt_llm_bls"):
        status, answer = server.call("POST", f"/v2/models/{model}/generate", body)
        assert 400 <= status < 600 and message in json.loads(answer)["error"]
    texts, error = good.read()
    good.close()
    assert "".join(texts) == expected and not error


def test_neutral_values_are_taken(server: Server, expected: str) -> None:
    options = {"beam_width": 1, "repetition_penalty": 1.0, "return_log_probs": False, "length_penalty": 1.0}
    assert server.generate(PROMPT, 12, **options) == expected


def test_invalid_utf8_and_broken_bytes(server: Server, expected: str) -> None:
    stream = Stream(server)
    stream.send(b"caf\xe9 \xff")
    assert "text_input: is not UTF-8, byte 0xe9 at 3" in stream.read()[1]
    stream.close()
    assert server.call("POST", "/v2/models/ensemble/generate", b'{"text_input": "a')[0] >= 400
    with socket.create_connection(("127.0.0.1", server.grpc_port), timeout=5) as connection:
        connection.sendall(b"\x00" * 100)
    assert server.generate(PROMPT, 12) == expected


def test_malformed_tokens_to_the_model_itself(server: Server) -> None:
    assert "input_lengths=-5: must be from 0" in _ask_model(server, input_lengths=[[-5]])
    assert "input_lengths=9: must be from 0" in _ask_model(server, input_lengths=[[9]])
    assert "input_ids: must be from 0" in _ask_model(server, input_ids=[[5, -7]])
    assert "the prompt has 0 tokens" in _ask_model(server, input_lengths=[[0]])
    words = "the ends of the words must rise"
    assert words in _ask_model(server, stop_words_list=[[[5, 5], [3, 1]]])
    assert words in _ask_model(server, stop_words_list=[[[5, 5], [1, 3]]])
    assert "stop_words: tokens must be from 0" in _ask_model(server, stop_words_list=[[[-5, 5], [1, 2]]])
    assert "stop: the request needs the id" in _ask_model(server, stop=[[True]])
    assert _ask_model(server) == ""


def _ask_model(server: Server, **change: object) -> str:
    """The error of a request to `tensorrt_llm`, "" for none."""
    stream = Stream(server, "tensorrt_llm")
    inputs = {"input_ids": [[5, 6]], "input_lengths": [[2]], "request_output_len": [[4]], **change}
    tensors = []
    for name, value in inputs.items():
        array = np.array(value, dtype="?" if name == "stop" else "i4")
        tensors.append(stream.grpc.InferInput(name, array.shape, "BOOL" if name == "stop" else "INT32"))
        tensors[-1].set_data_from_numpy(array)
    stream.client.async_stream_infer("tensorrt_llm", tensors)
    result, error = stream.answers.get(timeout=30)
    stream.close()
    assert error or result.as_numpy("sequence_length") == [[4]]
    return "" if error is None else str(error)


def test_unload_and_reload(server: Server, expected: str) -> None:
    names = ["ensemble", "tensorrt_llm_bls", "tensorrt_llm"]
    for name in names:
        assert server.call("POST", f"/v2/repository/models/{name}/unload")[0] == 200
    wait_for(lambda: server.call("GET", "/v2/models/tensorrt_llm/ready")[0] != 200)
    assert isinstance(server.generate(PROMPT), tuple)
    wait_for(lambda: not server.processes("xshare_trtllm.serving.worker"))
    for name in reversed(names):
        assert server.call("POST", f"/v2/repository/models/{name}/load")[0] == 200
    assert server.generate(PROMPT, 12) == expected


def test_load(server: Server) -> None:
    clients, requests = 32, 500
    numbers = iter(range(requests))
    lock, seconds, lost = threading.Lock(), [], []

    def client() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            started = time.perf_counter()
            answer = server.generate(f"{PROMPT} year {number}", 4, end_id=-1)
            seconds.append(time.perf_counter() - started)
            if not isinstance(answer, str) or not answer:
                lost.append(answer)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=90)
    elapsed = time.perf_counter() - started
    assert len(seconds) == requests and not lost
    cuts = statistics.quantiles(seconds, n=100)
    print(
        f"\n{requests} requests of {clients} clients in {elapsed:.1f} s: "
        f"p50 {cuts[49]:.3f} s, p99 {cuts[98]:.3f} s"
    )


def test_the_models_process_is_killed_and_replaced(server: Server, expected: str) -> None:
    [process] = server.processes("xshare_trtllm.serving.worker")
    stream = Stream(server)
    stream.send(PROMPT, 256, end_id=-1)
    stream.take()
    process.send_signal(signal.SIGKILL)
    assert "the model's process ended; try again" in stream.read()[1]
    stream.close()
    assert server.generate(PROMPT, 12) == expected
    [successor] = server.processes("xshare_trtllm.serving.worker")
    assert successor.pid != process.pid
    wait_for(lambda: server.metrics().get("xshare_engine_restarts_total") == 1, 10)


def test_tritons_own_process_is_killed_and_the_model_reloaded(server: Server, expected: str) -> None:
    """Triton 2.51 leaves the request under way without an answer; unload and load bring the model back."""
    [stub] = server.processes("tensorrt_llm/1/model.py")
    os.kill(stub.pid, signal.SIGKILL)
    wait_for(lambda: not server.processes("xshare_trtllm.serving.worker"))
    assert "not healthy" in server.generate(PROMPT)[1]
    assert server.call("POST", "/v2/repository/models/tensorrt_llm/unload")[0] == 200
    assert server.call("POST", "/v2/repository/models/tensorrt_llm/load")[0] == 200
    assert server.generate(PROMPT, 12) == expected


def test_without_streaming_plain_infer_works(tmp_path: Path, expected: str) -> None:
    import tritonclient.grpc as grpc
    import tritonclient.http as http

    with running_server(tmp_path, "--no-streaming") as server:
        for module, port in ((http, server.http_port), (grpc, server.grpc_port)):
            client = module.InferenceServerClient(f"127.0.0.1:{port}")
            inputs = [module.InferInput("text_input", [1, 1], "BYTES")]
            inputs += [module.InferInput("max_tokens", [1, 1], "INT32")]
            inputs[0].set_data_from_numpy(np.array([[PROMPT.encode()]], dtype=object))
            inputs[1].set_data_from_numpy(np.array([[12]], dtype=np.int32))
            for model in ("ensemble", "tensorrt_llm_bls"):
                output = client.infer(model, inputs).as_numpy("text_output")
                assert output.reshape(-1)[0].decode() == expected
            client.close()
        assert "written with --no-streaming" in server.generate(PROMPT, stream=True)[1]
