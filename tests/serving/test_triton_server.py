"""The `cpu` repository on the real tritonserver, as its clients see it."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from triton_client import Server, Servers, Stream, running_server, triton_input, wait_for

from xshare_trtllm.evaluation import MODEL_DIR, greedy_decode, load_model
from xshare_trtllm.hf import Decoder
from xshare_trtllm.serving.contracts import CONTRACTS

BUDGET = 16
PROMPT = "The history of the"
CANCELLED = 'xshare_requests_total{finish="cancelled"}'


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    arguments = ["--budget", str(BUDGET), "--warmup", "2", "--ep-size", "8", "--max-batch-size", "8"]
    limits = ["--max-queue-size", "32", "--max-input-len", "128", "--max-output-len", "512"]
    made = Servers(tmp_path_factory.mktemp("triton"), *arguments, *limits)
    yield made
    made.close()


@pytest.fixture
def server(servers: Servers) -> Server:
    return servers.ready()


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


def test_the_model_is_ready_and_listens_on_loopback_only(server: Server) -> None:
    assert server.call("GET", "/v2/models/tensorrt_llm/ready")[0] == 200
    family = psutil.Process(server.process.pid).children(recursive=True)
    [triton] = [process for process in family if process.name() == "tritonserver"]
    listening = [c.laddr for c in triton.net_connections() if c.status == psutil.CONN_LISTEN]
    assert {address.port for address in listening} >= {
        server.http_port,
        server.grpc_port,
        server.metrics_port,
    }
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


def test_clients_do_not_load_and_unload_models(server: Server) -> None:
    for action in ("unload", "load"):
        assert server.call("POST", f"/v2/repository/models/tensorrt_llm/{action}", {})[0] == 403
    assert server.is_ready()


def test_concurrent_requests_are_one_batch(server: Server) -> None:
    """Among the first requests of this server, so that its metrics are about little else."""
    tokens = "xshare_output_tokens_total"
    before = wait_for(
        lambda: now if (now := server.metrics()).get(tokens) else None
    )  # Triton's own first request
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
    goal = before[tokens] + 8 * 40

    def ended() -> dict[str, float] | None:
        """Once the requests that run have been counted again, which may be after the tokens."""
        now = server.metrics()
        is_idle = now["xshare_running_requests"] == now["xshare_waiting_requests"] == 0
        return now if now[tokens] == goal and is_idle else None

    after = wait_for(ended, 10)
    metrics = {name: value - before.get(name, 0) for name, value in after.items()}
    steps = metrics['xshare_steps_total{layer="0"}']
    assert metrics['xshare_rows_total{layer="0"}'] == 8 * 39  # the prompts' last rows gave the first tokens
    assert 39 <= steps < 8 * 39 / 2  # at least two rows to a step, on average
    for layer in range(4):
        used = metrics[f'xshare_experts_after_total{{layer="{layer}"}}']
        assert 8 * steps <= used <= BUDGET * steps
        assert used < metrics[f'xshare_experts_before_total{{layer="{layer}"}}']
        peak = metrics[f'xshare_peak_gpu_experts_after_total{{layer="{layer}"}}']
        assert steps <= peak <= 8 * steps  # eight GPUs of eight experts


def test_running_and_waiting_requests_are_counted_as_they_are(server: Server) -> None:
    stream = Stream(server)
    for number in range(12):
        stream.send(PROMPT, 256, str(number), end_id=-1)

    def counted() -> tuple[float, float]:
        now = server.metrics()
        return now["xshare_running_requests"], now["xshare_waiting_requests"]

    wait_for(lambda: counted() == (8, 4), 10)
    stream.close(cancel=True)
    wait_for(lambda: server.metrics()["xshare_running_requests"] == 0, 10)


def test_generate_over_http_says_what_the_model_says(server: Server, expected: str) -> None:
    assert server.generate(PROMPT, 12) == expected
    assert server.generate(PROMPT, 12, exclude_input_in_output=False) == PROMPT + expected


def test_streams_over_http_and_grpc_hold_the_text_so_far(server: Server, expected: str) -> None:
    body = server.body(PROMPT, 12, stream=True)
    status, events = server.call("POST", "/v2/models/tensorrt_llm/generate_stream", body)
    lines = [line.removeprefix("data: ") for line in events.decode().splitlines() if line]
    texts = [json.loads(line)["text_output"] for line in lines]
    assert status == 200 and texts[-1] == expected and len(texts) == 12
    assert all(later.startswith(text) for text, later in pairwise(texts))
    stream = Stream(server)
    stream.send(PROMPT, 12)
    assert stream.read() == (texts, "")
    stream.close()


def test_reasons_counts_and_times(server: Server, expected: str) -> None:
    wishes = [f"return_{name}" for name in ("finish_reason", "stop_reason", "perf_metrics")]
    wishes += [f"return_num_{name}_tokens" for name in ("input", "output")]
    started = time.monotonic_ns()

    def ask(**options: Any) -> dict[str, Any]:
        body = server.body(PROMPT, 12, **dict.fromkeys(wishes, True), **options)
        answer: dict[str, Any] = json.loads(server.call("POST", "/v2/models/tensorrt_llm/generate", body)[1])
        return answer

    answer = ask()
    assert answer["finish_reason"] == "length" and answer["stop_reason"] == "None"
    assert answer["num_output_tokens"] == 12 and 4 <= answer["num_input_tokens"] < 12
    names = ("arrival", "first_scheduled", "first_token", "last_token")
    moments = [started, *(answer[f"{name}_time_ns"] for name in names), time.monotonic_ns()]
    assert moments == sorted(moments)
    word = expected.split()[1]
    answer = ask(stop_words=["never said", word])
    assert (answer["finish_reason"], answer["stop_reason"]) == ("stop", word)
    assert answer["text_output"] == expected[: expected.index(word)]


def test_stop_words_bad_words_and_lengths(server: Server, spoken: tuple[list[int], str]) -> None:
    tokens, expected = spoken
    word = expected.split()[1]
    assert server.generate(PROMPT, 12, stop_words=[word, ""]) == expected[: expected.index(word)]
    assert server.generate(PROMPT, 12, stop_words="") == expected
    other = server.generate(PROMPT, 12, bad_words=[word, ""])
    assert word not in other and other.startswith(expected[: expected.index(word)].rstrip()[:3])
    assert server.generate(PROMPT, 12, min_tokens=0) == expected
    assert server.generate(PROMPT, 12, end_id=tokens[2]) != expected
    longer = server.generate(PROMPT, 12, end_id=tokens[2], min_tokens=12)
    assert longer != expected and len(longer) > len(server.generate(PROMPT, 12, end_id=tokens[2]))


def test_sampling_differs_unless_it_is_seeded(server: Server, expected: str) -> None:
    draws = {server.generate(PROMPT, 12, temperature=1.0) for _ in range(4)}
    assert len(draws) > 1
    seeded = {server.generate(PROMPT, 12, temperature=1.0, seed=2**63 + 1) for _ in range(3)}
    assert len(seeded) == 1
    assert server.generate(PROMPT, 12, top_k=1, temperature=1.0) == expected


def test_an_answer_that_ends_with_end_id(server: Server, spoken: tuple[list[int], str]) -> None:
    """The end token is no part of the answer: the last chunk repeats what there is."""
    tokens, text = spoken
    stream = Stream(server)
    for place in (0, 2):
        assert tokens[place] not in tokens[:place]
        stream.send(PROMPT, 12, end_id=tokens[place])
        texts, error = stream.read()
        assert not error and text.startswith("".join(texts[-1:]))
        assert server.generate(PROMPT, 12, end_id=tokens[place]) == "".join(texts[-1:])
    stream.close()


def _cancel_grpc_stream(server: Server) -> None:
    stream = Stream(server)
    stream.send(PROMPT, 512, end_id=-1)
    assert stream.take()[1]
    stream.close(cancel=True)


def _cancel_grpc(server: Server) -> None:
    stream = Stream(server)
    stream.send(PROMPT, 512, end_id=-1, stream=False)
    wait_for(lambda: server.metrics()["xshare_running_requests"] == 1)
    stream.close(cancel=True)


def _drop_http_stream(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=30)
    body = json.dumps(server.body(PROMPT, 512, end_id=-1, stream=True))
    connection.request("POST", "/v2/models/tensorrt_llm/generate_stream", body)
    connection.getresponse().readline()
    connection.close()


@pytest.mark.parametrize("cancel", [_cancel_grpc_stream, _cancel_grpc, _drop_http_stream])
def test_cancelled_requests_stop_the_model(server: Server, cancel: Callable[[Server], None]) -> None:
    before = server.metrics()
    cancel(server)
    count = before.get(CANCELLED, 0)
    after = wait_for(lambda: now if (now := server.metrics()).get(CANCELLED, 0) > count else None)
    tokens = "xshare_output_tokens_total"
    assert after[CANCELLED] == count + 1 and after[tokens] - before[tokens] < 512


def test_a_request_stops_another_by_its_id(server: Server) -> None:
    stream, other = Stream(server), Stream(server)
    stream.send(PROMPT, 512, "the long one", end_id=-1)
    stream.take()
    other.send(PROMPT, name="the long one", stop=True)
    assert other.read() == ([], "")
    texts, error = stream.read()
    assert not error and len(texts) < 511
    other.send(PROMPT, stop=True)
    assert "stop: the request needs the id" in other.read()[1]
    stream.close()
    other.close()


def test_a_full_queue_refuses_and_the_others_are_served(server: Server) -> None:
    with ThreadPoolExecutor(80) as pool:
        answers = list(pool.map(lambda _: server.generate(PROMPT, 60, end_id=-1), range(80)))
    refused = [answer for answer in answers if not isinstance(answer, str)]
    assert 32 <= len(answers) - len(refused) < 80
    # 503, but Triton 2.51 looks at the code of an error that it has freed.
    assert all(status in (400, 503) and "32 requests are waiting" in error for status, error in refused)


BAD_REQUESTS = {
    "empty": ({"text_input": ""}, "text_input: is empty"),
    "long": ({"text_input": "word " * 200}, "the prompt has"),
    "very long": ({"text_input": "word " * 20000}, "at most 4096 are taken"),
    "negative": ({"max_tokens": -1}, "max_tokens=-1: must be from 1 to 512"),
    "huge": ({"max_tokens": 2**31 - 1}, "must be from 1 to 512"),
    "overflow": ({"max_tokens": 2**40}, ""),
    "text for a number": ({"max_tokens": "many"}, ""),
    "number for a text": ({"text_input": 17}, ""),
    "two prompts": ({"text_input": ["a", "b"]}, "one prompt per request"),
    "missing": ({"text_input": None}, ""),
    "best of": ({"best_of": 4}, "sampling_param_best_of: is not supported, must be 1 or left out"),
    "penalty": ({"presence_penalty": 0.5}, "sampling_param_presence_penalty: is not supported, must be 0.0"),
    "lora": ({"lora_id": 3}, "lora_id: is not supported, leave it out"),
    "image": ({"image_url": "https://example.org"}, "image_url: is not supported"),
    "temperature": ({"temperature": -1.0}, "temperature=-1.0: must be"),
    "top_p": ({"top_p": 1.5}, "top_p=1.5: must be from 0 to 1"),
    "end_id": ({"end_id": 10**6}, "end_id=1000000: must be from 0 to"),
    "min_tokens": ({"min_tokens": 9}, "min_tokens=9: must be from 0 to max_tokens=8"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_an_error_to_its_client_only(server: Server, expected: str, name: str) -> None:
    change, message = BAD_REQUESTS[name]
    good = Stream(server)
    good.send(PROMPT, 12)
    options = {"text": PROMPT, "max_tokens": 8, **change}
    options["text"] = options.pop("text_input", PROMPT)
    status, error = server.generate(**options)
    assert 400 <= status < 600 and message in error
    texts, error = good.read()
    good.close()
    assert texts[-1] == expected and not error


def test_neutral_values_are_taken(server: Server, expected: str) -> None:
    options = {"best_of": 1, "repetition_penalty": 1.0, "return_cumulative_logprob": False}
    assert server.generate(PROMPT, 12, **options) == expected


def test_invalid_utf8_and_broken_bytes(server: Server, expected: str) -> None:
    stream = Stream(server)
    stream.send(b"caf\xe9 \xff")
    assert "text_input: is not UTF-8, byte 0xe9 at 3" in stream.read()[1]
    stream.close()
    assert server.call("POST", "/v2/models/tensorrt_llm/generate", b'{"text_input": "a')[0] >= 400
    with socket.create_connection(("127.0.0.1", server.grpc_port), timeout=5) as connection:
        connection.sendall(b"\x00" * 100)
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


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("xshare_trtllm.serving.worker", "the model's process ended; try again"),
        ("tensorrt_llm/1/model.py", ""),
    ],
    ids=["the model's process", "Triton's process"],
)
def test_a_killed_process_is_replaced(server: Server, expected: str, word: str, message: str) -> None:
    """Requests under way end with an error, the server is not ready until the model is there again."""
    restarts = server.metrics().get("xshare_engine_restarts_total", 0)
    [process] = server.processes(word)
    stream = Stream(server)
    stream.send(PROMPT, 256, end_id=-1)
    stream.take()
    process.send_signal(signal.SIGKILL)
    error = stream.read()[1]
    assert error and message in error
    stream.close()
    wait_for(lambda: not server.is_ready())
    wait_for(server.is_ready, 90)
    assert server.generate(PROMPT, 12) == expected
    [successor] = server.processes(word)
    assert successor.pid != process.pid
    wait_for(lambda: server.metrics().get("xshare_engine_restarts_total") == restarts + 1, 10)


def test_a_model_whose_weights_are_away_is_tried_again(tmp_path: Path, expected: str) -> None:
    model, away = tmp_path / "model", tmp_path / "away"
    model.mkdir()
    for file in MODEL_DIR.iterdir():
        (model / file.name).symlink_to(file)
    with running_server(tmp_path, "--coverage", "0.97", "--engine", str(model)) as server:
        [process] = server.processes("xshare_trtllm.serving.worker")
        wait_for(
            lambda: "xshare: the server is ready" in server.log.read_text()
        )  # the supervisor knows it, too
        model.rename(away)
        process.kill()
        wait_for(lambda: "failed to load all models" in server.log.read_text(), 60)
        assert not server.is_ready()
        away.rename(model)
        wait_for(server.is_ready, 90)
        assert server.generate(PROMPT, 12) == expected
        wait_for(lambda: server.metrics().get("xshare_engine_restarts_total", 0) >= 2, 10)


def test_streams_end_before_a_server_that_is_told_to_stop(tmp_path: Path) -> None:
    with running_server(tmp_path, "--coverage", "0.97") as server:
        streams = [Stream(server) for _ in range(2)]
        abandoned = Stream(server)
        for stream in (*streams, abandoned):
            stream.send(PROMPT, 200, end_id=-1)
            stream.take()
        abandoned.close(cancel=True)
        server.process.terminate()
        wait_for(lambda: not server.is_ready())
        late = server.generate(PROMPT)
        assert late[0] in (404, 503) and "no available versions" in late[1]
        for stream in streams:
            texts, error = stream.read()
            assert not error and len(texts) >= 190, (
                error,
                len(texts),
            )  # 199, less characters of several tokens
            stream.close()
        assert server.process.wait(timeout=60) == 0


def test_the_dial_is_turned_while_it_serves(tmp_path: Path, expected: str) -> None:
    """Without `--control` these inputs are not there. In shadow the text is the model's own, and the counts
    are XShare's."""
    with running_server(tmp_path, "--coverage", "0.97", "--control") as server:

        def turn(**request: Any) -> tuple[int, str]:
            body = json.dumps({"text_input": "", **request}).encode()
            status, answer = server.call("POST", "/v2/models/tensorrt_llm/generate", body)
            return status, json.loads(answer).get("text_output") or json.loads(answer)["error"]

        def state() -> tuple[float, ...]:
            metrics = server.metrics()
            return tuple(metrics.get(f"xshare_{name}", -1.0) for name in ("enabled", "shadow", "coverage"))

        def say() -> tuple[list[str], float]:
            """Texts of eight sequences decoded together, and the active experts of layer 0 as a share of the
            model's own."""
            names = [f'xshare_experts_{when}_total{{layer="0"}}' for when in ("before", "after")]
            before = server.metrics()
            with ThreadPoolExecutor(8) as pool:
                texts = list(pool.map(lambda n: server.generate(f"{PROMPT} {n}", 40, end_id=-1), range(8)))
            tokens = "xshare_output_tokens_total"
            goal = before[tokens] + 8 * 40
            after = wait_for(lambda: now if (now := server.metrics())[tokens] == goal else None)
            own, active = (after[name] - before.get(name, 0.0) for name in names)
            return texts, active / own

        wait_for(lambda: state() == (1, 0, pytest.approx(0.97)))
        assert turn(xshare="off") == (200, "warmup: 1\ncoverage: 0.97\nutility: squared_weight\nmode: 'off'")
        wait_for(lambda: state() == (0, 0, 1))
        own_texts, share = say()
        assert share == 1
        assert turn(xshare_coverage=0.5)[1].endswith("mode: 'off'")  # what is not named stays
        assert "mode: shadow" in turn(xshare="shadow")[1]
        wait_for(lambda: state() == (0, 1, 0.5))
        texts, share = say()
        assert texts == own_texts and share < 0.8
        assert "mode: 'on'" in turn(xshare="on", xshare_coverage=0.25)[1]
        wait_for(lambda: state() == (1, 0, 0.25))
        texts, share = say()
        assert texts != own_texts and share < 0.8
        assert "coverage must be less than or equal to 1" in turn(xshare_coverage=2.0)[1]
        assert "must be on, shadow, off" in turn(xshare="loud")[1]
        assert state() == (1, 0, 0.25) and server.metrics()["xshare_dial_refused"] == 0
        assert server.generate(PROMPT, 12) == expected  # a row alone keeps its own routing


def test_what_does_not_end_in_time_is_cut_off(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="not all requests ended in time"):  # noqa: SIM117
        with running_server(tmp_path, DRAIN_SECONDS="0.2") as server:
            stream = Stream(server)
            stream.send(PROMPT, 512, end_id=-1)
            stream.take()
            server.process.terminate()
            assert server.process.wait(timeout=30) == 1
            assert stream.read()[1]
            stream.close()


def test_without_streaming_plain_infer_works(tmp_path: Path, expected: str) -> None:
    import tritonclient.grpc as grpc
    import tritonclient.http as http_client

    contract_name = "inflight_batcher_llm"
    contract = CONTRACTS[contract_name]
    limits = ["--max-batch-size", "1", "--max-queue-size", "1"]
    with running_server(tmp_path, "--no-streaming", "--contract", contract_name, *limits) as server:
        for module, port in ((http_client, server.http_port), (grpc, server.grpc_port)):
            client = module.InferenceServerClient(f"127.0.0.1:{port}")
            values = {"text_input": PROMPT, "max_tokens": 12}
            inputs = [triton_input(module, contract, *item) for item in values.items()]
            output = client.infer("ensemble", inputs).as_numpy("text_output")
            assert output.reshape(-1)[0].decode() == expected
            client.close()
        assert "written with --no-streaming" in server.generate(PROMPT, stream=True)[1]
        inputs = [{"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "data": [PROMPT]}]
        for name, value in (("max_tokens", 200), ("end_id", -1)):
            inputs.append({"name": name, "datatype": "INT32", "shape": [1, 1], "data": [value]})
        with ThreadPoolExecutor(6) as pool:
            body = {"inputs": inputs}
            asked = pool.map(lambda _: server.call("POST", "/v2/models/ensemble/infer", body), range(6))
            answers = list(asked)
        assert {status for status, _ in answers} == {200, 503}
        assert all(b"1 requests are waiting" in data for status, data in answers if status == 503)
