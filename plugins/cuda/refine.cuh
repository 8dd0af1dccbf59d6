// SPDX-License-Identifier: Apache-2.0
// Stage 5 of a row, and the outputs of the step as a whole.
#ifndef XSHARE_CUDA_REFINE_CUH
#define XSHARE_CUDA_REFINE_CUH

#include "cuda/select.cuh"

namespace xshare {

// The experts where masked_logits keeps what the row has: this lane's bits.
template <int V>
XSHARE_DEVICE uint32_t allowed_experts(bool keeps_all, bool padding, uint32_t active, const Row<V>& row) {
    if (keeps_all) return ~0u;
    if (padding) return active;
    uint32_t available = 0;
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) available |= static_cast<uint32_t>(row.keys[i] != kUnavailable) << i;
    return active & available;
}

// S holds everything that any row activates where XShare stands aside: the best of S are then the row's own
// choice.
template <int V>
XSHARE_DEVICE void refine_row(const RouteArgs& args, bool stands_aside, uint32_t active, int index,
                              Row<V>& row, uint32_t* after) {
    const bool empty = device::ballot(active != 0) == 0;
    const bool real = row.kind != RowKind::kPadding;
    if (real && empty && args.t.stats != nullptr && device::lane() == 0) add_expert<V>(after, 0);
    const bool padding = !real || empty;
    if (padding) {
        write_padding_row<V>(args, index, active);
    } else if (!args.is_off() && row.kind == RowKind::kShared) {
        XSHARE_UNROLL
        for (int i = 0; i < V; ++i) row.keys[i] = active >> i & 1 ? row.keys[i] : kUnavailable;
        write_row<V>(args, index, best_of(row.keys, args.p.top_k), after);
    }
    if (args.t.masked_logits == nullptr) return;
    const bool keeps_all = padding ? empty : stands_aside || row.kind == RowKind::kExempt;
    device::sync_warp();  // in place: the weights have read this row
    write_masked<V>(args, index, padding, allowed_experts(keeps_all, padding, active, row));
}

// Where a row's own choice has been written, a second look at it is for its kind alone.
template <int V>
XSHARE_DEVICE void look_again(const RouteArgs& args, int index, Row<V>& row) {
    float logits[V];
    if (!args.is_off() && !args.is_marked_exempt(index)) return score_row(args, index, row);
    row.kind = load_row(args, index, logits);
}

template <int V>
XSHARE_DEVICE void write_active_experts(const RouteArgs& args, const uint32_t* active) {
    if (args.t.active_experts == nullptr) return;
    for (int e = device::thread(); e < args.p.num_experts; e += device::num_threads())
        args.t.active_experts[e] = has<V>(active, e);
}

// Room for the statistics, in shared memory.
struct Tally {
    Sets sets;  // before and after
    uint32_t active[device::kWarpSize];
    uint32_t on_gpu[2][kMaxExperts];
    uint64_t kept, total;
};

XSHARE_DEVICE uint32_t count_experts(const uint32_t* set) {
    return device::warp_add(static_cast<uint32_t>(device::num_bits(set[device::lane()])));
}

XSHARE_DEVICE int32_t peak(const RouteArgs& args, const uint32_t* on_gpu) {
    int32_t most = 0;
    for (int g = device::lane(); g < args.p.num_experts; g += device::kWarpSize)
        most = max_of(most, static_cast<int32_t>(on_gpu[g]));
    return device::warp_max(most);
}

// One block; `source` gives g and the sets, `tally` has before, after and active.
template <int V, typename Source>
XSHARE_DEVICE void write_stats(const RouteArgs& args, const Source& source, uint32_t num_real,
                               uint32_t overflow, Tally& tally) {
    const bool stands_aside = args.stands_aside(num_real);
    for (int e = device::thread(); e < args.p.num_experts; e += device::num_threads())
        tally.on_gpu[0][e] = tally.on_gpu[1][e] = 0;
    if (device::thread() == 0) tally.kept = tally.total = 0;
    device::sync_block();
    uint64_t kept = 0, total = 0;
    for (int e = device::thread(); e < args.p.num_experts; e += device::num_threads()) {
        const uint64_t sum = stands_aside ? 0 : source.sum(e);
        total += sum;
        kept += has<V>(tally.active, e) ? sum : 0;
        if (has<V>(tally.sets.before, e)) device::atomic_add(&tally.on_gpu[0][args.gpu_of(e)], 1u);
        if (has<V>(tally.sets.after, e)) device::atomic_add(&tally.on_gpu[1][args.gpu_of(e)], 1u);
    }
    kept = device::add_neighbours(kept, device::kWarpSize);
    total = device::add_neighbours(total, device::kWarpSize);
    if (device::lane() == 0) {
        device::atomic_add(&tally.kept, kept);
        device::atomic_add(&tally.total, total);
    }
    device::sync_block();
    if (device::warp() != 0) return;
    const int64_t num_before = count_experts(tally.sets.before), num_after = count_experts(tally.sets.after);
    const int32_t peak_before = peak(args, tally.on_gpu[0]), peak_after = peak(args, tally.on_gpu[1]);
    if (device::lane() != 0) return;
    int64_t* stats = args.t.stats;
    stats[XSHARE_STAT_EXPERTS_BEFORE] = num_before;
    stats[XSHARE_STAT_EXPERTS_AFTER] = num_after;
    stats[XSHARE_STAT_KEPT_UTILITY] = static_cast<int64_t>(tally.kept);
    stats[XSHARE_STAT_TOTAL_UTILITY] = static_cast<int64_t>(tally.total);
    stats[XSHARE_STAT_WARMUP_OVERFLOW] = overflow;
    stats[XSHARE_STAT_PEAK_GPU_BEFORE] = peak_before;
    stats[XSHARE_STAT_PEAK_GPU_AFTER] = peak_after;
    stats[XSHARE_STAT_ROWS] = num_real | static_cast<int64_t>(stands_aside) << 32;
}

}  // namespace xshare

#endif  // XSHARE_CUDA_REFINE_CUH
