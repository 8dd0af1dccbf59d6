// SPDX-License-Identifier: Apache-2.0
// Stage 5 of a row, and the outputs of the step as a whole.
#ifndef XSHARE_CUDA_REFINE_CUH
#define XSHARE_CUDA_REFINE_CUH

#include "cuda/select.cuh"

namespace xshare {

// Where masked_logits keeps what the row has: this lane's bits.
XSHARE_DEVICE uint32_t allowed_experts(bool keeps_all, bool padding, uint32_t active, uint32_t available) {
    if (keeps_all) return ~0u;
    return padding ? active : active & available;
}

// The picks that are in S.
template <int V>
XSHARE_DEVICE Picks picks_in(uint32_t active, const Picks& picks) {
    const uint32_t of_owner = device::shuffle(active, picks.id / V);
    const bool stays = picks.is_here() && (of_owner >> (picks.id % V) & 1);
    return {device::ballot(stays), picks.id, picks.key};
}

// The row's best of S: what is left of its own choice comes first, then the best of the others. Writes them,
// unless they are its own choice. False if there is none.
template <int V>
XSHARE_DEVICE bool pick_active(const RouteArgs& args, uint32_t active, int index, Row<V>& row,
                               uint32_t* after) {
    Picks picks = picks_in<V>(active, row.own);
    const int num_missing = args.p.top_k - picks.count();
    if (num_missing > 0) {
        XSHARE_UNROLL
        for (int i = 0; i < V; ++i) row.keys[i] = active >> i & 1 ? row.keys[i] : kUnavailable;
        take_best(row.keys, num_missing, kMaxTopK, picks);
        if (picks.lanes == 0) return false;
        if (!args.is_shadow()) write_row(args, index, picks, weigh(args, index, picks));
    }
    if (args.t.stats != nullptr && picks.is_here()) add_expert<V>(after, picks.id);
    return true;
}

// The experts that a shadow leaves in use, or S: this lane's bits.
XSHARE_DEVICE uint32_t experts_in_use(const RouteArgs& args, uint32_t active, const uint32_t* before) {
    return args.is_shadow() ? before[device::lane()] : active;
}

// Where XShare stands aside, and of an exempt row, the own choice has been written; so has it in a shadow, in
// which S is for the statistics alone and the experts in use are those of the rows' own choices.
template <int V>
XSHARE_DEVICE void refine_row(const RouteArgs& args, bool stands_aside, uint32_t active, uint32_t in_use,
                              int index, Row<V>& row, uint32_t* after) {
    const bool real = row.kind != RowKind::kPadding;
    const bool keeps_own = real && args.is_shadow();
    bool padding = !real;
    if (row.kind == RowKind::kShared && !stands_aside && args.needs_picks())
        padding = !pick_active(args, active, index, row, after);
    if (padding)
        write_padding_row<V>(args, index, real ? active : in_use, !keeps_own,
                             real && args.t.stats != nullptr ? after : nullptr);
    if (args.t.masked_logits == nullptr) return;
    padding = padding && !keeps_own;
    const bool empty = device::ballot(in_use != 0) == 0;
    const bool keeps_all = padding ? empty : stands_aside || keeps_own || row.kind == RowKind::kExempt;
    device::sync_warp();  // in place: the weights have read this row
    write_masked<V>(args, index, padding, allowed_experts(keeps_all, padding, in_use, row.available));
}

// Where a row's own choice has been written whatever S is, a second look at it is for its kind alone.
template <int V>
XSHARE_DEVICE void look_again(const RouteArgs& args, bool stands_aside, int index, Row<V>& row) {
    score_row(args, index, stands_aside || args.is_marked_exempt(index), row);
}

// What is one for all rows, by one block: active_experts and step_bias.
template <int V>
XSHARE_DEVICE void write_selection(const RouteArgs& args, bool stands_aside, const uint32_t* active) {
    for (int e = device::thread(); e < args.p.num_experts; e += device::num_threads()) {
        const bool is_active = has<V>(active, e);
        if (args.t.active_experts != nullptr) args.t.active_experts[e] = is_active;
        if (args.t.step_bias != nullptr)
            args.t.step_bias[e] =
                is_active || stands_aside || args.is_shadow() ? bias_of(args, e) : mask_value(args.p);
    }
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
                               bool stands_aside, uint32_t overflow, Tally& tally) {
    const uint32_t* after = stands_aside ? tally.sets.before : tally.sets.after;
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
        if (has<V>(after, e)) device::atomic_add(&tally.on_gpu[1][args.gpu_of(e)], 1u);
    }
    kept = device::add_neighbours(kept, device::kWarpSize);
    total = device::add_neighbours(total, device::kWarpSize);
    if (device::lane() == 0) {
        device::atomic_add(&tally.kept, kept);
        device::atomic_add(&tally.total, total);
    }
    device::sync_block();
    if (device::warp() != 0) return;
    const int64_t num_before = count_experts(tally.sets.before), num_after = count_experts(after);
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
