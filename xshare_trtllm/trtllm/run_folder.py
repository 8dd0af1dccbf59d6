"""What the processes of one server tell one another, in small files beside its configuration.

A server is started with a YAML file, `xshare.yaml`; its processes write to the folder `xshare.run` beside it:
`server.json` by the parent, `HOST-PID.json` by each process that loads a model. The file has to be on a file
system that all of them share, as the checkpoint is, so no port has to be open between hosts. Every file is
renamed into place whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from xshare_trtllm import __version__
from xshare_trtllm.report import write_json

WAIT_SECONDS = 120.0  # for the last worker, once TensorRT-LLM says that they are ready
_POLL_SECONDS = 0.05


def settings_hash(values: dict[str, Any]) -> str:
    """12 hex digits for the content of a configuration file."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


class RunFolder:
    """The folder of the server whose configuration is `config_path`."""

    def __init__(self, config_path: Path) -> None:
        self.config_path = config_path
        self.path = config_path.with_suffix(".run")

    # ---- A process that loads a model ----

    def report(self, **values: Any) -> None:
        """Writes this process's report, in place of the one before."""
        host, pid = socket.gethostname(), os.getpid()
        run = (self.server() or {}).get("run")
        about = {"run": run, "host": host, "pid": pid, "time": time.time(), "version": __version__}
        write_json(self.path / f"{host}-{pid}.json", about | values)

    # ---- The parent ----

    def begin(self, world_size: int, config_hash: str) -> str:
        """The parent is about to start its workers. Returns what tells this run from earlier ones.

        Raises RuntimeError where another server runs with this file.
        """
        before = self.server()
        if before is not None and before["pid"] != os.getpid() and is_alive(before):
            raise RuntimeError(
                f"{self.config_path}: the server with pid {before['pid']} runs with this file; give each "
                "server a file of its own"
            )
        for report in self.reports():
            if not is_alive(report):
                Path(report["path"]).unlink(missing_ok=True)
        run = uuid.uuid4().hex
        values = {
            "run": run,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.time(),
            "world_size": world_size,
            "version": __version__,
            "config_hash": config_hash,
        }
        write_json(self.path / "server.json", values)
        return run

    def wait(self, timeout: float = WAIT_SECONDS) -> list[dict[str, Any]]:
        """Until every rank of this run has XShare in its model. Returns their reports by rank.

        Raises RuntimeError naming the ranks that are missing and why, as far as can be told, as soon as one
        has failed or differs, and after `timeout` seconds.
        """
        server = self.server()
        assert server is not None, "begin() first"
        deadline = time.monotonic() + timeout
        while True:
            by_rank, problem = self._ranks(server)
            if problem is not None:
                raise RuntimeError(f"XShare: {problem}; the server is stopped rather than run without it")
            missing = [rank for rank in range(server["world_size"]) if rank not in by_rank]
            if not missing:
                return [by_rank[rank] for rank in sorted(by_rank)]
            if time.monotonic() > deadline:
                why = self._why_missing(server)
                raise RuntimeError(
                    f"XShare: {_ranks_of(missing)} of {server['world_size']} did not acknowledge within "
                    f"{timeout:g} s: {why}; the server is stopped rather than run without it"
                )
            time.sleep(_POLL_SECONDS)

    def _ranks(self, server: dict[str, Any]) -> tuple[dict[int, dict[str, Any]], str | None]:
        """The acknowledgements of this run by rank, and what is wrong with one of them."""
        by_rank: dict[int, dict[str, Any]] = {}
        for report in self.reports():
            if report.get("run") != server["run"]:
                continue
            where = f"pid {report['pid']} on {report['host']}"
            if report["state"] == "failed":
                return by_rank, f"{where} could not put it in: {report['error']}"
            if report["state"] != "on":
                continue
            for key in ("version", "config_hash"):
                if report[key] != server[key]:
                    return by_rank, (
                        f"rank {report['rank']} ({where}) has {key} {report[key]}, the server {server[key]}"
                    )
            by_rank[report["rank"]] = report
        return by_rank, None

    def _why_missing(self, server: dict[str, Any]) -> str:
        others = [report for report in self.reports() if report["pid"] != server["pid"]]
        waiting = [report for report in others if report["state"] == "waiting"]
        dead = [report for report in waiting if not is_alive(report)]
        if dead:
            gone = ", ".join(f"pid {report['pid']} on {report['host']}" for report in dead)
            return f"{gone} ended before its model was loaded, see its log"
        if waiting:
            slow = ", ".join(f"pid {report['pid']} on {report['host']}" for report in waiting)
            return f"{slow} has not loaded its model, or not with TensorRT-LLM's PyTorch backend"
        return (
            "no such process has come by here: either TRTLLM_XSHARE or xshare_startup.pth does not reach it "
            f"(another Python environment, python -S), or its host does not share {self.path}"
        )

    # ---- Anybody ----

    def server(self) -> dict[str, Any] | None:
        """What the parent wrote, None before."""
        return _read(self.path / "server.json")

    def reports(self) -> list[dict[str, Any]]:
        """Of all processes, with the `path` of each file, by host and pid."""
        found: list[dict[str, Any]] = []
        for path in sorted(self.path.glob("*-*.json")):
            report = _read(path)
            if report is not None:
                found.append(report | {"path": str(path)})
        return found

    def status(self) -> dict[str, Any]:
        """The server and its ranks, as `/xshare` and `xshare doctor --serving` show them.

        Raises RuntimeError where no server has run with this file.
        """
        server = self.server()
        if server is None:
            raise RuntimeError(f"{self.path}: no server has run with {self.config_path.name}")
        by_rank, problem = self._ranks(server)
        missing = [rank for rank in range(server["world_size"]) if rank not in by_rank]
        return {
            "config": str(self.config_path),
            "server": server,
            "ranks": [by_rank[rank] for rank in sorted(by_rank)],
            "missing": missing,
            "problem": problem,
        }


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # replaced or removed meanwhile
        return None
    return values


def is_alive(report: dict[str, Any]) -> bool:
    """Whether the process of a report runs; taken to be so on another host, where it cannot be seen."""
    if report["host"] != socket.gethostname():
        return True
    try:
        state = Path(f"/proc/{report['pid']}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except OSError:
        return False
    return state != b"Z"  # ended, and nobody has asked for its exit code yet


def _ranks_of(ranks: Iterable[int]) -> str:
    numbers = list(ranks)
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
