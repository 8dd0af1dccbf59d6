"""The script that a user with a GPU runs: what of it can be tried without one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_torch_backend import trtllm

from xshare_trtllm import ops

__all__ = ["trtllm"]  # a fixture

SCRIPTS = Path(__file__).resolve().parents[2] / "build_scripts"
SCRIPT = SCRIPTS / "verify_trtllm.sh"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | environment,
    )


def test_every_step_exists() -> None:
    assert subprocess.run(["bash", "-n", SCRIPT], check=True).returncode == 0
    listed = run("--list")
    steps = [line.split() for line in listed.stdout.splitlines()]
    assert listed.returncode == 0 and {part for part, _ in steps} == {"engine", "pytorch"}
    methods = {name for name in vars(module().Step) if not name.startswith("_")}
    assert methods == {step for _, step in steps}


def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("verify_trtllm", SCRIPTS / "verify_trtllm.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize(
    ("arguments", "said"),
    ((("both",), "unknown part 'both': give engine, pytorch or all"), (("engine",), "needs a GPU and torch")),
)
def test_refused(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = run(*arguments, str(tmp_path / "out"), PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and said in done.stderr
    assert not list(tmp_path.glob("out/*"))


def test_contract_ends_with_a_table_to_paste(tmp_path: Path) -> None:
    """Python is a stand-in: one step fails, the others print a result with a bar in it."""
    python = tmp_path / "python"
    python.write_text(
        """#!/bin/bash
case $1 in
    -c) [[ $2 != *"sys.exit((int(major)"* ]] ;; # of a version without engines
    -) echo "xshare-trtllm 0.1.0, tensorrt_llm 1.2.1, torch 2.9.1, transformers 4.57.3 on NVIDIA H100" ;;
    *)
        echo "noise"
        if [[ $2 == torch_fewer_experts && $3 == mixtral ]]; then
            echo "AssertionError: no"
            echo "[TRT-LLM] at exit"
            exit 1
        fi
        [[ $2 == torch_dial && $3 == mixtral ]] && exec sleep 20
        echo "RESULT: fine | so far"
        echo "[TRT-LLM] at exit" ;;
esac
"""
    )
    python.chmod(0o755)
    done = run("all", str(tmp_path / "out"), PYTHON=str(python), XSHARE_VERIFY_SECONDS="2")
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    head = lines.index("| model | step | result | what |")
    assert lines[head - 2].startswith("xshare-trtllm 0.1.0, tensorrt_llm 1.2.1")
    rows = [line for line in lines[head + 2 :] if line.startswith("|")]
    assert len(rows) == 1 + 14 and sum("| PASS | fine / so far |" in row for row in rows) == 12
    assert "| all | engine | SKIP | engines end with TensorRT-LLM 1.2 |" in rows
    assert "| mixtral | torch_fewer_experts | FAIL (1) | AssertionError: no |" in rows
    assert "| mixtral | torch_dial | FAIL (124) | TimeoutError: more than 2 s |" in rows
    refused = run("engine", str(tmp_path / "out"), PYTHON=str(python))
    assert refused.returncode == 2 and "engines end with 1.2" in refused.stderr


class LLM:
    """`tensorrt_llm.LLM` with the model in this process: the stand-in's engine, prefill of one prompt after
    the other, then steps of all requests, each with one token more."""

    def __init__(self, model: str, *, cuda_graph_config: Any = "on by default", **options: Any) -> None:
        assert options["skip_tokenizer_init"] and not options["kv_cache_config"]["enable_block_reuse"]
        assert os.environ["TLLM_WORKER_USE_SINGLE_PROCESS"] == "1"
        self.cuda_graph = cuda_graph_config is not None
        home = "tensorrt_llm._torch"
        moe = importlib.import_module(f"{home}.modules.fused_moe.moe")
        method = importlib.import_module(f"{home}.modules.fused_moe.routing").RenormalizeMoeRoutingMethod
        engines = importlib.import_module(f"{home}.pyexecutor.model_engine")
        layers = [moe.CutlassFusedMoE(routing_method=method(2), num_experts=16) for _ in range(2)]
        self.engine = engines.PyTorchModelEngine(model=engines.Model(*layers))
        self._executor = SimpleNamespace(engine=SimpleNamespace(model_engine=self.engine))

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def generate(self, prompts: list[dict[str, list[int]]], sampling: Any) -> list[Any]:
        tokens = [list(prompt["prompt_token_ids"]) for prompt in prompts]
        ids = list(range(70, 70 + len(tokens)))
        for request, prompt in zip(ids, tokens, strict=True):
            self.engine.step(logits_of([prompt] * len(prompt)), [request], [len(prompt)], num_contexts=1)
        for _ in range(sampling.max_tokens):
            output = self.engine.step(logits_of(tokens), ids, cuda_graph=self.cuda_graph)
            for request, value in zip(tokens, output[:, 0].tolist(), strict=True):
                request.append(round(100 * value) % 500)
        new = [request[-sampling.max_tokens :] for request in tokens]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids)]) for ids in new]


def logits_of(requests: list[list[int]]) -> torch.Tensor:
    seeds = [hash(tuple(request)) % 2**31 for request in requests]
    return torch.stack([torch.randn(16, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@pytest.mark.skipif(not ops.available(), reason="libxshare.so is not built: pip install -e .")
def test_contract_steps_of_the_pytorch_backend(
    trtllm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each passes with XShare, and fails where it does nothing."""
    package, api = importlib.import_module("tensorrt_llm"), ModuleType("tensorrt_llm.llmapi")
    monkeypatch.setattr(package, "LLM", LLM, raising=False)
    monkeypatch.setattr(package, "SamplingParams", SimpleNamespace, raising=False)
    monkeypatch.setattr(api, "KvCacheConfig", dict, raising=False)
    monkeypatch.setitem(sys.modules, "tensorrt_llm.llmapi", api)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setenv("TLLM_WORKER_USE_SINGLE_PROCESS", "0")
    from xshare_trtllm.trtllm import torch_backend
    from xshare_trtllm.trtllm.torch_routing import XShareMoeRoutingMethod

    step = module().Step("mixtral", tmp_path)
    monkeypatch.setattr(XShareMoeRoutingMethod, "apply", XShareMoeRoutingMethod.apply)  # a step replaces it
    assert step.torch_identical_tokens().startswith(
        "coverage 1: identical tokens; after disable(): identical"
    )
    assert "of the experts" in step.torch_fewer_experts()
    assert step.torch_dial().endswith("shadow: identical tokens; off: identical tokens")
    assert "at most" in step.torch_counted_in_python()
    monkeypatch.setattr(torch_backend._EnabledLayer, "install", lambda layer: layer.remove)
    monkeypatch.setattr(torch_backend._EnabledLayer, "remove", lambda layer: None)
    for name in ("identical_tokens", "fewer_experts", "dial", "counted_in_python"):
        with pytest.raises(AssertionError):
            getattr(step, f"torch_{name}")()


def test_tokens_prove_nothing_where_runs_without_xshare_differ() -> None:
    same = module()._same_tokens
    one, other, ours = ([[value] * 16] for value in (1, 2, 3))
    assert same(one, [one, one], "it") == "it: identical tokens"
    assert same(ours, [one, other], "it") == "it: 0 of 16 tokens the same, two runs without XShare 0"
    with pytest.raises(AssertionError, match="it: 0 of 16 tokens the same, without XShare all of them"):
        same(ours, [one, one], "it")
