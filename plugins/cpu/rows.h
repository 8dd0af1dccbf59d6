// SPDX-License-Identifier: Apache-2.0
// The loops over one row's experts, built once per instruction set (rows.cpp) and chosen when the library
// starts.
#ifndef XSHARE_CPU_ROWS_H
#define XSHARE_CPU_ROWS_H

#include <stddef.h>
#include <stdint.h>

#include "core/limits.h"
#include "xshare/xshare.h"

namespace xshare {

// Key rows are padded to whole blocks with kUnavailable.
constexpr int kBlock = 16;
constexpr int padded(int n) { return (n + kBlock - 1) / kBlock * kBlock; }

struct RowScores {
    alignas(64) float affinity[kMaxExperts];  // A; fewer than a whole block past num_experts is undefined
    alignas(64) float logits[kMaxExperts];    // Z in fp32
};

struct RowKernels {
    const char* name;

    // How many of the `n` logits are finite; -1 if one is NaN or +inf.
    int (*count_finite)(const void* logits, int32_t dtype, int n);

    // Scores one row: `scores`, and the keys of R in `keys` [padded(num_experts)], kUnavailable outside the
    // row's groups and where the logit is -inf.
    void (*score)(const xshare_route_params& params, const void* logits, const float* bias, RowScores& scores,
                  int32_t* keys);

    // sums[e] += fixed_point(affinity[e])
    void (*accumulate)(const float* affinity, int n, int64_t* sums);

    // The `k` best of `keys` [length, whole blocks], best first: places and keys. Returns how many are
    // available.
    int (*top_k)(int32_t* keys, int length, int k, int32_t* places, int32_t* best_keys);

    // Adds to `total` [n] what `part` holds.
    void (*add)(const int64_t* part, int n, int64_t* total);

    // masked = logits where allowed (allowed[e] != 0 and keys[e] available), else `mask_bits`. May be in
    // place.
    void (*mask)(const void* logits, int32_t dtype, uint32_t mask_bits, const int32_t* allowed,
                 const int32_t* keys, int n, void* masked);
};

const RowKernels& row_kernels();

}  // namespace xshare

#endif  // XSHARE_CPU_ROWS_H
