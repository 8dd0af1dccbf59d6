// SPDX-License-Identifier: Apache-2.0
// Stage 4 in one block. Budgets nest, so candidates that their GPU has no room for are struck out first, a
// warp per GPU; then one warp fills the batch's budget.
#ifndef XSHARE_CUDA_SELECT_CUH
#define XSHARE_CUDA_SELECT_CUH

#include "cuda/gather.cuh"
#include "cuda/largest.cuh"

namespace xshare {

// A block's view of the whole step, in shared memory. Sums lie as in row.cuh.
template <int V, typename Sum>
struct Selection {
    Sum utilities[V * device::kWarpSize];
    uint16_t gpu[V * device::kWarpSize];
    Sets sets;
    uint32_t fitting[device::kWarpSize];  // candidates that their GPU has room for
    uint32_t active[device::kWarpSize];   // S
    uint32_t num_real_rows, warmup_overflow;
};

// Everything that `source` (the team's blocks, or global memory) holds of the step, into this block.
template <int V, typename Sum, typename Source>
XSHARE_DEVICE void merge_step(const RouteArgs& args, const Source& source, Selection<V, Sum>& s) {
    const int thread = device::thread();
    for (int i = thread; i < kWordsBeforeRefining; i += device::num_threads())
        words_of(s.sets)[i] = source.set_word(i);
    if (thread < device::kWarpSize) s.fitting[thread] = 0;
    if (thread == device::num_threads() - 1) {
        s.num_real_rows = source.num_real_rows();
        s.warmup_overflow = 0;
    }
    if (args.is_off()) return;
    for (int place = thread; place < V * device::kWarpSize; place += device::num_threads()) {
        const int expert = expert_at<V>(place);
        s.utilities[place] = source.utility_at(place);
        s.gpu[place] = static_cast<uint16_t>(
            expert < args.p.num_experts && args.p.gpu_budget > 0 ? args.gpu_of(expert) : 0);
    }
}

XSHARE_DEVICE uint32_t less_or_none(int budget, uint32_t taken) {
    return static_cast<uint32_t>(budget) > taken ? static_cast<uint32_t>(budget) - taken : 0;
}

// Who counts against a budget, and who is no candidate any more: this lane's bits.
template <int V, typename Sum>
XSHARE_DEVICE uint32_t counted_experts(const Selection<V, Sum>& s) {
    return s.sets.warmup[device::lane()] & ~s.sets.exempt[device::lane()];
}
template <int V, typename Sum>
XSHARE_DEVICE uint32_t taken_experts(const Selection<V, Sum>& s) {
    return s.sets.warmup[device::lane()] | s.sets.exempt[device::lane()];
}

// How many of a GPU's or the batch's experts the warm-up has taken; notes those beyond the budget.
template <int V, typename Sum>
XSHARE_DEVICE uint32_t count_warmup(uint32_t here, int budget, Selection<V, Sum>& s) {
    const uint32_t counted = device::warp_add(static_cast<uint32_t>(device::num_bits(here)));
    if (device::lane() == 0 && counted > static_cast<uint32_t>(budget))
        device::atomic_add(&s.warmup_overflow, counted - static_cast<uint32_t>(budget));
    return counted;
}

template <int V, typename Sum>
XSHARE_DEVICE void find_fitting(const RouteArgs& args, Selection<V, Sum>& s) {
    const uint32_t counted = counted_experts(s), taken = taken_experts(s);
    int32_t gpu[V], last = 0;
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) {
        gpu[i] = s.gpu[i * device::kWarpSize + device::lane()];
        last = max_of(last, gpu[i]);
    }
    last = device::warp_max(last);
    for (int g = device::warp(); g <= last; g += device::num_warps()) {
        Sum sums[V];
        uint32_t of_gpu = 0;
        XSHARE_UNROLL
        for (int i = 0; i < V; ++i) {
            of_gpu |= static_cast<uint32_t>(gpu[i] == g) << i;
            sums[i] =
                (of_gpu & ~taken) >> i & 1 ? s.utilities[i * device::kWarpSize + device::lane()] : Sum{0};
        }
        const uint32_t num_counted = count_warmup(counted & of_gpu, args.p.gpu_budget, s);
        const uint32_t fitting = take_largest(sums, Room{less_or_none(args.p.gpu_budget, num_counted)});
        if (fitting != 0) device::atomic_or(&s.fitting[device::lane()], fitting);
    }
}

// S, by one warp.
template <int V, typename Sum>
XSHARE_DEVICE void fill_budget(const RouteArgs& args, Selection<V, Sum>& s) {
    const uint32_t taken = taken_experts(s);
    const uint32_t candidates = ~taken & (args.p.gpu_budget > 0 ? s.fitting[device::lane()] : ~0u);
    Sum sums[V];
    uint64_t covered = 0, total = 0;
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) {
        const Sum utility = s.utilities[i * device::kWarpSize + device::lane()];
        sums[i] = candidates >> i & 1 ? utility : Sum{0};
        covered += taken >> i & 1 ? utility : Sum{0};
        total += utility;
    }
    const uint32_t room = less_or_none(args.p.budget, count_warmup(counted_experts(s), args.p.budget, s));
    uint32_t added = 0;
    if (args.p.coverage > 0.0) {
        const double enough = args.p.coverage * as_double(device::warp_add_wide(total));
        added = take_largest(sums, RoomAndCoverage{room, device::warp_add_wide(covered), enough});
    } else {
        added = take_largest(sums, Room{room});
    }
    s.active[device::lane()] = taken | added;
}

// S from what merge_step left, after a barrier. Ends with a barrier.
template <int V, typename Sum>
XSHARE_DEVICE void select_experts(const RouteArgs& args, Selection<V, Sum>& s) {
    const bool stands_aside = args.stands_aside(s.num_real_rows);
    if (!stands_aside && args.p.gpu_budget > 0) {
        find_fitting(args, s);
        device::sync_block();
    }
    if (device::warp() == 0) {
        if (stands_aside)
            s.active[device::lane()] = s.sets.before[device::lane()];
        else
            fill_budget(args, s);
    }
    device::sync_block();
}

}  // namespace xshare

#endif  // XSHARE_CUDA_SELECT_CUH
