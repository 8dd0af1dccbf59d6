"""`xshare build` as a user runs it. TensorRT-LLM cannot be installed here: its conversion script and its
trtllm-build are stand-ins that record their arguments and write what the real ones write, as far as the build
looks at it (contract tests; options of TensorRT-LLM 1.2: examples/models/core/llama/convert_checkpoint.py,
examples/quantization/quantize.py, tensorrt_llm/commands/build.py)."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from xshare_trtllm.trtllm.build_command import OUR_IMPORT

ROOT = Path(__file__).resolve().parents[2]
MIXTRAL = ROOT / "engines" / "Mixtral-8x7B.sm_80.yaml"
XSHARE = [sys.executable, "-c", "from xshare_trtllm.cli import main; main()"]

CONVERT = """\
import argparse, os, pathlib, sys
parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("--model_dir", required=True)
parser.add_argument("--output_dir", default="tllm_checkpoint")
parser.add_argument("--dtype", default="auto", choices=["auto", "float16", "bfloat16", "float32"])
for name, default in (("tp_size", 1), ("pp_size", 1), ("moe_tp_size", -1), ("moe_ep_size", -1)):
    parser.add_argument("--" + name, type=int, default=default)
args = parser.parse_args()
assert args.moe_tp_size * args.moe_ep_size == args.tp_size
with open(os.environ["CALLS"], "a") as calls:
    calls.write("convert\\n")
out = pathlib.Path(args.output_dir)
out.joinpath("config.json").write_text("{}")
for rank in range(args.tp_size * args.pp_size):
    out.joinpath(f"rank{rank}.safetensors").write_bytes(pathlib.Path(args.model_dir, "model").read_bytes())
"""
BUILD = f'''\
#!{sys.executable}
"""
{OUR_IMPORT}"""
import argparse, os, pathlib, sys
parser = argparse.ArgumentParser(allow_abbrev=False)
for name in ("plugin", "xshare_config", "checkpoint_dir", "output_dir", "gemm_plugin"):
    parser.add_argument("--" + name, required=True)
for name in ("max_batch_size", "max_num_tokens", "max_seq_len", "workers"):
    parser.add_argument("--" + name, type=int, required=True)
args = parser.parse_args()
with open(os.environ["CALLS"], "a") as calls:
    calls.write("build\\n")
out = pathlib.Path(args.output_dir)
print("building rank 0", flush=True)
out.joinpath("rank0.engine").write_bytes(pathlib.Path(args.checkpoint_dir, "rank0.safetensors").read_bytes())
if os.environ.get("BUILD_FAILS"):
    sys.exit("out of memory")
out.joinpath("config.json").write_text(pathlib.Path(args.xshare_config).read_text())
'''


class Workshop:
    """A recipe, a checkpoint, TensorRT-LLM's stand-ins and an output folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "output"
        self.recipe = folder / MIXTRAL.name
        self.recipe.write_text(MIXTRAL.read_text())
        self.checkpoint, self.calls = folder / "checkpoint", folder / "calls"
        self.write("checkpoint/config.json", '{"model_type": "mixtral"}')
        self.write("checkpoint/model", "weights")
        self.write("trtllm/examples/models/core/llama/convert_checkpoint.py", CONVERT)
        self.write("bin/trtllm-build", BUILD).chmod(0o755)
        self.write("plugin.so", "plugin")
        self.environment = os.environ | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "TRTLLM_ROOT": str(folder / "trtllm"),
            "XSHARE_PLUGIN": str(folder / "plugin.so"),
            "CALLS": str(self.calls),
        }

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def run(self, *arguments: str, checkpoint: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs `xshare build`; afterwards `made` is which commands ran."""
        self.calls.write_text("")
        command = [*XSHARE, "build", "--recipe", str(self.recipe), "--output", str(self.output), *arguments]
        if checkpoint:
            command += ["--checkpoint", str(self.checkpoint)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, env=self.environment
        )
        self.made = self.calls.read_text().split()
        return done

    def run_well(self, *arguments: str, checkpoint: bool = True) -> str:
        done = self.run(*arguments, checkpoint=checkpoint)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def refusal(self, *arguments: str, checkpoint: bool = True) -> str:
        done = self.run(*arguments, checkpoint=checkpoint)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    def change_recipe(self, **changes: Any) -> None:
        self.recipe.write_text(yaml.safe_dump(yaml.safe_load(self.recipe.read_text()) | changes))

    def tree(self) -> dict[str, bytes]:
        files = (path for path in self.output.rglob("*") if path.is_file())
        return {str(path.relative_to(self.output)): path.read_bytes() for path in files}

    def manifest(self, step: str) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((self.output / step / "manifest.json").read_text())
        return values


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


ENGINE = {".lock", "checkpoint/config.json", "checkpoint/rank0.safetensors", "checkpoint/rank1.safetensors"}
ENGINE |= {"checkpoint/manifest.json", "engine/config.json", "engine/rank0.engine", "engine/xshare.yaml"}
ENGINE |= {"engine/manifest.json"}


def test_contract_builds_an_engine_and_says_from_what(shop: Workshop) -> None:
    output = shop.run_well()
    assert shop.made == ["convert", "build"]
    assert set(shop.tree()) == ENGINE
    assert "building rank 0" in output, "the commands' own output is shown"
    assert f"env LD_PRELOAD={shop.folder}/plugin.so trtllm-serve {shop.output}/engine" in output
    manifest = shop.manifest("engine")
    assert manifest["recipe"]["file"] == "Mixtral-8x7B.sm_80.yaml"
    assert manifest["xshare"]["coverage"]["origin"] == "shipped models"
    assert manifest["command"][:3] == ["trtllm-build", "--plugin", "xshare"]
    assert manifest["command"][-4:] == ["--gemm_plugin", "bfloat16", "--workers", "2"]
    utility = {"utility": "squared_weight"}
    assert manifest["inputs"]["xshare"] == {"warmup": 1, "coverage": 0.97, "max_rows": 48} | utility
    assert len(manifest["inputs"]["plugin"]["file"]) == 64
    assert set(manifest["files"]) == {"config.json", "rank0.engine", "xshare.yaml"}
    assert set(shop.manifest("checkpoint")["inputs"]["files"]) == {"config.json", "model"}


def test_contract_a_second_run_reuses_what_is_unchanged(shop: Workshop) -> None:
    shop.run_well()
    before = shop.tree()
    output = shop.run_well()
    assert (shop.made, shop.tree()) == ([], before)
    assert output.count("unchanged, reused") == 2

    settings = yaml.safe_load(shop.recipe.read_text())["xshare"]
    settings["coverage"]["value"] = 0.95
    shop.change_recipe(xshare=settings)
    shop.run_well()
    assert shop.made == ["build"], "another coverage needs no other checkpoint"
    assert b"coverage: 0.95" in shop.tree()["engine/config.json"]

    shop.write("plugin.so", "another plugin")
    shop.run_well()
    assert shop.made == ["build"]

    shop.write("checkpoint/model", "other weights")
    shop.run_well()
    assert shop.made == ["convert", "build"]
    assert shop.tree()["engine/rank0.engine"] == b"other weights"

    (shop.output / "engine" / "rank0.engine").unlink()
    shop.run_well()
    assert shop.made == ["build"]


def test_contract_a_failed_build_leaves_what_was_there(shop: Workshop) -> None:
    shop.environment["BUILD_FAILS"] = "1"
    error = shop.refusal()
    assert "exit code 1 of: trtllm-build" in error and "out of memory" in error
    assert not any(name.startswith(("engine", ".engine")) for name in shop.tree())
    assert "checkpoint/manifest.json" in shop.tree(), "what was finished before stays"

    del shop.environment["BUILD_FAILS"]
    shop.run_well()
    assert shop.made == ["build"]
    before = shop.tree()
    shop.write("plugin.so", "another plugin")
    shop.environment["BUILD_FAILS"] = "1"
    shop.refusal()
    assert shop.tree() == before


def test_contract_what_an_interrupted_build_left_is_cleared(shop: Workshop) -> None:
    shop.write("output/.engine.new/rank0.engine", "half")
    shop.write("output/engine/rank0.engine", "of unknown origin")
    shop.run_well()
    assert set(shop.tree()) == ENGINE


def test_contract_one_build_at_a_time(shop: Workshop) -> None:
    shop.output.mkdir()
    with (shop.output / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another build is under way there" in shop.refusal()
    assert shop.made == []


def test_dry_run_shows_the_commands_and_does_nothing(shop: Workshop) -> None:
    output = shop.run_well("--dry-run", checkpoint=False)
    assert "convert_checkpoint.py" in output and "trtllm-build \\\n    --plugin xshare" in output
    assert "mistralai/Mixtral-8x7B-Instruct-v0.1" in output
    assert not shop.output.exists()
    (shop.folder / "bin" / "trtllm-build").write_text("#!/bin/sh\n# TensorRT-LLM's own, without --plugin\n")
    output = shop.run_well("--dry-run", checkpoint=False)
    assert "-m xshare_trtllm.trtllm.build_command \\\n    --plugin xshare" in output


def test_what_is_missing_is_said_before_anything_runs(shop: Workshop) -> None:
    assert "hf download mistralai/Mixtral-8x7B-Instruct-v0.1" in shop.refusal(checkpoint=False)
    (shop.folder / "plugin.so").unlink()
    assert "plugin.so is not there: build_scripts/build_plugin.sh" in shop.refusal()
    shop.environment["TRTLLM_ROOT"] = str(shop.folder)
    assert "set TRTLLM_ROOT to a checkout" in shop.refusal()
    (shop.checkpoint / "config.json").unlink()
    assert "no config.json there" in shop.refusal()
    shop.change_recipe(weights="fp8")
    assert f"{shop.recipe}: weights='fp8': sm_80 computes with" in shop.refusal()
    assert not shop.output.exists()


def test_pytorch_path_writes_options_and_the_configuration(shop: Workshop) -> None:
    shop.recipe = ROOT / "engines" / "Kimi-K2.sm_90.yaml"
    output = shop.run_well(checkpoint=False)
    serve = shop.output / "serve"
    assert yaml.safe_load((serve / "options.yaml").read_text())["moe_config"] == {"backend": "CUTLASS"}
    written = yaml.safe_load((serve / "xshare.yaml").read_text())
    assert written == {"warmup": 1, "coverage": 0.97, "max_rows": 48, "utility": "squared_weight"}
    assert not any(b".serve.new" in text for text in shop.tree().values())
    assert f"TRTLLM_XSHARE={serve}/xshare.yaml srun" in output and "--ntasks 16" in output
    assert "trtllm-llmapi-launch xshare trtllm" in output
    for option in ("--tp_size 16", "--ep_size 16", "--max_batch_size 16", f"--config {serve}/xshare.yaml"):
        assert option in output
    assert "would be reused" in shop.run_well("--dry-run", checkpoint=False)
    assert "would be made" in shop.run_well("--dry-run"), "another checkpoint is another command"


@pytest.mark.parametrize("recipe", sorted((ROOT / "engines").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_can_be_shown(recipe: Path) -> None:
    from click.testing import CliRunner

    from xshare_trtllm.cli import main

    shown = CliRunner().invoke(main, ["build", "--recipe", str(recipe), "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "trtllm-serve" in shown.output and ("'budget':" in shown.output or "'coverage':" in shown.output)
