// SPDX-License-Identifier: Apache-2.0
// Stage 4 in one block. The walk down the utilities has no serial part: an expert is added if few enough
// candidates come before it, and (coverage) if they cover too little. Every thread counts those before one
// expert, or several threads share an expert. Budgets nest, so candidates that their GPU has no room for are
// struck out first.
#ifndef XSHARE_CUDA_SELECT_CUH
#define XSHARE_CUDA_SELECT_CUH

#include "cuda/gather.cuh"

namespace xshare {

constexpr int kQuad = 4;  // candidates of one load

template <typename Sum>
struct alignas(sizeof(Sum) * kQuad) Quad {
    Sum sums[kQuad];
};

// A block's view of the whole step, in shared memory.
template <typename Sum>
struct Selection {
    alignas(16) Sum candidates[kMaxExperts];  // utility; 0 = not to be added. Whole quads are defined
    uint32_t on_gpu[kMaxExperts];             // counted experts of each GPU
    uint16_t gpu[kMaxExperts];
    uint32_t warmup[device::kWarpSize], exempt[device::kWarpSize], before[device::kWarpSize];
    uint32_t active[device::kWarpSize];  // S
    uint32_t struck_out[kMaxExperts / 32];
    uint32_t num_real_rows, warmup_overflow;
    uint64_t covered, total;
};

// What is asked of the candidates that come before one: how many, their sum as well, or how many on the same
// GPU.
enum class Ask { kCount, kCountAndSum, kCountOnGpu };

struct Ahead {
    uint32_t count;
    uint64_t sum;
};

// The candidates that come before `expert`, one part of them.
template <Ask kAsk, typename Sum>
XSHARE_DEVICE Ahead count_ahead(const Selection<Sum>& s, int num_experts, int expert, int part,
                                int num_parts) {
    const Sum mine = s.candidates[expert];
    Ahead ahead = {0, 0};
    for (int q = part; q * kQuad < num_experts; q += num_parts) {
        const auto others = device::load<Quad<Sum>>(&s.candidates[q * kQuad]);
        const Sum bound = q < expert / kQuad ? mine - 1 : mine;  // among equals the lower id is first
        XSHARE_UNROLL
        for (int i = 0; i < kQuad; ++i) {
            bool first = others.sums[i] > bound;
            if (kAsk == Ask::kCountOnGpu) first = first && s.gpu[q * kQuad + i] == s.gpu[expert];
            ahead.count += first;
            if (kAsk == Ask::kCountAndSum) ahead.sum += first ? others.sums[i] : 0;
        }
    }
    for (int other = expert / kQuad * kQuad; part == 0 && other < expert; ++other) {
        const bool first =
            s.candidates[other] == mine && (kAsk != Ask::kCountOnGpu || s.gpu[other] == s.gpu[expert]);
        ahead.count += first;
        if (kAsk == Ask::kCountAndSum) ahead.sum += first ? mine : 0;
    }
    return ahead;
}

// Calls visit(expert, what comes before it) for every candidate, each from one thread.
template <Ask kAsk, typename Sum, typename Visit>
XSHARE_DEVICE void rank_candidates(const RouteArgs& args, const Selection<Sum>& s, Visit visit) {
    const int num_experts = args.p.num_experts;
    int num_parts = 1;
    while (num_parts < device::kWarpSize && 2 * num_parts * num_experts <= device::num_threads())
        num_parts *= 2;
    const int part = device::thread() % num_parts;
    const int at_once = device::num_threads() / num_parts;
    for (int first = 0; first < num_experts; first += at_once) {
        const int expert = first + device::thread() / num_parts;
        const bool candidate = expert < num_experts && s.candidates[expert] > 0;
        Ahead ahead = {0, 0};
        if (candidate) ahead = count_ahead<kAsk>(s, num_experts, expert, part, num_parts);
        ahead.count = device::add_neighbours(ahead.count, num_parts);
        if (kAsk == Ask::kCountAndSum) ahead.sum = device::add_neighbours(ahead.sum, num_parts);
        if (candidate && part == 0) visit(expert, ahead);
    }
}

// Everything that `source` (the team's blocks, or global memory) holds of the step, into this block.
template <int V, typename Sum, typename Source>
XSHARE_DEVICE void merge_step(const RouteArgs& args, const Source& source, Selection<Sum>& s) {
    const int thread = device::thread();
    if (thread < device::kWarpSize) {
        s.warmup[thread] = source.warmup(thread);
        s.exempt[thread] = source.exempt(thread);
        s.before[thread] = args.needs_own_choice() ? source.before(thread) : 0;
    }
    if (thread < kMaxExperts / 32) s.struck_out[thread] = 0;
    if (thread == 0) {
        s.num_real_rows = source.num_real_rows();
        s.covered = s.total = 0;
        s.warmup_overflow = 0;
    }
    for (int e = thread; e < (args.p.num_experts + kQuad - 1) / kQuad * kQuad; e += device::num_threads()) {
        s.candidates[e] = e < args.p.num_experts && !args.is_off() ? source.utility(e) : 0;
        s.on_gpu[e] = 0;
        s.gpu[e] =
            static_cast<uint16_t>(e < args.p.num_experts && args.p.gpu_budget > 0 ? args.gpu_of(e) : 0);
    }
}

// What the warm-up and the exempt rows take already is no candidate.
template <int V, typename Sum>
XSHARE_DEVICE void take_what_is_taken(const RouteArgs& args, Selection<Sum>& s) {
    uint64_t covered = 0, total = 0;
    for (int e = device::thread(); e < args.p.num_experts; e += device::num_threads()) {
        const bool exempt = has<V>(s.exempt, e), warmup = has<V>(s.warmup, e);
        total += s.candidates[e];
        covered += exempt || warmup ? s.candidates[e] : 0;
        if (exempt || warmup) s.candidates[e] = 0;
        if (warmup && !exempt && args.p.gpu_budget > 0) device::atomic_add(&s.on_gpu[s.gpu[e]], 1u);
    }
    if (device::thread() < device::kWarpSize)
        s.active[device::thread()] = s.warmup[device::thread()] | s.exempt[device::thread()];
    if (args.p.min_coverage == 0.0) return;
    covered = device::add_neighbours(covered, device::kWarpSize);
    total = device::add_neighbours(total, device::kWarpSize);
    if (device::lane() != 0) return;
    device::atomic_add(&s.covered, covered);
    device::atomic_add(&s.total, total);
}

template <typename Sum>
XSHARE_DEVICE void strike_out_full_gpus(const RouteArgs& args, Selection<Sum>& s) {
    rank_candidates<Ask::kCountOnGpu>(args, s, [&](int expert, const Ahead& ahead) {
        if (s.on_gpu[s.gpu[expert]] + ahead.count >= static_cast<uint32_t>(args.p.gpu_budget))
            device::atomic_or(&s.struck_out[expert / 32], 1u << (expert % 32));
    });
    device::sync_block();
    for (int e = device::thread(); e < args.p.num_experts; e += device::num_threads())
        if (s.struck_out[e / 32] >> (e % 32) & 1) s.candidates[e] = 0;
    device::sync_block();
}

template <typename Sum>
XSHARE_DEVICE void count_overflow(const RouteArgs& args, int counted, Selection<Sum>& s) {
    if (args.t.stats == nullptr || device::warp() != 0) return;
    uint32_t beyond = 0;
    for (int g = device::lane(); args.p.gpu_budget > 0 && g < args.p.num_experts; g += device::kWarpSize)
        beyond += static_cast<uint32_t>(max_of(0, static_cast<int32_t>(s.on_gpu[g]) - args.p.gpu_budget));
    beyond = device::warp_add(beyond);
    if (device::lane() == 0)
        s.warmup_overflow = beyond + static_cast<uint32_t>(max_of(0, counted - args.p.budget));
}

XSHARE_DEVICE double as_double(uint64_t sum) { return static_cast<double>(static_cast<int64_t>(sum)); }

template <int V, typename Sum>
XSHARE_DEVICE void add_until_covered(const RouteArgs& args, int room, Selection<Sum>& s) {
    const double enough = args.p.min_coverage * as_double(s.total);
    const uint64_t covered = s.covered;
    rank_candidates<Ask::kCountAndSum>(args, s, [&](int expert, const Ahead& ahead) {
        if (static_cast<int>(ahead.count) < room && as_double(covered + ahead.sum) < enough)
            add_expert<V>(s.active, expert);
    });
}

// S from what merge_step left, after a barrier. Ends with a barrier.
template <int V, typename Sum>
XSHARE_DEVICE void select_experts(const RouteArgs& args, Selection<Sum>& s) {
    if (args.stands_aside(s.num_real_rows)) {
        if (device::thread() < device::kWarpSize) s.active[device::thread()] = s.before[device::thread()];
        return device::sync_block();
    }
    take_what_is_taken<V>(args, s);
    const uint32_t counts_here = s.warmup[device::lane()] & ~s.exempt[device::lane()];
    const int counted =
        static_cast<int>(device::warp_add(static_cast<uint32_t>(device::num_bits(counts_here))));
    device::sync_block();
    count_overflow(args, counted, s);
    if (args.p.gpu_budget > 0) strike_out_full_gpus(args, s);
    const int room = args.p.budget - counted;
    if (args.p.min_coverage > 0.0)
        add_until_covered<V>(args, room, s);
    else
        rank_candidates<Ask::kCount>(args, s, [&](int expert, const Ahead& ahead) {
            if (static_cast<int>(ahead.count) < room) add_expert<V>(s.active, expert);
        });
    device::sync_block();
}

}  // namespace xshare

#endif  // XSHARE_CUDA_SELECT_CUH
