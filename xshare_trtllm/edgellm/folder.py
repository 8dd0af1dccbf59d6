"""The folder that `tensorrt-edgellm-export` writes for one model: its graphs rewritten, and given back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
from onnx import helper

from xshare_trtllm import __version__
from xshare_trtllm.config import RouterSpec, XShareConfig
from xshare_trtllm.edgellm.plugin import OURS
from xshare_trtllm.edgellm.rewrite import rewrite
from xshare_trtllm.report import write_aside

KEPT = ".xshare-original"  # behind the name of a graph that was rewritten


def rewrite_folder(
    folder: Path, config: XShareConfig, out: Path | None = None
) -> dict[Path, list[RouterSpec]]:
    """Rewrites `model.onnx`, or with tensor parallelism each rank's, in `folder` or in its copy `out`.

    Weights and other files are copied into `out`, since onnx refuses to read weights through links. The
    original graph is kept beside the new one. All graphs are rewritten before the first is written, and each
    is written aside and renamed.

    Returns the routers by MoE layer, by graph. Raises ValueError as `rewrite` does, for a folder without a
    graph and where `out` is there already; OSError where files cannot be written.
    """
    if out is not None and out.exists():
        raise ValueError(f"{out}: is there already; name a folder that is not")
    made = {}
    for path in _graphs(folder):
        model = onnx.load(path, load_external_data=False)
        try:
            specs = rewrite(model, config, folder)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        record = {"version": __version__, **config.to_dict()}
        helper.set_model_props(model, {**_props(model), OURS: json.dumps(record)})
        made[path.name] = (model.SerializeToString(), specs)
    with _place(folder, out) as place:
        for name, (text, _) in made.items():
            _keep(place / name)
            with write_aside(place / name) as aside:
                aside.write_bytes(text)
    return {(out or folder) / name: specs for name, (_, specs) in made.items()}


def undo_folder(folder: Path) -> list[Path]:
    """Gives the original graphs back, byte for byte; returns them.

    Raises ValueError where no graph was rewritten, or where an original is gone.
    """
    rewritten = [path for path in _graphs(folder) if _is_rewritten(path)]
    if not rewritten:
        raise ValueError(f"{folder}: no graph has XShare, there is nothing to undo")
    for path in rewritten:
        if not _kept(path).exists():
            raise ValueError(f"{_kept(path)}: is gone; export again with tensorrt-edgellm-export")
    for path in rewritten:
        os.replace(_kept(path), path)
    return rewritten


def _graphs(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("model*.onnx"))
    if not paths:
        raise ValueError(f"{folder}: has no model.onnx; name the folder with it, DIR/llm")
    return paths


def _is_rewritten(path: Path) -> bool:
    return OURS in _props(onnx.load(path, load_external_data=False))


def _props(model: onnx.ModelProto) -> dict[str, str]:
    return {prop.key: prop.value for prop in model.metadata_props}


def _kept(path: Path) -> Path:
    return path.with_name(path.name + KEPT)


def _keep(path: Path) -> None:
    with write_aside(_kept(path)) as aside:  # one may be there, of an earlier export into the same folder
        shutil.copy2(path, aside)


@contextmanager
def _place(folder: Path, out: Path | None) -> Iterator[Path]:
    """Where to write: `folder`, or a copy of it that becomes `out` if the block succeeds."""
    if out is None:
        yield folder
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        shutil.copytree(folder, aside)
        yield aside
        os.rename(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
