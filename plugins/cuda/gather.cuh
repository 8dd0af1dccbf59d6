// SPDX-License-Identifier: Apache-2.0
// What the rows of a step add up to: column sums and sets of experts. Sums of fixed-point integers and unions
// of bits do not depend on the order of rows, warps or blocks.
#ifndef XSHARE_CUDA_GATHER_CUH
#define XSHARE_CUDA_GATHER_CUH

#include "cuda/score.cuh"
#include "cuda/workspace.h"
#include "cuda/write.cuh"

namespace xshare {

// A block's rows, in shared memory. A utility is at most 2^20, so 32 bits hold the sum over 4095 rows.
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

// A row's `num` best of all experts, and what they are worth to it.
template <int V>
XSHARE_DEVICE void choose_own(const RouteArgs& args, int index, int num, Row<V>& row) {
    row.own = take_best(row.keys, num);
    row.weight = num == 0 ? 0.0f : weigh(args, index, row.own);
    row.utility = static_cast<uint32_t>(fixed_point(mul_rn(row.weight, row.weight)));
}

// Calls add(place, utility) for what a row adds to the column sums, as far as it is not 0. Places as in
// row.cuh.
template <int V, typename Add>
XSHARE_DEVICE void for_each_utility(const RouteArgs& args, const Row<V>& row, Add add) {
    if (args.p.utility == XSHARE_SQUARED_WEIGHT) {
        if (row.own.is_here() && row.utility != 0) add(place_of<V>(row.own.id), row.utility);
        return;
    }
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) {
        const uint32_t utility = static_cast<uint32_t>(fixed_point(row.affinity[i]));
        if (utility != 0) add(i * device::kWarpSize + device::lane(), utility);
    }
}

// Stages 1 and 2 of one row: its own choice, its warm-up and its part of the sums.
template <int V>
XSHARE_DEVICE void gather_row(const RouteArgs& args, int index, Row<V>& row, Gathered<V>& gathered) {
    score_row(args, index, false, row);
    if (row.kind == RowKind::kPadding) return;
    if (device::lane() == 0) device::atomic_add(&gathered.num_real_rows, 1u);
    const bool shared = row.kind == RowKind::kShared;
    row.is_whole = !shared || args.needs_own_choice();
    choose_own(args, index, row.is_whole ? args.p.top_k : args.p.warmup, row);
    if (row.own.is_here()) {
        if (row.is_whole) add_expert<V>(gathered.sets.before, row.own.id);
        if (!shared) add_expert<V>(gathered.sets.exempt, row.own.id);
        if (!shared && args.t.stats != nullptr) add_expert<V>(gathered.sets.after, row.own.id);
        if (shared && device::lane() < args.p.warmup) add_expert<V>(gathered.sets.warmup, row.own.id);
    }
    if (args.is_off() || !shared) return;
    for_each_utility(
        args, row, [&](int place, uint32_t utility) { device::atomic_add(&gathered.sums[place], utility); });
}

// A gathered row's own choice, if it is known as a whole: it is the outcome unless S lacks one of it.
template <int V>
XSHARE_DEVICE void write_own(const RouteArgs& args, int index, const Row<V>& row) {
    if (row.is_whole) write_row(args, index, row.own, row.weight);
}

}  // namespace xshare

#endif  // XSHARE_CUDA_GATHER_CUH
