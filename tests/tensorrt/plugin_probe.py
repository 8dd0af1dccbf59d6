"""ctypes over plugin_probe.cpp: a V3 plugin through TensorRT's own C++ interface."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from plugin_fields import Fields

FLOAT, HALF, INT32, BOOL, BF16 = 0, 1, 3, 4, 7  # nvinfer1::DataType
LINEAR = 0
BUILD_PHASE, RUNTIME_PHASE = 0, 1

_NUMPY = {
    "float32": (1, np.float32),
    "float64": (2, np.float64),
    "int32": (5, np.int32),
    "int64": (10, np.int64),
}
_CHAR = 6
_REALS = {"coverage": "float64", "routed_scaling_factor": "float32", "mask_value": "float32"}


class _Field(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
    )


def encode(name: str, value: Any) -> tuple[int, np.ndarray | None]:
    """A field's PluginFieldType and data."""
    if value is None:
        return 5, None
    if isinstance(value, str):
        return _CHAR, np.frombuffer(value.encode(), np.int8)
    if isinstance(value, tuple):
        kind, dtype = _NUMPY[value[0]]
        return kind, np.array(value[1], dtype)
    kind = _REALS.get(name, "int32")
    return encode(name, (kind, [value]))


class Probe:
    def __init__(self, path: str) -> None:
        self.c = ctypes.CDLL(path)
        self.c.probe_messages.restype = ctypes.c_char_p
        self.c.probe_workspace.restype = ctypes.c_uint64
        for name in ("registered_creator", "offered_creator", "create", "clone", "attach"):
            getattr(self.c, f"probe_{name}").restype = ctypes.c_void_p

    def record_messages_of(self, library: str) -> None:
        assert self.c.probe_set_logger(library.encode())

    def messages(self) -> str:
        text: str = self.c.probe_messages().decode()
        return text

    def registered_creator(self, tensorrt: str) -> int | None:
        creator: int | None = self.c.probe_registered_creator(tensorrt.encode())
        return creator

    def offered_creator(self, library: str) -> int:
        creator: int | None = self.c.probe_offered_creator(library.encode())
        assert creator
        return creator

    def create(self, creator: int, fields: Fields, phase: int = BUILD_PHASE) -> Plugin | None:
        return self.create_raw(
            creator, [(name, *encode(name, value)) for name, value in fields.items()], phase
        )

    def create_raw(
        self, creator: int, fields: Sequence[tuple[str | None, int, Any]], phase: int = BUILD_PHASE
    ) -> Plugin | None:
        array = (_Field * max(1, len(fields)))()
        for place, (name, kind, data) in enumerate(fields):
            address, length = (None, 0) if data is None else (data.ctypes.data, data.size)
            array[place] = _Field(None if name is None else name.encode(), address, kind, length)
        address = self.c.probe_create(ctypes.c_void_p(creator), array, len(fields), phase)
        return Plugin(self, address) if address else None

    def create_without_collection(self, creator: int) -> int | None:
        address: int | None = self.c.probe_create(ctypes.c_void_p(creator), None, -1, BUILD_PHASE)
        return address


class Plugin:
    def __init__(self, probe: Probe, address: int) -> None:
        self.probe = probe
        self.c = probe.c
        self.address = ctypes.c_void_p(address)

    def destroy(self) -> None:
        self.c.probe_destroy(self.address)

    def clone(self) -> Plugin:
        return Plugin(self.probe, self.c.probe_clone(self.address))

    def attach(self) -> Plugin:
        return Plugin(self.probe, self.c.probe_attach(self.address))

    def has_capabilities(self) -> bool:
        return bool(self.c.probe_has_capabilities(self.address))

    def serialize(self) -> dict[str, tuple[int, bytes, int]]:
        """Name -> type, data, length."""
        array = (_Field * 64)()
        count = self.c.probe_serialize(self.address, array, 64)
        sizes = {1: 4, 2: 8, 5: 4, _CHAR: 1}
        return {
            f.name.decode(): (f.type, ctypes.string_at(f.data, sizes[f.type] * f.length), f.length)
            for f in array[:count]
        }

    def supports(self, position: int, types: list[int], formats: list[int], inputs: int) -> bool:
        n = len(types)
        arrays = (ctypes.c_int32 * n)(*types), (ctypes.c_int32 * n)(*formats)
        return bool(self.c.probe_supports(self.address, position, *arrays, inputs, n - inputs))

    def outputs(self, inputs: int, num_experts: int) -> list[tuple[int, list[int]]] | None:
        """Type and shape of each output for 7 rows; None where the plugin refuses."""
        found = (ctypes.c_int64 * 12)()
        count = self.c.probe_outputs(self.address, inputs, num_experts, found)
        if count < 0:
            return None
        return [(found[4 * i], found[4 * i + 2 : 4 * i + 2 + found[4 * i + 1]]) for i in range(count)]

    def configure(self, inputs: int, dtype: int, rows: int, columns: int) -> int:
        code: int = self.c.probe_configure(
            self.address, inputs, dtype, ctypes.c_int64(rows), ctypes.c_int64(columns)
        )
        return code

    def workspace(self, dtype: int, rows: int, columns: int) -> int:
        size: int = self.c.probe_workspace(self.address, dtype, ctypes.c_int64(rows), ctypes.c_int64(columns))
        return size

    def enqueue(
        self,
        dtype: int,
        rows: int,
        columns: int,
        inputs: list[int],
        outputs: list[int],
        workspace: int,
        stream: int,
    ) -> int:
        pointers = (ctypes.c_void_p * len(inputs))(*inputs), (ctypes.c_void_p * len(outputs))(*outputs)
        sizes = ctypes.c_int64(rows), ctypes.c_int64(columns)
        code: int = self.c.probe_enqueue(
            self.address, dtype, *sizes, *pointers, ctypes.c_void_p(workspace), ctypes.c_void_p(stream)
        )
        return code
