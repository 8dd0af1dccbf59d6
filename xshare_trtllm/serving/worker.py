"""The engine in a process of its own: what works hard and may run out of memory is not Triton's process.

Where it dies, the requests under way end with an error and `on_death` is called; nothing is started again
here, since only a new server is ready in Triton's eyes (`supervise.py`).
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, Pipe
from typing import TYPE_CHECKING, Any

from xshare_trtllm.serving.generation import Busy, Chunk, OnChunk, Request
from xshare_trtllm.serving.metrics import Statistics
from xshare_trtllm.trtllm.setting import Setting

if TYPE_CHECKING:
    from xshare_trtllm.serving.engine import Generation

START_TIMEOUT = 300.0  # seconds for a model to load
STOP_TIMEOUT = 5.0  # seconds for the model's process to end when asked to; then it is killed


class Worker:
    """An `Engine` in a child process, by the settings of `load_engine`. Same `submit`, `close` and
    `statistics`; chunks arrive on a thread of this object.

    on_death  called on that thread when the process has ended unasked, after its requests got their errors

    Raises RuntimeError where the model does not load, with the reason.
    """

    def __init__(self, settings: dict[str, Any], on_death: Callable[[], None] = lambda: None) -> None:
        self._on_death = on_death
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._open: dict[int, OnChunk] = {}
        self._has_loaded = threading.Event()  # or has failed to
        self._is_over = False
        self._failure = "the model's process ended before the model was loaded"
        self._is_closing = False
        self.vocabulary = 0
        self.statistics = Statistics()
        setting = settings["setting"]
        self.setting = None if setting is None else Setting.from_dict(setting)
        self._start(settings)
        self._thread = threading.Thread(target=self._read, name="xshare-worker", daemon=True)
        self._thread.start()
        if not self._has_loaded.wait(START_TIMEOUT):
            self._failure = f"the model did not load within {START_TIMEOUT:.0f} s"
        if not self.vocabulary:
            self.close()
            raise RuntimeError(self._failure)

    def submit(self, request: Request, on_chunk: OnChunk) -> int:
        """Hand a request to the engine; what it refuses arrives as a chunk. Returns the number that `cancel`
        takes. Raises Busy where the process has ended."""
        number = next(self._numbers)
        with self._lock:
            if self._is_over or self._is_closing:
                raise Busy("the model's process has ended: try again later")
            self._open[number] = on_chunk
            with suppress(OSError):  # it has just died: the reader ends this request with the others
                self._connection.send(("submit", number, request))
        return number

    def cancel(self, number: int) -> None:
        """End a request; harmless where it has ended."""
        with self._lock:
            if number in self._open:
                with suppress(OSError):  # its process has died, and the request with it
                    self._connection.send(("cancel", number))

    def configure(self, setting: Setting) -> None:
        """Another setting from the next step on. Raises Busy where the process has ended."""
        with self._lock:
            if self._is_over or self._is_closing:
                raise Busy("the model's process has ended: try again later")
            with suppress(OSError):  # it has just died, and the reader will find it
                self._connection.send(("configure", -1, setting.to_dict()))
        self.setting = setting

    @property
    def pid(self) -> int:
        """The model's process."""
        return self._process.pid

    def close(self) -> None:
        with self._lock:
            self._is_closing = True
            with suppress(OSError):  # it may be dead already
                self._connection.send(("close", -1))
        try:
            self._process.wait(timeout=STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._thread.join(timeout=STOP_TIMEOUT)

    def _start(self, settings: dict[str, Any]) -> None:
        self._connection, theirs = Pipe()
        command = [sys.executable, "-m", "xshare_trtllm.serving.worker", str(theirs.fileno())]
        # Where this process was not started by its own sys.executable (in Triton), sys.path is not inherited.
        path = os.pathsep.join(entry for entry in sys.path if entry)
        environment = {**os.environ, "PYTHONPATH": path}
        # A session of its own: what ends the server's process group (Ctrl-C) lets it finish what it has.
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=environment, start_new_session=True
        )
        theirs.close()
        with suppress(OSError):  # it has died already, which the reader finds
            self._connection.send(settings)

    def _read(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                self._take(*self._connection.recv())
        self._process.wait()
        with self._lock:
            self._is_over = True
            lost, self._open = self._open, {}
        error = "the server stopped the model" if self._is_closing else "the model's process ended; try again"
        for on_chunk in lost.values():
            on_chunk(Chunk(finish="error", error=error))
        self._has_loaded.set()
        if self.vocabulary and not self._is_closing:
            self._on_death()

    def _take(self, kind: str, *values: Any) -> None:
        if kind == "ready":
            self.vocabulary = values[0]
            self._has_loaded.set()
        elif kind == "failed":
            self._failure = f"the model does not load: {values[0]}"
        elif kind == "step":
            chunks, statistics = values
            self.statistics = statistics or self.statistics
            for number, chunk in chunks:
                self._hand_on(number, chunk)

    def _hand_on(self, number: int, chunk: Chunk) -> None:
        with self._lock:
            on_chunk = self._open.pop(number, None) if chunk.finish else self._open.get(number)
        if on_chunk is not None:
            on_chunk(chunk)


def main() -> None:
    """The child: an engine, driven through the connection whose file descriptor is the argument."""
    connection = Connection(int(sys.argv[1]))
    settings = connection.recv()
    chunks: list[tuple[int, Chunk]] = []
    generations: dict[int, Generation] = {}
    known = threading.Lock()  # between an entry of `generations` and the end of that sequence
    sending = threading.Lock()
    sent = Statistics()

    def send(*message: Any) -> None:
        try:
            with sending:
                connection.send(message)
        except OSError:
            os._exit(0)  # the parent is gone, and with it every reader

    def after_step() -> None:
        nonlocal sent
        news, sent = (None if engine.statistics is sent else engine.statistics), engine.statistics
        send("step", chunks, news)
        chunks.clear()

    def keep(number: int, chunk: Chunk) -> None:
        chunks.append((number, chunk))
        if chunk.finish:
            with known:
                generations.pop(number, None)

    from xshare_trtllm.serving.engine import load_engine

    try:
        engine = load_engine(settings, after_step)
    except Exception as error:  # whatever it is, the parent has to tell the user
        send("failed", f"{type(error).__name__}: {error}")
        return
    send("ready", engine.vocabulary)
    while True:
        try:
            kind, number, *values = connection.recv()
        except (EOFError, OSError):
            os._exit(0)
        if kind == "close":
            engine.close()
            os._exit(0)  # at once: there is nothing to keep
        if kind == "configure":
            engine.configure(Setting.from_dict(values[0]))
            continue
        if kind == "cancel":
            with known:
                generation = generations.get(number)
            if generation is not None:
                generation.cancel()
            continue
        try:
            with known:
                generations[number] = engine.submit(values[0], partial(keep, number))
        except (ValueError, Busy) as error:
            send("step", [(number, Chunk(finish="error", error=str(error)))], None)


if __name__ == "__main__":
    main()
