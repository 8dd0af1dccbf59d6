"""What test_both_libraries.py runs in a process of its own:  both_libraries.py ORDER OURS THEIRS"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import tensorrt_lean_bindings as trt

NAMES = (("XShareRouting", "2", "xshare"), ("Fp16MoePlugin", "1", ""))
order, ours, theirs = sys.argv[1:]
if order == "preloaded":
    assert ours in Path("/proc/self/maps").read_text()
elif order == "ours first":
    ctypes.CDLL(ours)
registry = trt.get_plugin_registry()
assert registry.load_library(theirs) is not None
if order == "theirs first":
    ctypes.CDLL(ours)
for name in NAMES:
    creator = registry.get_creator(*name)
    assert creator is not None, name
    found = sum((c.name, c.plugin_version, c.plugin_namespace) == name for c in registry.all_creators)
    assert found == 1, (name, found)
plugin = registry.get_creator(*NAMES[0]).create_plugin(
    "layer", trt.PluginFieldCollection([]), trt.TensorRTPhase.BUILD
)
assert plugin is None, "refused for its fields, by our own library"
