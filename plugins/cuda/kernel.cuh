// SPDX-License-Identifier: Apache-2.0
// What every kernel runs, by its name in xshare_plan.h.
#ifndef XSHARE_CUDA_KERNEL_CUH
#define XSHARE_CUDA_KERNEL_CUH

#include "cuda/rows.cuh"
#include "cuda/step.cuh"
#include "xshare/xshare_plan.h"

namespace xshare {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;  // and the kernel for them is never launched
#else
constexpr bool kHasClusters = true;
#endif

template <int kKernel, int V>
XSHARE_DEVICE void run_kernel(const RouteArgs& args) {
    if constexpr (kKernel == XSHARE_KERNEL_BLOCK) route_step<V, 1>(args);
    if constexpr (kKernel == XSHARE_KERNEL_TEAM && kHasClusters) route_step<V, 0>(args);
    if constexpr (kKernel == XSHARE_KERNEL_GATHER_ROWS) gather_rows<V>(args);
    if constexpr (kKernel == XSHARE_KERNEL_PLACE_REQUESTS) place_requests(args);
    if constexpr (kKernel == XSHARE_KERNEL_ORDER_ROWS) order_rows(args);
    if constexpr (kKernel == XSHARE_KERNEL_SUM_REQUESTS) sum_requests<V>(args);
    if constexpr (kKernel == XSHARE_KERNEL_PROPOSE) propose<V>(args);
    if constexpr (kKernel == XSHARE_KERNEL_REFINE_ROWS) refine_rows<V>(args);
    if constexpr (kKernel == XSHARE_KERNEL_TALLY_ROWS) tally_rows<V>(args);
}

}  // namespace xshare

#endif  // XSHARE_CUDA_KERNEL_CUH
