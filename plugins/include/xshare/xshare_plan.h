// SPDX-License-Identifier: Apache-2.0
// Which kernels a call on a CUDA device is made of, for a host that compiles plugins/cuda/fixed.cu and
// launches it itself. Needs no device and no CUDA.
#ifndef XSHARE_XSHARE_PLAN_H
#define XSHARE_XSHARE_PLAN_H

#include "xshare/xshare.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum xshare_kernel {
    XSHARE_KERNEL_BLOCK = 0,  // a step, by one block
    XSHARE_KERNEL_TEAM = 1,   // a step, by the blocks of one cluster
    XSHARE_KERNEL_GATHER_ROWS = 2,
    XSHARE_KERNEL_PLACE_REQUESTS = 3,
    XSHARE_KERNEL_ORDER_ROWS = 4,
    XSHARE_KERNEL_SUM_REQUESTS = 5,
    XSHARE_KERNEL_PROPOSE = 6,
    XSHARE_KERNEL_REFINE_ROWS = 7,
    XSHARE_KERNEL_TALLY_ROWS = 8,
    XSHARE_NUM_KERNELS = 9
} xshare_kernel;

// What the launches are fitted to.
typedef struct xshare_gpu {
    uint32_t struct_size;
    int32_t num_multiprocessors;
    int32_t max_cluster_size;  // of the kernel XSHARE_KERNEL_TEAM: 16, 8, 4 or 2; 1 = no clusters
} xshare_gpu;

typedef struct xshare_launch {
    int32_t kernel;  // xshare_kernel
    int32_t num_blocks;
    int32_t num_threads;
    int32_t cluster_size;
} xshare_launch;

// One after the other in one stream, each with one argument by value: the parameters, the tensors and the
// address of the workspace (aligned to 64 bytes), whose first cleared_size bytes are 0 before the first.
typedef struct xshare_launch_plan {
    uint32_t struct_size;
    int32_t num_launches;
    uint64_t workspace_size;
    uint64_t cleared_size;
    xshare_launch launches[7];
} xshare_launch_plan;

// Checks the call as xshare_route_cuda does (whether pointers are NULL, not what they point to) and plans it.
XSHARE_API xshare_status xshare_plan_launches(const xshare_route_params* params,
                                              const xshare_route_tensors* tensors, const xshare_gpu* gpu,
                                              xshare_launch_plan* plan);

#ifdef __cplusplus
}
#endif

#endif  // XSHARE_XSHARE_PLAN_H
