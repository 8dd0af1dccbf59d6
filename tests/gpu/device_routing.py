"""The C ABI through ctypes with torch tensors, for the GPU tests and benchmarks. Needs torch alone.

The library is taken from XSHARE_CUDA_LIBRARY, else from build/cuda, where build_scripts/device_check.sh puts
it. Calls on host tensors are content with libxshare.so.
"""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SCORINGS = (
    "softmax",
    "softmax_renorm",
    "topk_softmax",
    "sigmoid_bias",
    "softmax_bias",
    "softmax_bias_renorm",
    "topk_sigmoid",
    "sqrt_softplus_bias",
)
BIASED = SCORINGS[3:]
UTILITIES = ("squared_weight", "affinity")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUM_STATS = 8

_PARAMS = struct.Struct("@I6if7ifd")  # xshare_route_params
_TENSORS = struct.Struct("@I12P")  # xshare_route_tensors
_PLAN_BYTES = struct.calcsize("@IiQQ28i")  # xshare_launch_plan


def library_path() -> Path:
    return Path(os.environ.get("XSHARE_CUDA_LIBRARY", ROOT / "build" / "cuda" / "libxshare_cuda.so"))


@cache
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library_path()))
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    loaded.xshare_route_cpu.argtypes = [pointer, pointer, pointer, size]
    loaded.xshare_last_error.restype = ctypes.c_char_p
    if hasattr(loaded, "xshare_route_cuda"):
        loaded.xshare_route_cuda.argtypes = [pointer, pointer, pointer, size, pointer]
        loaded.xshare_cuda_workspace_size.argtypes = [pointer, ctypes.POINTER(size)]
    return loaded


def plan_launches(params: bytes, tensors: bytes, gpu: bytes) -> bytes:
    """An `xshare_launch_plan`."""
    plan = ctypes.create_string_buffer(struct.pack("@I", _PLAN_BYTES), _PLAN_BYTES)
    check(library().xshare_plan_launches(params, tensors, gpu, plan))
    return plan.raw


def check(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"status {status}: {library().xshare_last_error().decode()}")


@dataclass(frozen=True)
class Settings:
    """What `xshare_route_params` says beyond the shape of the logits, in its order; 0 = off."""

    top_k: int
    scoring: str
    num_groups: int = 1
    top_k_groups: int = 1
    routed_scaling_factor: float = 1.0
    budget: int = 512
    warmup: int = 1
    request_budget: int = 0
    gpu_budget: int = 0
    max_rows: int = -1
    utility: str = "squared_weight"
    mask_value: float = 0.0
    coverage: float = 0.0

    def pack(self, logits: Tensor) -> bytes:
        top_k, scoring, groups, top_k_groups, scale, *budgets, utility, mask, coverage = astuple(self)
        dtype = DTYPES.index(logits.dtype)
        shape = (*logits.shape, top_k, SCORINGS.index(scoring), groups, top_k_groups)
        code = UTILITIES.index(utility)
        return _PARAMS.pack(_PARAMS.size, *shape, scale, dtype, *budgets, code, mask, coverage)

    def takes_step_bias(self) -> bool:
        return self.scoring == "sigmoid_bias" and self.num_groups == 1 and self.warmup > 0


@dataclass
class Inputs:
    """router_logits [T, E], correction_bias fp32 [E], request_ids int32 [T], exempt bool [T], expert_gpu
    int32 [E]."""

    router_logits: Tensor
    correction_bias: Tensor | None = None
    request_ids: Tensor | None = None
    exempt: Tensor | None = None
    expert_gpu: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (
            self.router_logits,
            self.correction_bias,
            self.request_ids,
            self.exempt,
            self.expert_gpu,
        )

    def to(self, device: str) -> Inputs:
        return Inputs(*(None if t is None else t.to(device) for t in self.tensors()))


class Outputs:
    """expert_ids, expert_weights, masked_logits, active_experts and stats, bytes poisoned; step_bias too
    if it is named."""

    NAMES = ("expert_ids", "expert_weights", "masked_logits", "active_experts", "stats", "step_bias")
    USUAL = tuple(name for name in NAMES if name != "step_bias")

    def __init__(self, logits: Tensor, top_k: int, only: tuple[str, ...] = USUAL) -> None:
        num_tokens, num_experts = logits.shape
        shapes = {
            "expert_ids": ((num_tokens, top_k), torch.int32),
            "expert_weights": ((num_tokens, top_k), torch.float32),
            "masked_logits": ((num_tokens, num_experts), logits.dtype),
            "active_experts": ((num_experts,), torch.uint8),
            "step_bias": ((num_experts,), torch.float32),
            "stats": ((NUM_STATS,), torch.int64),
        }
        made = {
            name: torch.empty(*shapes[name][:1], dtype=shapes[name][1], device=logits.device) for name in only
        }
        self.tensors = [made.get(name) for name in self.NAMES]
        self.poison()

    def poison(self) -> None:
        for tensor in self.tensors:
            if tensor is not None:
                tensor.view(torch.uint8).fill_(0x5A)

    def differences(self, other: Outputs) -> list[str]:
        """The names of the outputs whose bits are not those of `other`."""
        pairs = zip(self.NAMES, self.tensors, other.tensors, strict=True)
        return [n for n, a, b in pairs if a is not None and b is not None and not _same_bits(a, b)]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8))


class Call:
    """One call, packed once: on the host for host tensors, else on a stream of the current device."""

    def __init__(self, settings: Settings, inputs: Inputs, outputs: Outputs) -> None:
        self.inputs, self.outputs = inputs, outputs  # kept alive
        addresses = (0 if t is None else t.data_ptr() for t in (*inputs.tensors(), *outputs.tensors))
        self.params = settings.pack(inputs.router_logits)
        no_dial = 0
        self.tensors = _TENSORS.pack(_TENSORS.size, *addresses, no_dial)
        self.workspace = self.make_workspace(inputs.router_logits.device)

    def make_workspace(self, device: torch.device) -> Tensor:
        """Bytes of no meaning; none on the host, which has its own."""
        size = ctypes.c_size_t()
        if device.type != "cpu":
            check(library().xshare_cuda_workspace_size(self.params, ctypes.byref(size)))
        return torch.full((size.value,), 0xA5, dtype=torch.uint8, device=device)

    def run_on_host(self) -> None:
        check(library().xshare_route_cpu(self.params, self.tensors, None, 0))

    def enqueue(self, stream: int | None = None) -> None:
        if stream is None:
            stream = torch.cuda.current_stream().cuda_stream
        workspace = self.workspace
        address = workspace.data_ptr() if workspace.numel() else None
        check(library().xshare_route_cuda(self.params, self.tensors, address, workspace.numel(), stream))
