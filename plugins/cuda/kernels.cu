// SPDX-License-Identifier: Apache-2.0
// Built once per number of experts that a lane holds, with XSHARE_EXPERTS_PER_LANE naming it.
#include "cuda/kernel.cuh"
#include "cuda/kernels.h"

namespace xshare {

namespace {

constexpr int V = XSHARE_EXPERTS_PER_LANE;

#define XSHARE_KERNEL(name, kernel, given, max_threads, min_blocks) \
    __global__ void __launch_bounds__(max_threads, min_blocks)      \
        name##_kernel(const __grid_constant__ RouteArgs args) {     \
        run_kernel<kernel, V>(given);                               \
    }

XSHARE_KERNEL(route_block, XSHARE_KERNEL_BLOCK, args, step_threads(V), 1)
XSHARE_KERNEL(route_block_plain, XSHARE_KERNEL_BLOCK, args.as_plain(), step_threads(V), 1)
XSHARE_KERNEL(route_team, XSHARE_KERNEL_TEAM, args, step_threads(V), 1)
XSHARE_KERNEL(route_team_plain, XSHARE_KERNEL_TEAM, args.as_plain(), step_threads(V), 1)
XSHARE_KERNEL(gather_rows, XSHARE_KERNEL_GATHER_ROWS, args, kRowThreads, 2)
XSHARE_KERNEL(place_requests, XSHARE_KERNEL_PLACE_REQUESTS, args, kRowThreads, 1)
XSHARE_KERNEL(order_rows, XSHARE_KERNEL_ORDER_ROWS, args, kRowThreads, 1)
XSHARE_KERNEL(sum_requests, XSHARE_KERNEL_SUM_REQUESTS, args, kRowThreads, 2)
XSHARE_KERNEL(propose, XSHARE_KERNEL_PROPOSE, args, kRowThreads, 2)
XSHARE_KERNEL(refine_rows, XSHARE_KERNEL_REFINE_ROWS, args, kRowThreads, 2)
XSHARE_KERNEL(tally_rows, XSHARE_KERNEL_TALLY_ROWS, args, kRowThreads, 1)

using Pointer = void (*)(RouteArgs);
constexpr Pointer kGeneral[] = {route_block_kernel,    route_team_kernel,  gather_rows_kernel,
                                place_requests_kernel, order_rows_kernel,  sum_requests_kernel,
                                propose_kernel,        refine_rows_kernel, tally_rows_kernel};
static_assert(sizeof kGeneral / sizeof kGeneral[0] == XSHARE_NUM_KERNELS);

Pointer find(xshare_kernel kernel, bool plain) {
    if (plain && kernel == XSHARE_KERNEL_BLOCK) return route_block_plain_kernel;
    if (plain && kernel == XSHARE_KERNEL_TEAM) return route_team_plain_kernel;
    return kGeneral[kernel];
}

}  // namespace

template <>
const void* kernel_of<V>(xshare_kernel kernel, bool plain) {
    return reinterpret_cast<const void*>(find(kernel, plain));
}

}  // namespace xshare
