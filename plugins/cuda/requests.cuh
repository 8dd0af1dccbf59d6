// SPDX-License-Identifier: Apache-2.0
// Stage 3: what one request proposes, from its column sums in one warp.
#ifndef XSHARE_CUDA_REQUESTS_CUH
#define XSHARE_CUDA_REQUESTS_CUH

#include "cuda/gather.cuh"

namespace xshare {

template <int V, typename Sum>
XSHARE_DEVICE uint32_t count_from(const Sum (&sums)[V], Sum bound) {
    uint32_t count = 0;
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) count += sums[i] >= bound;
    return device::warp_add(count);
}

// The `n` largest sums that are not 0, the lower id among equals: this lane's bits of the set. `bits` is how
// many bits the sums have: the n-th largest is found one bit at a time, at a cost that does not grow with n.
template <int V, typename Sum>
XSHARE_DEVICE uint32_t largest_sums(const Sum (&sums)[V], uint32_t n, int bits) {
    Sum bound = 0;
    for (int b = bits - 1; b >= 0; --b) {
        const Sum higher = bound | static_cast<Sum>(1) << b;
        if (count_from(sums, higher) >= n) bound = higher;
    }
    uint32_t larger = 0, equal = 0;
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) {
        larger |= static_cast<uint32_t>(sums[i] > bound) << i;
        equal |= static_cast<uint32_t>(sums[i] == bound && bound != 0) << i;
    }
    uint32_t before = 0;  // equal ones of lower lanes
    const uint32_t equal_here = static_cast<uint32_t>(device::num_bits(equal));
    for (int l = 0; l < device::kWarpSize; ++l) {
        const uint32_t there = device::shuffle(equal_here, l);
        before += l < device::lane() ? there : 0;
    }
    uint32_t room = n - device::warp_add(static_cast<uint32_t>(device::num_bits(larger)));
    room = room > before ? room - before : 0;
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) {
        if (!(equal >> i & 1)) continue;
        if (room > 0) larger |= 1u << i;
        room -= room > 0;
    }
    return larger;
}

// The rows of a step of at most kStepRows, by request: the leader of a row is the first row of its request.
constexpr int kSumBits = 29;  // of a column sum of kStepRows rows

struct Leaders {
    int32_t ids[kStepRows];
    int32_t of[kStepRows];  // -1 = padding
};

XSHARE_DEVICE void find_leaders(const RouteArgs& args, Leaders& leaders) {
    for (int row = device::thread(); row < args.p.num_tokens; row += device::num_threads())
        leaders.ids[row] = args.t.request_ids[row];
    device::sync_block();
    for (int row = device::thread(); row < args.p.num_tokens; row += device::num_threads()) {
        int leader = 0;
        while (leaders.ids[leader] != leaders.ids[row]) ++leader;
        leaders.of[row] = leaders.ids[row] < 0 ? -1 : leader;
    }
    device::sync_block();
}

// One request: its rows after each other in this warp, then its proposal. Returns its last row.
template <int V>
XSHARE_DEVICE int gather_request(const RouteArgs& args, const Leaders& leaders, int leader, Row<V>& row,
                                 Gathered<V>& gathered) {
    uint32_t sums[V] = {};
    int last = -1;
    for (int first = leader / device::kWarpSize * device::kWarpSize; first < args.p.num_tokens;
         first += device::kWarpSize) {
        const int index = first + device::lane();
        uint32_t members = device::ballot(index < args.p.num_tokens && leaders.of[index] == leader);
        for (; members != 0; members &= members - 1) {
            last = first + device::first_bit(members);
            gather_row(args, last, row, gathered);
            if (row.kind != RowKind::kShared) continue;
            XSHARE_UNROLL
            for (int i = 0; i < V; ++i) sums[i] += static_cast<uint32_t>(fixed_point(row.affinity[i]));
        }
    }
    const uint32_t proposed = largest_sums(sums, static_cast<uint32_t>(args.p.request_budget), kSumBits);
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i)
        if (proposed >> i & 1)
            device::atomic_add(&gathered.proposed[i * device::kWarpSize + device::lane()], sums[i]);
    return last;
}

// All requests, dealt out to the warps of the team. Returns the last row that this warp scored.
template <int V>
XSHARE_DEVICE int gather_requests(const RouteArgs& args, int this_warp, int team_warps,
                                  const Leaders& leaders, Row<V>& row, Gathered<V>& gathered) {
    int last = -1, next_warp = 0;
    for (int first = 0; first < args.p.num_tokens; first += device::kWarpSize) {
        const int index = first + device::lane();
        uint32_t heads = device::ballot(index < args.p.num_tokens && leaders.of[index] == index);
        for (; heads != 0; heads &= heads - 1) {
            if (next_warp == this_warp)
                last = gather_request(args, leaders, first + device::first_bit(heads), row, gathered);
            next_warp = next_warp + 1 < team_warps ? next_warp + 1 : 0;
        }
    }
    return last;
}

}  // namespace xshare

#endif  // XSHARE_CUDA_REQUESTS_CUH
