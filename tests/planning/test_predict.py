"""`xshare predict`."""

import json
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from xshare_trtllm.cli import main
from xshare_trtllm.planning.shapes import CONFIGS


def predict(*arguments):
    return CliRunner().invoke(main, ["predict", *map(str, arguments)])


def row(output, batch):
    """The cells of that batch's line."""
    (line,) = [line for line in output.splitlines() if line.startswith(f"│ {batch:5} │")]
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_a_table_a_break_even_and_the_known_error():
    result = predict("--model", "gpt-oss-120b", "--gpu", "H200", "--batch", 16, "--batch", 4, "--budget", 24)
    assert result.exit_code == 0, result.output
    assert "budget 24 of 128" in result.output and "1 x H200 SXM" in result.output
    cells = row(result.output, 16)
    before, after = map(float, cells[1].split(" > "))
    assert before > 40 and 23.5 < after < 25
    assert cells[-2].startswith("+") and row(result.output, 4)[-2].startswith("-")
    assert "Break-even: gains from batch" in result.output
    assert re.search(r"Known error: 9 points on average, 14 at worst", result.output)
    assert "GPUs are needed" not in result.output


def test_a_coverage_is_the_default():
    result = predict("--model", "olmoe-1b-7b", "--gpu", "a100", "--batch", 8)
    assert result.exit_code == 0, result.output
    assert "A100 SXM: coverage 0.97, 1024 tokens" in result.output
    cells = row(result.output, 8)
    before, after = map(float, cells[1].split(" > "))
    assert after < before and float(cells[2].removesuffix("%")) >= 97
    stated = predict("--model", "olmoe-1b-7b", "--gpu", "a100", "--batch", 8, "--coverage", 0.97)
    assert stated.output == result.output


def test_a_coverage_and_a_budget():
    both = predict(
        "--model", "olmoe-1b-7b", "--gpu", "a100", "--batch", 32, "--coverage", 0.99, "--budget", 20
    )
    alone = predict("--model", "olmoe-1b-7b", "--gpu", "a100", "--batch", 32, "--budget", 20)
    assert "coverage 0.99, budget 20 of 64 experts" in both.output
    assert "coverage" not in alone.output
    assert row(both.output, 32) == row(alone.output, 32), "the budget is what limits here"


def test_expert_parallelism_and_too_little_memory():
    result = predict("--model", "DeepSeek-R1", "--gpu", "h100", "--batch", 8, "--expert-parallel", 8)
    assert result.exit_code == 0, result.output
    assert "peak" in result.output and "8 x H100 SXM" in result.output
    assert "The weights take 673 GB, the memory is 640 GB" in result.output


def test_a_config_json_is_a_model(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS["qwen3-30b-a3b"]))
    mine = predict("--model", path, "--gpu", "h100", "--batch", 8, "--budget", 24)
    known = predict("--model", "qwen3-30b-a3b", "--gpu", "h100", "--batch", 8, "--budget", 24)
    assert mine.exit_code == 0, mine.output
    assert row(mine.output, 8) == row(known.output, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt-5", "--gpu", "h200"], "model 'gpt-5' is not known; known are gpt-oss-120b"),
        (
            ["--model", "gpt-oss-20b", "--gpu", "v100"],
            "gpu 'v100' is not known; known are h100, h200, a100, b200",
        ),
        (["--model", "gpt-oss-20b", "--gpu", "h100", "--budget", 3], "budget must be at least top_k=4"),
        (["--model", "gpt-oss-20b", "--gpu", "h100", "--warmup", 5], "warmup must be at most top_k=4"),
        (["--model", "nowhere/config.json", "--gpu", "h100"], "No such file"),
        (
            ["--model", "gpt-oss-20b", "--gpu", "h100", "--tensor-parallel", 2, "--expert-parallel", 2],
            "cannot be combined",
        ),
    ],
)
def test_errors_are_one_line(arguments, message):
    result = predict(*arguments)
    assert result.exit_code == 1
    assert message in result.output and "Traceback" not in result.output


@pytest.mark.parametrize("coverage", [0, 1.5])
def test_a_coverage_outside_its_range(coverage):
    result = predict("--model", "gpt-oss-20b", "--gpu", "h100", "--coverage", coverage)
    assert result.exit_code == 2 and "is not in the range 0<x<=1" in result.output


@pytest.mark.parametrize("text", ["{", "", "[]", '{"model_type": "llama"}'])
def test_a_config_json_that_is_none(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    result = predict("--model", path, "--gpu", "h100")
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert str(path) in result.output.replace("\n", "")


def test_a_folder_with_a_byte_order_mark_and_weight_bits(tmp_path):
    path = tmp_path / "config.json"
    config = CONFIGS["qwen3-30b-a3b"] | {"quantization_config": {"quant_method": "quanto"}}
    path.write_text(json.dumps(config), encoding="utf-8-sig")
    unknown = predict("--model", tmp_path, "--gpu", "h100")
    assert unknown.exit_code == 1 and "--weight-bits" in unknown.output
    said = predict("--model", tmp_path, "--gpu", "h100", "--batch", 8, "--budget", 24, "--weight-bits", 16)
    known = predict("--model", "qwen3-30b-a3b", "--gpu", "h100", "--batch", 8, "--budget", 24)
    assert said.exit_code == 0 and row(said.output, 8) == row(known.output, 8)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from click.testing import CliRunner; "
        "from xshare_trtllm.planning.predict import predict; "
        "assert CliRunner().invoke(predict, ['--help']).exit_code == 0; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'rich')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
