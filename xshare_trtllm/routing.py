"""`route`, `mask_logits` and `warm_up`: arguments checked, a backend chosen, the result named."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from xshare_trtllm import ops, reference
from xshare_trtllm.config import RouterSpec, XShareConfig

Backend = Literal["auto", "native", "reference"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INTS = (torch.int32, torch.int64, torch.int16, torch.int8)
_BOOLS = (torch.bool,)


@dataclass(frozen=True, slots=True)
class RoutingStats:
    """What one call did. `before` is the model's own routing, `after` this one; padding never counts.

    experts_before, experts_after    distinct experts of the layer in use
    kept_utility                     share of the rows' utility that the active experts keep, 0 to 1
    warmup_overflow                  experts by which the warm-up exceeds the budgets (0: it fits)
    peak_gpu_before, peak_gpu_after  distinct experts on the GPU that has most of them
    rows                             real rows
    stood_aside                      the output is the model's own routing
    """

    experts_before: int
    experts_after: int
    kept_utility: float
    warmup_overflow: int
    peak_gpu_before: int
    peak_gpu_after: int
    rows: int
    stood_aside: bool

    @classmethod
    def decode(cls, raw: Tensor) -> RoutingStats:
        """From the int64 [8] of a backend: experts before and after, utility kept, in total (fixed point),
        overflow, two peaks, and the rows with `stood_aside` in bit 32."""
        before, after, kept, total, overflow, peak_before, peak_after, rows = raw.tolist()
        stood_aside = bool(rows >> 32)
        whole = stood_aside or total == 0
        return cls(
            experts_before=before,
            experts_after=after,
            kept_utility=1.0 if whole else kept / total,
            warmup_overflow=overflow,
            peak_gpu_before=peak_before,
            peak_gpu_after=peak_after,
            rows=rows & 0xFFFFFFFF,
            stood_aside=stood_aside,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """The routing of one MoE layer in one step.

    expert_ids      [T, k] int32, by rank
    expert_weights  [T, k] fp32, 0 in slots that a row does not use
    active_experts  [E] bool, the set `S` (the union of the rows' own top-k where XShare stood aside)
    raw_stats       [8] int64, decoded by `stats` when asked, so that a decode loop never waits for it
    """

    expert_ids: Tensor
    expert_weights: Tensor
    active_experts: Tensor
    raw_stats: Tensor

    @property
    def stats(self) -> RoutingStats:
        return RoutingStats.decode(self.raw_stats)


def route(
    router_logits: Tensor,
    spec: RouterSpec,
    config: XShareConfig,
    *,
    correction_bias: Tensor | None = None,
    request_ids: Tensor | None = None,
    exempt: Tensor | None = None,
    expert_gpu: Tensor | None = None,
    backend: Backend = "auto",
    check: bool = False,
) -> Routing:
    """Routes one MoE layer's rows to a shared set of experts within a budget.

    All stages of XShare (Vankov et al., arXiv 2602.07265), as the configuration switches them on.

    router_logits    [T, E] fp32, bf16 or fp16; -inf bans an expert from a row. A row with NaN, +inf or fewer
                     than k experts to choose from is treated as padding
    correction_bias  [E] float, added to the ranking score, of scorings that have one (default: zeros)
    request_ids      [T] int, the request of each row, >= 0; -1 = padding (default: every row is real)
    exempt           [T] bool, rows that keep their own top-k (prefill)
    expert_gpu       [E] int, the GPU (or other group) that holds each expert, 0 <= g < E. Where the
                     configuration has a coverage and no gpu_budget, it then limits the fullest GPU
    backend          `reference`, `native`, or `auto`: native where it is built for the tensors' device
    check            also refuse rows with NaN or +inf

    Raises ValueError where the arguments do not fit together.
    """
    run = _prepare(
        router_logits, spec, config, correction_bias, request_ids, exempt, expert_gpu, backend, check
    )
    return Routing(*run.route(router_logits, spec, config, correction_bias, request_ids, exempt, expert_gpu))


def mask_logits(
    router_logits: Tensor,
    spec: RouterSpec,
    config: XShareConfig,
    *,
    correction_bias: Tensor | None = None,
    request_ids: Tensor | None = None,
    exempt: Tensor | None = None,
    expert_gpu: Tensor | None = None,
    backend: Backend = "auto",
    check: bool = False,
) -> Tensor:
    """The selection of `route` as logits, `-inf` where a row may not go: for engines that route themselves.

    Arguments and errors as for `route`. Returns [T, E] in the logits' dtype. Exempt rows, and all real
    rows where XShare stands aside, are unchanged; padding rows are 0 inside the active experts.
    Refuses `softmax_bias` and `softmax_bias_renorm`, too: over fewer experts a softmax is larger, and the
    same bias ranks otherwise.
    """
    if spec.rule.affinity == "softmax" and spec.rule.has_bias:
        raise ValueError(
            f"mask_logits: {spec.scoring} cannot be masked, its bias would rank the larger scores of fewer "
            "experts otherwise; use route"
        )
    run = _prepare(
        router_logits, spec, config, correction_bias, request_ids, exempt, expert_gpu, backend, check
    )
    masked: Tensor = run.mask_logits(
        router_logits, spec, config, correction_bias, request_ids, exempt, expert_gpu
    )
    return masked


def warm_up(
    router_logits: Tensor,
    spec: RouterSpec,
    config: XShareConfig,
    *,
    correction_bias: Tensor | None = None,
    request_ids: Tensor | None = None,
    exempt: Tensor | None = None,
    expert_gpu: Tensor | None = None,
) -> None:
    """Makes `route` and `mask_logits` ready to be captured in a CUDA graph, for any number of rows.

    On a CUDA device their kernels are compiled for what the arguments say: the router, the logits' dtype,
    which limits are on and which tensors there are. That takes seconds, and milliseconds once they are on
    disk (in XSHARE_CACHE, else ~/.cache/xshare-trtllm); a capture that comes first is refused. Arguments and
    errors as for `route`.
    """
    tensors = (correction_bias, request_ids, exempt, expert_gpu)
    run = _prepare(router_logits, spec, config, *tensors, "auto", False)
    run.route(router_logits, spec, config, *tensors)
    run.mask_logits(router_logits, spec, config, *tensors)


def contiguous_placement(num_experts: int, num_gpus: int) -> Tensor:
    """[E] int32, the GPU of each expert where every GPU holds a contiguous slice, as TensorRT-LLM places
    them; the slices are of equal size, give or take one."""
    return torch.arange(num_experts, dtype=torch.int32) * num_gpus // num_experts


def _prepare(
    router_logits: Tensor,
    spec: RouterSpec,
    config: XShareConfig,
    correction_bias: Tensor | None,
    request_ids: Tensor | None,
    exempt: Tensor | None,
    expert_gpu: Tensor | None,
    backend: Backend,
    check: bool,
) -> ModuleType:
    """Checks the arguments and returns the module that runs them."""
    check_shapes(router_logits, spec, config, correction_bias, request_ids, exempt, expert_gpu)
    if check:
        _check_finite(router_logits)
    module = _backend(backend, router_logits.device.type)
    if module is reference:  # the operators check it when they first see it
        check_layer(spec, config)
    if check or module is reference:  # the native code checks the values itself
        check_values(correction_bias, request_ids, expert_gpu)
    return module


def check_shapes(
    router_logits: Tensor,
    spec: RouterSpec,
    config: XShareConfig,
    correction_bias: Tensor | None,
    request_ids: Tensor | None,
    exempt: Tensor | None,
    expert_gpu: Tensor | None,
) -> None:
    """Raises ValueError where a tensor of `route` is missing or has another dtype or shape; reads no
    tensor."""
    experts = spec.num_experts
    if router_logits.dtype not in _FLOATS or router_logits.dim() != 2 or router_logits.shape[1] != experts:
        _refuse_tensor("router_logits", router_logits, _FLOATS, f"[rows, {experts}]")
    rows = (router_logits.shape[0],)
    if correction_bias is not None:
        if not spec.rule.has_bias:
            raise ValueError(f"correction_bias: {spec.scoring} scoring has none")
        _check_vector("correction_bias", correction_bias, _FLOATS, (experts,))
    if request_ids is not None:
        _check_vector("request_ids", request_ids, _INTS, rows)
    elif config.request_budget is not None:
        raise ValueError(f"XShareConfig(request_budget={config.request_budget}): route needs request_ids")
    if exempt is not None:
        _check_vector("exempt", exempt, _BOOLS, rows)
    if expert_gpu is not None:
        _check_vector("expert_gpu", expert_gpu, _INTS, (experts,))
    elif config.gpu_budget is not None:
        raise ValueError(f"XShareConfig(gpu_budget={config.gpu_budget}): route needs expert_gpu")


@lru_cache(maxsize=4096)
def check_layer(spec: RouterSpec, config: XShareConfig) -> None:
    """Raises ValueError where `config` is not one layer's, or does not fit the router."""
    if isinstance(config.budget, tuple):
        raise ValueError(
            "XShareConfig(budget=one per layer): route needs one layer's configuration, config.for_layer(i)"
        )
    config.check(spec)


def _check_vector(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int]) -> None:
    if tensor.dtype not in dtypes or tensor.shape != shape:
        _refuse_tensor(name, tensor, dtypes, str(list(shape)))


def _refuse_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: str) -> None:
    if tensor.dtype in dtypes:
        raise ValueError(f"{name}: shape must be {shape}, got {list(tensor.shape)}")
    wanted, got = ", ".join(map(_name, dtypes)), _name(tensor.dtype)
    raise ValueError(f"{name}: dtype must be one of {wanted}, got {got}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_finite(router_logits: Tensor) -> None:
    wrong = router_logits.isnan() | (router_logits == torch.inf)
    bad = wrong.any(dim=-1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"router_logits: row {bad[0]} has NaN or +inf ({len(bad)} such rows)")


def check_values(
    correction_bias: Tensor | None, request_ids: Tensor | None, expert_gpu: Tensor | None
) -> None:
    """Raises ValueError where a tensor of `route` holds what it must not hold."""
    if correction_bias is not None and not bool(correction_bias.isfinite().all()):
        raise ValueError("correction_bias: has NaN or infinite values")
    if request_ids is not None and bool((request_ids < -1).any()):
        raise ValueError(f"request_ids: must be >= 0, or -1 for padding, got {int(request_ids.min())}")
    if expert_gpu is None:
        return
    last = len(expert_gpu) - 1
    if bool((expert_gpu.long().clamp(0, last) != expert_gpu).any()):
        raise ValueError(f"expert_gpu: must be from 0 to num_experts - 1 = {last}")


def _backend(name: str, device: str) -> ModuleType:
    if name == "reference":
        return reference
    if name not in ("auto", "native"):
        raise ValueError(f"backend={name!r}: must be auto, native or reference")
    is_built = _cuda_is_built if device == "cuda" else _native_is_built
    has_kernel = device in ("cpu", "cuda") or name == "native"  # an operator may still be traced elsewhere
    if has_kernel and is_built():
        return ops
    if name == "auto":
        if device == "cuda":
            _warn_of_reference()
        return reference
    if device == "cuda":
        raise ValueError(f"backend='native': {ops.why_no_cuda()}")
    raise ValueError(
        "backend='native': libxshare.so is not built; install a C++ compiler and run `pip install .`"
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator,unused-ignore]
def _native_is_built() -> bool:
    return ops.available()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator,unused-ignore]
def _cuda_is_built() -> bool:
    return ops.why_no_cuda() is None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator,unused-ignore]
def _warn_of_reference() -> bool:
    """Once for each reason. Returns True."""
    _warn_once(f"{ops.why_no_cuda()}; routing of CUDA tensors uses the much slower reference")
    return True


@lru_cache(maxsize=8)
def _warn_once(problem: str) -> None:
    warnings.warn(f"xshare_trtllm: {problem}", RuntimeWarning, stacklevel=5)
