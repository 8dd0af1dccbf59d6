// SPDX-License-Identifier: Apache-2.0
// The group limit of DeepSeek-style routers: a row keeps the experts of its best groups.
#ifndef XSHARE_CUDA_GROUPS_CUH
#define XSHARE_CUDA_GROUPS_CUH

#include "cuda/row.cuh"

namespace xshare {

// The best and the second best of some keys.
struct BestTwo {
    int32_t first = kUnavailable, second = kUnavailable;
};

XSHARE_DEVICE void merge(BestTwo& best, const BestTwo& other) {
    best.second = max_of(min_of(best.first, other.first), max_of(best.second, other.second));
    best.first = max_of(best.first, other.first);
}

// kUnavailable where bans have left the group too few experts.
XSHARE_DEVICE int32_t group_key(const RouteArgs& args, const BestTwo& best) {
    if (rule_of(args.p.scoring).group_best_of == 1) return best.first;
    if (best.second == kUnavailable) return kUnavailable;
    return score_key(add_rn(key_score(best.first), key_score(best.second)));
}

// Groups that are whole lanes, a power of two of them: DeepSeek-V3's 8 groups of 32 are 4 lanes each.
template <int V>
XSHARE_DEVICE void limit_groups_of_lanes(const RouteArgs& args, int lanes_per_group, int32_t (&keys)[V]) {
    BestTwo best;
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) merge(best, {keys[i], kUnavailable});
    for (int step = 1; step < lanes_per_group; step *= 2) {
        const int other = device::lane() ^ step;
        merge(best, {device::shuffle(best.first, other), device::shuffle(best.second, other)});
    }
    const int32_t mine = group_key(args, best);
    const int group = device::lane() / lanes_per_group;
    int better_groups = mine == kUnavailable ? args.p.num_groups : 0;
    for (int g = 0; g < args.p.num_groups; ++g) {
        const int32_t key = device::shuffle(mine, g * lanes_per_group);
        better_groups += key > mine || (key == mine && g < group);
    }
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) keys[i] = better_groups < args.p.top_k_groups ? keys[i] : kUnavailable;
}

// The best two keys of the experts from `first` to before `last`, over the warp.
template <int V>
XSHARE_DEVICE BestTwo best_two_between(const int32_t (&keys)[V], int first, int last) {
    BestTwo local, best;
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) {
        const int expert = device::lane() * V + i;
        if (expert >= first && expert < last) merge(local, {keys[i], kUnavailable});
    }
    best.first = device::warp_max(local.first);
    const int owner = device::first_bit(device::ballot(local.first == best.first));
    best.second = device::warp_max(device::lane() == owner ? local.second : local.first);
    return best;
}

// Groups of any size: their keys are laid out over the warp like the experts of a row, and the best are
// taken.
template <int V>
XSHARE_DEVICE void limit_groups_of_any_size(const RouteArgs& args, int group_size, int32_t (&keys)[V]) {
    const int lane = device::lane();
    int32_t group_keys[V];
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) group_keys[i] = kUnavailable;
    for (int g = 0; g < args.p.num_groups; ++g) {
        const int32_t key = group_key(args, best_two_between(keys, g * group_size, (g + 1) * group_size));
        XSHARE_UNROLL
        for (int i = 0; i < V; ++i) group_keys[i] = lane * V + i == g ? key : group_keys[i];
    }
    uint32_t taken = available_experts(group_keys);
    for (int n = 0; n < args.p.top_k_groups; ++n)
        if (strike_out_best(group_keys).key == kUnavailable) break;
    taken &= ~available_experts(group_keys);
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) {
        const int group =
            (lane * V + i) / group_size;  // beyond the last group for lanes beyond the last expert
        const uint32_t of_owner = device::shuffle(taken, (group / V) % device::kWarpSize);
        keys[i] = of_owner >> (group % V) & 1 ? keys[i] : kUnavailable;
    }
}

template <int V>
XSHARE_DEVICE void limit_groups(const RouteArgs& args, int32_t (&keys)[V]) {
    const int group_size = args.p.num_experts / args.p.num_groups;
    const int lanes = group_size / V;
    if (group_size % V == 0 && (lanes & (lanes - 1)) == 0)
        limit_groups_of_lanes(args, lanes, keys);
    else
        limit_groups_of_any_size(args, group_size, keys);
}

}  // namespace xshare

#endif  // XSHARE_CUDA_GROUPS_CUH
