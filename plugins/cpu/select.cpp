// SPDX-License-Identifier: Apache-2.0
#include "cpu/select.h"

#include <algorithm>
#include <functional>

#include "core/ordering.h"

namespace xshare {

namespace {

// The experts worth adding, as keys in no order; returns how many.
int list_candidates(const int64_t* utility, int num_experts, const ExpertSet& taken, int64_t* keys) {
    int count = 0;
    for (int e = 0; e < num_experts; ++e) {
        keys[count] = sum_key(utility[e], e);
        count += (utility[e] > 0) & !taken.has(e);
    }
    return count;
}

// The walk without per-GPU budgets or coverage needs no order, only the `room` best.
void add_best(int64_t* keys, int count, int room, ExpertSet& active) {
    if (room <= 0) return;
    if (room < count) std::nth_element(keys, keys + room, keys + count, std::greater<int64_t>());
    for (int i = 0; i < std::min(room, count); ++i) active.add(key_expert(keys[i]));
}

struct Counted {
    int in_batch = 0;
    int on_gpu[kMaxExperts] = {};
};

struct Limits {
    int budget;
    int gpu_budget;   // negative = off
    double coverage;  // 0 = off
    int least_size;   // of S, before coverage may end the walk
};

int64_t sum_of(const int64_t* utility, int num_experts) {
    int64_t total = 0;
    for (int e = 0; e < num_experts; ++e) total += utility[e];
    return total;
}

int64_t sum_of(const int64_t* utility, int num_experts, const ExpertSet& experts) {
    int64_t total = 0;
    for (int e = 0; e < num_experts; ++e) total += experts.has(e) ? utility[e] : 0;
    return total;
}

// The smallest number of each GPU's most useful experts, beyond the exempt ones, that is enough: they keep
// the coverage and are no fewer than k.
int gpu_cap(const xshare_route_params& params, const int64_t* utility, const ExpertSet& exempt_experts,
            const int32_t* expert_gpu) {
    int64_t keys[kMaxExperts], kept_by_place[kMaxExperts] = {};
    int num_by_place[kMaxExperts] = {}, on_gpu[kMaxExperts] = {};
    const int count = list_candidates(utility, params.num_experts, exempt_experts, keys);
    std::sort(keys, keys + count, std::greater<int64_t>());
    for (int i = 0; i < count; ++i) {
        const int place = on_gpu[expert_gpu[key_expert(keys[i])]]++;
        kept_by_place[place] += key_sum(keys[i]);
        ++num_by_place[place];
    }
    const double enough = params.coverage * static_cast<double>(sum_of(utility, params.num_experts));
    int64_t kept = sum_of(utility, params.num_experts, exempt_experts);
    int size = exempt_experts.size();
    const int least_size = std::min(params.top_k, size + count);
    int cap = 0;
    while (cap < count && (static_cast<double>(kept) < enough || size < least_size)) {
        kept += kept_by_place[cap];
        size += num_by_place[cap++];
    }
    return cap;
}

void walk(const Limits& limits, const int64_t* utility, int num_experts, const int32_t* expert_gpu,
          int64_t* keys, int count, Counted& counted, ExpertSet& active) {
    const double enough = limits.coverage * static_cast<double>(sum_of(utility, num_experts));
    int64_t covered = sum_of(utility, num_experts, active);
    int size = active.size();
    std::make_heap(keys, keys + count);
    while (count > 0 && counted.in_batch < limits.budget) {
        const bool is_covered = limits.coverage > 0.0 && static_cast<double>(covered) >= enough;
        if (is_covered && size >= limits.least_size) return;
        std::pop_heap(keys, keys + count);
        const int64_t key = keys[--count];
        const int expert = key_expert(key);
        const int gpu = limits.gpu_budget >= 0 ? expert_gpu[expert] : 0;
        if (limits.gpu_budget >= 0 && counted.on_gpu[gpu] >= limits.gpu_budget) continue;
        active.add(expert);
        ++counted.in_batch;
        ++counted.on_gpu[gpu];
        ++size;
        covered += key_sum(key);
    }
}

}  // namespace

void propose(const int64_t* sums, int num_experts, int request_budget, int64_t* utility) {
    int64_t keys[kMaxExperts];
    const int count = list_candidates(sums, num_experts, ExpertSet(), keys);
    if (request_budget < count)
        std::nth_element(keys, keys + request_budget, keys + count, std::greater<int64_t>());
    for (int i = 0; i < std::min(request_budget, count); ++i)
        utility[key_expert(keys[i])] += key_sum(keys[i]);
}

Selection select_experts(const xshare_route_params& params, const int64_t* utility,
                         const ExpertSet& exempt_experts, const ExpertSet& warmup_experts,
                         const int32_t* expert_gpu) {
    Selection selection;
    Counted counted;
    int32_t warmup[kMaxExperts];
    const int num_warmup = warmup_experts.list(warmup);
    for (int i = 0; i < num_warmup; ++i) {
        if (exempt_experts.has(warmup[i])) continue;
        ++counted.in_batch;
        if (expert_gpu != nullptr) ++counted.on_gpu[expert_gpu[warmup[i]]];
    }
    selection.warmup_overflow = std::max(0, counted.in_batch - params.budget);
    for (int g = 0; params.gpu_budget > 0 && g < params.num_experts; ++g)
        selection.warmup_overflow += std::max(0, counted.on_gpu[g] - params.gpu_budget);
    selection.active = exempt_experts;
    selection.active.add(warmup_experts);

    Limits limits = {params.budget, params.gpu_budget > 0 ? params.gpu_budget : -1, params.coverage,
                     params.top_k};
    if (params.coverage > 0.0 && params.gpu_budget == 0 && expert_gpu != nullptr) {
        limits.gpu_budget = gpu_cap(params, utility, exempt_experts, expert_gpu);
        limits.coverage = 0.0;
    }
    int64_t keys[kMaxExperts];
    const int count = list_candidates(utility, params.num_experts, selection.active, keys);
    if (limits.gpu_budget >= 0 || limits.coverage > 0.0)
        walk(limits, utility, params.num_experts, expert_gpu, keys, count, counted, selection.active);
    else
        add_best(keys, count, limits.budget - counted.in_batch, selection.active);
    return selection;
}

int peak_experts_per_gpu(const ExpertSet& experts, const int32_t* expert_gpu, int num_experts) {
    if (expert_gpu == nullptr) return experts.size();
    int on_gpu[kMaxExperts] = {};
    int32_t ids[kMaxExperts];
    const int size = experts.list(ids);
    for (int i = 0; i < size; ++i) ++on_gpu[expert_gpu[ids[i]]];
    return *std::max_element(on_gpu, on_gpu + num_experts);
}

}  // namespace xshare
