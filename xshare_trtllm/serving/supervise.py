"""Runs tritonserver: drains it on SIGTERM, and starts it anew when a process of its models has died.

`python3 -m xshare_trtllm.serving.supervise URL MODEL... -- COMMAND...`, as `launch.sh` does. Triton 2.51 does
neither: on SIGTERM it ends streams in the middle, and after the death of a Python model's process it says
ready, leaves requests without an answer and refuses later ones.

SIGTERM or SIGINT: the models are unloaded. At once the server is not ready and takes no new request, but it
finishes those that it has; then it is stopped, and this process ends with 0. After DRAIN_SECONDS (60) the
rest is cut off, with exit code 1. A second signal does not wait.

A dead model process, or a dead server: the server is stopped, which ends its connections, and started again
after a pause that doubles (1 to 30 s). After RESTARTS (5) of them within ten minutes, or where the server has
never been ready, this process ends with 1.
"""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

POLL = 0.1  # seconds between two looks at the processes
LAST_ANSWERS = 0.5  # seconds for errors on their way to clients, before a broken server is stopped
EXIT_TIMEOUT = 10  # seconds for the server to end when it has no requests any more
RESTART_WINDOW = 600.0  # seconds that restarts are counted over
LONGEST_PAUSE = 30.0  # seconds
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_STUB = "triton_python_b"  # as the kernel cuts triton_python_backend_stub


class Server:
    """One tritonserver (or an mpirun of several) and its processes.

    url      host:port of its HTTP endpoint
    models   in the order of unloading
    command  its word @control stands for what is added here: control of the models, behind a key that only
             this process has
    """

    def __init__(self, url: str, models: Sequence[str], command: Sequence[str], restarts: int) -> None:
        self._url, self._models = url, models
        self._key = secrets.token_hex(16)
        self._shared_memory = f"xshare_{os.getpid()}_{restarts}_"
        self._stubs: set[int] = set()
        self.was_ready = False
        name = "xshare-supervisor"
        control = [
            *("--model-control-mode", "explicit", "--load-model", "*"),
            *("--http-restricted-api", f"model-repository:{name}={self._key}"),
            *("--grpc-restricted-protocol", f"model-repository:{name}={self._key}"),
            *("--exit-timeout-secs", str(EXIT_TIMEOUT)),
            *("--backend-config", f"python,shm-region-prefix-name={self._shared_memory}"),
        ]
        self._headers = {name: self._key}
        environment = {**os.environ, "XSHARE_RESTARTS": str(restarts)}
        words = [word for part in command for word in (control if part == "@control" else [part])]
        try:
            self.process = subprocess.Popen(
                words, env=environment, start_new_session=True, preexec_fn=_end_with_parent
            )
        except FileNotFoundError:
            raise FileNotFoundError(f"{words[0]}: is not on PATH") from None

    def what_has_ended(self) -> str:
        """The server, or a process of a model that it had; "" where all of them run."""
        if self.process.poll() is not None:
            return f"the server has ended with code {self.process.returncode}"
        children = _children()
        running = {pid for group in children.values() for pid, _, state in group if state not in "ZX"}
        lost = self._stubs - running
        if lost:
            return f"process {lost.pop()} of a model has ended"
        self._stubs |= set(_stubs(children, self.process.pid)) & running
        if not self.was_ready:
            self.was_ready = self._call("GET", "/v2/health/ready")[0] == 200
            if self.was_ready:
                _say("the server is ready")
        return ""

    def unload(self) -> Iterator[None]:
        """Unloads one model after the other; a step per look at what is left to do."""
        for model in self._models:
            self._call("POST", f"/v2/repository/models/{model}/unload")
            while self._state(model) not in ("UNAVAILABLE", ""):
                yield

    def stop(self) -> bool:
        """True where it ended by itself, and well."""
        with suppress(ProcessLookupError):
            self.process.terminate()
        try:
            code = self.process.wait(EXIT_TIMEOUT + 5)
        except subprocess.TimeoutExpired:
            code = -1
        self.kill()
        return code == 0

    def kill(self) -> None:
        """End what is left of it, wherever its processes went: they hold the GPUs' memory. And its shared
        memory."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        _kill_children()
        for region in Path("/dev/shm").glob(f"{self._shared_memory}*"):
            region.unlink(missing_ok=True)

    def _state(self, model: str) -> str:
        """READY, UNLOADING, ...; "" where the server does not say."""
        status, body = self._call("POST", "/v2/repository/index")
        states = {entry["name"]: entry.get("state", "UNAVAILABLE") for entry in json.loads(body or b"[]")}
        return str(states.get(model, "")) if status == 200 else ""

    def _call(self, method: str, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self._url, timeout=5)
        try:
            connection.request(method, path, headers=self._headers)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()


def _end_with_parent() -> None:
    """Of this process, before it becomes the server: a supervisor that is killed leaves none behind."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _adopt_orphans() -> None:
    """What processes of the server start, in sessions of their own too (MPI's daemons and ranks, the model's
    process), become children of this process when their parents end."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _kill_children() -> None:
    """All children of this process, and theirs, for all of which it is the parent in the end."""
    deadline = time.monotonic() + EXIT_TIMEOUT  # one that waits for a device may not even be killed
    while time.monotonic() < deadline:
        for pid, _, _ in _children().get(os.getpid(), ()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.01)


def _children() -> dict[int, list[tuple[int, str, str]]]:
    """All processes by their parent: number, name, state."""
    children: dict[int, list[tuple[int, str, str]]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it has just ended
                head, _, rest = (entry / "stat").read_text(errors="replace").rpartition(")")
                state, parent = rest.split()[:2]
                children.setdefault(int(parent), []).append((int(entry.name), head.partition("(")[2], state))
    return children


def _stubs(children: dict[int, list[tuple[int, str, str]]], root: int) -> Iterator[int]:
    """The Python model processes below `root`. What one of them starts has its name until it becomes what it
    is to be, and is none."""
    left = [root]
    while left:
        for pid, name, _ in children.get(left.pop(), ()):
            if name == _STUB:
                yield pid
            else:
                left.append(pid)


class Supervisor:
    """Keeps one server running until a signal comes or restarts do not help."""

    def __init__(self, url: str, models: Sequence[str], command: Sequence[str]) -> None:
        self._arguments = url, models, command
        self._drain_seconds = _number("DRAIN_SECONDS", 60)  # before it is needed
        self._limit = int(_number("RESTARTS", 5))
        self._signals = 0
        self._starts: deque[float] = deque()
        self._restarts = 0
        self._was_ever_ready = False

    def run(self) -> int:
        """The exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        _adopt_orphans()
        while True:
            server = Server(*self._arguments, self._restarts)
            try:
                while not (ended := server.what_has_ended()) and not self._signals:
                    time.sleep(POLL)
                self._was_ever_ready |= server.was_ready
                if self._signals:
                    return 0 if self._drain(server) else 1
                time.sleep(LAST_ANSWERS)
            finally:
                server.kill()
            if not self._was_ever_ready:
                _say(f"{ended}, before the server was ready")
                return 1
            if not self._may_restart():
                _say(f"{ended}, {self._limit} restarts within {RESTART_WINDOW:.0f} s did not help")
                return 1
            pause = min(2.0 ** (len(self._starts) - 1), LONGEST_PAUSE)
            _say(f"{ended}: starting the server again in {pause:.0f} s")
            if not self._sleep(pause):
                return 0

    def _on_signal(self, _number: int, _frame: object) -> None:
        self._signals += 1

    def _drain(self, server: Server) -> bool:
        """True where every request was finished."""
        deadline = time.monotonic() + self._drain_seconds
        is_done = True
        if server.was_ready:
            for _ in server.unload():
                if time.monotonic() > deadline or self._signals > 1 or server.process.poll() is not None:
                    _say("not all requests ended in time: the rest is cut off")
                    is_done = False
                    break
                time.sleep(POLL)
        return is_done and server.stop()  # else it is killed

    def _may_restart(self) -> bool:
        now = time.monotonic()
        while self._starts and now - self._starts[0] > RESTART_WINDOW:
            self._starts.popleft()
        self._starts.append(now)
        self._restarts += 1
        return len(self._starts) <= self._limit

    def _sleep(self, seconds: float) -> bool:
        """False where a signal came meanwhile."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._signals:
            time.sleep(POLL)
        return not self._signals


def _number(name: str, default: float) -> float:
    """An environment variable, from 0 on. Raises ValueError, naming it."""
    text = os.environ.get(name, str(default))
    with suppress(ValueError):
        if 0 <= (value := float(text)) < float("inf"):
            return value
    raise ValueError(f"{name}={text}: must be a number from 0 on")


def _say(message: str) -> None:
    print(f"xshare: {message}", file=sys.stderr, flush=True)


def main() -> None:
    """The command of this module."""
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    if split < 3 or split + 1 >= len(sys.argv):
        raise SystemExit("usage: python3 -m xshare_trtllm.serving.supervise HOST:PORT MODEL... -- COMMAND...")
    try:
        code = Supervisor(sys.argv[1], sys.argv[2:split], sys.argv[split + 1 :]).run()
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"xshare: {error}") from None
    raise SystemExit(code)


if __name__ == "__main__":
    main()
