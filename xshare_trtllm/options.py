"""The options that commands share: what XShare may do, as numbers or as a file."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from xshare_trtllm.config import UTILITIES, XShareConfig

_OPTIONS = (
    click.option(
        "--config",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="YAML file with the coverage, the budget and their options, instead of those below.",
    ),
    click.option("--coverage", type=float, help="Share of what the rows ask for that is enough, as 0.97."),
    click.option("--budget", type=int, help="Experts that may be active. [default: no limit]"),
    click.option("--warmup", type=int, help="Experts that each token keeps. [default: 1]"),
    click.option("--request-budget", type=int, help="Experts that one request proposes."),
    click.option("--gpu-budget", type=int, help="Experts that may be active on one GPU."),
    click.option("--max-rows", type=int, help="More rows than this are routed as the model does."),
    click.option(
        "--utility",
        type=click.Choice(UTILITIES),
        help="What an expert is worth to a row. [default: squared_weight]",
    ),
)
_NUMBERS = ("coverage", "budget", "warmup", "request_budget", "gpu_budget", "max_rows", "utility")


def xshare_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command the options of XShare. It is called with `config`: an XShareConfig, or None where none
    of them is given. What does not fit together ends the command with one sentence."""

    @wraps(command)
    def with_config(*args: Any, config: Path | None, **options: Any) -> Any:
        numbers = {name: options.pop(name) for name in _NUMBERS}
        given = {name: value for name, value in numbers.items() if value is not None}
        return command(*args, config=_config(config, given), **options)

    decorated: Callable[..., Any] = with_config
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated


def _config(path: Path | None, given: dict[str, Any]) -> XShareConfig | None:
    if path is not None and given:
        option = next(iter(given)).replace("_", "-")
        raise click.UsageError(f"--config names all of XShare's settings: leave --{option} out")
    try:
        if path is not None:
            return XShareConfig.from_yaml(path)
        return XShareConfig(**given) if given else None
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
