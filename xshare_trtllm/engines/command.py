"""`xshare build`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from xshare_trtllm.engines.recipe import Recipe
    from xshare_trtllm.engines.steps import Step


@click.command()
@click.option(
    "--recipe",
    "recipe_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="A file of engines/.",
)
@click.option(
    "--checkpoint",
    help="Folder of the Hugging Face checkpoint. Without it trtllm-serve downloads the recipe's model; "
    "trtllm-build needs the folder.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to build.  [default: build/engines/RECIPE]",
)
@click.option("--dry-run", is_flag=True, help="Print the commands and files, and do nothing.")
def build(recipe_path: Path, checkpoint: str | None, output: Path | None, dry_run: bool) -> None:
    """Make a recipe's engine, or its options for the PyTorch backend.

    Converts the checkpoint and runs trtllm-build with the plugin (path engine), or writes the options file of
    trtllm-serve (path pytorch). What is there and unchanged is reused; a manifest in each folder says what it
    was made from. A build that fails leaves what was there before.
    """
    from xshare_trtllm.engines.recipe import load_recipe
    from xshare_trtllm.engines.run import StepFailed, run
    from xshare_trtllm.engines.steps import plan, serve_command, shown

    try:
        recipe = load_recipe(recipe_path)
        model = checkpoint or recipe.model
        output = output or Path("build/engines") / recipe_path.stem
        steps = plan(recipe, model, output)
        serve = serve_command(recipe, model, output)
        if dry_run:
            _show(steps, recipe, output)
        else:
            _check_can_run(recipe, checkpoint)
            run(steps, output, _about(recipe_path, recipe), click.echo)
    except (ValueError, OSError, StepFailed) as error:
        raise click.ClickException(str(error)) from error
    except ImportError as error:
        raise click.ClickException(f"{error}; see: xshare doctor") from error
    click.echo(f"== to serve it\n{shown(serve)}")


def _show(steps: list[Step], recipe: Recipe, output: Path) -> None:
    from xshare_trtllm.engines.run import is_current
    from xshare_trtllm.engines.steps import shown

    for number, step in enumerate(steps, 1):
        folder = output / step.name
        state = "unchanged, would be reused" if is_current(step, folder) else "would be made"
        click.echo(f"== {number}/{len(steps)} {folder}: {state}")
        if step.command is not None:
            click.echo(shown(step.command(folder)))
    click.echo(f"== XShare: {recipe.config.to_dict()}")


def _check_can_run(recipe: Recipe, checkpoint: str | None) -> None:
    """Before the long commands: what they would miss. Raises ValueError."""
    from xshare_trtllm.engines import environment

    if recipe.path == "pytorch":
        return
    if checkpoint is None:
        raise ValueError(f"--checkpoint: is needed. hf download {recipe.model} --local-dir FOLDER")
    if not (Path(checkpoint) / "config.json").is_file():
        raise ValueError(f"--checkpoint {checkpoint}: no config.json there")
    if environment.find_trtllm_examples() is None:
        raise ValueError(
            "TensorRT-LLM's scripts are not here (the wheel has none): set TRTLLM_ROOT to a checkout of the "
            "installed version, git clone --depth 1 --branch v1.2.1 https://github.com/NVIDIA/TensorRT-LLM"
        )
    plugin = environment.find_library(environment.PLUGIN)
    if plugin is None or not plugin.is_file():
        raise ValueError(f"{plugin or environment.PLUGIN} is not there: build_scripts/build_plugin.sh")


def _about(recipe_path: Path, recipe: Recipe) -> dict[str, Any]:
    import hashlib
    from datetime import datetime, timezone

    return {
        "recipe": {
            "file": recipe_path.name,
            "sha256": hashlib.sha256(recipe_path.read_bytes()).hexdigest(),
            "model": recipe.model,
            "gpu": recipe.gpu,
        },
        "xshare": {name: setting.model_dump() for name, setting in recipe.xshare.items()},
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
