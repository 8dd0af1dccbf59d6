// SPDX-License-Identifier: Apache-2.0
#ifndef XSHARE_CUDA_KERNELS_H
#define XSHARE_CUDA_KERNELS_H

#include "cuda/plan.h"

namespace xshare {

constexpr int kRowThreads = 256;  // of the other kernels

// A kernel that takes a RouteArgs, for rows of up to 32 * V experts. Built once per V (kernels.cu).
template <int V>
__attribute__((visibility("hidden"))) const void* kernel_of(Kernel kernel);

}  // namespace xshare

#endif  // XSHARE_CUDA_KERNELS_H
