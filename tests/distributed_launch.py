"""Runs one function in several real processes, in bounded time."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

# A fork server that has torch: ranks start at once, and no rank is forked from a process with threads.
_context = multiprocessing.get_context("forkserver")
_preloaded = ["torch", "torch.distributed", "xshare_trtllm.distributed"]
_context.set_forkserver_preload(_preloaded)


def preload(module: str) -> None:
    """Have the fork server import it too, unless it runs already."""
    _preloaded.append(module)
    _context.set_forkserver_preload(_preloaded)


def launch(world: int, function: Callable[..., Any], *arguments: Any, seconds: float = 60) -> list[Any]:
    """`function(rank, *arguments)` in `world` processes: what each returned (plain values), None where
    it ended without.

    Raises AssertionError with the traceback of a rank that raised, or after `seconds`, naming the ranks that
    still ran.
    """
    pipes, processes = [], []
    for rank in range(world):
        receiver, sender = _context.Pipe(duplex=False)
        process = _context.Process(target=_run, args=(sender, function, rank, arguments), daemon=True)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        return _collect(pipes, seconds)
    finally:
        for process in processes:
            process.join(timeout=1)
            process.kill()
            process.join(timeout=5)


def _run(sender: Connection, function: Callable[..., Any], rank: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        sender.send((function(rank, *arguments), None))
    except BaseException:
        sender.send((None, traceback.format_exc()))


def _collect(pipes: list[Connection], seconds: float) -> list[Any]:
    results: list[Any] = [None] * len(pipes)
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline = time.monotonic() + seconds
    errors = []
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        assert ready, (
            f"ranks {sorted(waiting.values())} of {len(pipes)} run for more than {seconds} s\n"
            + "".join(errors)
        )
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                results[rank], error = pipe.recv()
            except EOFError:
                continue
            if error:
                errors.append(f"rank {rank} of {len(pipes)}:\n{error}")
    assert not errors, "\n".join(errors)
    return results


def join_group(
    rank: int, world: int, folder: str, name: str = "group", seconds: float = 30
) -> dist.ProcessGroup:
    """A gloo group of `world` ranks that meet through a file in `folder`."""
    store = dist.FileStore(f"{folder}/{name}", world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=seconds)
    )
    group = dist.group.WORLD
    assert group is not None
    return group
