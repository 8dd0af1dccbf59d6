"""What layers count on their device, how it is read back, and what is said of a server from it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from test_torch_backend import DUMMY, EXPERTS, SMALL, cutlass, engine_of, renormalize, trtllm
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from xshare_trtllm import RouterSpec, XShareConfig, route
from xshare_trtllm.cli import main
from xshare_trtllm.trtllm import torch_rows, torch_statistics
from xshare_trtllm.trtllm.run_folder import RunFolder
from xshare_trtllm.trtllm.torch_backend import enable
from xshare_trtllm.trtllm.torch_statistics import Reporter

__all__ = ["trtllm"]  # a fixture


class Reports(list[dict[str, Any]]):
    """What a Reporter writes, without its thread and its pause."""

    def __init__(self, enabled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch_statistics, "SECONDS", 0.0)
        monkeypatch.setattr(torch_rows, "_listeners", [])
        reporter = Reporter(enabled, self.append)
        reporter._writer = SimpleNamespace(submit=lambda write, values: write(values))  # type: ignore[assignment]
        reporter.start()


def test_contract_counts_are_the_statistics_of_every_step(
    trtllm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a captured graph too, where no Python of the model runs."""
    engine = engine_of(trtllm, cutlass(trtllm), cutlass(trtllm))
    with enable(engine.model, SMALL) as enabled:
        engine.step(
            torch.randn(4, EXPERTS), [1, 2, 3, 4], cuda_graph=True
        )  # warm-up and capture count as well
        enabled.counters.zero_()
        reports = Reports(enabled, monkeypatch)
        spec, before, after = RouterSpec(EXPERTS, 4, "topk_softmax"), 0, 0
        for requests in ([70, 71, 72, DUMMY], [80, 81, 82, 83], [90, 91, DUMMY, DUMMY]):
            logits = torch.randn(4, EXPERTS)
            engine.step(logits, requests, cuda_graph=True)
            ids = torch.tensor([-1 if r >= 2**63 else i for i, r in enumerate(requests)], dtype=torch.int32)
            stats = route(logits, spec, SMALL, request_ids=ids).stats
            before, after = before + 2 * stats.experts_before, after + 2 * stats.experts_after
        for _ in range(3):  # a step reads, the next one reports
            engine.step(torch.full((1, EXPERTS), torch.nan), [5])
    assert reports[0]["steps"] == reports[0]["rows"] == 0
    assert [report["silent_layers"] for report in reports] == [[]] * len(reports)
    last = reports[-1]
    assert (last["rows"], last["experts_before"], last["experts_after"]) == (2 * 9, before, after)
    for layer in last["by_layer"]:  # both see the same rows
        assert layer[:2] == [before // 2, after // 2] and layer[7:] == [9, 0]
    assert 0 < last["kept_utility"] < last["total_utility"] and last["steps"] == 4


def test_contract_a_graph_that_was_captured_without_xshare_is_seen(
    trtllm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(trtllm, cutlass(trtllm))
    step = {"router_logits": torch.randn(4, EXPERTS), "request_ids": [1, 2, 3, 4], "cuda_graph": True}
    engine.step(**step)
    engine._release_cuda_graphs = lambda: None  # a version that keeps its graphs
    with enable(engine.model, SMALL) as enabled:
        reports = Reports(enabled, monkeypatch)
        for _ in range(4):
            engine.step(**step)
    assert reports[-1]["silent_layers"] == [0] and reports[-1]["rows"] == 0


def test_contract_masked_logits_count_their_rows(trtllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = trtllm.moe.TritonFusedMoE(routing_method=renormalize(trtllm), num_experts=EXPERTS)
    engine = engine_of(trtllm, layer, cutlass(trtllm))
    with enable(engine.model, SMALL) as enabled:
        assert enabled.backends() == {"TritonFusedMoE (masked logits)": 1, "CutlassFusedMoE": 1}
        reports = Reports(enabled, monkeypatch)
        for _ in range(4):
            engine.step(torch.randn(3, EXPERTS), [7, 8, 9])
    assert reports[-1]["silent_layers"] == [] and reports[-1]["rows"] > 0


def test_contract_steps_of_padding_are_no_steps(trtllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(trtllm, cutlass(trtllm))
    with enable(engine.model, SMALL) as enabled:
        reports = Reports(enabled, monkeypatch)
        for _ in range(4):
            engine.step(torch.randn(2, EXPERTS), [DUMMY, DUMMY])
    assert len(reports) == 1


def test_contract_a_layer_that_is_off_counts_nothing(trtllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(trtllm, cutlass(trtllm), cutlass(trtllm))
    with enable(engine.model, XShareConfig((EXPERTS, 8))) as enabled:
        assert enabled.counters.shape == (1, 8)
        reports = Reports(enabled, monkeypatch)
        for _ in range(4):
            engine.step(torch.randn(3, EXPERTS), [7, 8, 9])
    assert reports[-1]["silent_layers"] == []


class Writes(TorchDispatchMode):
    """Which of the operators that run in it write to a tensor, and what `where` says then."""

    def __init__(self, tensor: Tensor, where: Callable[[], str]) -> None:
        super().__init__()
        self.address, self.where = tensor.data_ptr(), where
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        if func._schema.is_mutable and isinstance(first, Tensor) and first.data_ptr() == self.address:
            self.found.append(self.where())
        return func(*args, **(kwargs or {}))


def test_contract_chunks_on_two_streams_lose_no_count(trtllm: Any) -> None:
    """Even chunks run on another stream, which the layer waits for at its end (fused_moe_cutlass.py at
    000a01de66, moe_scheduler.py at 24fc023e10). One stream alone writes the counters, behind that wait."""
    layer = cutlass(trtllm, moe_max_num_tokens=5)
    engine, logits = engine_of(trtllm, layer), torch.randn(12, EXPERTS)
    with enable(engine.model, SMALL) as enabled, Writes(enabled.counters, lambda: layer.where) as writes:
        engine.step(logits, range(70, 82))
    assert layer.places == ["aux", "main", "aux"] and writes.found == ["main, joined"] * 3
    spec, wanted = RouterSpec(EXPERTS, 4, "topk_softmax"), torch.zeros(8, dtype=torch.int64)
    for rows in logits.split(4):
        wanted += route(rows, spec, SMALL).raw_stats
    assert torch.equal(enabled.counters[0], wanted)


def test_contract_a_pass_that_fails_counts_nothing(trtllm: Any) -> None:
    layer = cutlass(trtllm, moe_max_num_tokens=5)
    engine, own = engine_of(trtllm, layer), layer.experts
    with enable(engine.model, SMALL) as enabled:
        layer.experts = lambda *_: (_ for _ in ()).throw(RuntimeError("no memory"))
        with pytest.raises(RuntimeError, match="no memory"):
            engine.step(torch.randn(12, EXPERTS), range(70, 82))
        layer.experts = own
        engine.step(torch.randn(3, EXPERTS), range(70, 73))
    assert enabled.counters[0, 7] == 3


# ---- A server that runs -----------------------------------------------------------------------------------


def counts(**values: Any) -> dict[str, Any]:
    names = ("experts_before", "experts_after", "kept_utility", "total_utility", "warmup_overflow", "rows")
    made = dict.fromkeys((*names, "stood_aside", "steps", "recent_steps"), 0)
    return made | {"silent_layers": []} | values


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    config = tmp_path / "xshare.yaml"
    config.write_text("coverage: 0.9\n")
    made = RunFolder(config)
    made.begin(1, "abc")
    return made


def report(folder: RunFolder, **statistics: Any) -> None:
    about = {
        "state": "on",
        "rank": 0,
        "config_hash": "abc",
        "layers": 36,
        "backends": {"CutlassFusedMoE": 36},
    }
    dial = {"setting": {"coverage": 0.9, "mode": "on"}, "generation": 0, "refused": None}
    folder.report(**about, **dial, statistics=counts(**statistics))


def doctor(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["doctor", "--serving", *arguments])
    return done.exit_code, " ".join(done.output.split())


RUNNING = {
    "rows": 640,
    "steps": 10,
    "experts_before": 1000,
    "experts_after": 700,
    "kept_utility": 97,
    "total_utility": 100,
}


def test_doctor_says_what_a_server_does(folder: RunFolder) -> None:
    code, said = doctor(str(folder.config_path))
    assert code == 1 and "rank 0 no no acknowledgement" in said.replace("│", "").replace("  ", " ")
    report(folder)
    assert doctor(str(folder.config_path))[0] == 0
    report(folder, **RUNNING)
    code, said = doctor(str(folder.config_path))
    assert code == 0 and "10 steps, experts -30.0 %, utility kept 0.9700" in said, said
    report(folder, **RUNNING, recent_steps=50, silent_layers=[3, 4])
    code, said = doctor(str(folder.config_path))
    assert (
        code == 1 and "50 steps without XShare in layers [3, 4]: a CUDA graph was captured without it" in said
    )


def test_doctor_finds_a_server_by_its_url(folder: RunFolder) -> None:
    report(folder, **RUNNING)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/xshare" else 404)
            self.end_headers()
            if self.path == "/xshare":
                self.wfile.write(json.dumps(folder.status()).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        code, said = doctor(f"http://127.0.0.1:{server.server_port}/", "--json")
        without = doctor(f"http://127.0.0.1:{server.server_port}/other")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert code == 0 and '"rank": 0' in said
    assert without[0] == 1 and "this server runs without XShare" in without[1]


@pytest.mark.parametrize(
    ("server", "why"), (("1", "was not started with TRTLLM_XSHARE"), ("/nowhere/x.yaml", "no server has run"))
)
def test_doctor_where_there_is_no_such_server(server: str, why: str) -> None:
    code, said = doctor(server)
    assert code == 1 and (why in said or "Permission denied" in said), said


def test_metrics(folder: RunFolder) -> None:
    client = pytest.importorskip("prometheus_client")
    registry = import_module("xshare_trtllm.trtllm.metrics").registry(folder)
    assert 'xshare_up{rank="0"} 0.0' in client.generate_latest(registry).decode()
    report(folder, **RUNNING)
    text = client.generate_latest(registry).decode()
    for line in (
        'xshare_up{rank="0"} 1.0',
        'xshare_rows_total{rank="0"} 640.0',
        'xshare_experts_before_total{rank="0"} 1000.0',
        'xshare_experts_after_total{rank="0"} 700.0',
    ):
        assert line in text.splitlines(), text
    age = next(line for line in text.splitlines() if line.startswith("xshare_report_age_seconds{"))
    assert 0 <= float(age.split()[1]) < 60 and time.time() > 0
