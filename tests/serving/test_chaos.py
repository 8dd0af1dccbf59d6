"""Everything at once, bounded and on loopback: clients that go away, a killed process, a SIGTERM."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from soak import Load
from triton_client import Server, running_server, shared_memory, wait_for


def test_every_request_ends_and_nothing_is_left(tmp_path: Path) -> None:
    """300 requests of 16 clients. Half-way the model's process is killed: those under way end with an error
    or a closed connection, those that come before the server is there again too. At the end a SIGTERM."""
    before = shared_memory()
    with running_server(tmp_path, "--coverage", "0.97", "--max-output-len", "128") as server:

        def ready(numbers: range) -> Iterator[int]:
            for number in numbers:
                deadline = time.monotonic() + 90
                while not _is_ready(server) and time.monotonic() < deadline:
                    time.sleep(0.05)
                yield number

        load = Load(server, ready(range(300)), 16, 0.01)
        wait_for(lambda: load.became["finished"] >= 30, 120)
        [model] = server.processes("xshare_trtllm.serving.worker")
        model.send_signal(signal.SIGKILL)
        load.wait(240)
        became = load.became
        assert sum(became.values()) == 300 and became["lost"] == 0, became
        assert became["finished"] >= 60 and became["dropped"] >= 10, became
        assert became["refused"] + became["closed"] <= 3 * 16, became
        metrics = wait_for(lambda: now if (now := server.metrics())["xshare_running_requests"] == 0 else None)
        assert metrics["xshare_engine_restarts_total"] == 1
        counted = sum(value for name, value in metrics.items() if name.startswith("xshare_requests_total"))
        assert counted <= became["finished"] + became["dropped"] + 1
        last = Load(server, iter(range(64)), 4, 0.0)
        wait_for(lambda: server.metrics()["xshare_running_requests"] > 0, 10)
        family = psutil.Process(server.process.pid).children(recursive=True)
        server.process.terminate()
        last.wait(60)
        assert server.process.wait(60) == 0
        assert last.became["finished"] >= 1 and last.became["lost"] == 0
        assert not [process for process in family if process.is_running()]
    assert shared_memory() <= before


def _is_ready(server: Server) -> bool:
    try:
        return server.call("GET", "/v2/health/ready")[0] == 200
    except OSError:
        return False
