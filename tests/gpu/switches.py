"""The kernels with one feature of the launches off at a time, so that a failure is bisected at once.

    python tests/gpu/switches.py        prints a table; the exit status is the number of rows that failed

The library reads the switches when it is loaded, so that each row is a process of its own: a small subset of
test_route_cuda.py, in which every kind of launch occurs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CORRECTNESS = Path(__file__).resolve().parent / "test_route_cuda.py"
SUBSET = (
    "chain or awaited or first_call or captured_graph or"
    " (equals_the_host and (gpt-oss or v3 or largest) and (-1] or -16] or -64] or -100] or -256] or -700]))"
)
SECONDS = 90  # of one row; all run at once
OFF = {"XSHARE_PROGRAMMATIC_LAUNCH": "0"}
SWITCHES: dict[str, dict[str, str]] = {
    "as it is": {},
    "no programmatic launch": OFF,
    **{f"clusters of at most {size}": {"XSHARE_CLUSTER_SIZE": str(size)} for size in (1, 2, 4, 8, 16)},
    "neither": OFF | {"XSHARE_CLUSTER_SIZE": "1"},
}


@dataclass(frozen=True)
class Outcome:
    name: str
    passed: bool
    said: str  # pytest's last line, and the tests that failed

    def __str__(self) -> str:
        return f"{self.name:28} {'PASS' if self.passed else 'FAIL'}  {self.said}"


def environment_of(name: str) -> dict[str, str]:
    """This process's, with the switches of that row and no others."""
    rest = {
        k: v for k, v in os.environ.items() if k not in ("XSHARE_PROGRAMMATIC_LAUNCH", "XSHARE_CLUSTER_SIZE")
    }
    return rest | SWITCHES[name]


def run(name: str) -> Outcome:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rf",
        "-p",
        "no:cacheprovider",
        str(CORRECTNESS),
        "-k",
        SUBSET,
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, check=False, env=environment_of(name)
        )
    except subprocess.TimeoutExpired:
        return Outcome(name, False, f"no end within {SECONDS} s")
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["said nothing"]
    failed = re.findall(r"^FAILED \S+?::(\S+)", done.stdout, re.MULTILINE)
    return Outcome(name, done.returncode == 0, "; ".join([lines[-1], *failed[:4]]))


def run_all() -> list[Outcome]:
    with ThreadPoolExecutor(len(SWITCHES)) as pool:
        return list(pool.map(run, SWITCHES))


def main() -> None:
    outcomes = run_all()
    for outcome in outcomes:
        print(outcome)
    sys.exit(sum(not outcome.passed for outcome in outcomes))


if __name__ == "__main__":
    main()
