// SPDX-License-Identifier: Apache-2.0
// Stage 3: which rows are of one request, and what it proposes, from its column sums in one warp.
#ifndef XSHARE_CUDA_REQUESTS_CUH
#define XSHARE_CUDA_REQUESTS_CUH

#include "cuda/gather.cuh"
#include "cuda/largest.cuh"

namespace xshare {

// The request's slot in an open hash table of a power of two of slots. A slot belongs to the first request
// that finds it empty: which one that is may differ between runs, and no result depends on it.
template <typename Slot>
XSHARE_DEVICE uint32_t claim_slot(Slot* slots, uint32_t num_slots, int hash_shift, uint32_t request) {
    uint32_t slot = (request * 2654435769u) >> hash_shift;
    while (true) {
        const uint32_t there = device::atomic_exchange_if(&slots[slot].request, 0, request + 1);
        if (there == 0 || there == request + 1) return slot;
        slot = (slot + 1) & (num_slots - 1);
    }
}

// The rows of a step by request, in shared memory. The leader of a row is the first row of its request.
struct RowsByRequest {
    static constexpr int kSlots = 2 * kStepRows, kHashShift = 32 - 9;
    static_assert(kSlots == 1 << (32 - kHashShift), "the hash is as wide as the table");
    struct Slot {
        uint32_t request;  // id + 1; 0 = empty
        uint32_t leader;
    };

    Slot slots[kSlots];
    int32_t slot_of_row[kStepRows];  // -1 = padding

    // -1 = padding
    XSHARE_DEVICE_METHOD int leader_of(int row) const {
        return slot_of_row[row] < 0 ? -1 : static_cast<int>(slots[slot_of_row[row]].leader);
    }
};

XSHARE_DEVICE void clear(RowsByRequest& rows) {
    for (int i = device::thread(); i < RowsByRequest::kSlots; i += device::num_threads())
        rows.slots[i] = {0, kStepRows};
}

// To be followed by a barrier.
XSHARE_DEVICE void enter_rows(const RouteArgs& args, RowsByRequest& rows) {
    for (int row = device::thread(); row < args.p.num_tokens; row += device::num_threads()) {
        const int32_t id = args.t.request_ids[row];
        rows.slot_of_row[row] = -1;
        if (id < 0) continue;
        const uint32_t slot = claim_slot(rows.slots, RowsByRequest::kSlots, RowsByRequest::kHashShift,
                                         static_cast<uint32_t>(id));
        device::atomic_min(&rows.slots[slot].leader, static_cast<uint32_t>(row));
        rows.slot_of_row[row] = static_cast<int32_t>(slot);
    }
}

// What the warps of a block have scored, one row each, for the warps that add up requests. Laid out as in
// row.cuh.
template <int V>
struct ScoredRows {
    uint32_t utility[step_threads(V) / device::kWarpSize][V * device::kWarpSize];  // 0 of a row not shared
};

// To be followed by a barrier of the warp at least.
template <int V>
XSHARE_DEVICE void publish_row(const RouteArgs& args, const Row<V>& row, ScoredRows<V>& scored) {
    uint32_t* utilities = scored.utility[device::warp()];
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) utilities[i * device::kWarpSize + device::lane()] = 0;
    device::sync_warp();
    if (row.kind != RowKind::kShared) return;
    for_each_utility(args, row, [&](int place, uint32_t utility) { utilities[place] = utility; });
}

template <int V>
XSHARE_DEVICE void add_lanes(const uint32_t* utilities, uint32_t (&sums)[V]) {
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) sums[i] += utilities[i * device::kWarpSize + device::lane()];
}

// One request: its rows after each other in this warp, then its proposal. `add_row(row, sums)` adds a row's
// utilities.
template <int V, typename AddRow>
XSHARE_DEVICE void gather_request(const RouteArgs& args, const RowsByRequest& rows, int leader,
                                  AddRow add_row, Gathered<V>& gathered) {
    uint32_t sums[V] = {};
    for (int first = leader / device::kWarpSize * device::kWarpSize; first < args.p.num_tokens;
         first += device::kWarpSize) {
        const int index = first + device::lane();
        uint32_t members = device::ballot(index < args.p.num_tokens && rows.leader_of(index) == leader);
        for (; members != 0; members &= members - 1) add_row(first + device::first_bit(members), sums);
    }
    const uint32_t proposed = take_largest(sums, Room{static_cast<uint32_t>(args.p.request_budget)});
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i)
        if (proposed >> i & 1)
            device::atomic_add(&gathered.proposed[i * device::kWarpSize + device::lane()], sums[i]);
}

// All requests, dealt out to the warps of the team by the order of their leaders.
template <int V, typename AddRow>
XSHARE_DEVICE void gather_requests(const RouteArgs& args, int this_warp, int team_warps,
                                   const RowsByRequest& rows, AddRow add_row, Gathered<V>& gathered) {
    int num_before = 0;
    for (int first = 0; first < args.p.num_tokens; first += device::kWarpSize) {
        const int index = first + device::lane();
        const bool leads = index < args.p.num_tokens && rows.leader_of(index) == index;
        const uint32_t leaders = device::ballot(leads);
        const int place = num_before + device::num_bits(leaders & device::lower_lanes());
        uint32_t mine = device::ballot(leads && place % team_warps == this_warp);
        for (; mine != 0; mine &= mine - 1)
            gather_request(args, rows, first + device::first_bit(mine), add_row, gathered);
        num_before += device::num_bits(leaders);
    }
}

}  // namespace xshare

#endif  // XSHARE_CUDA_REQUESTS_CUH
