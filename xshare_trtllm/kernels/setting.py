"""What a kernel knows when it is compiled: everything about a call but its budgets, rows and addresses."""

from __future__ import annotations

import struct
from dataclasses import dataclass

PARAMS = struct.Struct("@I6if7ifd")  # xshare_route_params
TENSORS = struct.Struct("@I12P")  # xshare_route_tensors

# xshare_kernel, in its order.
KERNELS = (
    *("route_block", "route_team", "gather_rows", "place_requests"),
    *("order_rows", "sum_requests", "propose", "refine_rows", "tally_rows"),
)
ROW_THREADS = 256  # kRowThreads of plugins/cuda/args.h
# xshare_route_tensors without router_logits, which are always there.
POINTERS = (
    *("correction_bias", "request_ids", "exempt", "expert_gpu", "expert_ids", "expert_weights"),
    *("masked_logits", "active_experts", "stats", "step_bias", "dial"),
)


def experts_per_lane(num_experts: int) -> int:
    """Of plugins/cuda/plan.h: the least for which there are kernels."""
    return next(lanes for lanes in (1, 2, 4, 8, 12, 16) if num_experts <= 32 * lanes)


def step_threads(lanes: int) -> int:
    """Of plugins/cuda/args.h: by the registers that a row of so many experts per lane takes."""
    return 512 if lanes <= 8 else 384


@dataclass(frozen=True, slots=True)
class Setting:
    """Of the calls that one set of kernels is for. Numbers and codes as in xshare.h.

    limits  which of budget, request_budget, gpu_budget, max_rows and coverage are on
    has     which tensors beside the router's logits there are, in the order of xshare_route_tensors
    """

    num_experts: int
    top_k: int
    scoring: int
    num_groups: int
    top_k_groups: int
    logits_dtype: int
    warmup: int
    utility: int
    limits: tuple[bool, bool, bool, bool, bool]
    has: tuple[bool, ...]

    @classmethod
    def of_call(cls, params: bytes, tensors: bytes) -> Setting:
        """From an `xshare_route_params` and an `xshare_route_tensors`."""
        _, _, experts, top_k, scoring, groups, top_k_groups, _, dtype, *limits = PARAMS.unpack(params)
        budget, warmup, request_budget, gpu_budget, max_rows, utility, _, coverage = limits
        _, _, *addresses = TENSORS.unpack(tensors)
        on = (budget < experts, request_budget > 0, gpu_budget > 0, max_rows >= 0, coverage > 0.0)
        has = tuple(address != 0 for address in addresses)
        return cls(experts, top_k, scoring, groups, top_k_groups, dtype, warmup, utility, on, has)

    def kernels(self, has_clusters: bool) -> tuple[str, ...]:
        """Those that a call of any number of rows may take."""
        left_out = set() if has_clusters else {"route_team"}
        if not self.limits[1]:
            left_out |= {"place_requests", "order_rows", "sum_requests", "propose"}
        if not self.has[POINTERS.index("stats")]:
            left_out.add("tally_rows")
        return tuple(kernel for kernel in KERNELS if kernel not in left_out)

    def macros(self, kernel: str) -> dict[str, int | str]:
        """Of plugins/cuda/fixed.cu, for one of KERNELS."""
        lanes = experts_per_lane(self.num_experts)
        values: dict[str, int | str] = {
            "NAME": f"xshare_{kernel}",
            "KERNEL_ID": KERNELS.index(kernel),
            "THREADS": step_threads(lanes) if kernel in KERNELS[:2] else ROW_THREADS,
            "EXPERTS_PER_LANE": lanes,
            "NUM_EXPERTS": self.num_experts,
            "TOP_K": self.top_k,
            "SCORING": self.scoring,
            "NUM_GROUPS": self.num_groups,
            "TOP_K_GROUPS": self.top_k_groups,
            "LOGITS_DTYPE": self.logits_dtype,
            "WARMUP": self.warmup,
            "UTILITY": self.utility,
        }
        stages = ("LIMITS_BATCH", "LIMITS_REQUESTS", "LIMITS_GPUS", "LIMITS_ROWS", "COVERS")
        values |= dict(zip(stages, map(int, self.limits), strict=True))
        has = zip(POINTERS, map(int, self.has), strict=True)
        values |= {f"HAS_{name.upper()}": there for name, there in has}
        return {f"XSHARE_FIXED_{name}": value for name, value in values.items()}
