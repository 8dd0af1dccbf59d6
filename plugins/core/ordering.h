// SPDX-License-Identifier: Apache-2.0
// Keys whose integer order is the order of the algorithm: greater first, and among equals the lower expert
// id.
#ifndef XSHARE_CORE_ORDERING_H
#define XSHARE_CORE_ORDERING_H

#include "core/limits.h"
#include "core/platform.h"

namespace xshare {

// Below the key of every float: an expert that the row must not take.
constexpr int32_t kUnavailable = INT32_MIN;

// Ordered like the float; -0.0 and 0.0 have one key. Not for NaN.
XSHARE_FN int32_t score_key(float score) {
    const int32_t bits = float_bits(add_rn(score, 0.0f));
    return bits ^ ((bits >> 31) & INT32_MAX);
}

XSHARE_FN float key_score(int32_t key) { return bits_float(key ^ ((key >> 31) & INT32_MAX)); }

// A column sum and its expert in one integer. No two experts have equal keys.
XSHARE_FN int64_t sum_key(int64_t sum, int expert) { return sum * kMaxExperts + (kMaxExperts - 1 - expert); }

XSHARE_FN int key_expert(int64_t key) { return kMaxExperts - 1 - static_cast<int>(key & (kMaxExperts - 1)); }

XSHARE_FN int64_t key_sum(int64_t key) { return key / kMaxExperts; }

}  // namespace xshare

#endif  // XSHARE_CORE_ORDERING_H
