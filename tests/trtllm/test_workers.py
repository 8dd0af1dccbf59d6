"""How XShare reaches the workers of a server, and that none serves without it: real interpreters in an
environment made for the purpose, with TensorRT-LLM's stand-in in it (contract tests); MPI where it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from xshare_trtllm.trtllm import run_folder, startup, workers
from xshare_trtllm.trtllm.run_folder import RunFolder

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SERVE = str(HERE / "serve.py")
CONFIG = "coverage: 0.9\nwarmup: 2\n"


class Environment:
    """A Python environment whose site-packages has the hook, or has not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
        self.python = folder / "bin" / "python"
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        self.site = folder / "lib" / version / "site-packages"
        self.use("torch_stand_in")
        self.hook(True)

    def use(self, *stand_ins: str) -> None:
        """The stand-in, this checkout and what it needs, on the path of every interpreter, `-I` or not."""
        paths = [*(HERE / name for name in stand_ins), ROOT, sysconfig.get_path("purelib")]
        ray = find_spec("ray")
        if ray is not None and ray.origin is not None:
            paths.append(Path(ray.origin).parents[1])
        (self.site / "paths.pth").write_text("".join(f"{path}\n" for path in paths))

    def hook(self, there: bool) -> None:
        path = self.site / startup.HOOK_FILE
        path.unlink(missing_ok=True)
        if there:
            path.write_text(startup.HOOK_LINE)

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        return subprocess.run(
            [str(self.python), *arguments],
            env=clean | {"OMP_NUM_THREADS": "1", "TRTLLM_XSHARE_WAIT": "6"} | variables,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("venv"))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "xshare.yaml"
    path.write_text(CONFIG)
    return path


def outcome(done: subprocess.CompletedProcess[str]) -> str:
    """The line that serve.py ends with."""
    lines = [line for line in done.stdout.splitlines() if line.startswith(("SERVING", "STOPPED"))]
    assert len(lines) == 1, done.stdout + done.stderr
    return lines[0]


# ---- Every process ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ([], ["-I"], ["-E", "-s"]))
def test_the_hook_acts_where_the_variable_is_set(options: list[str], environment: Environment) -> None:
    code = "import sys; print('xshare_trtllm.trtllm.startup' in sys.modules, 'torch' in sys.modules)"
    with_it = environment.run(*options, "-c", code, TRTLLM_XSHARE="/some/xshare.yaml")
    without = environment.run(*options, "-c", code)
    assert with_it.stdout.split() == ["True", "False"], with_it.stderr
    assert without.stdout.split() == ["False", "False"] and not without.stderr


def test_contract_isolated_workers_with_all_variables(environment: Environment, config: Path) -> None:
    """One of them import-isolated, one late. The parent shows the ranks at /xshare."""
    done = environment.run(
        *(SERVE, "variables", "2", "", "-I"), TRTLLM_XSHARE=str(config), TLLM_FAULT="late 1", TEST_OPENAI="1"
    )
    said = outcome(done)
    assert said.startswith("SERVING"), said
    shown = json.loads(said.removeprefix("SERVING "))
    assert shown["routes"] == ["/health", "/xshare", "/xshare/metrics"]
    ranks = shown["xshare"]["ranks"]
    assert [rank["rank"] for rank in ranks] == [0, 1] and not shown["xshare"]["missing"]
    for rank in ranks:
        assert rank["state"] == "on" and rank["layers"] == 1 and rank["backends"] == {"CutlassFusedMoE": 1}
        assert (
            rank["setting"]["coverage"] == 0.9
            and rank["setting"]["mode"] == "on"
            and rank["config_hash"] == ranks[0]["config_hash"]
        )


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun: apt-get install openmpi-bin")
@pytest.mark.skipif(find_spec("mpi4py") is None, reason="needs mpi4py: pip install mpi4py")
def test_contract_mpi_spawns_the_workers(environment: Environment, config: Path) -> None:
    """Real MPI: mpirun starts the parent, mpi4py spawns the workers, which get sys.path and TRTLLM* alone.
    The stand-in is main's of August 2026, where no worker imports the module of an unused class."""
    environment.use("torch_stand_in_2026")
    mpirun = ["mpirun", "--oversubscribe", "-n", "1", str(environment.python), SERVE, "mpi", "2"]
    variables = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMP_NUM_THREADS": "1",
        "TRTLLM_XSHARE": str(config),
    }
    try:
        done = subprocess.run(
            mpirun, env=os.environ | variables, capture_output=True, text=True, timeout=120, check=False
        )
    finally:
        environment.use("torch_stand_in")
    assert outcome(done).startswith("SERVING"), done.stdout + done.stderr
    ranks = RunFolder(config).status()["ranks"]
    assert [rank["backends"] for rank in ranks] == [{"TrtllmCutlassUnquantizedImpl": 1}] * 2


@pytest.mark.skipif(find_spec("ray") is None, reason="needs ray: pip install ray")
def test_contract_ray_starts_the_workers(environment: Environment, config: Path, tmp_path: Path) -> None:
    """Real Ray, a cluster of this test's own: its workers start with the variables of the actor's runtime
    environment, so the line in site-packages acts."""
    done = environment.run(*(SERVE, "ray", "2"), TRTLLM_XSHARE=str(config), HOME=str(tmp_path))
    assert outcome(done).startswith("SERVING"), done.stdout + done.stderr
    ranks = RunFolder(config).status()["ranks"]
    assert [rank["rank"] for rank in ranks] == [0, 1] and len({rank["pid"] for rank in ranks}) == 2


LAUNCH = """set -e
rank=$OMPI_COMM_WORLD_RANK
export TLLM_SPAWN_PROXY_PROCESS=1
if [ "$rank" -eq 0 ]; then
    ( for name in $(compgen -e); do case $name in OMPI_*|PMIX_*|PMI_*) unset "$name";; esac; done
      "$@" ) &
fi
"$PYTHON" -m tensorrt_llm.executor.worker "[$rank, $OMPI_COMM_WORLD_SIZE]"
wait
"""


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun: apt-get install openmpi-bin")
def test_contract_ranks_that_were_started_before_the_server(
    environment: Environment, config: Path, tmp_path: Path
) -> None:
    """As trtllm-llmapi-launch (020c89e64e) does it, under mpirun: the server runs beside rank 0, without
    the variables of MPI."""
    command = [str(environment.python), "-c", use_and_serve(config), "launch", "2"]
    mpirun = ["mpirun", "--oversubscribe", "-n", "2", "bash", "-c", LAUNCH, "launch"]
    variables = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR": str(tmp_path),
        "TRTLLM_XSHARE": str(config),
        "PYTHON": str(environment.python),
    }
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [*mpirun, *command], env=clean | variables, capture_output=True, text=True, timeout=120, check=False
    )
    assert outcome(done).startswith("SERVING"), done.stdout + done.stderr
    assert [rank["rank"] for rank in RunFolder(config).status()["ranks"]] == [0, 1]


def use_and_serve(config: Path) -> str:
    return (
        f"from xshare_trtllm.trtllm import use; use({str(config)!r})\n"
        f"import runpy; runpy.run_path({SERVE!r}, run_name='__main__')"
    )


@pytest.mark.parametrize("before", ({}, {"TRTLLM_XSHARE": "another.yaml"}))
def test_contract_what_the_server_sets_reaches_no_rank_that_runs(
    before: dict[str, str], environment: Environment, config: Path
) -> None:
    """So it says at once what has to be exported, before a model is loaded."""
    variables = {"TLLM_SPAWN_PROXY_PROCESS": "1"} | before
    refused = environment.run("-c", use_and_serve(config), "launch", "2", **variables)
    assert f"has started already: export TRTLLM_XSHARE={config} before mpirun" in refused.stderr
    assert "SERVING" not in refused.stdout


def test_contract_a_configuration_that_does_not_fit_the_model(environment: Environment, config: Path) -> None:
    """Here with the model in the parent's own process (TLLM_WORKER_USE_SINGLE_PROCESS)."""
    config.write_text("budget: 3\n")
    refused = environment.run(SERVE, "single", "1", TRTLLM_XSHARE=str(config))
    assert "budget must be at least top_k=4" in refused.stderr and "SERVING" not in refused.stdout
    (report,) = RunFolder(config).reports()
    assert report["state"] == "failed" and report["error"].startswith("ValueError: MoE layer 0: XShareConfig")


# ---- Never silently off -----------------------------------------------------------------------------------


def test_contract_workers_that_die_or_are_mute_stop_the_server(
    environment: Environment, config: Path
) -> None:
    """Rank 1 dies before its model is loaded; rank 2 is an interpreter without site-packages' hook, which
    loads its model without XShare and never says a word."""
    paths = [HERE / "torch_stand_in", ROOT, sysconfig.get_path("purelib")]
    done = environment.run(
        *(SERVE, "variables", "3", "", "", "-S"),
        TRTLLM_XSHARE=str(config),
        TLLM_FAULT="die 1",
        PYTHONPATH=os.pathsep.join(map(str, paths)),
    )
    said = outcome(done)
    assert said.startswith("STOPPED XShare: ranks 1, 2 of 3 did not acknowledge within 6 s: pid "), said
    assert "ended before its model was loaded, see its log; the server is stopped" in said
    assert "shutdown" in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("arguments", "why"),
    (
        ({"backend": "_autodeploy"}, "backend=_autodeploy is not supported, it is in the PyTorch backend"),
        (
            {"ray_placement_config": SimpleNamespace(defer_workers_init=True)},
            "defer_workers_init is not supp",
        ),
    ),
)
def test_contract_what_would_never_acknowledge_is_refused_at_once(
    arguments: dict[str, Any], why: str, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(engine: Any, llm_args: Any = None, **_: Any) -> Any:
        raise AssertionError("workers were started")

    executor = SimpleNamespace(create=staticmethod(create))
    workers.patch_executor(SimpleNamespace(GenerationExecutor=executor))  # type: ignore[arg-type]
    monkeypatch.setenv("TRTLLM_XSHARE", str(config))
    with pytest.raises(RuntimeError, match=why):
        executor.create("engine", llm_args=SimpleNamespace(**arguments))
    assert not (config.parent / "xshare.run").exists()


def test_use_refuses_where_the_hook_is_not(environment: Environment, config: Path) -> None:
    code = f"from xshare_trtllm.trtllm import use; use({str(config)!r})"
    environment.hook(False)
    try:
        refused = environment.run("-c", code)
    finally:
        environment.hook(True)
    message = refused.stderr.splitlines()[-1]
    assert "XShare would not get into worker processes" in message and "xshare trtllm --install" in message
    assert not environment.run("-c", code).stderr
    config.write_text("budget: none\n")
    assert "budget must be a positive integer" in environment.run("-c", code).stderr


def test_contract_the_command(environment: Environment, config: Path) -> None:
    """`xshare trtllm` runs a console script of the environment, in a process that says how it was started."""
    cli = ("-c", "from xshare_trtllm.cli import main; main()", "trtllm")
    information = environment.site / "tensorrt_llm-1.2.1.dist-info"
    information.mkdir(exist_ok=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorrt-llm\nVersion: 1.2.1\n")
    (information / "entry_points.txt").write_text("[console_scripts]\ntrtllm-serve = serve_stub:main\n")
    (environment.site / "serve_stub.py").write_text(
        "import os, sys\ndef main():\n    print(sys.argv[1:], os.environ['TRTLLM_XSHARE'])\n"
        "    print(b'TRTLLM_XSHARE' in open('/proc/self/environ', 'rb').read())\n    return 3\n"
    )
    done = environment.run(*cli, "--config", str(config), "trtllm-serve", "model", "--tp_size", "2")
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines() == [f"['model', '--tp_size', '2'] {config}", "True"]
    unknown = environment.run(*cli, "--config", str(config), "trtllm-swerve")
    assert "trtllm-swerve: no such command" in unknown.stderr and unknown.returncode == 1
    assert "give --config FILE and a command" in environment.run(*cli, "trtllm-serve").stderr


def test_the_hook_is_written_once(environment: Environment) -> None:
    cli = ("-c", "from xshare_trtllm.cli import main; main()", "trtllm", "--install")
    environment.hook(False)
    done = environment.run(*cli)
    path = environment.site / startup.HOOK_FILE
    assert done.stdout.startswith(f"{path}: written"), done.stderr
    assert path.read_text() == startup.HOOK_LINE


def test_an_installation_brings_the_hook(tmp_path: Path) -> None:
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(build, check=True, timeout=120, cwd=ROOT, capture_output=True)
    assert (tmp_path / startup.HOOK_FILE).read_text() == startup.HOOK_LINE


# ---- The folder -------------------------------------------------------------------------------------------


def on(rank: int, **values: Any) -> dict[str, Any]:
    return {"state": "on", "rank": rank, "config_hash": "abc"} | values


@pytest.fixture
def folder(config: Path) -> RunFolder:
    return RunFolder(config)


def as_process(monkeypatch: pytest.MonkeyPatch, pid: int, host: str = "elsewhere") -> None:
    monkeypatch.setattr(run_folder.os, "getpid", lambda: pid)
    monkeypatch.setattr(run_folder.socket, "gethostname", lambda: host)


def test_acknowledgements_of_an_earlier_run_do_not_count(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.begin(1, "abc")
    folder.report(**on(0))
    assert [report["rank"] for report in folder.wait(1)] == [0]
    folder.begin(1, "abc")
    with pytest.raises(RuntimeError, match="rank 0 of 1 did not acknowledge within 0 s"):
        folder.wait(0)


def test_the_likely_reason(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.begin(2, "abc")
    folder.report(**on(0))
    with pytest.raises(
        RuntimeError, match=r"rank 1 of 2 .*: no such process has come by here: .* python -S\)"
    ):
        folder.wait(0)
    with monkeypatch.context() as patch:
        as_process(patch, 7)
        folder.report(state="waiting")
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 .*: pid 7 on elsewhere has not loaded its model"):
        folder.wait(0)


@pytest.mark.parametrize(
    ("values", "why"),
    (
        (on(1, config_hash="xyz"), "rank 1 .pid 7 on elsewhere. has config_hash xyz, the server abc"),
        (on(1, version="0.0.9"), "rank 1 .pid 7 on elsewhere. has version 0.0.9, the server "),
        (
            {"state": "failed", "error": "ValueError: MoE layer 3: no"},
            "pid 7 on elsewhere .* MoE layer 3: no",
        ),
    ),
)
def test_a_rank_that_differs_or_fails_stops_at_once(
    values: dict[str, Any], why: str, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.begin(2, "abc")
    as_process(monkeypatch, 7)
    folder.report(**values)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=why):
        folder.wait(60)
    assert time.monotonic() - start < 10


def test_two_servers_with_one_file_are_refused(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.begin(1, "abc")
    monkeypatch.setattr(run_folder.os, "getpid", lambda: 1)
    with pytest.raises(RuntimeError, match=r"the server with pid .* runs with this file"):
        folder.begin(1, "abc")


def test_a_file_that_is_being_replaced_is_no_report(folder: RunFolder) -> None:
    folder.begin(1, "abc")
    folder.report(**on(0))
    (folder.path / "host-5.json").write_text('{"state": ')
    assert len(folder.reports()) == 1 and len(folder.wait(1)) == 1
