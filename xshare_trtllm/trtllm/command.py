"""`xshare trtllm`: a command of TensorRT-LLM, with XShare in all of its processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "--config",
    "config_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="YAML file with the coverage or budget. Its processes report to the folder beside it.",
)
@click.option("--install", is_flag=True, help="Write xshare_startup.pth into this environment, and end.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def trtllm(config_path: Path | None, install: bool, command: tuple[str, ...]) -> None:
    """Run trtllm-serve or trtllm-bench with XShare, or not at all.

    \b
    xshare trtllm --config xshare.yaml trtllm-serve MODEL --tp_size 8

    The server starts once XShare is in the model of every rank, and is stopped where it is not, saying which
    rank is missing and why. Under mpirun or srun, export TRTLLM_XSHARE=/path/xshare.yaml to all ranks too.
    """
    from xshare_trtllm.trtllm import startup
    from xshare_trtllm.trtllm.workers import use

    try:
        if install:
            click.echo(f"{startup.write_hook()}: written; it acts where {startup.VARIABLE} is set")
            return
        if config_path is None or not command:
            raise click.UsageError("give --config FILE and a command, such as trtllm-serve MODEL")
        use(config_path)
    except (ValueError, RuntimeError, OSError) as error:
        raise click.ClickException(str(error)) from error
    # A process of its own, so that /proc says how the server was started: `xshare doctor --serving PID`.
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", __name__, *command])


def main() -> None:
    """The rest of the command, in the process that serves."""
    from xshare_trtllm.trtllm import startup
    from xshare_trtllm.trtllm.inspection import check_names
    from xshare_trtllm.trtllm.workers import run_console_script

    startup.install()
    try:
        check_names()
    except RuntimeError as error:
        raise SystemExit(str(error)) from error
    run_console_script(sys.argv[1:])


if __name__ == "__main__":
    main()
