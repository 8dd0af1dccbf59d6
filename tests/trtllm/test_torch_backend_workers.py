"""XShare in worker processes: several ranks, and the folder of `write_options`, against the stand-in."""

from __future__ import annotations

import os
import pickle
import runpy
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xshare_trtllm import RouterSpec, XShareConfig, route
from xshare_trtllm.trtllm import run_console_script, write_options

HERE = Path(__file__).parent
STAND_IN = HERE / "torch_stand_in"
CONFIG = XShareConfig(8, warmup=2)


def environment(*folders: Path, **variables: str) -> dict[str, str]:
    paths = [*map(str, folders), str(STAND_IN), *sys.path]
    return (
        os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"} | variables
    )


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(STAND_IN))
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt_llm"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [
        name for name in sys.modules if name.partition(".")[0] in ("tensorrt_llm", "xshare_options")
    ]:
        del sys.modules[name]


def test_contract_attention_data_parallelism(tmp_path: Path) -> None:
    """Two ranks with rows of their own, one idle, route as one rank with all rows would: real processes in a
    real process group, led together by what stands for MPI."""
    script = HERE / "torch_backend_rank.py"
    variables = environment(TENSORRT_LLM_BCAST=str(tmp_path / "address"), GLOO_SOCKET_IFNAME="lo")
    ranks = [
        subprocess.Popen([sys.executable, str(script), str(rank), str(tmp_path)], env=variables)
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=100) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    rows = [torch.randn(n, 32, generator=torch.Generator().manual_seed(i)) for i, n in enumerate((4, 1))]
    requests = torch.tensor([0, 1, 2, -1, -1], dtype=torch.int32)
    made = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for layer, budget in enumerate((8, 12)):
        whole = route(
            torch.cat(rows),
            RouterSpec(32, 4, "topk_softmax"),
            XShareConfig(budget, gpu_budget=7),
            request_ids=requests,
            expert_gpu=torch.arange(32) // 16,
        )
        assert torch.equal(torch.cat([rank[layer][0] for rank in made]), whole.expert_ids)
        assert torch.equal(torch.cat([rank[layer][1] for rank in made]), whole.expert_weights)


def make_engine(**kwargs: Any) -> Any:
    moe = import_module("tensorrt_llm._torch.modules.fused_moe.moe")
    routing = import_module("tensorrt_llm._torch.modules.fused_moe.routing")
    engine = import_module("tensorrt_llm._torch.pyexecutor.model_engine")
    layer = moe.CutlassFusedMoE(routing_method=routing.RenormalizeMoeRoutingMethod(4), num_experts=32)
    return engine.PyTorchModelEngine(model=engine.Model(layer), **kwargs)


def test_contract_options_reach_every_model_that_is_loaded(
    tmp_path: Path, stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = write_options(tmp_path / "xshare_options", CONFIG)
    assert arguments == ["--custom_module_dirs", str(tmp_path / "xshare_options")]
    names = ["__init__.py", "__main__.py", "xshare.yaml"]
    assert sorted(path.name for path in (tmp_path / "xshare_options").iterdir()) == names
    # As import_custom_module_from_dir does (tensorrt_llm/tools/importlib_utils.py): the parent on the path.
    monkeypatch.syspath_prepend(str(tmp_path))
    import_module("xshare_options")
    engine, draft = make_engine(), make_engine(is_draft_model=True)
    assert len(engine.xshare) == 1 and not hasattr(draft, "xshare")
    assert engine.model.layers[0].routing_method.layer.config == CONFIG
    said = import_module("tensorrt_llm.logger").logger.lines
    assert said == ["XShare: 1 MoE layers, {'budget': 8, 'warmup': 2}"]

    from xshare_trtllm.trtllm import enable_when_loaded

    enable_when_loaded(CONFIG)  # again: no harm, and only once
    assert len(make_engine().xshare) == 1 and len(said) == 2
    with pytest.raises(ValueError, match="is waiting already"):
        enable_when_loaded(XShareConfig(16))


def test_contract_options_reach_worker_processes(
    tmp_path: Path, stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker gets the registered classes pickled, and nothing else of the parent but its sys.path."""
    write_options(tmp_path / "xshare_options", CONFIG)
    monkeypatch.syspath_prepend(str(tmp_path))
    import_module("xshare_options")
    mapping = import_module("tensorrt_llm._torch.models.modeling_utils").MODEL_CLASS_MAPPING
    worker = (
        "import pickle, sys; pickle.load(sys.stdin.buffer); sys.path.insert(0, sys.argv[1]);"
        "from test_torch_backend_workers import make_engine; print(len(make_engine().xshare))"
    )
    done = subprocess.run(
        [sys.executable, "-c", worker, str(HERE)],
        input=pickle.dumps(mapping),
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        timeout=100,
        check=True,
    )
    assert done.stdout.split() == [b"1"]


def test_contract_python_m_runs_the_commands(
    tmp_path: Path, stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For versions whose commands have no --custom_module_dirs."""
    write_options(tmp_path / "xshare_options", CONFIG)
    monkeypatch.syspath_prepend(str(tmp_path))
    ran: list[list[str]] = []

    def serve() -> int:
        ran.append(sys.argv)
        return 3

    def entry_points(group: str, name: str) -> list[Any]:
        assert group == "console_scripts"
        return [SimpleNamespace(load=lambda: serve)] if name == "trtllm-serve" else []

    monkeypatch.setattr("importlib.metadata.entry_points", entry_points)
    monkeypatch.setattr(sys, "argv", ["-m", "trtllm-serve", "model", "--tp_size", "2"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("xshare_options", run_name="__main__", alter_sys=False)
    assert left.value.code == 3 and ran == [["trtllm-serve", "model", "--tp_size", "2"]]
    assert len(make_engine().xshare) == 1
    runpy.run_module("xshare_options.__main__", run_name="__worker__")  # as mpi4py does in what it spawns
    assert len(ran) == 1
    for argv, message in ((["-m", "trtllm-swerve"], "no such command"), (["-m"], "usage")):
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit, match=message):
            run_console_script()


def test_options_folder_has_an_importable_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the folder's name must be a Python identifier"):
        write_options(tmp_path / "xshare-options", CONFIG)
    assert not list(tmp_path.iterdir())


def test_the_package_needs_no_torch() -> None:
    code = "import sys, xshare_trtllm.trtllm as t; assert 'torch' not in sys.modules; t.nothing"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, timeout=60)
    assert "has no attribute 'nothing'" in done.stderr, done.stderr
