"""The options that commands share: every field of XShareConfig, from numbers or from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from xshare_trtllm import XShareConfig
from xshare_trtllm.options import xshare_options


def run(*arguments: str) -> tuple[Result, list[XShareConfig | None]]:
    """What a command with these options is called with."""
    seen: list[XShareConfig | None] = []

    @click.command()
    @click.option("--other", default=3)
    @xshare_options
    def command(config: XShareConfig | None, other: int) -> None:
        assert other == 3
        seen.append(config)

    return CliRunner().invoke(command, arguments), seen


VALUES: dict[str, Any] = {
    "budget": 24,
    "warmup": 2,
    "request_budget": 12,
    "gpu_budget": 6,
    "coverage": 0.9,
    "max_rows": 48,
    "utility": "affinity",
}


def test_every_field_has_an_option() -> None:
    assert VALUES.keys() == XShareConfig.model_fields.keys()
    options = [f"--{name.replace('_', '-')}={value}" for name, value in VALUES.items()]
    done, seen = run(*options)
    assert done.exit_code == 0 and seen == [XShareConfig(**VALUES)], done.output


def test_what_is_not_given_is_the_configurations_own() -> None:
    assert run("--coverage", "0.97")[1] == [XShareConfig(coverage=0.97)]
    assert run()[1] == [None]


def test_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "xshare.yaml"
    XShareConfig([8, 12], coverage=0.9).to_yaml(path)
    assert run("--config", str(path))[1] == [XShareConfig([8, 12], coverage=0.9)]
    done, seen = run("--config", str(path), "--max-rows", "4")
    assert done.exit_code == 2 and seen == []
    assert "--config names all of XShare's settings: leave --max-rows out" in done.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("budget: 24\nmin_coverage: 0.9", "unknown key 'min_coverage'; known are budget, warmup"),
        ("warmup: 1", "nothing is limited; set coverage (0.97 = keep 97 % of what rows ask for)"),
        ("coverage: 97", "coverage must be less than or equal to 1"),
    ],
)
def test_a_file_that_is_wrong_is_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "xshare.yaml"
    path.write_text(text)
    done, seen = run("--config", str(path))
    assert done.exit_code == 1 and seen == [] and message in done.output
    assert done.output.startswith("Error: XShareConfig") and done.output.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coverage", "0"], "XShareConfig(coverage=0.0): coverage must be greater than 0"),
        (["--budget", "24", "--warmup", "-1"], "warmup must be greater than or equal to 0"),
        (["--utility", "frequency"], "'squared_weight', 'affinity'"),
        (["--min-coverage", "0.9"], "No such option"),
        (["--warmup", "2"], "nothing is limited; set coverage"),
    ],
)
def test_numbers_that_are_wrong(arguments: list[str], message: str) -> None:
    done, seen = run(*arguments)
    assert done.exit_code != 0 and seen == [] and message in done.output
