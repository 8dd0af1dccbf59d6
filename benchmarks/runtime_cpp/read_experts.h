// SPDX-License-Identifier: Apache-2.0
// The part of an MoE layer that a budget saves: reading each active expert's weights once from device memory.
#ifndef XSHARE_BENCH_READ_EXPERTS_H
#define XSHARE_BENCH_READ_EXPERTS_H

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

// weights: [num_experts, bytes_per_expert] on the device, aligned to 16; bytes_per_expert a multiple of 16.
// expert_ids, expert_weights: the `slots` slots of the routing, on the device; weight 0 = unused.
// sink: one int32 on the device.
cudaError_t read_experts(const void* weights, int num_experts, size_t bytes_per_expert,
                         const int32_t* expert_ids, const float* expert_weights, int slots, int32_t* sink,
                         cudaStream_t stream);

#endif  // XSHARE_BENCH_READ_EXPERTS_H
