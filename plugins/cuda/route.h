// SPDX-License-Identifier: Apache-2.0
#ifndef XSHARE_CUDA_ROUTE_H
#define XSHARE_CUDA_ROUTE_H

#include <cuda_runtime_api.h>

#include "cuda/args.h"

namespace xshare {

// That one block takes in one launch where there are no clusters; needs no workspace. More rows than this
// keep one multiprocessor busy (about 900 to 1800 instructions each) for longer than a memset and a second
// kernel take.
constexpr int kBlockRows = 32;

// All arguments have been checked.
cudaError_t route_on_device(const RouteArgs& args, cudaStream_t stream);

}  // namespace xshare

#endif  // XSHARE_CUDA_ROUTE_H
