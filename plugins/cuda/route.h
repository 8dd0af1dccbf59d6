// SPDX-License-Identifier: Apache-2.0
#ifndef XSHARE_CUDA_ROUTE_H
#define XSHARE_CUDA_ROUTE_H

#include <cuda_runtime_api.h>

#include "cuda/args.h"

namespace xshare {

constexpr int kBlockRows =
    64;  // that one block takes in one launch where there are no clusters; needs no workspace

// All arguments have been checked.
cudaError_t route_on_device(const RouteArgs& args, cudaStream_t stream);

}  // namespace xshare

#endif  // XSHARE_CUDA_ROUTE_H
