// SPDX-License-Identifier: Apache-2.0
// One kernel for one setting of a layer, compiled when a host first needs it (xshare_trtllm/kernels): what
// the macros say is known here, so that a call executes little more than it needs; the budgets, the coverage
// and the addresses are arguments. Whoever launches it must have made the macros from the same call.
#include "cuda/kernel.cuh"

#if defined(__CUDACC__)
#define XSHARE_FIXED_KERNEL __global__ void __launch_bounds__(XSHARE_FIXED_THREADS, 1)
#define XSHARE_GIVEN const __grid_constant__ xshare::RouteArgs
#define XSHARE_ASSUME(fact) __builtin_assume(fact)
#else
#define XSHARE_FIXED_KERNEL void
#define XSHARE_GIVEN const xshare::RouteArgs
#define XSHARE_ASSUME(fact) \
    if (!(fact)) __builtin_trap()
#endif

#define XSHARE_FIX_NUMBER(name, limits, off) \
    if (!(limits)) args.p.name = (off);      \
    XSHARE_ASSUME(!(limits) || args.p.name != (off))
#define XSHARE_FIX_POINTER(name, is_there)  \
    if (!(is_there)) args.t.name = nullptr; \
    XSHARE_ASSUME(!(is_there) || args.t.name != nullptr)

namespace xshare {

XSHARE_DEVICE RouteArgs fix(const RouteArgs& given) {
    RouteArgs args = given;
    args.p.num_experts = XSHARE_FIXED_NUM_EXPERTS;
    args.p.top_k = XSHARE_FIXED_TOP_K;
    args.p.scoring = XSHARE_FIXED_SCORING;
    args.p.num_groups = XSHARE_FIXED_NUM_GROUPS;
    args.p.top_k_groups = XSHARE_FIXED_TOP_K_GROUPS;
    args.p.logits_dtype = XSHARE_FIXED_LOGITS_DTYPE;
    args.p.warmup = XSHARE_FIXED_WARMUP;
    args.p.utility = XSHARE_FIXED_UTILITY;
    if (!XSHARE_FIXED_LIMITS_BATCH) args.p.budget = args.p.num_experts;
    XSHARE_ASSUME(!XSHARE_FIXED_LIMITS_BATCH || args.p.budget < args.p.num_experts);
    XSHARE_FIX_NUMBER(request_budget, XSHARE_FIXED_LIMITS_REQUESTS, 0);
    XSHARE_FIX_NUMBER(gpu_budget, XSHARE_FIXED_LIMITS_GPUS, 0);
    XSHARE_FIX_NUMBER(max_rows, XSHARE_FIXED_LIMITS_ROWS, -1);
    XSHARE_FIX_NUMBER(coverage, XSHARE_FIXED_COVERS, 0.0);
    XSHARE_FIX_POINTER(correction_bias, XSHARE_FIXED_HAS_CORRECTION_BIAS);
    XSHARE_FIX_POINTER(request_ids, XSHARE_FIXED_HAS_REQUEST_IDS);
    XSHARE_FIX_POINTER(exempt, XSHARE_FIXED_HAS_EXEMPT);
    XSHARE_FIX_POINTER(expert_gpu, XSHARE_FIXED_HAS_EXPERT_GPU);
    XSHARE_FIX_POINTER(expert_ids, XSHARE_FIXED_HAS_EXPERT_IDS);
    XSHARE_FIX_POINTER(expert_weights, XSHARE_FIXED_HAS_EXPERT_WEIGHTS);
    XSHARE_FIX_POINTER(masked_logits, XSHARE_FIXED_HAS_MASKED_LOGITS);
    XSHARE_FIX_POINTER(active_experts, XSHARE_FIXED_HAS_ACTIVE_EXPERTS);
    XSHARE_FIX_POINTER(stats, XSHARE_FIXED_HAS_STATS);
    XSHARE_FIX_POINTER(step_bias, XSHARE_FIXED_HAS_STEP_BIAS);
    XSHARE_FIX_POINTER(dial, XSHARE_FIXED_HAS_DIAL);
    return args;
}

}  // namespace xshare

extern "C" XSHARE_FIXED_KERNEL XSHARE_FIXED_NAME(XSHARE_GIVEN given) {
    xshare::run_kernel<XSHARE_FIXED_KERNEL_ID, XSHARE_FIXED_EXPERTS_PER_LANE>(xshare::fix(given));
}
