// SPDX-License-Identifier: Apache-2.0
#ifndef XSHARE_CUDA_KERNELS_H
#define XSHARE_CUDA_KERNELS_H

#include "cuda/args.h"
#include "xshare/xshare_plan.h"

namespace xshare {

// A kernel that takes a RouteArgs, for rows of up to 32 * V experts. Built once per V (kernels.cu). Those of
// a step have variants, of a third of the code.
template <int V>
__attribute__((visibility("hidden"))) const void* kernel_of(xshare_kernel kernel, Variant variant);

}  // namespace xshare

#endif  // XSHARE_CUDA_KERNELS_H
