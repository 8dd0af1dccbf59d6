"""What test_plugin_registry.py runs in processes of their own:  registry_checks.py CHECK LIBRARY PROBE COPY

A crash inside a shared library ends the process that it is in, which should not be pytest's.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from pathlib import Path
from typing import Any

import plugin_probe
from plugin_fields import DEEPSEEK, EDGE, GPT_OSS, STEP_BIAS, Fields, illegal, legal
from plugin_probe import BF16, BOOL, BUILD_PHASE, FLOAT, HALF, INT32, LINEAR, RUNTIME_PHASE, Probe

NAME = ("XShareRouting", "2", "xshare")
EARLIER = ("XShareRouting", "1", "xshare")  # other fields: an engine of it must find no creator
INPUTS = ("has_correction_bias", "has_request_ids", "has_exempt", "has_expert_gpu")
INPUT_TYPES = dict(zip(INPUTS, (FLOAT, INT32, BOOL, INT32), strict=True))


# ---- The real registry, through TensorRT's own Python ----


def load_list_unload(library: str, probe_path: str, copy: str) -> None:
    trt, registry = _registry()
    others = len(registry.all_creators)
    for _ in range(2):
        handle = registry.load_library(library)
        assert handle is not None
        assert _listed(registry) == 1
        creator = registry.get_creator(*NAME)
        assert (creator.name, creator.plugin_version, creator.plugin_namespace) == NAME
        assert registry.get_creator(*EARLIER) is None
        names = [field.name for field in creator.field_names]
        assert len(names) == len(set(names)) and set(names) >= set(DEEPSEEK | GPT_OSS | EDGE), names
        _create_in_python(trt, creator)
        registry.deregister_library(handle)
        assert _listed(registry) == 0 and len(registry.all_creators) == others
        assert registry.get_creator(*NAME) is None


def second_copy(library: str, probe_path: str, copy: str) -> None:
    """TensorRT refuses a second library of one name, keeps the first, takes the second once that is gone."""
    trt, registry = _registry()
    for first, second in ((library, copy), (copy, library)):
        handle = registry.load_library(first)
        assert handle is not None
        assert registry.load_library(second) is None
        assert _listed(registry) == 1
        _create_in_python(trt, registry.get_creator(*NAME))
        registry.deregister_library(handle)
        assert _listed(registry) == 0


def both_copies_work(library: str, probe_path: str, copy: str) -> None:
    """Two copies in one process keep their own state, whichever of them is registered."""
    _, registry = _registry()
    assert registry.load_library(library) is not None
    probe = Probe(probe_path)
    creators = [probe.offered_creator(path) for path in (library, copy)]
    assert creators[0] != creators[1] and probe.registered_creator(_tensorrt()) == creators[0]
    plugins = [probe.create(creator, fields) for creator in creators for fields in (GPT_OSS, DEEPSEEK)]
    serialized = [plugin.serialize() for plugin in plugins if plugin is not None]
    assert serialized[:2] == serialized[2:] and serialized[0] != serialized[1]


def dlopen_only(library: str, probe_path: str, copy: str) -> None:
    """Registered by dlopen alone; handed over without an error where load_library comes later."""
    trt, registry = _registry()
    ctypes.CDLL(library)
    assert _listed(registry) == 1
    _create_in_python(trt, registry.get_creator(*NAME))
    ctypes.CDLL(copy)  # finds the name taken and leaves it
    assert _listed(registry) == 1
    for _ in range(2):
        handle = registry.load_library(library)
        assert handle is not None and _listed(registry) == 1
        registry.deregister_library(handle)
        assert _listed(registry) == 0


def _registry() -> tuple[Any, Any]:
    import tensorrt_lean_bindings as trt

    registry = trt.get_plugin_registry()
    assert _listed(registry) == 0
    return trt, registry


def _tensorrt() -> str:
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "libnvinfer_lean.so" in line:
            return line.split(maxsplit=5)[5]
    raise AssertionError("TensorRT is not loaded")


def _listed(registry: Any) -> int:
    return sum((c.name, c.plugin_version, c.plugin_namespace) == NAME for c in registry.all_creators)


def _create_in_python(trt: Any, creator: Any) -> None:
    for fields in (GPT_OSS, DEEPSEEK):
        plugin = creator.create_plugin("layer", _collection(trt, fields), trt.TensorRTPhase.BUILD)
        core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
        assert (core.plugin_name, core.plugin_version, core.plugin_namespace) == NAME
        build = plugin.get_capability_interface(trt.PluginCapabilityType.BUILD)
        assert build.num_outputs == 2
        assert plugin.get_capability_interface(trt.PluginCapabilityType.RUNTIME) is not None
    assert creator.create_plugin("layer", _collection(trt, {"top_k": 1}), trt.TensorRTPhase.BUILD) is None
    gc.collect()


def _collection(trt: Any, fields: Fields) -> Any:
    encoded = ((name, *plugin_probe.encode(name, value)) for name, value in fields.items())
    return trt.PluginFieldCollection(
        [trt.PluginField(name, data, trt.PluginFieldType(kind)) for name, kind, data in encoded]
    )


# ---- The plugin itself, through TensorRT's C++ interface, from the creator in the real registry ----


def fields(library: str, probe_path: str, copy: str) -> None:
    """A legal set makes the same plugin again from what it serialises; an illegal one is refused by name."""
    probe, creator = _creator(library, probe_path)
    for given in legal():
        plugin = probe.create(creator, given)
        assert plugin is not None, (given, probe.messages())
        _check_serialized(probe, creator, given, plugin)
    assert probe.messages() == ""
    for given, expected in illegal():
        for phase in (BUILD_PHASE, RUNTIME_PHASE):
            assert probe.create(creator, given, phase) is None, given
            messages = probe.messages()
            assert messages.startswith("1: XShareRouting: createPlugin('layer'): "), messages  # 1 = kERROR
            assert expected in messages and messages.count("\n") == 1, (given, messages)


def broken_collections(library: str, probe_path: str, copy: str) -> None:
    probe, creator = _creator(library, probe_path)
    assert probe.create_without_collection(creator) is None
    assert "there are no fields" in probe.messages()
    encoded = [(name, *plugin_probe.encode(name, value)) for name, value in GPT_OSS.items()]
    assert probe.create_raw(creator, [*encoded, encoded[0]]) is None
    assert "field num_experts is given twice" in probe.messages()
    assert probe.create_raw(creator, [*encoded, (None, 5, None)]) is None
    assert "field number 4 has no name" in probe.messages()


def _check_serialized(probe: Probe, creator: int, given: Fields, plugin: Any) -> None:
    serialized = plugin.serialize()
    for name, value in given.items():
        kind, data = plugin_probe.encode(name, value)
        if serialized[name][0] == kind:
            assert serialized[name][1] == data.tobytes().rstrip(b"\0" if kind == 6 else b""), (name, given)
    copies = [plugin.clone(), plugin.attach(), plugin.clone().attach()]
    again = probe.create_raw(creator, _as_given(serialized), RUNTIME_PHASE)
    assert again is not None, probe.messages()
    plugin.destroy()  # clones own what they need
    for each in (*copies, again):
        assert each.serialize() == serialized and each.has_capabilities()
        each.destroy()
    probe.messages()  # has_capabilities asks for one that does not exist


def _as_given(serialized: dict[str, tuple[int, bytes, int]]) -> list[tuple[str, int, Any]]:
    import numpy as np

    dtypes = {1: np.float32, 2: np.float64, 5: np.int32, 6: np.int8}
    return [(name, kind, np.frombuffer(data, dtypes[kind])) for name, (kind, data, _) in serialized.items()]


def tensors(library: str, probe_path: str, copy: str) -> None:
    """Types, formats, shapes and row limits, for every combination of optional tensors."""
    probe, creator = _creator(library, probe_path)
    for chosen in range(16):
        has = {name: chosen >> bit & 1 for bit, name in enumerate(INPUTS)}
        for active in (0, 1):
            plugin = probe.create(creator, DEEPSEEK | has | {"has_active_experts": active})
            assert plugin is not None
            inputs = [FLOAT] + [INPUT_TYPES[name] for name in INPUTS if has[name]]
            outputs = [INT32, FLOAT] + [BOOL] * active
            _check_formats(plugin, inputs, outputs)
            shapes = [(INT32, [7, 8]), (FLOAT, [7, 8]), (BOOL, [256])]
            assert plugin.outputs(len(inputs), 256) == shapes[: 2 + active]
            assert probe.messages() == ""
            assert plugin.outputs(len(inputs) + 1, 256) is None and "promise" in probe.messages()
            plugin.destroy()
    for fields, output in ((EDGE, (FLOAT, [7, 128])), (STEP_BIAS, (FLOAT, [128]))):
        for active in (0, 1):
            plugin = probe.create(creator, fields | {"has_active_experts": active})
            assert plugin is not None
            inputs = [FLOAT] * (2 if fields is STEP_BIAS else 1)
            _check_formats(plugin, inputs, [output[0]] + [BOOL] * active, logits_like=fields is EDGE)
            assert plugin.outputs(len(inputs), 128) == [output, (BOOL, [128])][: 1 + active]
            plugin.destroy()
    _check_sizes(probe, creator)


def _check_formats(plugin: Any, inputs: list[int], outputs: list[int], logits_like: bool = False) -> None:
    """`logits_like`: the first output has the type of the logits, whichever that is."""
    types, n = inputs + outputs, len(inputs)
    for dtype in (FLOAT, HALF, BF16):
        same = [dtype, *types[1:]]
        same[n] = dtype if logits_like else types[n]
        assert plugin.supports(n, same, [LINEAR] * len(types), n)
        same[n] = HALF if same[n] != HALF else FLOAT
        assert not plugin.supports(n, same, [LINEAR] * len(types), n)
    for position in range(len(types)):
        good = (FLOAT, HALF, BF16) if position == 0 else (types[position],)
        for dtype in range(12):
            tried = [*types[:position], dtype, *types[position + 1 :]]
            assert plugin.supports(position, tried, [LINEAR] * len(types), n) == (dtype in good)
        for layout in range(1, 13):
            assert not plugin.supports(position, types, [layout] * len(types), n)


def _check_sizes(probe: Probe, creator: int) -> None:
    plugin = probe.create(creator, GPT_OSS)
    assert plugin is not None
    rows = [0, 1, 2, 16, 255, 256, 257, 300, 1000, 4096, 8191, 16384]
    for dtype in (FLOAT, HALF, BF16):
        sizes = [plugin.workspace(dtype, n, 128) for n in rows]
        assert sizes == sorted(sizes)  # TensorRT asks once, for the most rows
        assert all(plugin.configure(1, dtype, n, 128) == 0 for n in rows), probe.messages()
    masking = probe.create(creator, EDGE)
    assert masking is not None
    assert masking.configure(1, FLOAT, 8, 128) == 0
    assert masking.configure(1, HALF, 8, 128) != 0  # it has no -1e30
    assert "mask_value must be negative and exact in logits_dtype" in probe.messages()
    refused = (
        ((1, FLOAT, 8, 64), "must be [rows, num_experts=128]"),
        ((1, FLOAT, 8, -1), "must be [rows, num_experts=128]"),
        ((1, INT32, 8, 128), "float32, bfloat16 or float16"),
        ((2, FLOAT, 8, 128), "promise 1 inputs and 2 outputs, not 2 and 2"),
        ((1, FLOAT, 2**40, 128), "num_tokens must be"),
    )
    for arguments, expected in refused:
        assert plugin.configure(*arguments) != 0
        assert expected in probe.messages()


def threads(library: str, probe_path: str, copy: str) -> None:
    """Plugins are made, cloned, read and destroyed on eight threads at once."""
    probe, creator = _creator(library, probe_path)
    shared = probe.create(creator, DEEPSEEK)
    assert shared is not None
    expected, failures = shared.serialize(), []

    def work() -> None:
        for _ in range(300):
            own = probe.create(creator, DEEPSEEK)
            copies = [shared.clone(), shared.attach(), own]
            if any(each is None or each.serialize() != expected for each in copies):
                failures.append(1)
            for each in copies:
                if each is not None:
                    each.destroy()

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures and probe.messages() == ""


def _creator(library: str, probe_path: str) -> tuple[Probe, int]:
    _, registry = _registry()
    assert registry.load_library(library) is not None
    probe = Probe(probe_path)
    creator = probe.registered_creator(_tensorrt())
    assert creator == probe.offered_creator(library)
    probe.record_messages_of(library)
    return probe, creator


def without_a_driver(library: str, probe_path: str, copy: str) -> None:
    """A launch that CUDA refuses is an error code and a message, not a crash."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        return  # there is a driver: tests/gpu
    probe, creator = _creator(library, probe_path)
    plugin = probe.create(creator, GPT_OSS)
    assert plugin is not None
    room = (ctypes.c_uint64 * 1024)()
    address = ctypes.addressof(room)
    assert plugin.enqueue(FLOAT, 4, 128, [address], [address, address], address, 0) != 0
    assert "enqueue: cudaError" in probe.messages()
    assert plugin.enqueue(FLOAT, 4, 128, [address + 1], [address, address], address, 0) != 0
    assert "router_logits is not aligned to 4 bytes" in probe.messages()


# ---- Without TensorRT in the process ----


def without_tensorrt(library: str, probe_path: str, copy: str) -> None:
    """The library loads and its creator works; what is wrong goes to standard error."""
    probe = Probe(probe_path)
    assert probe.create(probe.offered_creator(library), GPT_OSS) is not None
    assert probe.create(probe.offered_creator(library), GPT_OSS | {"top_k": 99}) is None


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
