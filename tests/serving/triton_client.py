"""The real tritonserver on loopback, on free ports, for a bounded time."""

from __future__ import annotations

import http.client
import json
import os
import queue
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from click.testing import CliRunner

from xshare_trtllm.cli import main
from xshare_trtllm.serving.install_tritonserver import EXECUTABLE

LIFETIME = 300  # seconds after which the server ends whatever happens
MODEL_INPUTS = {
    "max_tokens": "INT32",
    "top_k": "INT32",
    "end_id": "INT32",
    "stream": "BOOL",
    "seed": "UINT64",
}


def wait_for(what: Any, seconds: float = 30.0) -> Any:
    """The first true value of `what()`, within a time."""
    deadline = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


class Server:
    """A running server and the simplest of clients."""

    def __init__(self, process: subprocess.Popen[bytes], ports: list[int], log: Path) -> None:
        self.process, self.log = process, log
        self.http_port, self.grpc_port, self.metrics_port = ports

    def call(self, method: str, path: str, body: Any = None, port: int | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port or self.http_port, timeout=60)
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        connection.request(method, path, data)
        response = connection.getresponse()
        with response:
            return response.status, response.read()

    def is_ready(self) -> bool:
        if self.process.poll() is not None:
            pytest.fail(f"tritonserver ended: {self.log.read_text()[-3000:]}")
        try:
            return self.call("GET", "/v2/health/ready")[0] == 200
        except OSError:
            return False

    def generate(
        self, text: str | bytes, max_tokens: Any = 8, model: str = "ensemble", **options: Any
    ) -> Any:
        status, body = self.call(
            "POST",
            f"/v2/models/{model}/generate",
            {"text_input": text, "max_tokens": max_tokens, **options},
        )
        answer = json.loads(body)
        return answer["text_output"] if status == 200 else (status, answer["error"])

    def metrics(self) -> dict[str, float]:
        text = self.call("GET", "/metrics", port=self.metrics_port)[1].decode()
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("xshare_")]
        return {name: float(value) for name, value in lines}

    def processes(self, word: str) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):  # it has just ended
                found += [child] if any(word in argument for argument in child.cmdline()) else []
        return found


class Stream:
    """Requests to a decoupled model over one gRPC stream; `take` gives `(request id, text, error)`."""

    def __init__(self, server: Server, model: str = "ensemble") -> None:
        import tritonclient.grpc as grpc

        self.grpc, self.model = grpc, model
        self.client = grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")
        self.answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self.client.start_stream(lambda result, error: self.answers.put((result, error)))

    def send(self, text: str | bytes, max_tokens: int = 8, name: str = "", **options: Any) -> None:
        values = {"text_input": text, "max_tokens": max_tokens, "stream": True, **options}
        inputs = [self._input(*item) for item in values.items()]
        self.client.async_stream_infer(self.model, inputs, request_id=name, enable_empty_final_response=True)

    def _input(self, name: str, value: Any) -> Any:
        kind = MODEL_INPUTS.get(name, "BYTES")
        if kind == "BYTES":
            words = [value] if isinstance(value, (str, bytes)) else value
            data = [word if isinstance(word, bytes) else word.encode() for word in words]
            array = np.array([data], dtype=object)
        else:
            array = np.array([[value]], dtype={"INT32": "i4", "BOOL": "?", "UINT64": "u8"}[kind])
        tensor = self.grpc.InferInput(name, array.shape, kind)
        tensor.set_data_from_numpy(array)
        return tensor

    def take(self, timeout: float = 30.0) -> tuple[str, str, str, bool]:
        """`(request id, text, error, is it the last)`"""
        result, error = self.answers.get(timeout=timeout)
        if error is not None:
            return "", "", str(error), True
        response = result.get_response()
        is_final = response.parameters["triton_final_response"].bool_param
        array = result.as_numpy("text_output")
        return response.id, "" if array is None else array.reshape(-1)[0].decode(), "", is_final

    def read(self) -> tuple[list[str], str]:
        """The texts and the error of the only request."""
        texts, is_final, error = [], False, ""
        while not is_final:
            _, text, error, is_final = self.take()
            texts += [text] if text else []
        return texts, error

    def close(self, cancel: bool = False) -> None:
        self.client.stop_stream(cancel_requests=cancel)
        self.client.close()


@contextmanager
def running_server(folder: Path, *arguments: str) -> Iterator[Server]:
    """A server on a new repository of the `cpu` back end."""
    pytest.importorskip("tritonclient.grpc", reason="needs tritonclient[grpc]")
    found = str(EXECUTABLE) if EXECUTABLE.is_file() else shutil.which("tritonserver")
    if found is None:
        pytest.skip("needs tritonserver: python -m xshare_trtllm.serving.install_tritonserver")
    repository = folder / "repository"
    result = CliRunner().invoke(main, ["triton", "--repo", str(repository), *arguments])
    assert result.exit_code == 0, result.output
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    names = ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT")
    environment = {**os.environ, **dict(zip(names, map(str, ports), strict=True))}
    environment["PATH"] = f"{Path(found).parent}:{environment['PATH']}"
    command = ["timeout", "--foreground", "-k", "5", str(LIFETIME), "bash", str(repository / "launch.sh")]
    options = ["--model-control-mode", "explicit", "--load-model", "*", "--exit-timeout-secs", "10"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, *options], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    server = Server(process, ports, folder / "log")
    try:
        wait_for(server.is_ready, 90)
        yield server
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        _, left = psutil.wait_procs(family, timeout=20)
        for child in left:
            with suppress(psutil.Error):
                child.kill()
        process.kill()
        process.wait()
    assert not left, (folder / "log").read_text()[-3000:]  # a clean end, of all its processes
