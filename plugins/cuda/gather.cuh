// SPDX-License-Identifier: Apache-2.0
// What the rows of a step add up to: column sums and sets of experts. Sums of fixed-point integers and unions
// of bits do not depend on the order of rows, warps or blocks.
#ifndef XSHARE_CUDA_GATHER_CUH
#define XSHARE_CUDA_GATHER_CUH

#include "cuda/score.cuh"
#include "cuda/workspace.h"
#include "cuda/write.cuh"

namespace xshare {

// A block's rows, in shared memory. An affinity is at most 2^20, so 32 bits hold the sum over 4095 rows.
template <int V>
struct Gathered {
    uint32_t sums[V * device::kWarpSize];      // g
    uint32_t proposed[V * device::kWarpSize];  // u, where requests propose
    Sets sets;
    uint32_t num_real_rows;
};

template <int V>
XSHARE_DEVICE void clear(Gathered<V>& gathered) {
    constexpr int kWords = sizeof(Gathered<V>) / 4;
    uint32_t* words = reinterpret_cast<uint32_t*>(&gathered);
    for (int i = device::thread(); i < kWords; i += device::num_threads()) words[i] = 0;
}

// Stages 1 and 2 of one row: its own choice, its warm-up and its part of the sums. Where its own choice is
// the outcome whatever the others do, that is written.
template <int V>
XSHARE_DEVICE void gather_row(const RouteArgs& args, int index, Row<V>& row, Gathered<V>& gathered) {
    score_row(args, index, row);
    if (row.kind == RowKind::kPadding) return;
    if (device::lane() == 0) device::atomic_add(&gathered.num_real_rows, 1u);
    const bool shared = row.kind == RowKind::kShared;
    const bool whole = !shared || args.needs_own_choice();
    const Picks own = best_of(row.keys, whole ? args.p.top_k : args.p.warmup);
    if (device::lane() < own.count) {
        if (whole) add_expert<V>(gathered.sets.before, own.id);
        if (!shared) add_expert<V>(gathered.sets.exempt, own.id);
        if (shared && device::lane() < args.p.warmup) add_expert<V>(gathered.sets.warmup, own.id);
    }
    if (args.is_off() || !shared) return write_row<V>(args, index, own, gathered.sets.after);
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) {
        const uint32_t fixed = static_cast<uint32_t>(fixed_point(row.affinity[i]));
        if (fixed != 0) device::atomic_add(&gathered.sums[i * device::kWarpSize + device::lane()], fixed);
    }
}

}  // namespace xshare

#endif  // XSHARE_CUDA_GATHER_CUH
