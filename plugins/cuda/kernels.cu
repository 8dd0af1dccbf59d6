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
XSHARE_KERNEL(route_block_softmax, XSHARE_KERNEL_BLOCK, args.known_to_be(kPlainSoftmax), step_threads(V), 1)
XSHARE_KERNEL(route_block_sigmoid, XSHARE_KERNEL_BLOCK, args.known_to_be(kPlainSigmoid), step_threads(V), 1)
XSHARE_KERNEL(route_team, XSHARE_KERNEL_TEAM, args, step_threads(V), 1)
XSHARE_KERNEL(route_team_softmax, XSHARE_KERNEL_TEAM, args.known_to_be(kPlainSoftmax), step_threads(V), 1)
XSHARE_KERNEL(route_team_sigmoid, XSHARE_KERNEL_TEAM, args.known_to_be(kPlainSigmoid), step_threads(V), 1)
XSHARE_KERNEL(gather_rows, XSHARE_KERNEL_GATHER_ROWS, args, kRowThreads, 2)
XSHARE_KERNEL(place_requests, XSHARE_KERNEL_PLACE_REQUESTS, args, kRowThreads, 1)
XSHARE_KERNEL(order_rows, XSHARE_KERNEL_ORDER_ROWS, args, kRowThreads, 1)
XSHARE_KERNEL(sum_requests, XSHARE_KERNEL_SUM_REQUESTS, args, kRowThreads, 2)
XSHARE_KERNEL(propose, XSHARE_KERNEL_PROPOSE, args, kRowThreads, 2)
XSHARE_KERNEL(refine_rows, XSHARE_KERNEL_REFINE_ROWS, args, kRowThreads, 2)
XSHARE_KERNEL(tally_rows, XSHARE_KERNEL_TALLY_ROWS, args, kRowThreads, 1)

using Pointer = void (*)(RouteArgs);
constexpr Pointer kAny[] = {route_block_kernel,    route_team_kernel,  gather_rows_kernel,
                            place_requests_kernel, order_rows_kernel,  sum_requests_kernel,
                            propose_kernel,        refine_rows_kernel, tally_rows_kernel};
static_assert(sizeof kAny / sizeof kAny[0] == XSHARE_NUM_KERNELS);

constexpr Pointer kBlocks[] = {route_block_kernel, route_block_softmax_kernel, route_block_sigmoid_kernel};
constexpr Pointer kTeams[] = {route_team_kernel, route_team_softmax_kernel, route_team_sigmoid_kernel};
static_assert(sizeof kBlocks == kNumVariants * sizeof kBlocks[0] && sizeof kTeams == sizeof kBlocks);

Pointer find(xshare_kernel kernel, Variant variant) {
    if (kernel == XSHARE_KERNEL_BLOCK) return kBlocks[variant];
    return kernel == XSHARE_KERNEL_TEAM ? kTeams[variant] : kAny[kernel];
}

}  // namespace

template <>
const void* kernel_of<V>(xshare_kernel kernel, Variant variant) {
    return reinterpret_cast<const void*>(find(kernel, variant));
}

}  // namespace xshare
