"""The plugin XShareRouting: its name in TensorRT's registry, and how a process gets it."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

NODE, OURS, PLUGIN_VERSION = "XShareRouting", "xshare", "2"
LIBRARY = Path(__file__).parents[1] / "lib" / "libnvinfer_plugin_xshare.so"


def load_creator(trt: Any) -> Any:
    """The plugin's creator, its library loaded first: XSHARE_PLUGIN, or the one in this package.

    The library registers itself. TensorRT Edge-LLM loads no library but its own, so ours has to be in the
    process before or beside it. Raises RuntimeError where it is not there or not the right version.
    """
    library = Path(os.environ.get("XSHARE_PLUGIN", LIBRARY))
    if not library.is_file():
        raise RuntimeError(f"{library} is not there: build_scripts/build_plugin.sh builds it")
    ctypes.CDLL(str(library))
    creator = trt.get_plugin_registry().get_creator(NODE, PLUGIN_VERSION, OURS)
    if creator is None:
        raise RuntimeError(f"{library}: TensorRT has no {NODE} of version {PLUGIN_VERSION} from it")
    return creator
