"""A server that runs: found by its URL, the pid of one of its processes or its configuration, and judged."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xshare_trtllm.trtllm.run_folder import RunFolder, is_alive
from xshare_trtllm.trtllm.startup import VARIABLE


@dataclass(frozen=True)
class RankState:
    """One line of `xshare doctor --serving`."""

    rank: int
    ok: bool
    found: str


def find(server: str) -> dict[str, Any]:
    """The status of a server.

    server  http://HOST:PORT of trtllm-serve, the pid of one of its processes on this host, or its YAML file

    Raises RuntimeError where there is none, saying what was looked at.
    """
    if server.startswith(("http://", "https://")):
        return _by_url(server.rstrip("/") + "/xshare")
    if server.isdigit():
        return RunFolder(_config_of(int(server))).status()
    return RunFolder(Path(server).resolve()).status()


def _by_url(url: str) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            values: dict[str, Any] = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{url}: {error}; this server runs without XShare") from error
    except (OSError, ValueError) as error:
        raise RuntimeError(f"{url}: {error}") from error
    return values


def _config_of(pid: int) -> Path:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError as error:
        raise RuntimeError(f"pid {pid}: {error.strerror}") from error
    prefix = f"{VARIABLE}=".encode()
    values = [variable[len(prefix) :] for variable in variables if variable.startswith(prefix)]
    if not values:
        raise RuntimeError(f"pid {pid}: was not started with {VARIABLE}, so it runs without XShare")
    return Path(values[0].decode())


def judge(status: dict[str, Any]) -> list[RankState]:
    """Every rank of a status, in order."""
    missing = [RankState(rank, False, "no acknowledgement") for rank in status["missing"]]
    present = []
    for report in status["ranks"]:
        problem = rank_problem(report)
        present.append(RankState(report["rank"], problem is None, problem or _in_words(report)))
    return sorted([*missing, *present], key=lambda state: state.rank)


def rank_problem(report: dict[str, Any]) -> str | None:
    """Why a rank does not route by XShare although it has acknowledged; None where it does."""
    if not is_alive(report):
        return f"pid {report['pid']} on {report['host']} has ended"
    silent = report["statistics"]["silent_layers"]
    if silent:
        return (
            f"{report['statistics']['recent_steps']} steps without XShare in layers {silent}: a CUDA graph "
            "was captured without it"
        )
    return None


def _in_words(report: dict[str, Any]) -> str:
    counts = report["statistics"]
    mode = report["setting"]["mode"]
    words = f"{mode}, {report['layers']} MoE layers, {', '.join(report['backends'])}, pid {report['pid']}"
    if report["refused"] is not None:
        words += f", its file is refused: {report['refused']}"
    if not counts["rows"]:
        return f"{words}, no step yet"
    before, after = counts["experts_before"], counts["experts_after"]
    saved = f", experts {100 * (after - before) / before:+.1f} %" if before else ""
    kept = (
        f", utility kept {counts['kept_utility'] / counts['total_utility']:.4f}"
        if counts["total_utility"]
        else ""
    )
    return f"{words}, {counts['steps']} steps{saved}{kept}, {time.time() - report['time']:.0f} s ago"
