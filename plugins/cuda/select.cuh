// SPDX-License-Identifier: Apache-2.0
// Stage 4 in one block. Budgets nest, so candidates that their GPU has no room for are struck out first, a
// warp per GPU; then one warp fills the batch's budget. Where coverage sets the budget of a GPU, each
// candidate is ranked among those of its GPU first.
#ifndef XSHARE_CUDA_SELECT_CUH
#define XSHARE_CUDA_SELECT_CUH

#include "cuda/gather.cuh"
#include "cuda/largest.cuh"

namespace xshare {

// Keys of candidates are ordered by GPU first. Their sums are at most 2^40 (core/limits.h).
constexpr int kGpuShift = 50, kCountBits = 10;

// A block's view of the whole step, in shared memory. Sums lie as in row.cuh.
template <int V, typename Sum>
struct Selection {
    Sum utilities[V * device::kWarpSize];
    uint16_t gpu[V * device::kWarpSize];
    Sets sets;
    uint32_t fitting[device::kWarpSize];         // candidates that their GPU has room for
    uint32_t active[device::kWarpSize];          // S
    uint64_t candidates[V * device::kWarpSize];  // if GPUs are capped: their keys, in no order
    uint64_t by_rank[V * device::kWarpSize];     // of all GPUs' n-th best: sum << 10 | count
    uint32_t num_candidates;
    uint32_t num_real_rows, warmup_overflow;
    bool stands_aside;
};

// A warp at least asks together.
XSHARE_DEVICE bool step_stands_aside(const RouteArgs& args, uint32_t num_real_rows, const Sets& sets) {
    const bool bias_for_all = args.t.step_bias != nullptr && device::ballot(sets.exempt[device::lane()] != 0);
    return bias_for_all || args.stands_aside(num_real_rows);
}

// Everything that `source` (the team's blocks, or global memory) holds of the step, into this block.
template <int V, typename Sum, typename Source>
XSHARE_DEVICE void merge_step(const RouteArgs& args, const Source& source, Selection<V, Sum>& s) {
    const int thread = device::thread();
    for (int i = thread; i < kWordsBeforeRefining; i += device::num_threads())
        words_of(s.sets)[i] = source.set_word(i);
    if (thread < device::kWarpSize) s.fitting[thread] = 0;
    if (thread == device::num_threads() - 1) {
        s.num_real_rows = source.num_real_rows();
        s.warmup_overflow = s.num_candidates = 0;
    }
    if (args.is_off()) return;
    for (int place = thread; place < V * device::kWarpSize; place += device::num_threads()) {
        const int expert = expert_at<V>(place);
        s.utilities[place] = source.utility_at(place);
        s.gpu[place] = static_cast<uint16_t>(
            expert < args.p.num_experts && args.limits_gpus() ? args.gpu_of(expert) : 0);
        s.by_rank[place] = 0;
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

// How many of a GPU's or the batch's experts the warm-up has taken; notes those beyond a budget that was set.
template <int V, typename Sum>
XSHARE_DEVICE uint32_t count_warmup(uint32_t here, bool is_set, int budget, Selection<V, Sum>& s) {
    const uint32_t counted = device::warp_add(static_cast<uint32_t>(device::num_bits(here)));
    if (is_set && device::lane() == 0 && counted > static_cast<uint32_t>(budget))
        device::atomic_add(&s.warmup_overflow, counted - static_cast<uint32_t>(budget));
    return counted;
}

// The utilities of a set and of all experts, in every lane, and the set's size.
struct Coverage {
    uint64_t covered, total;
    uint32_t size;
};

template <int V, typename Sum>
XSHARE_DEVICE Coverage coverage_of(const Selection<V, Sum>& s, uint32_t set) {
    uint64_t covered = 0, total = 0;
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) {
        const Sum utility = s.utilities[i * device::kWarpSize + device::lane()];
        covered += set >> i & 1 ? utility : Sum{0};
        total += utility;
    }
    return {device::warp_add_wide(covered), device::warp_add_wide(total),
            device::warp_add(static_cast<uint32_t>(device::num_bits(set)))};
}

// To be followed by a barrier.
template <int V, typename Sum>
XSHARE_DEVICE void list_candidates(Selection<V, Sum>& s) {
    for (int place = device::thread(); place < V * device::kWarpSize; place += device::num_threads()) {
        const int expert = expert_at<V>(place);
        if (s.utilities[place] == 0 || has<V>(s.sets.exempt, expert)) continue;
        const int64_t key = sum_key(static_cast<int64_t>(s.utilities[place]), expert);
        s.candidates[device::atomic_add(&s.num_candidates, 1u)] =
            uint64_t{s.gpu[place]} << kGpuShift | static_cast<uint64_t>(key);
    }
}

// To be followed by a barrier.
template <int V, typename Sum>
XSHARE_DEVICE void rank_candidates(Selection<V, Sum>& s) {
    const int count = static_cast<int>(s.num_candidates);
    for (int i = device::thread(); i < count; i += device::num_threads()) {
        const uint64_t key = s.candidates[i];
        const uint64_t end_of_gpu = ((key >> kGpuShift) + 1) << kGpuShift;
        int rank = 0;
        for (int j = 0; j < count; ++j) rank += s.candidates[j] > key && s.candidates[j] < end_of_gpu;
        const uint64_t sum = (key & ((uint64_t{1} << kGpuShift) - 1)) / kMaxExperts;
        device::atomic_add(&s.by_rank[rank], sum << kCountBits | 1);
    }
}

// The least number of each GPU's best candidates, exempt experts aside, that keeps the coverage and leaves a
// row k experts: what all GPUs may take, since they wait for the fullest.
template <int V, typename Sum>
XSHARE_DEVICE int find_gpu_cap(const RouteArgs& args, Selection<V, Sum>& s) {
    list_candidates(s);
    device::sync_block();
    rank_candidates(s);
    device::sync_block();
    const Coverage exempt = coverage_of(s, s.sets.exempt[device::lane()]);
    const uint64_t enough = share_of(args.coverage(), exempt.total);
    const int least_size =
        min_of(args.p.top_k, static_cast<int32_t>(exempt.size + s.num_candidates));  // of what there is
    uint64_t covered = exempt.covered;
    uint32_t size = exempt.size, cap = 0;
    while (covered < enough || size < static_cast<uint32_t>(least_size)) {
        const uint64_t next = s.by_rank[cap++];
        covered += next >> kCountBits;
        size += static_cast<uint32_t>(next) & ((1u << kCountBits) - 1);
    }
    return static_cast<int>(cap);
}

template <int V, typename Sum>
XSHARE_DEVICE void find_fitting(const RouteArgs& args, int gpu_budget, Selection<V, Sum>& s) {
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
        const uint32_t num_counted =
            count_warmup(counted & of_gpu, args.p.gpu_budget > 0, args.p.gpu_budget, s);
        const uint32_t fitting = take_largest(sums, Room{less_or_none(gpu_budget, num_counted)});
        if (fitting != 0) device::atomic_or(&s.fitting[device::lane()], fitting);
    }
}

// S, by one warp.
template <int V, typename Sum>
XSHARE_DEVICE void fill_budget(const RouteArgs& args, Selection<V, Sum>& s) {
    const uint32_t taken = taken_experts(s);
    const uint32_t candidates = ~taken & (args.limits_gpus() ? s.fitting[device::lane()] : ~0u);
    Sum sums[V];
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i)
        sums[i] = candidates >> i & 1 ? s.utilities[i * device::kWarpSize + device::lane()] : Sum{0};
    const uint32_t num_counted = count_warmup(counted_experts(s), true, args.budget(), s);
    const uint32_t room = less_or_none(args.budget(), num_counted);
    uint32_t added = 0;
    if (args.coverage() > 0.0 && !args.caps_gpus()) {
        const Coverage known = coverage_of(s, taken);
        const uint64_t enough = share_of(args.coverage(), known.total);
        added = take_largest(sums, RoomAndCoverage{room, less_or_none(args.p.top_k, known.size),
                                                   enough > known.covered ? enough - known.covered : 0});
    } else {
        added = take_largest(sums, Room{room});
    }
    s.active[device::lane()] = taken | added;
}

// S from what merge_step left, after a barrier. Ends with a barrier.
template <int V, typename Sum>
XSHARE_DEVICE void select_experts(const RouteArgs& args, Selection<V, Sum>& s) {
    const bool stands_aside = step_stands_aside(args, s.num_real_rows, s.sets);
    if (!stands_aside && args.limits_gpus()) {
        find_fitting(args, args.caps_gpus() ? find_gpu_cap(args, s) : args.p.gpu_budget, s);
        device::sync_block();
    }
    if (device::warp() == 0) {
        if (device::lane() == 0) s.stands_aside = stands_aside;
        if (stands_aside)
            s.active[device::lane()] = s.sets.before[device::lane()];
        else
            fill_budget(args, s);
    }
    device::sync_block();
}

}  // namespace xshare

#endif  // XSHARE_CUDA_SELECT_CUH
