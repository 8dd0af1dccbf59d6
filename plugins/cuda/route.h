// SPDX-License-Identifier: Apache-2.0
#ifndef XSHARE_CUDA_ROUTE_H
#define XSHARE_CUDA_ROUTE_H

#include <cuda_runtime_api.h>

#include "cuda/args.h"

namespace xshare {

// All arguments have been checked.
cudaError_t route_on_device(const RouteArgs& args, cudaStream_t stream);

}  // namespace xshare

#endif  // XSHARE_CUDA_ROUTE_H
