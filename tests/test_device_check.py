"""build_scripts/device_check.sh without a GPU: what it starts are stand-ins (contract tests).

What they stand in for is run on the host in tests/test_gpu_code_on_host.py."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
TARGETS = runpy.run_path(str(BENCHMARKS / "route_targets.py"))
GOOD = {
    "xshare_us": 5.0,
    "over_plain": 1.2,
    "over_public": 1.3,
    "over_eager": 0.05,
    "in_model_us": 6.0,
    "in_model_over_plain": 1.1,
    "in_model_over_public": 1.4,
}
# What the stand-in for Python does in place of each step; a test changes a line of it. DO_... is bash.
STAND_IN = r"""#!/bin/bash
echo "python $*" >>"$RECORD"
case "$*" in
*get_device_capability*) name=device ;;
*importlib*) name=has ;;
*"pip install"*) name=pip ;;
*route_targets.py*) exec "$REAL_PYTHON" "$@" ;;
*gpu/switches.py*) name=bisect ;;
*"--compiled"*) name=compiled ;;
*"--rows deciding"*) name=deciding ;;
*"--rows rest"*) name=rest ;;
*moe_layer_gpu.py*) name=moe ;;
*"-m pytest"*) name=${!#} name=${name##*test_} name=${name%.py} ;;
esac
action=DO_$name
eval "${!action:-true}"
"""
TOOLS = (
    "bash",
    "env",
    "dirname",
    "head",
    "tail",
    "cat",
    "cp",
    "grep",
    "mkdir",
    "rm",
    "nproc",
    "timeout",
    "tee",
    "sleep",
)
DEFAULTS = {
    "DO_device": "echo 90-real 13",
    "DO_deciding": 'cp "$GOOD_ROWS" "$results/route_gpu.json"',
    "DO_rest": "echo the other rows",
    "DO_cmake": "[[ $1 != --build ]] || echo >build/cuda/libxshare.so >build/cuda/libxshare_cuda.so",
    "XSHARE_CHECK_SECONDS": "60",
}


class Done:
    def __init__(self, code: int, said: str, calls: str, results: Path, seconds: float) -> None:
        self.code, self.said, self.calls, self.results, self.seconds = code, said, calls, results, seconds

    def last(self, word: str) -> str:
        """What the summary says behind `word`."""
        return re.findall(rf"^== {word}: (.*)$", self.said, re.MULTILINE)[-1]

    def verdict(self) -> str:
        return re.findall(r"^VERDICT: (.*)$", self.said, re.MULTILINE)[0]


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., Done]:
    """Runs the script in a tree of its own, on a PATH of stand-ins, with the changes to DEFAULTS given."""
    tree, tools = tmp_path / "tree", tmp_path / "bin"
    for folder in (tree / "build_scripts", tools):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "build_scripts" / "device_check.sh", tree / "build_scripts")
    (tree / "benchmarks").symlink_to(BENCHMARKS)
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found is not None
        (tools / tool).symlink_to(found)
    texts = {
        "python": STAND_IN,
        "cmake": '#!/bin/bash\necho "cmake $*" >>"$RECORD"\neval "$DO_cmake"\n',
        "compute-sanitizer": '#!/bin/bash\neval "${DO_sanitizer:-true}"\n',
    }
    for name, text in texts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    good = tmp_path / "good.json"
    good.write_text(json.dumps({"results": dict.fromkeys(TARGETS["DECIDING"], GOOD)}))

    def run(without: str = "", wheels: bool = False, **changes: str) -> Done:
        if without:
            (tools / without).unlink()
        if wheels:
            (tree / "build" / "wheels").mkdir(parents=True)
        environment = {
            "PATH": str(tools),
            "PYTHON": "python",
            "REAL_PYTHON": sys.executable,
            "GOOD_ROWS": str(good),
        }
        environment |= {"RECORD": str(tmp_path / "calls")} | DEFAULTS | changes
        start = time.monotonic()
        done = subprocess.run(
            [str(tree / "build_scripts" / "device_check.sh"), str(tmp_path / "results")],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
            env=environment,
        )
        seconds = time.monotonic() - start
        said, calls = done.stdout + done.stderr, (tmp_path / "calls").read_text()
        return Done(done.returncode, said, calls, tmp_path / "results", seconds)

    return run


def test_contract_verdict_comes_first(check: Callable[..., Done]) -> None:
    done = check()
    assert done.code == 0, done.said
    assert done.verdict() == "PASS"
    before, after = done.said.split("VERDICT: PASS\n", 1)
    steps = re.findall(r"^== (\w[\w ]*): passed", before, re.MULTILINE)
    assert steps == ["build for 90", "route_cuda", "deciding_rows", "targets"]
    for later in (
        "no_spills",
        "other_rows",
        "moe_layer",
        "route_switches",
        "ops_cuda",
        "memcheck",
        "compiled_pytorch",
    ):
        assert f"== {later}: passed" in after, done.said
    assert (done.last("failed"), done.last("cut off by the clock")) == ("nothing", "nothing")
    assert "-DCMAKE_CUDA_ARCHITECTURES=90-real" in done.calls
    files = set(re.findall(r"(?:tests|benchmarks)/\S+\.py", done.calls))
    assert len(files) == 8 and [name for name in files if not (ROOT / name).is_file()] == []
    assert "--compiled" not in done.calls.split("moe_layer_gpu")[0], "compiled before everything else"


def test_contract_ratios_stand_beside_the_verdict(check: Callable[..., Done]) -> None:
    done = check()
    kept = (done.results / "verdict.txt").read_text()
    assert kept.startswith("VERDICT: PASS\n") and kept in done.said
    for name in TARGETS["DECIDING"]:
        assert re.search(rf"^{re.escape(name)} .* 5\.00 .*1\.20 ", kept, re.MULTILINE), kept
    assert "in a model at most 1.5x the best public kernel: worst 1.4" in kept


def test_contract_wrong_output_is_bisected_and_fails(check: Callable[..., Done]) -> None:
    done = check(DO_route_cuda="exit 1", DO_bisect="echo neither PASS; exit 7")
    assert done.code == 2, done.said
    assert done.verdict() == "FAIL: route_cuda, bisect" and done.last("failed") == "route_cuda, bisect"
    assert "neither PASS" in done.said.split("VERDICT")[0]
    assert "route_switches (bisect was the same)" in done.said
    assert "== deciding_rows: passed" in done.said, "the rows are worth having all the same"


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (lambda rows: rows["T=16 E=128 k=4"].update(xshare_us=9.0), "MISSED       at most 8 us at T=16"),
        (
            lambda rows: rows["T=16 E=384 k=8"].update(in_model_over_plain=1.9),
            "missed at 1 of 6, worst 1.9 at T=16",
        ),
        (lambda rows: rows["T=1 E=128 k=4"].pop("over_public"), "not measured at T=1 E=128 k=4"),
        (lambda rows: rows.pop("T=256 E=128 k=4"), "not measured at T=256 E=128 k=4"),
    ],
    ids=("slow", "slow in a model", "no baseline", "no row"),
)
def test_contract_targets_decide(
    check: Callable[..., Done], tmp_path: Path, rows: Callable[[dict[str, Any]], Any], says: str
) -> None:
    results = {name: dict(GOOD) for name in TARGETS["DECIDING"]}
    rows(results)
    (tmp_path / "bad.json").write_text(json.dumps({"results": results}))
    done = check(GOOD_ROWS=str(tmp_path / "bad.json"))
    assert done.code == 1 and done.verdict() == "FAIL: targets" and says in done.said, done.said


def test_contract_failing_steps_are_named_and_counted(check: Callable[..., Done]) -> None:
    done = check(DO_moe="exit 3", DO_sanitizer="[[ $2 != racecheck ]]")
    assert done.code == 2 and done.verdict() == "PASS"
    assert done.last("failed") == "moe_layer, racecheck"
    assert "== moe_layer: FAILED (3)" in done.said


def test_contract_kept_within_its_time(check: Callable[..., Done]) -> None:
    """A benchmark that hangs, and does not end when it is asked to: its row stays, the rest is named."""
    hang = 'echo \'{"row": 1}\' >"$results/kept.json"; trap "" TERM; while :; do sleep 1; done'
    done = check(DO_rest=hang, XSHARE_CHECK_SECONDS="9")
    assert done.seconds < 9
    assert done.code == 0 and done.verdict() == "PASS", done.said
    assert (done.results / "kept.json").read_text() == '{"row": 1}\n'
    assert done.last("cut off by the clock").startswith("other_rows (cut off), moe_layer (not begun)")
    assert "memcheck (not begun)" in done.last("cut off by the clock")


def test_contract_no_time_for_a_verdict_is_a_failure(check: Callable[..., Done]) -> None:
    done = check(DO_deciding="sleep 60", XSHARE_CHECK_SECONDS="9")
    assert done.seconds < 9
    assert done.verdict() == "FAIL: deciding_rows (cut off), targets (not begun)" and done.code == 2, (
        done.said
    )


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"DO_device": "echo no driver >&2; exit 1"}, "FAIL: device"),
        ({"DO_cmake": "echo broken; exit 1"}, "FAIL: build for 90"),
    ],
)
def test_contract_ends_where_nothing_can_run(
    check: Callable[..., Done], changes: dict[str, str], verdict: str
) -> None:
    done = check(**changes)
    assert done.code == 1 and done.verdict() == verdict
    assert "-m pytest" not in done.calls and "route_gpu" not in done.calls


def test_contract_spills_fail_beside_the_verdict(check: Callable[..., Done]) -> None:
    spill = "    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads"
    done = check(DO_cmake=DEFAULTS["DO_cmake"] + f"; echo '{spill}'")
    assert done.code == 1 and done.verdict() == "PASS" and done.last("failed") == "no_spills"


def test_contract_what_is_missing_is_named(check: Callable[..., Done]) -> None:
    done = check(without="compute-sanitizer", DO_has="exit 1", DO_device="echo 80-real 12")
    assert done.code == 0 and done.verdict() == "PASS"
    summary = done.said.split("== skipped:\n")[1]
    for name in (
        "packages (no pytest, numpy",
        "ops_cuda (",
        "memcheck, racecheck, synccheck (",
        "plugin_enqueue (",
    ):
        assert f"     {name}" in summary, summary
    assert "moe_layer (needs compute capability 9.0)" in summary
    assert "the engine of aot_engine (needs tensorrt)" in summary
    assert "test_ops_cuda" not in done.calls and "pip" not in done.calls


def test_contract_wheels_are_installed_aside(check: Callable[..., Done]) -> None:
    done = check(wheels=True, DO_has="exit 1", DO_pip='[[ "$*" != *safetensors* ]]')
    calls = [line for line in done.calls.splitlines() if "pip install" in line]
    assert all("--no-index --find-links build/wheels --target build/device_site" in call for call in calls)
    assert calls[0].endswith("--no-deps kernel-lens")
    assert "pytest numpy pyyaml" in calls[1] and calls[1].endswith(
        "safetensors cuda-bindings==13.* cuda-core"
    )
    assert "safetensors (not installed" in done.said and "pydantic (not" not in done.said, done.said


def test_device_wheels_says_what_it_does_not_know() -> None:
    script = str(ROOT / "build_scripts" / "device_wheels.sh")
    for arguments, says in (
        (["2.7"], "unknown Python version '2.7'"),
        (["3.12", "mips"], "unknown machine 'mips'"),
    ):
        done = subprocess.run([script, *arguments], capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == 2 and says in done.stderr
