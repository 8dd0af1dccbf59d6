// SPDX-License-Identifier: Apache-2.0
// What stands where a row may not go.
#ifndef XSHARE_CORE_MASKING_H
#define XSHARE_CORE_MASKING_H

#include "core/platform.h"
#include "xshare/xshare.h"

namespace xshare {

XSHARE_FN float mask_value(const xshare_route_params& p) {
    return p.mask_value == 0.0f ? bits_float(static_cast<int32_t>(0xff800000u)) : p.mask_value;
}

// In the logits' type, which holds the value exactly.
XSHARE_FN uint32_t mask_bits(const xshare_route_params& p) {
    const uint32_t bits = static_cast<uint32_t>(float_bits(mask_value(p)));
    if (p.logits_dtype == XSHARE_FLOAT32) return bits;
    if (p.logits_dtype == XSHARE_BFLOAT16) return bits >> 16;
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t half = magnitude == 0x7f800000u ? 0x7c00u : (magnitude - (112u << 23)) >> 13;
    return 0x8000u | half;
}

}  // namespace xshare

#endif  // XSHARE_CORE_MASKING_H
