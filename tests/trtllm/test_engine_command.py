"""The command line: what passes untouched, what is refused, and how it gets into `trtllm-build`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from engine_runs import COMMAND, checkpoint, run

from xshare_trtllm.trtllm import build_command
from xshare_trtllm.trtllm.build_command import find_build_command, install, uninstall

THEIRS = (sys.executable, "-m", "tensorrt_llm.commands.build")
EVERY_OPTION = """
    --max_batch_size=48 --max_input_len 64 --max_decoder_seq_len 128 --max_beam_width 1 --max_num_tokens 512
    --opt_num_tokens 48 --max_multimodal_len 7 --kv_cache_type paged --input_timing_cache a --strip_plan
    --profiling_verbosity detailed --weight_streaming --fast_build --workers 1 --log_level verbose
    --logits_dtype float32 --lora_dir one two --lora_ckpt_source nemo --lora_target_modules attn_q mlp_gate
    --max_lora_rank 8 --gemm_plugin auto --moe_plugin auto --remove_input_padding enable --monitor_mem
    --dry_run --use_paged_context_fmha disable --tokens_per_block 64
"""


def arguments_seen(folder: Path, *arguments: object, command: tuple[str, ...] = COMMAND) -> str:
    log = folder / "arguments"
    paths = ("--checkpoint_dir", checkpoint(folder), "--output_dir", folder / "engine")
    done = run(*paths, *arguments, command=command, STAND_IN_ARGUMENTS=str(log))
    assert done.returncode == 0, done.stderr
    return log.read_text()


def test_contract_arguments_pass_untouched(tmp_path: Path) -> None:
    """With and without XShare its parser sees what it would have seen; ours may stand anywhere."""
    wanted = arguments_seen(tmp_path, *EVERY_OPTION.split(), command=THEIRS)
    assert "'max_batch_size': 48" in wanted and "'lora_dir': ['one', 'two']" in wanted
    assert arguments_seen(tmp_path, *EVERY_OPTION.split()) == wanted
    last = EVERY_OPTION.split()
    mixed = ("--xshare_budget=4", *last[:-2], "--plugin", "xshare", *last[-2:])
    assert arguments_seen(tmp_path, *mixed) == wanted


def test_contract_unknown_options_are_theirs_to_refuse(tmp_path: Path) -> None:
    for arguments in (("--xshare_bugdet", "4"), ("--plug", "xshare"), ("--max_batch_size", "many")):
        done = run("--checkpoint_dir", tmp_path, *arguments)
        theirs = run("--checkpoint_dir", tmp_path, *arguments, command=THEIRS)
        assert done.returncode == theirs.returncode == 2
        assert (
            done.stderr.splitlines()[-1].split("error:")[1]
            == theirs.stderr.splitlines()[-1].split("error:")[1]
        )


def test_contract_help(tmp_path: Path) -> None:
    said = run("--help").stdout
    assert (
        "--plugin {xshare}" in said
        and "--xshare_budget INT" in said
        and "--xshare_coverage FLOAT" in said
        and "--remove_input_padding" in said
    )
    assert "--plugin" not in run("--help", command=THEIRS).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["--plugin", "xshare"], "needs either --xshare_config or its values: --xshare_coverage 0.97"),
        (
            ["--plugin", "xshare", "--xshare_budget", "4", "--xshare_config", "x.yaml"],
            "needs either --xshare_config or its values",
        ),
        (["--xshare_budget", "4"], "--xshare_budget needs --plugin xshare"),
        (["--plugin", "other"], "invalid choice: 'other'"),
        (["--plugin", "xshare", "--xshare_budget", "0"], "budget must be a positive integer"),
        (["--plugin", "xshare", "--xshare_config", "/nowhere.yaml"], "No such file"),
        (["--plugin", "xshare", "--xshare_budget", "4"], "no TensorRT-LLM with engines: pip install"),
        (["--checkpoint_dir", "x"], "no TensorRT-LLM with engines: pip install"),
    ),
)
def test_refused(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    with pytest.raises(SystemExit) as stopped:
        build_command.main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("trtllm-build: error: ") and message in said


def test_contract_library_is_missing(tmp_path: Path) -> None:
    arguments = ("--checkpoint_dir", tmp_path, "--plugin", "xshare", "--xshare_budget", 4)
    done = run(*arguments, XSHARE_PLUGIN=str(tmp_path / "none.so"))
    assert done.returncode == 2 and "none.so is not there: run build_scripts/build_plugin.sh" in done.stderr


# The scripts that pip and uv write for `trtllm-build = tensorrt_llm.commands.build:main`.
PIP = """#!/usr/bin/env python3
import re
import sys
from tensorrt_llm.commands.build import main
if __name__ == '__main__':
    sys.argv[0] = re.sub(r'(-script\\.pyw|\\.exe)?$', '', sys.argv[0])
    sys.exit(main())
"""
UV = """#!/usr/bin/env python3
# -*- coding: utf-8 -*-
import sys
from tensorrt_llm.commands.build import main
if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.fixture(params=(PIP, UV), ids=("pip", "uv"))
def script(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "bin" / "trtllm-build"
    path.parent.mkdir()
    path.write_text(request.param)
    path.chmod(0o755)
    return path


def test_install_and_uninstall(script: Path) -> None:
    own, path = script.read_text(), str(script.parent)
    assert find_build_command(path) == (script, False)
    assert install(script) and not install(script)
    assert find_build_command(path) == (script, True)
    assert script.stat().st_mode & 0o777 == 0o755
    assert uninstall(script) and not uninstall(script)
    assert script.read_text() == own and find_build_command(path) == (script, False)
    assert find_build_command(str(script.parent / "nowhere")) == (None, False)


def test_other_files_stay_as_they_are(tmp_path: Path) -> None:
    command = tmp_path / "trtllm-build"
    for content in (b"#!/bin/sh\nexec other\n", b"\x7fELF\xff\xfe"):
        command.write_bytes(content)
        with pytest.raises(ValueError, match="is not the script that pip writes"):
            install(command)
        assert command.read_bytes() == content


def test_contract_the_installed_command(script: Path, tmp_path: Path) -> None:
    """Found on PATH, changed by the option, works with spawned workers, and without this package."""
    arguments = ("--checkpoint_dir", checkpoint(tmp_path, mapping={"world_size": 2, "tp_size": 2}))
    arguments += ("--output_dir", str(tmp_path / "engine"), "--dry_run", "--workers", "2")
    changed = run("--xshare_install", PATH=str(script.parent))
    assert (changed.returncode, changed.stdout) == (0, f"--plugin xshare put into {script}\n"), changed.stderr
    done = run(*arguments, "--plugin", "xshare", "--xshare_budget", 4, command=(sys.executable, str(script)))
    assert done.returncode == 0, done.stderr
    assert "xshare" in (tmp_path / "engine" / "config.json").read_text()
    code = "import runpy, sys; sys.modules['xshare_trtllm.trtllm.build_command'] = None; del sys.argv[0]"
    code += "; runpy.run_path(sys.argv[0], run_name='__main__')"
    plain = run(script, "--help", command=(sys.executable, "-c", code))
    assert plain.returncode == 0 and "--plugin" not in plain.stdout, plain.stderr
    assert run("--xshare_uninstall", PATH=str(script.parent)).stdout.startswith("--plugin xshare taken out")
