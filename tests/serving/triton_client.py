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
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from click.testing import CliRunner

from xshare_trtllm.cli import main
from xshare_trtllm.serving.contracts import CONTRACTS, Contract
from xshare_trtllm.serving.install_tritonserver import EXECUTABLE

LIFETIME = 900  # seconds after which the server ends whatever happens


def wait_for(what: Any, seconds: float = 30.0) -> Any:
    """The first true value of `what()`, within a time."""
    deadline = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


class Server:
    """A running server and the simplest of clients. Requests are written with the names of
    `inflight_batcher_llm` and sent with those of the server's contract."""

    def __init__(
        self, process: subprocess.Popen[bytes], ports: list[int], log: Path, contract: Contract
    ) -> None:
        self.process, self.log, self.contract = process, log, contract
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
            answers = (
                self.call("GET", "/v2/health/ready"),
                self.call("GET", "/metrics", port=self.metrics_port),
            )
        except OSError:
            return False
        return all(status == 200 for status, _ in answers)

    def body(self, text: Any, max_tokens: Any = 8, **options: Any) -> dict[str, Any]:
        """A request for the `generate` endpoint."""
        values = {"text_input": text, "max_tokens": max_tokens, **options}
        return {self.contract.name(name): value for name, value in values.items()}

    def generate(self, text: Any, max_tokens: Any = 8, **options: Any) -> Any:
        """The text, or the status and the error."""
        path = f"/v2/models/{self.contract.model}/generate"
        status, body = self.call("POST", path, self.body(text, max_tokens, **options))
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

    def __init__(self, server: Server) -> None:
        import tritonclient.grpc as grpc

        self.grpc, self.contract = grpc, server.contract
        self.client = grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")
        self.answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self.client.start_stream(lambda result, error: self.answers.put((result, error)))

    def send(self, text: str | bytes, max_tokens: int = 8, name: str = "", **options: Any) -> None:
        values = {"text_input": text, "max_tokens": max_tokens, "stream": True, **options}
        inputs = [triton_input(self.grpc, self.contract, *item) for item in values.items()]
        self.client.async_stream_infer(
            self.contract.model, inputs, request_id=name, enable_empty_final_response=True
        )

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


def triton_input(module: Any, contract: Contract, name: str, value: Any) -> Any:
    """An `InferInput` of tritonclient.grpc or .http."""
    tensor = contract.inputs[name]
    kind = {"TYPE_STRING": "BYTES"}.get(tensor.type, tensor.type.removeprefix("TYPE_"))
    if kind == "BYTES":
        words = [value] if isinstance(value, (str, bytes)) else value
        data = [word if isinstance(word, bytes) else word.encode() for word in words]
        array = np.array(data, dtype=object)
    else:
        array = np.array([value], dtype={"INT32": "i4", "BOOL": "?", "UINT64": "u8", "FP32": "f4"}[kind])
    array = array[None] if contract.is_batched else array
    described = module.InferInput(tensor.name, array.shape, kind)
    described.set_data_from_numpy(array)
    return described


def shared_memory() -> set[str]:
    """What supervisors that have ended left there."""
    names = {region.name for region in Path("/dev/shm").glob("xshare_*")}
    return {name for name in names if not psutil.pid_exists(int(name.split("_")[1]))}


def tritonserver() -> str:
    """Its path; the test is skipped where there is none."""
    pytest.importorskip("tritonclient.grpc", reason="needs tritonclient[grpc]")
    found = str(EXECUTABLE) if EXECUTABLE.is_file() else shutil.which("tritonserver")
    if found is None:
        pytest.skip("needs tritonserver: python -m xshare_trtllm.serving.install_tritonserver")
    return found


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


@contextmanager
def running_server(
    folder: Path, *arguments: str, lifetime: int = LIFETIME, cwd: Path | None = None, **environment: str
) -> Iterator[Server]:
    """A server on a new repository; its end is a clean one, or an error. Triton's Python imports from `cwd`
    and looks at no PYTHONPATH."""
    found = tritonserver()
    repository = folder / "repository"
    result = CliRunner().invoke(main, ["triton", "--repo", str(repository), *arguments])
    assert result.exit_code == 0, result.output
    ports = free_ports(3)
    names = ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT")
    variables = {**os.environ, **dict(zip(names, map(str, ports), strict=True)), **environment}
    variables["PATH"] = f"{Path(found).parent}:{variables['PATH']}"
    command = ["timeout", "--foreground", "-k", "60", str(lifetime), "bash", str(repository / "launch.sh")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=variables, stdout=log, stderr=log, start_new_session=True, cwd=cwd
        )
    [contract] = [c for c in CONTRACTS.values() if c.model in {path.name for path in repository.iterdir()}]
    server = Server(process, ports, folder / "log", contract)
    before = shared_memory()
    try:
        wait_for(server.is_ready, 90)
        yield server
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        _, left = psutil.wait_procs(family, timeout=30)
        for child in left:
            with suppress(psutil.Error):
                child.kill()
        if left:
            process.kill()
        code = process.wait()
    assert not left and code == 0, (code, (folder / "log").read_text()[-3000:])
    assert shared_memory() <= before


class Servers:
    """One server after the other: one that a test has lost is not the next test's."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._folder, self._arguments = folder, arguments
        self._stack = ExitStack()
        self._server: Server | None = None

    def ready(self) -> Server:
        """The server as it is, or a new one."""
        if self._server is not None:
            with suppress(AssertionError, pytest.fail.Exception):
                wait_for(self._server.is_ready, 10)
                return self._server
            with suppress(AssertionError):
                self.close()
        folder = self._folder / str(len(list(self._folder.iterdir())))
        folder.mkdir()
        self._server = self._stack.enter_context(running_server(folder, *self._arguments))
        return self._server

    def close(self) -> None:
        """The end of the one that runs; an AssertionError where it is not a clean one."""
        self._server = None
        self._stack.close()
