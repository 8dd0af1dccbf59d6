"""The supervisor, with a stand-in for tritonserver: restarts, their limit, and what a signal does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from triton_client import free_ports

SERVER = """
import http.server, json, os, sys, threading
started = open("starts", "a"); started.write(os.environ["XSHARE_RESTARTS"] + "\\n"); started.close()
open("arguments", "w").write("\\n".join(sys.argv[1:]))
if os.path.exists("daemon"):
    os.system("setsid sleep 300 & echo $! > daemon; sleep 0.1")
states = {"a": "READY", "b": "READY"}
class Handler(http.server.BaseHTTPRequestHandler):
    def reply(self, status, body=b"[]"):
        self.send_response(status); self.send_header("Content-Length", str(len(body)))
        self.end_headers(); self.wfile.write(body)
    def do_GET(self):
        self.reply(200 if set(states.values()) == {"READY"} and not os.path.exists("broken") else 400)
    def do_POST(self):
        assert self.headers["xshare-supervisor"] in " ".join(sys.argv)
        name = self.path.split("/")[-2]
        if self.path.endswith("unload"):
            open("unloads", "a").write(name + "\\n")
            states[name] = "UNLOADING"
            done = lambda: states.update({name: "UNAVAILABLE"})
            if not os.path.exists("endless"):
                threading.Timer(0.3, done).start()
        self.reply(200, json.dumps([{"name": n, "state": s} for n, s in states.items()]).encode())
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


class Supervised:
    """A supervisor in a folder of its own, and what the stand-in has written there."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        (folder / "server.py").write_text(SERVER)
        [port] = free_ports(1)
        command = [
            sys.executable,
            "-m",
            "xshare_trtllm.serving.supervise",
            f"127.0.0.1:{port}",
            "a",
            "b",
            "--",
        ]
        command += [sys.executable, "server.py", str(port), "@control"]
        self.process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True
        )

    def read(self, name: str) -> list[str]:
        file = self.folder / name
        return file.read_text().split() if file.exists() else []

    def wait_for_starts(self, count: int) -> None:
        deadline = time.monotonic() + 30
        while len(self.read("starts")) < count:
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.02)
        time.sleep(1.0)  # until the supervisor has seen that it is ready

    def server(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def end(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=40)
        return self.process.returncode, said


def test_models_are_unloaded_one_after_the_other_then_it_ends_well(tmp_path: Path) -> None:
    """The stand-in ends by SIGTERM, without the exit code of a tritonserver that ended by itself."""
    supervised = Supervised(tmp_path)
    supervised.wait_for_starts(1)
    arguments = supervised.read("arguments")
    assert arguments[1:5] == ["--model-control-mode", "explicit", "--load-model", "*"]
    assert any(word.startswith("model-repository:xshare-supervisor=") for word in arguments)
    supervised.process.send_signal(signal.SIGTERM)
    supervised.end()
    assert supervised.read("unloads") == ["a", "b"] and supervised.read("starts") == ["0"]


def test_requests_that_do_not_end_are_cut_off_in_time(tmp_path: Path) -> None:
    (tmp_path / "endless").touch()
    supervised = Supervised(tmp_path, DRAIN_SECONDS="0.5")
    supervised.wait_for_starts(1)
    supervised.process.send_signal(signal.SIGTERM)
    code, said = supervised.end()
    assert code == 1 and "not all requests ended in time" in said


def test_a_dead_server_is_started_again_under_a_limit(tmp_path: Path) -> None:
    supervised = Supervised(tmp_path, RESTARTS="1")
    supervised.wait_for_starts(1)
    os.kill(supervised.server(), signal.SIGKILL)
    supervised.wait_for_starts(2)
    assert supervised.read("starts") == ["0", "1"]
    os.kill(supervised.server(), signal.SIGKILL)
    code, said = supervised.end()
    assert code == 1 and "1 restarts within 600 s did not help" in said


def test_what_a_dead_server_has_started_ends_too(tmp_path: Path) -> None:
    """As MPI's daemons and their ranks do, it runs in a session of its own and its parent has ended."""
    (tmp_path / "daemon").touch()
    supervised = Supervised(tmp_path)
    supervised.wait_for_starts(1)
    daemons = []
    for restart in (True, False):
        daemons.append(psutil.Process(int(supervised.read("daemon")[0])))
        assert daemons[-1].is_running() and daemons[-1].ppid() == supervised.process.pid
        if restart:
            psutil.Process(supervised.server()).kill()
            supervised.wait_for_starts(2)
    supervised.process.send_signal(signal.SIGTERM)
    supervised.end()
    assert daemons[0] != daemons[1] and not any(daemon.is_running() for daemon in daemons)


def test_a_killed_supervisor_leaves_no_server(tmp_path: Path) -> None:
    supervised = Supervised(tmp_path)
    supervised.wait_for_starts(1)
    server = psutil.Process(supervised.server())
    supervised.process.kill()
    supervised.end()
    server.wait(timeout=20)


def test_a_server_that_is_never_ready_is_not_started_again(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    supervised = Supervised(tmp_path)
    supervised.wait_for_starts(1)
    os.kill(supervised.server(), signal.SIGKILL)
    code, said = supervised.end()
    assert code == 1 and "ended with code -9, before the server was ready" in said
    assert supervised.read("starts") == ["0"]


def test_one_that_was_ready_once_is_tried_again_where_it_does_not_get_ready(tmp_path: Path) -> None:
    """As where the model's weights are away for a while."""
    supervised = Supervised(tmp_path, RESTARTS="3")
    supervised.wait_for_starts(1)
    (tmp_path / "broken").touch()
    for starts in (2, 3):
        psutil.Process(supervised.server()).kill()
        supervised.wait_for_starts(starts)
    supervised.process.send_signal(signal.SIGTERM)
    supervised.end()
    assert supervised.read("starts") == ["0", "1", "2"]


@pytest.mark.parametrize("words", [[], ["127.0.0.1:1"], ["127.0.0.1:1", "a", "--"]])
def test_the_command_says_how_it_is_called(words: list[str]) -> None:
    command = [sys.executable, "-m", "xshare_trtllm.serving.supervise", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and "usage:" in done.stderr


@pytest.mark.parametrize(
    ("command", "environment", "message"),
    [
        ("no-such-server", {}, "no-such-server: is not on PATH"),
        ("true", {"DRAIN_SECONDS": "1m"}, "DRAIN_SECONDS=1m: must be a number from 0 on"),
        ("true", {"RESTARTS": "-1"}, "RESTARTS=-1: must be a number from 0 on"),
    ],
)
def test_what_cannot_work_is_said_at_once(command: str, environment: dict[str, str], message: str) -> None:
    words = [sys.executable, "-m", "xshare_trtllm.serving.supervise", "127.0.0.1:1", "a", "--", command]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=30, env={**os.environ, **environment}
    )
    assert done.returncode == 1 and done.stderr == f"xshare: {message}\n"
