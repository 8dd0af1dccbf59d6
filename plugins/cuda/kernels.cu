// SPDX-License-Identifier: Apache-2.0
// Built once per number of experts that a lane holds, with XSHARE_EXPERTS_PER_LANE naming it.
#include "cuda/kernels.h"
#include "cuda/rows.cuh"
#include "cuda/step.cuh"

namespace xshare {

namespace {

constexpr int V = XSHARE_EXPERTS_PER_LANE;

__global__ void __launch_bounds__(step_threads(V), 1)
    route_step_kernel(const __grid_constant__ RouteArgs args) {
    route_step<V>(args);
}
__global__ void __launch_bounds__(kRowThreads, 2) gather_rows_kernel(const __grid_constant__ RouteArgs args) {
    gather_rows<V>(args);
}
__global__ void __launch_bounds__(kRowThreads) place_requests_kernel(const __grid_constant__ RouteArgs args) {
    place_requests(args);
}
__global__ void __launch_bounds__(kRowThreads) order_rows_kernel(const __grid_constant__ RouteArgs args) {
    order_rows(args);
}
__global__ void __launch_bounds__(kRowThreads, 2) propose_kernel(const __grid_constant__ RouteArgs args) {
    propose<V>(args);
}
__global__ void __launch_bounds__(kRowThreads, 2) refine_rows_kernel(const __grid_constant__ RouteArgs args) {
    refine_rows<V>(args);
}
__global__ void __launch_bounds__(kRowThreads) tally_rows_kernel(const __grid_constant__ RouteArgs args) {
    tally_rows<V>(args);
}

}  // namespace

template <>
const void* kernel_of<V>(Kernel kernel) {
    void (*pointer)(RouteArgs) = nullptr;
    switch (kernel) {
        case Kernel::kStep:
            pointer = route_step_kernel;
            break;
        case Kernel::kGatherRows:
            pointer = gather_rows_kernel;
            break;
        case Kernel::kPlaceRequests:
            pointer = place_requests_kernel;
            break;
        case Kernel::kOrderRows:
            pointer = order_rows_kernel;
            break;
        case Kernel::kPropose:
            pointer = propose_kernel;
            break;
        case Kernel::kRefineRows:
            pointer = refine_rows_kernel;
            break;
        case Kernel::kTallyRows:
            pointer = tally_rows_kernel;
            break;
    }
    return reinterpret_cast<const void*>(pointer);
}

}  // namespace xshare
