// SPDX-License-Identifier: Apache-2.0
// The experts of one MoE layer on the host: gated MLPs (SwiGLU), one pass over the weights of each expert
// that has rows and none over the others. This is what makes a shared set of experts cheaper on a CPU, as it
// does on a GPU.
#ifndef XSHARE_XSHARE_EXPERTS_H
#define XSHARE_XSHARE_EXPERTS_H

#include "xshare/xshare.h"

#ifdef __cplusplus
extern "C" {
#endif

// Set all of it to zero, then struct_size = sizeof(xshare_experts_params).
typedef struct xshare_experts_params {
    uint32_t struct_size;
    int32_t num_tokens;         // T: 0 .. 1048576
    int32_t num_experts;        // E: 1 .. 512
    int32_t top_k;              // k: 1 .. 16
    int32_t hidden_size;        // H: 1 .. 65536
    int32_t intermediate_size;  // F: 1 .. 65536
} xshare_experts_params;

// Dense, row-major, fp32 and aligned to 4 bytes where nothing else is said.
typedef struct xshare_experts_tensors {
    uint32_t struct_size;
    const float* hidden_states;   // [T, H]
    const int32_t* expert_ids;    // [T, k], 0 <= id < E
    const float* expert_weights;  // [T, k]; a slot of weight 0 is not computed
    const float* gate_up;         // [E, 2F, H]: F rows of the gate, then F rows of the up projection
    const float* down;            // [E, H, F]
    float* output;                // out [T, H]: sum over slots of weight * down(silu(gate(x)) * up(x))
} xshare_experts_tensors;

// The workspace that a call with `params` needs, aligned to 64 bytes.
XSHARE_API xshare_status xshare_experts_workspace_size(const xshare_experts_params* params,
                                                       size_t* workspace_size);

// Runs the experts on the calling thread.
XSHARE_API xshare_status xshare_experts_cpu(const xshare_experts_params* params,
                                            const xshare_experts_tensors* tensors, void* workspace,
                                            size_t workspace_size);

#ifdef __cplusplus
}
#endif

#endif  // XSHARE_XSHARE_EXPERTS_H
