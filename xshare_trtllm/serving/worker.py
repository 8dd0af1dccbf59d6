"""The engine in a process of its own. Where that process dies, requests under way end with an error, a new
process starts, and later requests are served.

Triton 2.51 does not do this by itself: when the process of a decoupled Python model is killed, its requests
never end and the model serves no more until it is unloaded and loaded again.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection, Pipe
from typing import TYPE_CHECKING, Any

from xshare_trtllm.serving.generation import Busy, Chunk, OnChunk, Request
from xshare_trtllm.serving.metrics import Statistics, add_layers

if TYPE_CHECKING:
    from xshare_trtllm.serving.engine import Generation

START_TIMEOUT = 300.0  # seconds for a model to load
STOP_TIMEOUT = 5.0  # seconds for the model's process to end when asked to; then it is killed
FRUITLESS_STARTS = 3  # so many deaths before the model was loaded, and no other start is tried


class Worker:
    """An `Engine` in a child process, by the settings of `load_engine`. Same `submit`, `close` and
    `statistics`; chunks arrive on a thread of this object.

    Raises RuntimeError where the model does not load, with the reason.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._open: dict[int, OnChunk] = {}
        self._is_ready = threading.Event()
        self._is_closing = False
        self._failure = ""
        self.vocabulary = 0  # of the model, once it is ready
        self._restarts = 0
        self._ended = Statistics()  # of the processes that died
        self._current = Statistics()
        self._start()
        self._thread = threading.Thread(target=self._read, name="xshare-worker", daemon=True)
        self._thread.start()
        is_in_time = self._is_ready.wait(START_TIMEOUT)
        if self._failure or not is_in_time:
            self.close()
            raise RuntimeError(self._failure or f"the model did not load within {START_TIMEOUT:.0f} s")

    def submit(self, request: Request, on_chunk: OnChunk) -> int:
        """Hand a request to the engine; what it refuses arrives as a chunk. Returns the number that `cancel`
        takes. Raises Busy where the process is just dying."""
        number = next(self._numbers)
        with self._lock:
            if self._failure or self._is_closing:
                raise Busy(self._failure or "the server stopped the model")
            self._open[number] = on_chunk
            try:
                self._connection.send(("submit", number, request))
            except OSError:
                del self._open[number]
                raise Busy("the model's process has ended; another one starts: try again") from None
        return number

    def cancel(self, number: int) -> None:
        """End a request; harmless where it has ended."""
        with self._lock:
            if number in self._open:
                with suppress(OSError):  # its process has died, and the request with it
                    self._connection.send(("cancel", number))

    @property
    def pid(self) -> int:
        """The model's process."""
        return self._process.pid

    @property
    def statistics(self) -> Statistics:
        return _sum(self._ended, self._current, self._restarts)

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

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        command = [sys.executable, "-m", "xshare_trtllm.serving.worker", str(theirs.fileno())]
        # Where this process was not started by its own sys.executable (in Triton), sys.path is not inherited.
        path = os.pathsep.join(entry for entry in sys.path if entry)
        environment = {**os.environ, "PYTHONPATH": path}
        # A session of its own: what ends the server's process group (Ctrl-C) is not a death to recover from.
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=environment, start_new_session=True
        )
        theirs.close()
        with suppress(OSError):  # it has died already, which the reader finds
            self._connection.send(self._settings)

    def _read(self) -> None:
        """Until the end: the messages of one process after another."""
        fruitless = 0
        while True:
            try:
                while True:
                    self._take(*self._connection.recv())
            except (EOFError, OSError):
                pass
            self._process.wait()
            fruitless = 0 if self._is_ready.is_set() else fruitless + 1
            with self._lock:
                lost, self._open = self._open, {}
                self._ended, self._current = _sum(self._ended, self._current), Statistics()
                if fruitless == FRUITLESS_STARTS and not self._failure:
                    self._failure = f"the model's process ended {fruitless} times before the model was loaded"
                is_over = self._is_closing or bool(self._failure)
                if not is_over:
                    self._is_ready.clear()
                    self._restarts += 1
                    self._start()
            error = "the server stopped the model" if is_over else "the model's process ended; try again"
            for on_chunk in lost.values():
                on_chunk(Chunk(finish="error", error=error))
            if is_over:
                self._is_ready.set()
                return

    def _take(self, kind: str, *values: Any) -> None:
        if kind == "ready":
            self.vocabulary = values[0]
            self._is_ready.set()
        elif kind == "failed":
            self._failure = f"the model does not load: {values[0]}"
        elif kind == "step":
            chunks, statistics = values
            self._current = statistics or self._current
            for number, chunk in chunks:
                self._hand_on(number, chunk)

    def _hand_on(self, number: int, chunk: Chunk) -> None:
        with self._lock:
            on_chunk = self._open.pop(number, None) if chunk.finish else self._open.get(number)
        if on_chunk is not None:
            on_chunk(chunk)


def _sum(one: Statistics, other: Statistics, restarts: int = 0) -> Statistics:
    """Totals of two processes, one after the other."""
    layers = add_layers(one.layers, other.layers)
    reasons = {**one.finished, **other.finished}
    finished = {reason: one.finished.get(reason, 0) + other.finished.get(reason, 0) for reason in reasons}
    tokens = one.output_tokens + other.output_tokens
    return replace(other, layers=layers, finished=finished, output_tokens=tokens, restarts=restarts)


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
