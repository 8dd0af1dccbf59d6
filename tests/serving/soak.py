"""Clients that go away: load on a `cpu` server over HTTP and gRPC, with random lengths, cancels and closed
connections; in the end nothing may be lost, and memory, handles and threads may not have grown.

    python tests/serving/soak.py --seconds 900 --clients 16 --drop 0.01
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from triton_client import Server, Stream, running_server, wait_for

WORD = "word "


@dataclass(frozen=True, slots=True)
class Usage:
    """Of the server's processes together."""

    memory: int  # bytes
    files: int
    threads: int

    @classmethod
    def of(cls, server: Server) -> Usage:
        family = psutil.Process(server.process.pid).children(recursive=True)
        return cls(
            sum(process.memory_info().rss for process in family),
            sum(process.num_fds() for process in family),
            sum(process.num_threads() for process in family),
        )


class Load:
    """`clients` threads that ask until `numbers` ends, and what became of every request: `finished`,
    `dropped`, `refused` (an error of the server's), `closed` (a connection that the server closed), `lost`
    (a time-out, or an answer without an end)."""

    def __init__(self, server: Server, numbers: Iterator[int], clients: int, drop: float) -> None:
        """drop: how likely a client goes away after a chunk."""
        self.server, self.drop = server, drop
        self.became: Counter[str] = Counter()
        self._numbers, self._lock = numbers, threading.Lock()
        self.threads = [threading.Thread(target=self._work) for _ in range(clients)]
        for thread in self.threads:
            thread.start()

    def wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for thread in self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        assert not any(thread.is_alive() for thread in self.threads), "a client waits for ever"

    def _work(self) -> None:
        while True:
            with self._lock:
                number = next(self._numbers, None)
            if number is None:
                return
            chance = random.Random(number)
            options = {"temperature": 1.0} if chance.random() < 0.5 else {}
            length, words = chance.randint(1, 120), chance.randint(1, 60)
            ask = self._grpc if chance.random() < 0.3 else self._http
            became = ask(WORD * words, length, chance, options)
            with self._lock:
                self.became[became] += 1

    def _http(self, text: str, length: int, chance: random.Random, options: dict[str, float]) -> str:
        body = self.server.body(text, length, stream=True, end_id=-1, return_finish_reason=True, **options)
        connection = http.client.HTTPConnection("127.0.0.1", self.server.http_port, timeout=60)
        last = {}
        try:
            path = f"/v2/models/{self.server.contract.model}/generate_stream"
            connection.request("POST", path, json.dumps(body))
            response = connection.getresponse()
            while line := response.readline():
                if not line.strip():
                    continue
                if chance.random() < self.drop:
                    return "dropped"
                last = json.loads(line.removeprefix(b"data: "))
        except TimeoutError:
            return "lost"
        except (OSError, http.client.HTTPException):
            return "closed"
        finally:
            connection.close()
        if "error" in last:
            return "refused"
        return "finished" if last.get("finish_reason") == "length" else "closed"

    def _grpc(self, text: str, length: int, chance: random.Random, options: dict[str, float]) -> str:
        import queue

        stream = Stream(self.server)
        is_dropped = False
        try:
            stream.send(text, length, end_id=-1, **options)
            while True:
                _, _, error, is_final = stream.take(60)
                if is_final:
                    return ("closed" if "UNAVAILABLE" in error else "refused") if error else "finished"
                is_dropped = chance.random() < self.drop
                if is_dropped:
                    return "dropped"
        except queue.Empty:
            return "lost"
        finally:
            stream.close(cancel=is_dropped)


def until(deadline: float) -> Iterator[int]:
    """0, 1, 2, ... up to a time."""
    number = 0
    while time.monotonic() < deadline:
        yield number
        number += 1


def moments(seconds: float) -> list[float]:
    """When to look, under load: after half a minute, then every two minutes, and at the end."""
    every = [30.0 + 120 * index for index in range(int(seconds // 120) + 1)]
    return [*(moment for moment in every if moment < seconds - 10), seconds - 5]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--drop", type=float, default=0.01, help="how likely a client goes away, per chunk")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(Path(folder), "--coverage", "0.97", lifetime=int(options.seconds) + 300) as server,
    ):
        started = time.monotonic()
        load = Load(server, until(started + options.seconds), options.clients, options.drop)
        under_load = []
        for moment in moments(options.seconds):
            time.sleep(max(0.0, started + moment - time.monotonic()))
            under_load.append(Usage.of(server))
            print(f"{moment:5.0f} s: {under_load[-1]}, {dict(load.became)}", flush=True)
        load.wait(options.seconds + 120)
        wait_for(lambda: server.metrics()["xshare_running_requests"] == 0)
        print(f"idle: {Usage.of(server)}, {dict(load.became)}", flush=True)
        ended = {name: value for name, value in server.metrics().items() if "requests_total" in name}
        print(f"{ended}; restarts {server.metrics()['xshare_engine_restarts_total']:.0f}")
    assert set(load.became) <= {"finished", "dropped"}, dict(load.became)
    first, last = under_load[0], under_load[-1]
    assert last.memory < 1.1 * first.memory
    assert last.threads <= first.threads + 4  # gRPC's pool has more or less of them
    assert last.files <= first.files + options.clients  # connections that come and go


if __name__ == "__main__":
    main()
