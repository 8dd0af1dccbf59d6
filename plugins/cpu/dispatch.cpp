// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows.h"

namespace xshare {

namespace baseline {
extern const RowKernels kernels;
}
#if defined(XSHARE_HAVE_AVX2)
namespace avx2 {
extern const RowKernels kernels;
}
#endif

const RowKernels& row_kernels() {
#if defined(XSHARE_HAVE_AVX2)
    static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (has_avx2) return avx2::kernels;
#endif
    return baseline::kernels;
}

}  // namespace xshare
