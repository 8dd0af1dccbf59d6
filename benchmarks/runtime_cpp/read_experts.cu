// SPDX-License-Identifier: Apache-2.0
#include "read_experts.h"

namespace {

constexpr int kThreads = 256, kBlocksPerExpert = 64, kUnroll = 8;
constexpr int32_t kNever = 0x5eed5eed;  // the weights are zeros, so no sum is this

// blockIdx.y is the expert. Blocks of experts without a slot return at once.
__global__ void read_active(const int4* weights, size_t vectors, const int32_t* ids, const float* scales,
                            int slots, int32_t* sink) {
    int has_slot = 0;
    for (int s = threadIdx.x; s < slots; s += blockDim.x)
        has_slot |= ids[s] == static_cast<int32_t>(blockIdx.y) && scales[s] != 0.0f;
    if (!__syncthreads_or(has_slot)) return;
    const int4* const expert = weights + blockIdx.y * vectors;
    const size_t step = static_cast<size_t>(gridDim.x) * blockDim.x;
    int32_t sum = 0;
    for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < vectors;
         i += kUnroll * step) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            if (i + u * step >= vectors) break;
            const int4 value = __ldcs(expert + i + u * step);
            sum ^= value.x ^ value.y ^ value.z ^ value.w;
        }
    }
    if (sum == kNever) *sink = sum;  // the loads must not be optimised away
}

}  // namespace

cudaError_t read_experts(const void* weights, int num_experts, size_t bytes_per_expert,
                         const int32_t* expert_ids, const float* expert_weights, int slots, int32_t* sink,
                         cudaStream_t stream) {
    const dim3 blocks(kBlocksPerExpert, static_cast<unsigned>(num_experts));
    read_active<<<blocks, kThreads, 0, stream>>>(static_cast<const int4*>(weights), bytes_per_expert / 16,
                                                 expert_ids, expert_weights, slots, sink);
    return cudaGetLastError();
}
