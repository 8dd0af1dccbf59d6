// SPDX-License-Identifier: Apache-2.0
// Many rows: blocks gather into global memory, then blocks that all decide the same refine; with requests,
// three or four small kernels between them. Kernels of one stream follow each other, so nothing waits inside
// a kernel.
//
//     gather_rows [-> place_requests -> order_rows [-> sum_requests] -> propose] -> refine_rows [->
//     tally_rows]
//
// The floor at T = 16384, E = 128, fp32: the logits are read twice (8 MiB each; the second time from L2), 6
// us at 3 TB/s, and 3 launches.
#ifndef XSHARE_CUDA_ROWS_CUH
#define XSHARE_CUDA_ROWS_CUH

#include "cuda/refine.cuh"
#include "cuda/requests.cuh"
#include "cuda/workspace.h"

namespace xshare {

// What all blocks gathered.
template <int V>
class TotalsSource {
  public:
    XSHARE_DEVICE_METHOD TotalsSource(const RouteArgs& args, const Totals& totals)
        : totals_(totals), proposing_(args.p.request_budget > 0) {}

    XSHARE_DEVICE_METHOD uint32_t set_word(int i) const { return words_of(totals_.sets)[i]; }
    XSHARE_DEVICE_METHOD uint32_t num_real_rows() const { return totals_.num_real_rows; }
    XSHARE_DEVICE_METHOD uint64_t sum(int expert) const { return totals_.sums[place_of<V>(expert)]; }
    XSHARE_DEVICE_METHOD uint64_t utility_at(int place) const {
        return (proposing_ ? totals_.proposed : totals_.sums)[place];
    }

  private:
    const Totals& totals_;
    const bool proposing_;
};

XSHARE_DEVICE int first_index() { return device::block() * device::num_threads() + device::thread(); }
XSHARE_DEVICE int index_step() { return device::num_blocks() * device::num_threads(); }
XSHARE_DEVICE int first_row() { return device::block() * device::num_warps() + device::warp(); }
XSHARE_DEVICE int row_step() { return device::num_blocks() * device::num_warps(); }

template <int V>
XSHARE_DEVICE void add_to_totals(const Gathered<V>& gathered, Totals& totals) {
    for (int i = device::thread(); i < V * device::kWarpSize; i += device::num_threads())
        if (gathered.sums[i] != 0)
            device::atomic_add(&totals.sums[i], static_cast<uint64_t>(gathered.sums[i]));
    for (int i = device::thread(); i < kSetWords; i += device::num_threads())
        if (words_of(gathered.sets)[i] != 0)
            device::atomic_or(&words_of(totals.sets)[i], words_of(gathered.sets)[i]);
    if (device::thread() == 0) device::atomic_add(&totals.num_real_rows, gathered.num_real_rows);
}

// Counts one row of its request. The order of a request's rows may differ between runs; no result depends on
// it.
XSHARE_DEVICE void enter_request(const Workspace& w, uint32_t request, int row) {
    const uint32_t slot = claim_slot(w.slots, w.num_slots, w.hash_shift, request);
    w.slot_of_row[row] = static_cast<int32_t>(slot);
    w.place_in_request[row] = device::atomic_add(&w.slots[slot].num_rows, 1u);
}

template <int V>
XSHARE_DEVICE void gather_rows(const RouteArgs& args) {
    XSHARE_SHARED(Gathered<V>, gathered);
    const Workspace w(args);
    clear(gathered);
    device::await_previous_kernel();
    device::allow_next_kernel();
    device::sync_block();
    Row<V> row;
    for (int index = first_row(); index < args.p.num_tokens; index += row_step()) {
        gather_row(args, index, row, gathered);
        write_own(args, index, row);
        if (args.p.request_budget == 0 || device::lane() != 0) continue;
        if (row.kind == RowKind::kShared)
            enter_request(w, static_cast<uint32_t>(args.t.request_ids[index]), index);
        else
            w.slot_of_row[index] = -1;
    }
    device::sync_block();
    add_to_totals(gathered, *w.totals);
}

// Gives every request a number and a range of `rows_by_request`.
XSHARE_DEVICE void place_requests(const RouteArgs& args) {
    const Workspace w(args);
    device::await_previous_kernel();
    device::allow_next_kernel();
    for (int slot = first_index(); slot < static_cast<int>(w.num_slots); slot += index_step()) {
        const uint32_t num_rows = w.slots[slot].num_rows;
        if (num_rows == 0) continue;
        w.first_of_slot[slot] = device::atomic_add(&w.totals->num_placed_rows, num_rows);
        w.slot_of_request[device::atomic_add(&w.totals->num_requests, 1u)] = slot;
        if (num_rows > kChunkRows)
            w.sums_of_slot[slot] = device::atomic_add(&w.totals->num_long_requests, 1u);
    }
}

XSHARE_DEVICE void order_rows(const RouteArgs& args) {
    const Workspace w(args);
    device::await_previous_kernel();
    device::allow_next_kernel();
    for (int row = first_index(); row < args.p.num_tokens; row += index_step()) {
        const int32_t slot = w.slot_of_row[row];
        if (slot >= 0) w.rows_by_request[w.first_of_slot[slot] + w.place_in_request[row]] = row;
    }
}

template <int V>
struct ProposeShared {
    uint64_t sums[V * device::kWarpSize];
};

// The column sums of rows of one request, over the block, between barriers.
template <int V>
XSHARE_DEVICE void sum_rows(const RouteArgs& args, const int32_t* rows, int num_rows,
                            ProposeShared<V>& shared) {
    for (int i = device::thread(); i < V * device::kWarpSize; i += device::num_threads()) shared.sums[i] = 0;
    device::sync_block();
    Row<V> row;
    for (int i = device::warp(); i < num_rows; i += device::num_warps()) {
        score_row(args, rows[i], false, row);
        if (args.p.utility == XSHARE_SQUARED_WEIGHT) choose_own(args, rows[i], args.p.top_k, row);
        for_each_utility(args, row, [&](int place, uint32_t utility) {
            device::atomic_add(&shared.sums[place], uint64_t{utility});
        });
    }
    device::sync_block();
}

// Stage 3 of requests with many rows: a block takes one chunk of the rows after another, and those of each
// long request in it.
template <int V>
XSHARE_DEVICE void sum_requests(const RouteArgs& args) {
    XSHARE_SHARED(ProposeShared<V>, shared);
    const Workspace w(args);
    device::await_previous_kernel();
    device::allow_next_kernel();
    if (w.totals->num_long_requests == 0) return;
    const int num_rows = static_cast<int>(w.totals->num_placed_rows);
    for (int start = device::block() * kChunkRows; start < num_rows;
         start += device::num_blocks() * kChunkRows) {
        const int stop = min_of(start + kChunkRows, num_rows);
        for (int first = start; first < stop;) {
            const int32_t slot = w.slot_of_row[w.rows_by_request[first]];
            const int end = static_cast<int>(w.first_of_slot[slot] + w.slots[slot].num_rows);
            const int here = min_of(end, stop) - first;
            if (w.slots[slot].num_rows > kChunkRows) {
                sum_rows(args, w.rows_by_request + first, here, shared);
                uint64_t* sums = w.long_requests[w.sums_of_slot[slot]].sums;
                for (int i = device::thread(); i < V * device::kWarpSize; i += device::num_threads())
                    if (shared.sums[i] != 0) device::atomic_add(&sums[i], shared.sums[i]);
                device::sync_block();
            }
            first += here;
        }
    }
}

// Stage 3: a block takes one request after another.
template <int V>
XSHARE_DEVICE void propose(const RouteArgs& args) {
    XSHARE_SHARED(ProposeShared<V>, shared);
    const Workspace w(args);
    device::await_previous_kernel();
    device::allow_next_kernel();
    if (step_stands_aside(args, w.totals->num_real_rows, w.totals->sets)) return;
    for (uint32_t request = static_cast<uint32_t>(device::block()); request < w.totals->num_requests;
         request += static_cast<uint32_t>(device::num_blocks())) {
        const int32_t slot = w.slot_of_request[request];
        const bool is_long = w.slots[slot].num_rows > kChunkRows;
        if (!is_long)
            sum_rows(args, w.rows_by_request + w.first_of_slot[slot],
                     static_cast<int>(w.slots[slot].num_rows), shared);
        if (device::warp() == 0) {
            const uint64_t* from = is_long ? w.long_requests[w.sums_of_slot[slot]].sums : shared.sums;
            uint64_t sums[V];
            XSHARE_UNROLL
            for (int i = 0; i < V; ++i) sums[i] = from[i * device::kWarpSize + device::lane()];
            const uint32_t proposed = take_largest(sums, Room{static_cast<uint32_t>(args.p.request_budget)});
            XSHARE_UNROLL
            for (int i = 0; i < V; ++i)
                if (proposed >> i & 1)
                    device::atomic_add(&w.totals->proposed[i * device::kWarpSize + device::lane()], sums[i]);
        }
        device::sync_block();
    }
}

template <int V>
struct RefineShared {
    Selection<V, uint64_t> selection;
    uint32_t after[device::kWarpSize];
};

// Stages 4, by every block alike, and 5.
template <int V>
XSHARE_DEVICE void refine_rows(const RouteArgs& args) {
    XSHARE_SHARED(RefineShared<V>, shared);
    const Workspace w(args);
    const int thread = device::thread();
    if (thread < device::kWarpSize) shared.after[thread] = 0;
    device::await_previous_kernel();
    device::allow_next_kernel();
    merge_step(args, TotalsSource<V>(args, *w.totals), shared.selection);
    device::sync_block();
    select_experts(args, shared.selection);
    const uint32_t active = shared.selection.active[device::lane()];
    const uint32_t in_use = experts_in_use(args, active, shared.selection.sets.before);
    const bool stands_aside = shared.selection.stands_aside;
    Row<V> row;
    for (int index = first_row(); index < args.p.num_tokens; index += row_step()) {
        look_again(args, stands_aside, index, row);
        refine_row<V>(args, stands_aside, active, in_use, index, row, shared.after);
    }
    if (device::block() == 0) {
        write_selection<V>(args, stands_aside,
                           args.is_shadow() ? shared.selection.sets.before : shared.selection.active);
        if (thread < device::kWarpSize) w.totals->active[thread] = active;
        if (thread == 0) w.totals->warmup_overflow = shared.selection.warmup_overflow;
    }
    device::sync_block();
    if (thread < device::kWarpSize && shared.after[thread] != 0)
        device::atomic_or(&w.totals->sets.after[thread], shared.after[thread]);
}

// The statistics, by one block.
template <int V>
XSHARE_DEVICE void tally_rows(const RouteArgs& args) {
    XSHARE_SHARED(Tally, tally);
    const Workspace w(args);
    device::await_previous_kernel();
    device::allow_next_kernel();
    if (device::thread() < device::kWarpSize) {
        tally.sets.before[device::thread()] = w.totals->sets.before[device::thread()];
        tally.sets.after[device::thread()] = w.totals->sets.after[device::thread()];
        tally.active[device::thread()] = w.totals->active[device::thread()];
    }
    const TotalsSource<V> source(args, *w.totals);
    const uint32_t num_real = w.totals->num_real_rows;
    write_stats<V>(args, source, num_real, step_stands_aside(args, num_real, w.totals->sets),
                   w.totals->warmup_overflow, tally);
}

}  // namespace xshare

#endif  // XSHARE_CUDA_ROWS_CUH
