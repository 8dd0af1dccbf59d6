"""Walks NVIDIA's own `tensorrt.plugin` through the build of an engine:  aot_contract.py CASES RESULTS

In a process of its own, since it puts TensorRT's lean runtime in the place of `tensorrt`. Real are, from
tensorrt-lean-cu13-bindings 11.4.0.106: the Python package `plugin` as a whole, the plugin registry, the
classes that a plugin is made of, the enumerations. What only a builder has is a stand-in here; names, members
and the order of the calls are those of TensorRT 10.14 and 11.1, read from NVIDIA/TensorRT:
python/src/infer/{pyPlugin,pyGraph}.cpp, python/packaging/bindings_wheel/tensorrt/plugin/_plugin_class.py.

CASES is JSON, {name: arguments and the compiled kernel}; RESULTS gets what TensorRT would put into the
engine, or the error.
"""

from __future__ import annotations

import enum
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tensorrt_lean_bindings as trt

from xshare_trtllm import RouterSpec, XShareConfig
from xshare_trtllm.graph import aot_plugin

# ---- Stand-ins for what the lean runtime lacks ----


class TensorFormat(enum.Enum):
    LINEAR = 0


class ITensor:
    def __init__(self, dtype: Any, shape: Sequence[int]) -> None:
        self.dtype, self.shape = dtype, tuple(shape)


class IDimensionExpr:
    """A dimension as a function of the number of rows."""

    def __init__(self, value: Callable[[int], int], constant: bool) -> None:
        self.value, self.constant = value, constant

    def is_constant(self) -> bool:
        return self.constant

    def get_constant_value(self) -> int:
        return self.value(0)


_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "SUM": lambda a, b: a + b,
    "PROD": lambda a, b: a * b,
    "MAX": max,
    "MIN": min,
    "CEIL_DIV": lambda a, b: -(-a // b),
}


class ExprBuilder:
    def constant(self, value: int) -> IDimensionExpr:
        return IDimensionExpr(lambda _: value, True)

    def operation(self, operation: Any, a: IDimensionExpr, b: IDimensionExpr) -> IDimensionExpr:
        function = _OPERATIONS[operation.name]
        return IDimensionExpr(lambda rows: function(a.value(rows), b.value(rows)), a.constant and b.constant)


class DimsExprs(list):  # type: ignore[type-arg]
    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class ISymExpr:
    type: Any
    dtype: Any
    expr: IDimensionExpr


class PluginTensorDesc:
    dims: tuple[int, ...]
    type: Any
    format: Any
    scale = 1.0


class DynamicPluginTensorDesc:
    def __init__(self, dtype: Any, shape: Sequence[int], max_rows: int) -> None:
        self.desc = PluginTensorDesc()
        self.desc.dims, self.desc.type, self.desc.format = tuple(shape), dtype, TensorFormat.LINEAR
        self.min, self.opt, self.max = (
            tuple(rows if size == -1 else size for size in shape) for rows in (1, 1, max_rows)
        )


class SymExprs(dict):  # type: ignore[type-arg]
    nbSymExprs = 0


class Network:
    """Of INetworkDefinition, the one call: `add_plugin(func, aot)`."""

    def __init__(self) -> None:
        self.plugin: Any = None

    def add_plugin(self, func: Callable[[Any], Any], aot: bool) -> Any:
        request = trt.QuickPluginCreationRequest
        self.inputs, shape_inputs, self.plugin = func(request.STRICT_AOT if aot else request.STRICT_JIT)
        assert shape_inputs == []
        return SimpleNamespace(get_output=lambda place: f"output {place}")


for stand_in in (TensorFormat, ITensor, IDimensionExpr, DimsExprs, ISymExpr, PluginTensorDesc):
    setattr(trt, stand_in.__name__, stand_in)
trt.DynamicPluginTensorDesc = DynamicPluginTensorDesc
sys.modules["tensorrt"] = trt

# ---- The walk ----


def tensors_of(case: dict[str, Any]) -> dict[str, ITensor]:
    experts, rows = case["spec"]["num_experts"], case.get("rows", -1)
    shapes = {"router_logits": (rows, experts), "correction_bias": (experts,), "expert_gpu": (experts,)}
    return {
        name: ITensor(getattr(trt.DataType, dtype), shapes.get(name, (rows,)))
        for name, dtype in case["inputs"].items()
    }


def add(network: Network, case: dict[str, Any]) -> Any:
    aot_plugin.compile_ptx = lambda macros, architecture: case["ptx"]  # type: ignore[assignment]
    return aot_plugin.add_aot_routing(
        trt,
        network,
        RouterSpec(**case["spec"]),
        XShareConfig(**case["config"]),
        tensors_of(case),
        max_rows=case["max_rows"],
        compute_capability=case["compute_capability"],
    )


def build(case: dict[str, Any]) -> dict[str, Any]:
    """The calls that TensorRT makes on a plugin while it builds, in order."""
    network = Network()
    outputs = add(network, case)
    assert outputs == ("output 0", "output 1", "output 2")
    plugin, tensors, expressions = network.plugin, network.inputs, ExprBuilder()
    assert isinstance(plugin, trt.IPluginV3QuickAOTBuild)
    creator = trt.get_plugin_registry().get_creator(plugin.plugin_name, "1", plugin.plugin_namespace)
    assert creator is not None

    types = plugin.get_output_data_types([t.dtype for t in tensors], [len(t.shape) for t in tensors])
    dims = [dimensions(expressions, t.shape) for t in tensors]
    shapes = plugin.get_output_shapes(dims, [], expressions)
    profile = case.get("profile", case["max_rows"])
    described = [(t.dtype, t.shape) for t in tensors]
    described += [
        (dtype, [-1 if e.value(1) != e.value(2) else e.value(1) for e in shape])
        for dtype, shape in zip(types, shapes, strict=True)
    ]
    in_out = [DynamicPluginTensorDesc(dtype, shape, profile) for dtype, shape in described]
    combinations = plugin.get_supported_format_combinations(in_out, len(tensors))
    assert [c.type for c in combinations] == [desc.desc.type for desc in in_out], (
        "one, the network's own types"
    )
    plugin.configure_plugin(in_out[: len(tensors)], in_out[len(tensors) :])
    assert plugin.get_valid_tactics() == []
    plugin.set_tactic(0)
    launch, scalars = SimpleNamespace(), SymExprs()
    plugin.get_launch_params(dims, in_out, len(tensors), launch, scalars, expressions)
    assert len(scalars) == scalars.nbSymExprs
    assert all(s.dtype == trt.PluginArgDataType.INT32 for s in scalars.values())
    name, kernel = plugin.get_kernel(
        [d.desc for d in in_out[: len(tensors)]], [d.desc for d in in_out[len(tensors) :]]
    )
    return {
        "plugin": [plugin.plugin_namespace, plugin.plugin_name],
        "types": [t.name for t in types],
        "shapes": [[e.value(7) for e in shape] for shape in shapes],
        "kernel": name,
        "ptx": kernel.decode(),
        "scalars": [
            [scalars[i].expr.value(rows) for i in range(len(scalars))] for rows in range(profile + 1)
        ],
        "launches": [
            {field: getattr(launch, field).expr.value(rows) for field in vars(launch)}
            for rows in range(profile + 1)
        ],
    }


def dimensions(expressions: ExprBuilder, shape: Sequence[int]) -> DimsExprs:
    dims = DimsExprs(len(shape))
    for place, size in enumerate(shape):
        dims[place] = expressions.constant(size) if size >= 0 else IDimensionExpr(lambda rows: rows, False)
    return dims


def main(cases: Path, results: Path) -> None:
    found = {}
    for name, case in json.loads(cases.read_text()).items():
        try:
            found[name] = build(case)
        except (ValueError, RuntimeError) as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    results.write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
