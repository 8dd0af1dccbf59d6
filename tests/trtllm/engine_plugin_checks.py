"""What test_engine_plugin.py runs:  engine_plugin_checks.py LIBRARY PROBE"""

from __future__ import annotations

import ctypes
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import tensorrt_lean_bindings as trt
from plugin_probe import Probe

from xshare_trtllm import RouterSpec, XShareConfig
from xshare_trtllm.graph import GraphInputs
from xshare_trtllm.trtllm.engine import load_plugin, make_plugin, plugin_fields

CASES = (
    (RouterSpec(8, 2, "topk_softmax"), XShareConfig(4), GraphInputs(exempt=True)),
    (RouterSpec(60, 4, "softmax"), XShareConfig(2**40, coverage=0.9), GraphInputs(exempt=True)),
    (
        RouterSpec(160, 6, "softmax", 8, 3, 16.0),
        XShareConfig(40, 2, request_budget=20, gpu_budget=9, coverage=0.75, max_rows=256),
        GraphInputs(request_ids=True, exempt=True, expert_gpu=True),
    ),
    (RouterSpec(160, 6, "softmax_renorm", 8, 3), XShareConfig(40), GraphInputs(True, True, True, True)),
)


def main(library: Path, probe_path: str) -> None:
    creator = load_plugin(trt, library)
    assert load_plugin(trt, library).name == creator.name == "XShareRouting"
    probe = Probe(probe_path)
    for spec, config, inputs in CASES[:3]:
        plugin = make_plugin(trt, creator, spec, config, inputs)
        build: Any = plugin.get_capability_interface(trt.PluginCapabilityType.BUILD)
        assert build.num_outputs == 2
        check_serialized(probe, library, spec, config, inputs)
    try:
        make_plugin(trt, creator, *CASES[3])  # a bias without sigmoid_bias
        raise AssertionError("the plugin took a correction bias for softmax_renorm")
    except RuntimeError as error:
        assert "refused its fields" in str(error)
    check_other_library(library)
    print("all good")


def check_serialized(
    probe: Probe, library: Path, spec: RouterSpec, config: XShareConfig, inputs: GraphInputs
) -> None:
    """What an engine would hold are the very values of the configuration, all bits."""
    values = plugin_fields(spec, config, inputs)
    kinds = {"i": 5, "f": 1, "d": 2, "b": 6}
    raw = [(name, kinds[value.dtype.char], value) for name, value in values.items()]
    plugin = probe.create_raw(probe.offered_creator(str(library)), raw)
    assert plugin is not None, probe.messages()
    serialized = plugin.serialize()
    for name, kind, value in raw:
        assert serialized[name][:2] == (kind, value.tobytes()), name
    plugin.destroy()


def check_other_library(library: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copyfile(library, Path(folder) / "libother.so"))
        try:
            load_plugin(trt, copy)
            raise AssertionError("another library's plugin passed for this one's")
        except RuntimeError as error:
            assert "registered by another library" in str(error)
        ctypes.CDLL(None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
