// SPDX-License-Identifier: Apache-2.0
// The C ABI of XShare: the only door to the native code. Plain C, no exceptions, no global state that a
// caller can see.
//
// Every function may be called from any number of threads at once. A call that is refused writes no output.
#ifndef XSHARE_XSHARE_H
#define XSHARE_XSHARE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(XSHARE_BUILDING_LIBRARY) && defined(__GNUC__)
#define XSHARE_API __attribute__((visibility("default")))
#else
#define XSHARE_API
#endif

#define XSHARE_VERSION_MAJOR 0
#define XSHARE_VERSION_MINOR 1
#define XSHARE_VERSION_PATCH 0

typedef enum xshare_status {
    XSHARE_OK = 0,
    XSHARE_INVALID_STRUCT = 1,     // struct_size does not fit this library, or a struct pointer is NULL
    XSHARE_INVALID_PARAMETER = 2,  // a field of xshare_route_params is out of range
    XSHARE_INVALID_TENSOR = 3,     // a pointer is missing, misaligned, or its contents are out of range
    XSHARE_INVALID_WORKSPACE = 4,  // the workspace is too small or misaligned
    XSHARE_OUT_OF_MEMORY = 5,      // the library's own buffer could not grow
    XSHARE_INTERNAL_ERROR = 6,     // a bug in the library
    XSHARE_CUDA_ERROR = 7          // a CUDA call failed (xshare_cuda.h)
} xshare_status;

typedef enum xshare_dtype { XSHARE_FLOAT32 = 0, XSHARE_BFLOAT16 = 1, XSHARE_FLOAT16 = 2 } xshare_dtype;

typedef enum xshare_scoring {
    XSHARE_SOFTMAX = 0,         // OLMoE, DeepSeek-V2-Lite
    XSHARE_SOFTMAX_RENORM = 1,  // Mixtral, Qwen3-MoE
    XSHARE_TOPK_SOFTMAX = 2,    // gpt-oss
    XSHARE_SIGMOID_BIAS = 3,    // DeepSeek-V3, Kimi-K2, GLM-4.5
    XSHARE_SOFTMAX_BIAS = 4,
    XSHARE_SOFTMAX_BIAS_RENORM = 5,  // ERNIE-4.5, Mistral 4 with groups
    XSHARE_TOPK_SIGMOID = 6,         // Llama 4, Kolibri 1
    XSHARE_SQRT_SOFTPLUS_BIAS = 7    // DeepSeek-V4
} xshare_scoring;

// What an expert is worth to a row.
typedef enum xshare_utility {
    XSHARE_SQUARED_WEIGHT = 0,  // the square of the weight, before scaling, that the model gives it in the
                                // row's own top-k
    XSHARE_AFFINITY = 1         // the router's score of every expert (the paper's)
} xshare_utility;

typedef enum xshare_mode {
    XSHARE_ON = 0,
    XSHARE_SHADOW = 1,  // the model's own routing, with the statistics that XSHARE_ON would have
    XSHARE_OFF = 2      // the model's own routing
} xshare_mode;

// What may change while a server runs. It is in the memory that the tensors are in, and a captured CUDA graph
// reads it anew on every replay; written between two calls. What it holds is not refused: a budget below
// top_k counts as top_k, a coverage that is negative or not a number as off, one above 1 as 1.
typedef struct xshare_dial {
    double coverage;  // in place of that of the parameters
    int32_t budget;   // in place of that of the parameters
    int32_t mode;     // xshare_mode
} xshare_dial;

// What to route and under which budgets. Set all of it to zero, then struct_size =
// sizeof(xshare_route_params).
typedef struct xshare_route_params {
    uint32_t struct_size;
    int32_t num_tokens;           // T: 0 .. 1048576
    int32_t num_experts;          // E: 1 .. 512
    int32_t top_k;                // k: 1 .. min(16, E)
    int32_t scoring;              // xshare_scoring
    int32_t num_groups;           // expert groups of the model's own router; 1 = none
    int32_t top_k_groups;         // groups that a row may use: 1 .. num_groups
    float routed_scaling_factor;  // multiplies every weight; 1 = none
    int32_t logits_dtype;         // xshare_dtype of router_logits and masked_logits
    int32_t budget;               // m: experts that may be active, at least top_k; E or more = no limit
    int32_t warmup;               // k0: 0 .. top_k
    int32_t request_budget;       // m_r; 0 = off
    int32_t gpu_budget;           // m_g; 0 = off
    int32_t max_rows;             // stand aside above this number of real rows; negative = no limit
    int32_t utility;              // xshare_utility
    float mask_value;             // where masked_logits and step_bias say no: negative, exact in the logits'
                                  // type; 0 = -inf
    double coverage;              // c: 0 < c <= 1; 0 = off. Sets m_g where expert_gpu is given and m_g is off
} xshare_route_params;

// Where the tensors are: dense, row-major, aligned to their element, in host memory for xshare_route_cpu.
// Set all of it to zero, then struct_size = sizeof(xshare_route_tensors). Any output may be NULL.
typedef struct xshare_route_tensors {
    uint32_t struct_size;
    const void* router_logits;     // [T, E] logits_dtype; -inf bans an expert from a row. A row with NaN,
                                   // +inf or fewer than top_k experts to choose from is padding
    const float* correction_bias;  // [E], of scorings with a bias; NULL = zeros
    const int32_t* request_ids;    // [T], >= 0, or -1 = padding; request_budget needs it; NULL = no padding
    const uint8_t* exempt;         // [T], not 0 = the row keeps its own top-k; NULL = none
    const int32_t* expert_gpu;     // [E], 0 .. E-1; gpu_budget needs it; NULL = all on one GPU
    int32_t* expert_ids;           // out [T, k], by ranking score descending
    float* expert_weights;         // out [T, k]
    void* masked_logits;           // out [T, E] logits_dtype; may be router_logits itself
    uint8_t* active_experts;       // out [E], 1 = in the set S
    int64_t* stats;                // out [XSHARE_NUM_STATS], see xshare_stat
    float* step_bias;              // out [E], correction_bias inside S, mask_value outside: a bias is one for
                                   // all rows, so a step with a real exempt row stands aside. Only with
                                   // XSHARE_SIGMOID_BIAS, one group and a warm-up
    const xshare_dial* dial;       // NULL = the parameters', XSHARE_ON
} xshare_route_tensors;

// Places in `stats`. Kept and total utility are sums of round(d * 2^20), 0 where XShare stood aside.
typedef enum xshare_stat {
    XSHARE_STAT_EXPERTS_BEFORE = 0,   // distinct experts in the real rows' own top-k
    XSHARE_STAT_EXPERTS_AFTER = 1,    // distinct experts in the real rows' output
    XSHARE_STAT_KEPT_UTILITY = 2,     // over S
    XSHARE_STAT_TOTAL_UTILITY = 3,    // over all experts
    XSHARE_STAT_WARMUP_OVERFLOW = 4,  // counted warm-up experts beyond the budgets
    XSHARE_STAT_PEAK_GPU_BEFORE = 5,
    XSHARE_STAT_PEAK_GPU_AFTER = 6,
    XSHARE_STAT_ROWS = 7,  // real rows; bit 32 = XShare stood aside
    XSHARE_NUM_STATS = 8
} xshare_stat;

// Checks `params` and says how much workspace a call with them needs (aligned to 64 bytes).
XSHARE_API xshare_status xshare_workspace_size(const xshare_route_params* params, size_t* workspace_size);

// Routes one MoE layer's rows on the calling thread, with the same bits whatever floating-point mode the
// thread is in (flushing of subnormal numbers, rounding); the mode is its own again afterwards. With
// workspace = NULL (and workspace_size = 0) it uses a buffer of the calling thread that grows to the largest
// call so far (at most 1 MiB + 9 bytes per row) and is then reused.
XSHARE_API xshare_status xshare_route_cpu(const xshare_route_params* params,
                                          const xshare_route_tensors* tensors, void* workspace,
                                          size_t workspace_size);

// What a status means in general: a constant string, never NULL.
XSHARE_API const char* xshare_error_string(xshare_status status);

// What was wrong with this thread's last failed call, in detail ("" if none failed). Valid until this
// thread's next failure.
XSHARE_API const char* xshare_last_error(void);

// "0.1.0"
XSHARE_API const char* xshare_version(void);

#ifdef __cplusplus
}
#endif

#endif  // XSHARE_XSHARE_H
