// SPDX-License-Identifier: Apache-2.0
// From router logits to affinities, in arithmetic whose every bit is fixed: no libm, no fused operations,
// exact sums.
#ifndef XSHARE_CORE_SCORING_H
#define XSHARE_CORE_SCORING_H

#include "core/platform.h"

namespace xshare {

XSHARE_FN float widen_bf16(uint16_t h) {
    return bits_float(static_cast<int32_t>(static_cast<uint32_t>(h) << 16));
}

XSHARE_FN float widen_fp16(uint16_t h) {
    const uint32_t sign = (h & 0x8000u) << 16;
    const uint32_t magnitude = (h & 0x7fffu)
                               << 13;  // exponent and fraction at their fp32 places, exponent bias still 15
    const uint32_t rebased = magnitude + (112u << 23);
    const float normal = bits_float(static_cast<int32_t>(rebased));
    const float subnormal = bits_float(static_cast<int32_t>(rebased + (1u << 23))) - bits_float(113 << 23);
    const float special = bits_float(static_cast<int32_t>(rebased + (112u << 23)));  // inf and NaN
    const float finite = magnitude < (1u << 23) ? subnormal : normal;
    const float absolute = magnitude >= (31u << 23) ? special : finite;
    return bits_float(static_cast<int32_t>(static_cast<uint32_t>(float_bits(absolute)) | sign));
}

// exp(x) for x <= 0, relative error below 2e-7; 0 below -87, so that no result is subnormal.
XSHARE_FN float exp_fixed(float x) {
    const float clamped = x < -87.0f ? -87.0f : x;
    const float round_to_integer =
        12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction bits, half to even
    const float shifted = add_rn(mul_rn(clamped, 1.44269504f), round_to_integer);
    const float n = sub_rn(shifted, round_to_integer);   // also the lowest bits of `shifted`
    float r = sub_rn(clamped, mul_rn(n, 0.693359375f));  // ln 2 in two parts (Cody and Waite)
    r = sub_rn(r, mul_rn(n, -2.12194440e-4f));
    float p = 1.9875691500e-4f;  // the polynomial of Cephes' expf
    p = add_rn(mul_rn(p, r), 1.3981999507e-3f);
    p = add_rn(mul_rn(p, r), 8.3334519073e-3f);
    p = add_rn(mul_rn(p, r), 4.1665795894e-2f);
    p = add_rn(mul_rn(p, r), 1.6666665459e-1f);
    p = add_rn(mul_rn(p, r), 5.0000001201e-1f);
    float y = mul_rn(p, mul_rn(r, r));
    y = add_rn(y, r);
    y = add_rn(y, 1.0f);
    const uint32_t power_of_two = static_cast<uint32_t>(float_bits(shifted) + 127) << 23;
    return mul_rn(y, bits_float(x < -87.0f ? 0 : static_cast<int32_t>(power_of_two)));
}

// 1 / x for 1 <= x <= 2, rounded once, from a guess that is up to 4 units in the last place off. No branch,
// as a division has for numbers far from 1. Markstein's two steps miss one x.
XSHARE_FN float refine_reciprocal(float x, float guess) {
    float r = fma_rn(guess, fma_rn(-x, guess, 1.0f), guess);
    r = fma_rn(r, fma_rn(-x, r, 1.0f), r);
    return x == 0x1.fffffep0f ? 0x1.000002p-1f : r;
}

XSHARE_FN float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
    float guess;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(guess) : "f"(x));
    return refine_reciprocal(x, guess);
#else
    return 1.0f / x;
#endif
}

XSHARE_FN float sigmoid_fixed(float z) {
    const float e = exp_fixed(z >= 0.0f ? -z : z);
    const float r = reciprocal(add_rn(1.0f, e));
    return z >= 0.0f ? r : mul_rn(e, r);
}

// sqrt(log(1 + e^z)), relative error below 4e-7; 0 where z < -87. log(1 + e) is 2 artanh(e / (2 + e)), whose
// series in the square of that, up to 1/9, is cut to a polynomial of relative error 2e-8.
XSHARE_FN float sqrt_softplus_fixed(float z) {
    const float e = exp_fixed(z >= 0.0f ? -z : z);
    const float s = div_rn(e, add_rn(2.0f, e));
    const float t = mul_rn(s, s);
    float p = 0.268675476f;
    p = add_rn(mul_rn(p, t), 0.282339573f);
    p = add_rn(mul_rn(p, t), 0.400076717f);
    p = add_rn(mul_rn(p, t), 0.666666389f);
    p = add_rn(mul_rn(p, t), 2.0f);
    return sqrt_rn(add_rn(z >= 0.0f ? z : 0.0f, mul_rn(s, p)));
}

// z + bias, finite where both are.
XSHARE_FN float add_bias_to_logit(float z, float bias) {
    const float most = 3.402823466e+38f, sum = add_rn(z, bias);
    const float below = sum > most ? most : sum;
    return below < -most ? -most : below;
}

// rint(e * 2^40) for 0 <= e <= 1 plus a constant: the bits of a double whose last place is 2^-40. As integers
// they sum exactly in any order; softmax_scale takes the n constants off again.
XSHARE_FN uint64_t softmax_term(float e) { return double_bits(static_cast<double>(e) + 6144.0); }

// What every term is multiplied by.
XSHARE_FN float softmax_scale(uint64_t sum_of_terms, int n) {
    const uint64_t sum =
        sum_of_terms - static_cast<uint64_t>(n) * 0x40B8000000000000ull;  // the bits of 6144.0
    const double exact = static_cast<double>(static_cast<int64_t>(sum)) * 0x1p-40;
    return div_rn(1.0f, static_cast<float>(exact));
}

// round(utility * 2^20), half away from zero, for 0 <= utility <= 1. An error of at most 2^-21 per utility.
// Weights that sum to 1 have squares that sum to 1 / k or more, so a row loses at most k^2 2^-21 of them
// (1.2e-4 for k = 16), in any number of rows. The weights of a softmax over all E that are not divided sum to
// k / E or more: at most E^2 2^-21 (0.2 % for E = 64, 12 % for a router of 512 without any preference).
XSHARE_FN int32_t fixed_point(float utility) {
    const float x = mul_rn(utility, 1048576.0f);
    const int32_t whole = static_cast<int32_t>(x);
    return whole + (sub_rn(x, static_cast<float>(whole)) >= 0.5f ? 1 : 0);
}

}  // namespace xshare

#endif  // XSHARE_CORE_SCORING_H
