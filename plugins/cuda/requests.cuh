// SPDX-License-Identifier: Apache-2.0
// Stage 3: what one request proposes, from its column sums in one warp.
#ifndef XSHARE_CUDA_REQUESTS_CUH
#define XSHARE_CUDA_REQUESTS_CUH

#include "cuda/gather.cuh"
#include "cuda/largest.cuh"

namespace xshare {

// The rows of a step of at most kStepRows, by request: the leader of a row is the first row of its request.
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
    const uint32_t proposed = take_largest(sums, Room{static_cast<uint32_t>(args.p.request_budget)});
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
