"""`torch.ops.xshare.route` and `torch.ops.xshare.mask_logits`: the native libraries behind torch's dispatch.

The library is a plain C ABI (plugins/include/xshare/), called through `ctypes` with the tensors' addresses,
so that one build serves every torch version. For tensors on a CUDA device the kernels are compiled when a
setting is first used (kernels/), or, where XSHARE_CUDA_LIBRARY names it or there is no cuda-python, those of
libxshare_cuda.so are taken. Nothing is loaded at import.

On a CUDA device a call is enqueued on torch's current stream, with outputs and workspace from torch's caching
allocator and without host synchronisation: it can be captured in a CUDA graph, after one call before with the
same setting (`warm_up`).
"""

from __future__ import annotations

import ctypes
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from xshare_trtllm.config import MODES, NO_LIMIT, SCORINGS, UTILITIES, RouterSpec, XShareConfig
from xshare_trtllm.kernels.compile import why_not
from xshare_trtllm.kernels.launch import PLAN_BYTES, enqueue
from xshare_trtllm.kernels.setting import PARAMS, TENSORS

LIBRARY = Path(__file__).parent / "lib" / "libxshare.so"
CUDA_LIBRARY = Path(os.environ.get("XSHARE_CUDA_LIBRARY") or LIBRARY.with_name("libxshare_cuda.so"))
NUM_STATS = 8

_SCORING_CODES = {name: code for code, name in enumerate(SCORINGS)}
_UTILITY_CODES = {name: code for code, name in enumerate(UTILITIES)}
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INT32_MAX = 2**31 - 1
_CUDA_ERROR = 7  # XSHARE_CUDA_ERROR
_NOWHERE = 64  # aligned to whatever is not there

_DIAL = struct.Struct("@dii")  # xshare_dial
_EXPERTS_PARAMS = struct.Struct("@I5i")  # xshare_experts_params
_EXPERTS_TENSORS = struct.Struct("@I6P")  # xshare_experts_tensors

_SETTINGS = (
    "int top_k, str scoring, int num_groups, int top_k_groups, float routed_scaling_factor, "
    "int budget, int warmup, int request_budget, int gpu_budget, int max_rows, str utility, float coverage"
)
_INPUTS = (
    "Tensor router_logits, Tensor? correction_bias, Tensor? request_ids, Tensor? exempt, Tensor? expert_gpu"
)

_OUTSIDE = "Tensor? dial=None"  # behind the settings, so that a call without it is as before

DIAL_BYTES = _DIAL.size

# What the operators take after the tensors, in the order of _SETTINGS. What is off is 0, max_rows -1.
Settings = tuple[int, str, int, int, float, int, int, int, int, int, str, float]


def available() -> bool:
    """True where libxshare.so is built and loads. Says once, as a warning, when it is not."""
    return _load() is not None


def why_no_cuda() -> str | None:
    """What is missing for tensors on a CUDA device, with the command that helps; None = nothing."""
    if os.environ.get("XSHARE_CUDA_LIBRARY") and _load_cuda() is None:
        return f"XSHARE_CUDA_LIBRARY={CUDA_LIBRARY}: is not there, or is no library with the kernels"
    if _load_cuda() is not None or (why_not() is None and available()):
        return None
    compiling = why_not() or f"{LIBRARY.name} is not built"
    return f"kernels cannot be compiled here ({compiling}), and {CUDA_LIBRARY.name} is not built"


def version() -> str:
    """The version of the native library. Raises RuntimeError where it is not built."""
    return str(_library().xshare_version().decode())


def settings(spec: RouterSpec, config: XShareConfig) -> Settings:
    """The plain numbers of one layer's `spec` and `config` that the operators take after the tensors."""
    max_rows = config.max_rows
    return (
        spec.top_k,
        spec.scoring,
        spec.num_groups,
        spec.top_k_groups,
        spec.routed_scaling_factor,
        config.layer_budget,
        config.warmup,
        min(config.request_budget or 0, NO_LIMIT),
        min(config.gpu_budget or 0, NO_LIMIT),
        -1 if max_rows is None else min(max_rows, NO_LIMIT),
        config.utility,
        config.coverage or 0.0,
    )


def pack_dial(config: XShareConfig, mode: str) -> bytes:
    """An `xshare_dial` with one layer's limits: what a tensor of uint8 [DIAL_BYTES] holds that is given to
    `route` as its `dial`. Raises ValueError for a mode that is not known."""
    if mode not in MODES:
        raise ValueError(f"mode must be {', '.join(MODES)}, not {mode!r}")
    return _DIAL.pack(config.coverage or 0.0, config.layer_budget, MODES.index(mode))


def route(
    router_logits: Tensor,
    spec: RouterSpec,
    config: XShareConfig,
    correction_bias: Tensor | None = None,
    request_ids: Tensor | None = None,
    exempt: Tensor | None = None,
    expert_gpu: Tensor | None = None,
    dial: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All stages of XShare in native code, where `router_logits` is: on the host or on a CUDA device.

    router_logits [T, E] fp32, bf16 or fp16; correction_bias [E] float; request_ids [T] int, -1 = padding;
    exempt [T] bool; expert_gpu [E] int; dial uint8 [DIAL_BYTES], whose coverage, budget and mode
    (`pack_dial`) are read when the call runs, also when a captured graph replays it, in place of those of
    `config`. Returns expert_ids int32 [T, k], expert_weights fp32 [T, k], active_experts bool [E] and stats
    int64 [8] (`xshare_stat` in xshare.h).

    Raises ValueError for values that do not fit together, RuntimeError where the library is not built or a
    CUDA call fails. What device tensors hold is not checked (xshare_cuda.h says what is made of it); int64
    request ids on a device are taken modulo 2^31 - 1.
    """
    tensors = (router_logits, correction_bias, request_ids, exempt, expert_gpu)
    if torch.compiler.is_compiling():
        outputs: tuple[Tensor, Tensor, Tensor, Tensor] = _route_op(*tensors, *settings(spec, config), dial)
        return outputs
    call = _route_op if _needs_dispatcher(router_logits) else _route_cpu
    outputs = call(*tensors, *_cached_settings(spec, config), dial)
    return outputs


def mask_logits(
    router_logits: Tensor,
    spec: RouterSpec,
    config: XShareConfig,
    correction_bias: Tensor | None = None,
    request_ids: Tensor | None = None,
    exempt: Tensor | None = None,
    expert_gpu: Tensor | None = None,
    dial: Tensor | None = None,
    counters: Tensor | None = None,
) -> Tensor:
    """The selection of `route` as logits [T, E] of the same dtype: `-inf` outside a row's allowed experts.

    counters  int64 [NUM_STATS]: the statistics of the call are added to it
    """
    tensors = (router_logits, correction_bias, request_ids, exempt, expert_gpu)
    if torch.compiler.is_compiling():
        masked: Tensor = _mask_logits_op(*tensors, *settings(spec, config), dial, counters)
        return masked
    call = _mask_logits_op if _needs_dispatcher(router_logits) else _mask_logits_cpu
    masked = call(*tensors, *_cached_settings(spec, config), dial, counters)
    return masked


def experts(
    hidden_states: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """The routed experts (SwiGLU) of one MoE layer on the host, without gradients: [T, H] fp32.

    One pass over the weights of each expert that a slot with a weight names, none over the others.

    hidden_states   [T, H] fp32
    expert_ids      [T, k] int
    expert_weights  [T, k] fp32
    gate_up         [E, 2F, H] fp32: F rows of the gate projection, then F of the up projection
    down            [E, H, F] fp32

    Raises ValueError where shapes, dtypes or ids do not fit.
    """
    num_tokens, width = hidden_states.shape
    num_experts, size = gate_up.shape[0], down.shape[-1]
    top_k = expert_ids.shape[-1]
    _check_float32("hidden_states", hidden_states, (num_tokens, width))
    _check_float32("expert_weights", expert_weights, (num_tokens, top_k))
    _check_float32("gate_up", gate_up, (num_experts, 2 * size, width))
    _check_float32("down", down, (num_experts, width, size))
    if expert_ids.shape != (num_tokens, top_k):
        raise ValueError(f"expert_ids: shape must be [{num_tokens}, {top_k}], got {list(expert_ids.shape)}")
    inputs = (hidden_states, _as_int32(expert_ids), expert_weights, gate_up, down)
    dense = [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in inputs]
    output = torch.empty(num_tokens, width)
    addresses = [tensor.data_ptr() for tensor in (*dense, output)]
    params, workspace_size = _packed_experts_params(num_tokens, num_experts, top_k, width, size)
    workspace = torch.empty(workspace_size, dtype=torch.uint8)
    tensors = _EXPERTS_TENSORS.pack(_EXPERTS_TENSORS.size, *addresses)
    _raise_unless_ok(_library().xshare_experts_cpu(params, tensors, workspace.data_ptr(), workspace_size))
    return output


def _check_float32(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape or tensor.dtype is not torch.float32:
        raise ValueError(f"{name}: must be float32 {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")


@lru_cache(maxsize=1024)
def _packed_experts_params(*shape: int) -> tuple[bytes, int]:
    """An `xshare_experts_params` for this shape, and the workspace that it needs."""
    params = _EXPERTS_PARAMS.pack(_EXPERTS_PARAMS.size, *shape)
    needed = ctypes.c_size_t()
    _raise_unless_ok(_library().xshare_experts_workspace_size(params, ctypes.byref(needed)))
    return params, needed.value


def _raise_unless_ok(status: int, library: ctypes.CDLL | None = None) -> None:
    if status == 0:
        return
    message = (library or _library()).xshare_last_error().decode()
    raise RuntimeError(message) if status == _CUDA_ERROR else ValueError(message)


def _needs_dispatcher(router_logits: Tensor) -> bool:
    """Whether something may want to see the operator. Plain eager calls save its third of the time."""
    plain = type(router_logits) is Tensor and router_logits.is_cpu
    return not plain or torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None


# ---- The library ------------------------------------------------------------------------------------------


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    library.xshare_route_cpu.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    library.xshare_route_cpu.restype = ctypes.c_int
    library.xshare_experts_workspace_size.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.xshare_experts_workspace_size.restype = ctypes.c_int
    library.xshare_experts_cpu.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    library.xshare_experts_cpu.restype = ctypes.c_int
    library.xshare_plan_launches.argtypes = [ctypes.c_void_p] * 4
    library.xshare_plan_launches.restype = ctypes.c_int
    library.xshare_last_error.restype = ctypes.c_char_p
    library.xshare_version.restype = ctypes.c_char_p
    return library


@cache
def _load() -> ctypes.CDLL | None:
    try:
        library = _declare(ctypes.CDLL(str(LIBRARY)))
    except (
        OSError,
        AttributeError,
    ) as error:  # AttributeError: built from older sources, a function is missing
        why = str(error) if LIBRARY.exists() else "it was not built"
        warnings.warn(
            f"xshare_trtllm: no native library ({why}); routing uses the much slower reference. "
            "Install a C++ compiler and run `pip install .` again.",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    return library


def _library() -> ctypes.CDLL:
    library = _load()
    if library is None:
        raise RuntimeError(
            f"{LIBRARY.name} is not built: install a C++ compiler and run `pip install .` again"
        )
    return library


@cache
def _load_cuda() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(CUDA_LIBRARY))
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        library.xshare_route_cuda.argtypes = [pointer, pointer, pointer, size, pointer]
        library.xshare_route_cuda.restype = ctypes.c_int
        library.xshare_cuda_workspace_size.argtypes = [pointer, pointer]
        library.xshare_cuda_workspace_size.restype = ctypes.c_int
        library.xshare_last_error.restype = ctypes.c_char_p
    except (OSError, AttributeError):
        return None
    return library


@cache
def _prebuilt() -> ctypes.CDLL | None:
    """The library with kernels, where it was asked for or there is nothing else."""
    problem = why_no_cuda()
    if problem is not None:
        raise RuntimeError(problem)
    if why_not() is None and available() and not os.environ.get("XSHARE_CUDA_LIBRARY"):
        return None
    return _load_cuda()


_settings_of: dict[tuple[int, int], tuple[Settings, RouterSpec, XShareConfig]] = {}


def _cached_settings(spec: RouterSpec, config: XShareConfig) -> Settings:
    """By identity: both are immutable, and hashing them would cost more than the routing."""
    entry = _settings_of.get((id(spec), id(config)))
    if entry is not None:
        return entry[0]
    if len(_settings_of) >= 1024:
        _settings_of.clear()
    values = settings(spec, config)
    config.check(spec)
    _settings_of[id(spec), id(config)] = (values, spec, config)  # kept alive, so that an id is never reused
    return values


def _shape(router_logits: Tensor) -> tuple[int, int]:
    if router_logits.dim() != 2:
        raise ValueError(f"router_logits: shape must be [rows, experts], got {list(router_logits.shape)}")
    num_tokens, num_experts = router_logits.shape
    return num_tokens, num_experts


def _address(tensor: Tensor | None) -> int:
    """0 = not there. One without elements is there all the same, though torch gives it no address."""
    return 0 if tensor is None else tensor.data_ptr() or _NOWHERE


def _as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor if tensor.dtype is dtype else tensor.to(dtype)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _as_int32(tensor: Tensor) -> Tensor:
    """Values beyond int32 become invalid ones rather than wrap around to valid ones."""
    return _as_dtype(tensor.clamp(-2, _INT32_MAX) if tensor.dtype is torch.int64 else tensor, torch.int32)


def _request_ids(request_ids: Tensor) -> Tensor:
    """Any request ids as int32; those beyond int32 are numbered anew."""
    if request_ids.dtype is torch.int64 and bool((request_ids > _INT32_MAX).any()):
        renumbered = torch.unique(request_ids, return_inverse=True)[1]
        request_ids = torch.where(request_ids < 0, request_ids, renumbered)
    return _as_int32(request_ids)


def _request_ids_on_device(request_ids: Tensor) -> Tensor:
    """As `_request_ids`, without waiting for the device: ids that counted up stay distinct."""
    if request_ids.dtype is torch.int64:
        request_ids = torch.where(request_ids < 0, request_ids, request_ids % _INT32_MAX)
    return _as_int32(request_ids)


def _check_shape(name: str, tensor: Tensor, length: int) -> None:
    if tensor.shape != (length,):
        raise ValueError(f"{name}: shape must be [{length}], got {list(tensor.shape)}")


def _check_device(name: str, tensor: Tensor | None, device: torch.device) -> None:
    if tensor is not None and tensor.device != device:
        raise ValueError(f"{name}: must be on {device} as router_logits is, not on {tensor.device}")


def pack_params(num_tokens: int, num_experts: int, dtype: torch.dtype, values: Settings) -> bytes:
    """An `xshare_route_params` for this shape and what `settings` returned."""
    top_k, scoring, num_groups, top_k_groups, scale, *budgets, utility, coverage = values
    code = _SCORING_CODES.get(scoring)
    utility_code = _UTILITY_CODES.get(utility)
    dtype_code = _DTYPE_CODES.get(dtype)
    if code is None:
        raise ValueError(f"scoring must be one of {', '.join(SCORINGS)}, not {scoring!r}")
    if utility_code is None:
        raise ValueError(f"utility must be one of {', '.join(UTILITIES)}, not {utility!r}")
    if dtype_code is None:
        raise ValueError(f"router_logits: dtype must be float32, bfloat16 or float16, got {dtype}")
    shape = (num_tokens, num_experts, top_k, code, num_groups, top_k_groups)
    return PARAMS.pack(PARAMS.size, *shape, scale, dtype_code, *budgets, utility_code, 0.0, coverage)


_packed_params = lru_cache(maxsize=1024)(pack_params)


def _call(
    router_logits: Tensor,
    correction_bias: Tensor | None,
    request_ids: Tensor | None,
    exempt: Tensor | None,
    expert_gpu: Tensor | None,
    values: tuple[Any, ...],
    outputs: tuple[int, int, int, int, int],
    device: torch.device | None = None,
) -> None:
    settings, dial = _settings_and_dial(values)
    num_tokens, num_experts = router_logits.shape
    params = _packed_params(num_tokens, num_experts, router_logits.dtype, settings)
    if dial is not None and (dial.dtype is not torch.uint8 or dial.shape != (DIAL_BYTES,)):
        raise ValueError(f"dial: must be uint8 [{DIAL_BYTES}], got {dial.dtype} {list(dial.shape)}")
    if dial is not None and dial.data_ptr() % 8:
        raise ValueError("dial: must be aligned to 8 bytes, as a tensor of its own is")
    logits = router_logits if router_logits.is_contiguous() else router_logits.contiguous()
    bias = gpus = ids = free = None
    if correction_bias is not None:
        _check_shape("correction_bias", correction_bias, num_experts)
        bias = _as_dtype(correction_bias, torch.float32)
    if request_ids is not None:
        _check_shape("request_ids", request_ids, num_tokens)
        ids = _request_ids(request_ids)
    if exempt is not None:
        _check_shape("exempt", exempt, num_tokens)
        free = _as_dtype(exempt, torch.bool)
    if expert_gpu is not None:
        _check_shape("expert_gpu", expert_gpu, num_experts)
        gpus = _as_int32(expert_gpu)
    tensors = TENSORS.pack(
        TENSORS.size,
        _address(logits),
        _address(bias),
        _address(ids),
        _address(free),
        _address(gpus),
        *outputs,
        0,  # step_bias
        _address(dial),
    )
    if device is None:
        _raise_unless_ok(_library().xshare_route_cpu(params, tensors, None, 0))
    else:
        _enqueue(params, tensors, device)


def _settings_and_dial(values: tuple[Any, ...]) -> tuple[Settings, Tensor | None]:
    """Of what an operator takes after the tensors; what has its default may be left out there."""
    number = len(get_args(Settings))
    return values[:number], values[number] if len(values) > number else None  # type: ignore[return-value]


def _call_on_device(
    router_logits: Tensor,
    correction_bias: Tensor | None,
    request_ids: Tensor | None,
    exempt: Tensor | None,
    expert_gpu: Tensor | None,
    values: tuple[Any, ...],
    outputs: tuple[int, int, int, int, int],
) -> None:
    device = router_logits.device
    _check_device("correction_bias", correction_bias, device)
    _check_device("request_ids", request_ids, device)
    _check_device("exempt", exempt, device)
    _check_device("expert_gpu", expert_gpu, device)
    _check_device("dial", _settings_and_dial(values)[1], device)
    if request_ids is not None:
        request_ids = _request_ids_on_device(request_ids)
    _call(router_logits, correction_bias, request_ids, exempt, expert_gpu, values, outputs, device)


def _enqueue(params: bytes, tensors: bytes, device: torch.device) -> None:
    """On torch's current stream. What the call reads may be freed at once: torch's allocator hands memory on
    in the order of that stream."""
    library = _prebuilt()
    with torch.cuda.device(device):
        if library is None:
            return enqueue(params, tensors, device, _plan_launches)
        size = _cuda_workspace_size(params)
        workspace = torch.empty(size, dtype=torch.uint8, device=device) if size else None
        stream = torch.cuda.current_stream().cuda_stream
        status = library.xshare_route_cuda(params, tensors, _address(workspace), size, stream)
    _raise_unless_ok(status, library)


@lru_cache(maxsize=1024)
def _cuda_workspace_size(params: bytes) -> int:
    library, needed = _prebuilt(), ctypes.c_size_t()
    assert library is not None
    _raise_unless_ok(library.xshare_cuda_workspace_size(params, ctypes.byref(needed)), library)
    return needed.value


def _plan_launches(params: bytes, tensors: bytes, gpu: bytes) -> bytes:
    """An `xshare_launch_plan`."""
    plan = ctypes.create_string_buffer(struct.pack("@I", PLAN_BYTES), PLAN_BYTES)
    _raise_unless_ok(_library().xshare_plan_launches(params, tensors, gpu, plan))
    return plan.raw


# ---- The operators ----------------------------------------------------------------------------------------


def _empty_outputs(
    num_tokens: int, num_experts: int, top_k: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty(num_tokens, top_k, dtype=torch.int32, device=device),
        torch.empty(num_tokens, top_k, dtype=torch.float32, device=device),
        torch.empty(num_experts, dtype=torch.bool, device=device),
        torch.empty(NUM_STATS, dtype=torch.int64, device=device),
    )


def _route_cpu(
    router_logits: Tensor,
    correction_bias: Tensor | None,
    request_ids: Tensor | None,
    exempt: Tensor | None,
    expert_gpu: Tensor | None,
    *values: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _empty_outputs(*_shape(router_logits), values[0])
    ids, weights, active, stats = map(_address, outputs)
    addresses = (ids, weights, 0, active, stats)
    _call(router_logits, correction_bias, request_ids, exempt, expert_gpu, values, addresses)
    return outputs


def _route_cuda(
    router_logits: Tensor,
    correction_bias: Tensor | None,
    request_ids: Tensor | None,
    exempt: Tensor | None,
    expert_gpu: Tensor | None,
    *values: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _empty_outputs(*_shape(router_logits), values[0], router_logits.device)
    ids, weights, active, stats = map(_address, outputs)
    addresses = (ids, weights, 0, active, stats)
    _call_on_device(router_logits, correction_bias, request_ids, exempt, expert_gpu, values, addresses)
    return outputs


def _route_fake(router_logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_tokens, num_experts = router_logits.shape
    top_k = arguments[4]
    return (
        router_logits.new_empty((num_tokens, top_k), dtype=torch.int32),
        router_logits.new_empty((num_tokens, top_k), dtype=torch.float32),
        router_logits.new_empty((num_experts,), dtype=torch.bool),
        router_logits.new_empty((NUM_STATS,), dtype=torch.int64),
    )


def _mask_logits_cpu(
    router_logits: Tensor,
    correction_bias: Tensor | None,
    request_ids: Tensor | None,
    exempt: Tensor | None,
    expert_gpu: Tensor | None,
    *values: Any,
) -> Tensor:
    _shape(router_logits)
    masked = torch.empty(router_logits.shape, dtype=router_logits.dtype)
    with _counted(values, masked.device) as stats:
        outputs = (0, 0, _address(masked), 0, stats)
        _call(router_logits, correction_bias, request_ids, exempt, expert_gpu, values, outputs)
    return masked


def _mask_logits_cuda(
    router_logits: Tensor,
    correction_bias: Tensor | None,
    request_ids: Tensor | None,
    exempt: Tensor | None,
    expert_gpu: Tensor | None,
    *values: Any,
) -> Tensor:
    _shape(router_logits)
    masked = torch.empty(router_logits.shape, dtype=router_logits.dtype, device=router_logits.device)
    with _counted(values, masked.device) as stats:
        outputs = (0, 0, _address(masked), 0, stats)
        _call_on_device(router_logits, correction_bias, request_ids, exempt, expert_gpu, values, outputs)
    return masked


@contextmanager
def _counted(values: tuple[Any, ...], device: torch.device) -> Iterator[int]:
    """Where a call may write its statistics (0: nowhere), to be added to the operator's last argument."""
    counters = values[-1] if len(values) == len(get_args(Settings)) + 2 else None
    if counters is None:
        yield 0
        return
    stats = torch.empty(NUM_STATS, dtype=torch.int64, device=device)
    yield stats.data_ptr()
    counters.add_(stats)


def _mask_logits_fake(router_logits: Tensor, *_: Any) -> Tensor:
    return router_logits.new_empty(router_logits.shape)


_definitions: Any = torch.library.Library("xshare", "DEF")
_definitions.define(f"route({_INPUTS}, {_SETTINGS}, {_OUTSIDE}) -> (Tensor, Tensor, Tensor, Tensor)")
_definitions.define(f"mask_logits({_INPUTS}, {_SETTINGS}, {_OUTSIDE}, Tensor(a!)? counters=None) -> Tensor")
_definitions.impl("route", _route_cpu, "CPU")
_definitions.impl("mask_logits", _mask_logits_cpu, "CPU")
_definitions.impl("route", _route_cuda, "CUDA")
_definitions.impl("mask_logits", _mask_logits_cuda, "CUDA")
torch.library.register_fake("xshare::route", _route_fake, lib=_definitions)
torch.library.register_fake("xshare::mask_logits", _mask_logits_fake, lib=_definitions)
_route_op = torch.ops.xshare.route.default
_mask_logits_op = torch.ops.xshare.mask_logits.default
