// SPDX-License-Identifier: Apache-2.0
// The step kernel for TensorRT's ahead-of-time plugins, which embed a kernel in the engine: one entry whose
// parameters are what TensorRT passes, the addresses of the inputs, then the scalars, then the addresses of
// the outputs. Everything else is known when it is built: xshare_trtllm/graph/aot_plugin.py defines all the
// macros, once per configuration of a layer. TensorRT gives no launch attributes, so the cluster is part of
// the kernel.
#include "cuda/step.cuh"

#if defined(__CUDACC__)
#define XSHARE_AOT_ENTRY(threads) __global__ void __launch_bounds__(threads, 1)
#else
#define XSHARE_AOT_ENTRY(threads) void
#endif
#if defined(__CUDACC__) && XSHARE_AOT_BLOCKS > 1
#define XSHARE_AOT_CLUSTER __cluster_dims__(XSHARE_AOT_BLOCKS, 1, 1)
#else
#define XSHARE_AOT_CLUSTER
#endif

extern "C" XSHARE_AOT_CLUSTER XSHARE_AOT_ENTRY(XSHARE_AOT_THREADS)
    XSHARE_AOT_NAME(const void* router_logits,
#if XSHARE_AOT_HAS_CORRECTION_BIAS
                    const float* correction_bias,
#endif
#if XSHARE_AOT_HAS_REQUEST_IDS
                    const int32_t* request_ids,
#endif
#if XSHARE_AOT_HAS_EXEMPT
                    const uint8_t* exempt,
#endif
#if XSHARE_AOT_HAS_EXPERT_GPU
                    const int32_t* expert_gpu,
#endif
                    int32_t num_tokens, int32_t* expert_ids, float* expert_weights, uint8_t* active_experts) {
    xshare::RouteArgs args = {};
    args.p.num_tokens = num_tokens;
    args.p.num_experts = XSHARE_AOT_NUM_EXPERTS;
    args.p.top_k = XSHARE_AOT_TOP_K;
    args.p.scoring = XSHARE_AOT_SCORING;
    args.p.num_groups = XSHARE_AOT_NUM_GROUPS;
    args.p.top_k_groups = XSHARE_AOT_TOP_K_GROUPS;
    args.p.routed_scaling_factor = XSHARE_AOT_ROUTED_SCALING_FACTOR;
    args.p.logits_dtype = XSHARE_AOT_LOGITS_DTYPE;
    args.p.budget = XSHARE_AOT_BUDGET;
    args.p.warmup = XSHARE_AOT_WARMUP;
    args.p.request_budget = XSHARE_AOT_REQUEST_BUDGET;
    args.p.gpu_budget = XSHARE_AOT_GPU_BUDGET;
    args.p.max_rows = XSHARE_AOT_MAX_ROWS;
    args.p.coverage = XSHARE_AOT_COVERAGE;
    args.p.utility = XSHARE_AOT_UTILITY;
    args.t.router_logits = router_logits;
#if XSHARE_AOT_HAS_CORRECTION_BIAS
    args.t.correction_bias = correction_bias;
#endif
#if XSHARE_AOT_HAS_REQUEST_IDS
    args.t.request_ids = request_ids;
#endif
#if XSHARE_AOT_HAS_EXEMPT
    args.t.exempt = exempt;
#endif
#if XSHARE_AOT_HAS_EXPERT_GPU
    args.t.expert_gpu = expert_gpu;
#endif
    args.t.expert_ids = expert_ids;
    args.t.expert_weights = expert_weights;
    args.t.active_experts = active_experts;
    xshare::route_step<XSHARE_AOT_EXPERTS_PER_LANE, XSHARE_AOT_BLOCKS>(args);
}
