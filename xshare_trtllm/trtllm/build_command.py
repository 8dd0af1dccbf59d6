"""`trtllm-build` with `--plugin xshare`: TensorRT-LLM's own command, with XShare in its engines' MoE layers.

Without `--plugin xshare` it is TensorRT-LLM's command and nothing else. How it gets into `trtllm-build`, and
why that way: docs/engine_path.md. `python -m xshare_trtllm.trtllm.build_command` works whatever is on PATH.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from xshare_trtllm.config import XShareConfig
from xshare_trtllm.report import write_aside

PROGRAM = "trtllm-build"
THEIR_IMPORT = "from tensorrt_llm.commands.build import main\n"
OUR_IMPORT = f"""\
try:  # written by xshare-trtllm: adds --plugin xshare
    from xshare_trtllm.trtllm.build_command import main
except ImportError:
    {THEIR_IMPORT}"""


def find_build_command(path: str | None = None) -> tuple[Path | None, bool]:
    """The `trtllm-build` that is first on `path` (default: PATH), and whether it knows `--plugin xshare`."""
    found = shutil.which(PROGRAM, path=path)
    if found is None:
        return None, False
    return Path(found), OUR_IMPORT.encode() in Path(found).read_bytes()


def install(command: Path) -> bool:
    """Puts XShare into TensorRT-LLM's `trtllm-build`, a script that pip wrote; False: it is there already.

    Raises ValueError for a file that is not such a script.
    """
    text = _script(command)
    if OUR_IMPORT in text:
        return False
    _rewrite(command, text, THEIR_IMPORT, OUR_IMPORT)
    return True


def uninstall(command: Path) -> bool:
    """Takes it out again; False: it is not there."""
    text = _script(command)
    if OUR_IMPORT not in text:
        return False
    _rewrite(command, text, OUR_IMPORT, THEIR_IMPORT)
    return True


def _script(command: Path) -> str:
    try:
        return command.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def _rewrite(command: Path, text: str, old: str, new: str) -> None:
    if text.count(old) != 1:
        raise ValueError(f"{command} is not the script that pip writes for TensorRT-LLM; it stays as it is")
    with write_aside(command) as aside:
        aside.write_text(text.replace(old, new), encoding="utf-8")
        aside.chmod(command.stat().st_mode)


# The fields of XShareConfig, by their names.
_SETTINGS: dict[str, tuple[type, str]] = {
    "coverage": (float, "Share of what the rows ask for that is enough, for example 0.97."),
    "budget": (int, "Experts that may be active in an MoE layer."),
    "utility": (str, "What an expert is worth to a row: squared_weight (default) or affinity."),
    "warmup": (int, "Experts per token that are kept whatever the batch says (default 1)."),
    "request_budget": (int, "Experts that one request proposes (speculative decoding)."),
    "gpu_budget": (int, "Experts that may be active on one GPU (expert parallelism)."),
    "max_rows": (int, "With more rows than this the model's own routing is the output."),
}


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(PROGRAM, add_help=False, allow_abbrev=False)
    _add_options(parser)
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("XShare (xshare-trtllm)")
    add = partial(group.add_argument, default=argparse.SUPPRESS)
    add("--plugin", choices=["xshare"], help="One shared set of experts per MoE layer and step.")
    add("--xshare_config", type=Path, metavar="FILE", help="YAML file with what the options below say.")
    for name, (kind, text) in _SETTINGS.items():
        add(f"--xshare_{name}", type=kind, metavar=kind.__name__.upper(), help=text)
    add("--xshare_install", action="store_true", help="Put --plugin into the trtllm-build on PATH, and end.")
    add("--xshare_uninstall", action="store_true", help="Take it out of there again, and end.")


def main(argv: Sequence[str] | None = None) -> None:
    """`trtllm-build` with XShare's options, which are taken out; the other arguments pass untouched."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _options()
    given, others = parser.parse_known_args(arguments)
    chosen = vars(given)
    if chosen.keys() & {"xshare_install", "xshare_uninstall"}:
        _change_command(parser, put_in="xshare_install" in chosen)
        return
    if not chosen:
        _run(parser, arguments)
        return
    if "plugin" not in chosen:
        parser.error(f"--{next(iter(chosen))} needs --plugin xshare")
    _run(parser, others, _configuration(parser, chosen))


def _configuration(parser: argparse.ArgumentParser, chosen: dict[str, Any]) -> XShareConfig:
    settings = {name: chosen[key] for name in _SETTINGS if (key := f"xshare_{name}") in chosen}
    if ("xshare_config" in chosen) == bool(settings):
        parser.error("--plugin xshare needs either --xshare_config or its values: --xshare_coverage 0.97")
    try:
        if "xshare_config" in chosen:
            return XShareConfig.from_yaml(chosen["xshare_config"])
        return XShareConfig.from_dict(settings)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _run(parser: argparse.ArgumentParser, arguments: list[str], config: XShareConfig | None = None) -> None:
    """TensorRT-LLM's own main; with a configuration, with `XShareBuild` for its `build_and_save`."""
    try:
        theirs = import_module("tensorrt_llm.commands.build")
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("tensorrt_llm"):
            raise
        parser.error("this Python has no TensorRT-LLM with engines: pip install 'tensorrt-llm>=1.0,<1.3'")
    from xshare_trtllm.trtllm.engine import XShareBuild, replaced

    with replaced(sys, "argv", [sys.argv[0], *arguments]):
        if config is not None:
            build = XShareBuild(_settings(parser, config), theirs.build_and_save)
            with replaced(theirs, "build_and_save", build):
                theirs.main()
        elif {"-h", "--help"} & set(arguments):
            with replaced(theirs, "parse_arguments", _with_help(theirs.parse_arguments)):
                theirs.main()
        else:
            theirs.main()


def _settings(parser: argparse.ArgumentParser, config: XShareConfig) -> Any:
    from xshare_trtllm.engines.environment import PLUGIN, find_library
    from xshare_trtllm.trtllm.engine import Settings, check_version

    library = find_library(PLUGIN)
    if library is None or not library.is_file():
        parser.error(
            f"the plugin library {library or PLUGIN} is not there: run build_scripts/build_plugin.sh, or "
            "name it with XSHARE_PLUGIN"
        )
    try:
        check_version(import_module("tensorrt_llm").__version__)
    except ValueError as error:
        parser.error(str(error))
    return Settings(config, library.resolve())


def _with_help(parse_arguments: Any) -> Any:
    def with_ours() -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = parse_arguments()
        _add_options(parser)
        return parser

    return with_ours


def _change_command(parser: argparse.ArgumentParser, *, put_in: bool) -> None:
    command, _ = find_build_command()
    if command is None:
        parser.error(f"there is no {PROGRAM} on PATH: install TensorRT-LLM 1.0 to 1.2 first")
    if not os.access(command.parent, os.W_OK):
        parser.error(f"{command} cannot be changed: no right to write to {command.parent}")
    try:
        changed = install(command) if put_in else uninstall(command)
    except ValueError as error:
        parser.error(str(error))
    done = "put into" if put_in else "taken out of"
    print(f"--plugin xshare {done} {command}" if changed else f"{command}: nothing to do")


if __name__ == "__main__":
    main()
