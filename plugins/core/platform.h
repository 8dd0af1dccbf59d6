// SPDX-License-Identifier: Apache-2.0
// Float operations that round once, on the host and on a device alike, so that both give the same bits.
// The host side needs -ffp-contract=off. Functions are static: every translation unit may be built for
// another ISA.
#ifndef XSHARE_CORE_PLATFORM_H
#define XSHARE_CORE_PLATFORM_H

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define XSHARE_FN static __host__ __device__ __forceinline__
#define XSHARE_METHOD __host__ __device__ __forceinline__
#else
#define XSHARE_FN [[maybe_unused]] static inline __attribute__((always_inline))
#define XSHARE_METHOD inline
#endif

namespace xshare {

XSHARE_FN float add_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

XSHARE_FN float sub_rn(float a, float b) { return add_rn(a, -b); }

XSHARE_FN float mul_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

XSHARE_FN float div_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}

XSHARE_FN float sqrt_rn(float a) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(a);
#else
    return __builtin_sqrtf(a);
#endif
}

// a * b + c, rounded once.
XSHARE_FN float fma_rn(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return __builtin_fmaf(a, b, c);
#endif
}

XSHARE_FN int32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
    return __float_as_int(x);
#else
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
#endif
}

XSHARE_FN float bits_float(int32_t bits) {
#if defined(__CUDA_ARCH__)
    return __int_as_float(bits);
#else
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
#endif
}

XSHARE_FN uint64_t double_bits(double x) {
#if defined(__CUDA_ARCH__)
    return static_cast<uint64_t>(__double_as_longlong(x));
#else
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
#endif
}

}  // namespace xshare

#endif  // XSHARE_CORE_PLATFORM_H
