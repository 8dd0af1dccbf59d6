"""Compiled kernels, loaded once per device and setting, and launched as the native library plans."""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from xshare_trtllm.kernels import store
from xshare_trtllm.kernels.compile import compile_kernel, compiler_version, find_architecture, identity
from xshare_trtllm.kernels.setting import KERNELS, TENSORS, Setting

Plan = Callable[[bytes, bytes, bytes], bytes]

_GPU = struct.Struct("@Iii")  # xshare_gpu
PLAN_BYTES = struct.calcsize("@IiQQ28i")
_PLAN = struct.Struct("@IiQQ28i")  # xshare_launch_plan
_LARGEST_CLUSTER = 16  # kMaxTeamSize of plugins/cuda/args.h
_PORTABLE_CLUSTER = 8  # kPortableTeamSize


def enqueue(params: bytes, tensors: bytes, device: torch.device, plan: Plan) -> None:
    """Routes on torch's current stream of `device`, whose context is current.

    params, tensors  an `xshare_route_params` and an `xshare_route_tensors` of device addresses
    plan             xshare_plan_launches of the native library: params, tensors and an `xshare_gpu` to an
                     `xshare_launch_plan`

    Raises RuntimeError where a CUDA call fails, and where the stream is being captured into a graph while the
    kernels for this setting have not been loaded.
    """
    has = tuple(map(bool, TENSORS.unpack(tensors)))
    call = _calls.get((params, has, device.index))
    if call is None or not _in_context():
        call = _prepare(params, tensors, has, device.index, plan)
    size, cleared, launches = call
    workspace = torch.empty(size, dtype=torch.uint8, device=device) if size else None
    address = 0 if workspace is None else workspace.data_ptr()
    stream = torch.cuda.current_stream(device).cuda_stream
    if cleared:
        _call("cuMemsetD8Async", address, 0, cleared, stream)
    arguments = ctypes.create_string_buffer(params + tensors + struct.pack("@P", address))
    pointer = ctypes.c_void_p(ctypes.addressof(arguments))
    for launch in launches:
        launch.run(ctypes.addressof(pointer), stream)


# ---- One setting on one device ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with its launch configuration, which is one for all streams and so used by one thread at a
    time."""

    function: Any
    config: Any
    lock: threading.Lock

    def run(self, arguments: int, stream: int) -> None:
        with self.lock:
            self.config.hStream = stream
            _call("cuLaunchKernelEx", self.config, self.function, arguments, 0)


# Bytes of workspace, how many of them are to be cleared, and what is launched then.
Call = tuple[int, int, list[Launch]]


class Loaded:
    """The kernels of one setting on one device."""

    def __init__(self, setting: Setting, ordinal: int) -> None:
        _check_driver()
        capability = torch.cuda.get_device_capability(ordinal)
        architecture = find_architecture(capability)
        self._is_hopper = capability >= (9, 0)
        kernels = setting.kernels(self._is_hopper)
        with ThreadPoolExecutor(min(len(kernels), os.cpu_count() or 1)) as pool:
            cubins = pool.map(lambda kernel: _cubin(kernel, setting, architecture), kernels)
        self._functions = dict(zip(kernels, map(_load_function, kernels, cubins), strict=True))
        largest = self._largest_cluster(setting) if self._is_hopper else 1
        multiprocessors = torch.cuda.get_device_properties(ordinal).multi_processor_count
        self._gpu = _GPU.pack(_GPU.size, multiprocessors, largest)

    def plan(self, params: bytes, tensors: bytes, plan: Plan) -> Call:
        _, count, size, cleared, *numbers = _PLAN.unpack(plan(params, tensors, self._gpu))
        launches = [
            self._launch(numbers[4 * place : 4 * place + 4], place > 0 or cleared == 0)
            for place in range(count)
        ]
        return size, cleared, launches

    def _launch(self, numbers: list[int], overlaps: bool) -> Launch:
        """From an `xshare_launch`, which may overlap the kernel before it."""
        kernel, blocks, threads, cluster = numbers
        programmatic = self._is_hopper and overlaps and os.environ.get("XSHARE_PROGRAMMATIC_LAUNCH") != "0"
        config = _launch_config(blocks, threads, cluster, programmatic)
        return Launch(self._functions[KERNELS[kernel]], config, threading.Lock())

    def _largest_cluster(self, setting: Setting) -> int:
        """That the device has room for: a cluster lies in one group of multiprocessors, of which some devices
        have few. One of more than 8 blocks must be allowed for the kernel."""
        from cuda.bindings import driver

        function = self._functions["route_team"]
        most = int(os.environ.get("XSHARE_CLUSTER_SIZE") or _LARGEST_CLUSTER)
        allow = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
        if _status("cuFuncSetAttribute", function, allow, 1)[0] != 0:
            most = min(most, _PORTABLE_CLUSTER)
        threads = int(setting.macros("route_team")["XSHARE_FIXED_THREADS"])
        for size in (16, 8, 4, 2):
            if size > most:
                continue
            status, *values = _status(
                "cuOccupancyMaxActiveClusters", function, _launch_config(size, threads, size, False)
            )
            if status == 0 and values[0] > 0:
                return size
        return 1


_loaded: dict[tuple[Setting, int], Loaded] = {}
_loading = threading.Lock()


def _load(setting: Setting, ordinal: int) -> Loaded:
    known = _loaded.get((setting, ordinal))
    if known is not None:
        return known
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured, and the kernels for this setting are not loaded yet: call "
            "xshare_trtllm.warm_up (or the operator itself, with any number of rows) before the capture"
        )
    with _loading:
        if (setting, ordinal) not in _loaded:
            _loaded[setting, ordinal] = Loaded(setting, ordinal)
    return _loaded[setting, ordinal]


def _cubin(kernel: str, setting: Setting, architecture: str) -> bytes:
    name = f"{kernel}-{architecture}-{identity(kernel, setting, architecture)[:32]}.cubin"
    return store.get_or_make(name, lambda: compile_kernel(kernel, setting, architecture)[0])


def _load_function(kernel: str, cubin: bytes) -> Any:
    module = _call("cuModuleLoadData", cubin)
    return _call("cuModuleGetFunction", module, f"xshare_{kernel}".encode())


# By parameters, which tensors there are, and device: what a call finds without looking at its setting.
_calls: dict[tuple[bytes, tuple[bool, ...], int], Call] = {}


def _prepare(params: bytes, tensors: bytes, has: tuple[bool, ...], ordinal: int, plan: Plan) -> Call:
    plan(
        params, tensors, _GPU.pack(_GPU.size, 1, 1)
    )  # refuses what does not fit together, before it compiles
    _enter_context(ordinal)
    call = _load(Setting.of_call(params, tensors), ordinal).plan(params, tensors, plan)
    if len(_calls) >= 4096:
        _calls.clear()
    _calls[params, has, ordinal] = call
    return call


_contexts = threading.local()


def _in_context() -> bool:
    return getattr(_contexts, "is_there", False)


def _enter_context(ordinal: int) -> None:
    """A thread that has not called the CUDA runtime yet has no context: torch's, which is the primary one."""
    if int(_call("cuCtxGetCurrent")) == 0:
        _call("cuCtxSetCurrent", _call("cuDevicePrimaryCtxRetain", _call("cuDeviceGet", ordinal)))
    _contexts.is_there = True


# ---- The driver -------------------------------------------------------------------------------------------


@cache
def _function(name: str) -> Any:
    from cuda.bindings import driver

    return getattr(driver, name)


def _status(name: str, *arguments: Any) -> Any:
    return _function(name)(*arguments)


def _call(name: str, *arguments: Any) -> Any:
    """What a driver function gives. Raises RuntimeError with its name and its error's."""
    status, *values = _function(name)(*arguments)
    if status != 0:
        raise RuntimeError(f"{name}: {_describe(status)}")
    return values[0] if values else None


def _check_driver() -> None:
    """A driver runs no machine code of a newer major version of CUDA."""
    driver, compiler = _call("cuDriverGetVersion") // 1000, compiler_version()[0]
    if compiler > driver:
        raise RuntimeError(
            f"the driver is of CUDA {driver} and NVRTC of CUDA {compiler}, whose code it does not run: "
            f"pip uninstall nvidia-cuda-nvrtc, then pip install nvidia-cuda-nvrtc-cu{driver}"
        )


def _describe(status: Any) -> str:
    _, text = _status("cuGetErrorString", status)
    return f"{status.name}, {text.decode() if text else 'unknown'}"


def _launch_config(blocks: int, threads: int, cluster: int, programmatic: bool) -> Any:
    from cuda.bindings import driver

    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    attributes = []
    if programmatic:
        attributes.append(_launch_attribute("PROGRAMMATIC_STREAM_SERIALIZATION"))
        attributes[-1].value.programmaticStreamSerializationAllowed = 1
    if cluster > 1:
        attributes.append(_launch_attribute("CLUSTER_DIMENSION"))
        dimension = attributes[-1].value.clusterDim
        dimension.x, dimension.y, dimension.z = cluster, 1, 1
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config


def _launch_attribute(name: str) -> Any:
    from cuda.bindings import driver

    attribute = driver.CUlaunchAttribute()
    attribute.id = getattr(driver.CUlaunchAttributeID, f"CU_LAUNCH_ATTRIBUTE_{name}")
    return attribute
