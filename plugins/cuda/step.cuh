// SPDX-License-Identifier: Apache-2.0
// A decode step in one launch: up to kStepRows rows in one block, or in the blocks of one cluster, which
// exchange their sums through each other's shared memory and then all decide the same.
//
// The floor. At T = 16, E = 128 the tensors are 9 KB: bytes do not matter (3 ns at 3 TB/s), a chain of
// latencies does: the launch in a graph (about 1.5 us behind another kernel), one trip to L2 or memory for
// the logits (0.3 to 0.6 us), three warp reductions for the softmax, k dependent picks (40 ns each) and k
// additions for the row's own choice, 4 block barriers (about 20 ns each), the choice of S in one warp (about
// 5 rounds of 3 E / 32 comparisons and a few warp reductions, 70 to 100 ns each), a pick for each of the own
// choice that S lacks, and the stores. An estimate of 3 us, nearly all of it latency. Hence one warp per row:
// more rows are more warps, not more time, until the block is full. Then there are more blocks (a cluster
// barrier is about 0.3 us), with half as many rows each: at about 900 (E = 128, k = 4) to 1800 (E = 256,
// k = 8, groups) instructions per row (README.md), 16 warps keep the four schedulers of a multiprocessor busy
// for 3600 to 7200 cycles, and 8 for half of it. Requests cost a barrier and, in one warp each, the sum of
// their rows and a choice of their own: 0.5 to 1 us.
#ifndef XSHARE_CUDA_STEP_CUH
#define XSHARE_CUDA_STEP_CUH

#include "cuda/refine.cuh"
#include "cuda/requests.cuh"

namespace xshare {

// The team meets between the first and the second use of what is shared twice.
template <int V>
struct StepShared {
    struct Proposing {
        RowsByRequest rows;
        ScoredRows<V> scored;
    };
    struct Deciding {
        Selection<V, uint32_t> selection;
        Tally tally;
    };
    Gathered<V> gathered;
    union {
        Proposing proposing;
        Deciding deciding;
    };
};

// What the blocks of the team gathered.
template <int V, typename Team>
class TeamSource {
  public:
    XSHARE_DEVICE_METHOD TeamSource(const RouteArgs& args, Gathered<V>& own)
        : own_(own), proposing_(args.p.request_budget > 0) {}

    XSHARE_DEVICE_METHOD uint32_t set_word(int i) const {
        uint32_t bits = 0;
        for_each_block(words_of(own_.sets) + i, [&](uint32_t there) { bits |= there; });
        return bits;
    }
    XSHARE_DEVICE_METHOD uint32_t num_real_rows() const { return sum_of(&own_.num_real_rows); }
    XSHARE_DEVICE_METHOD uint32_t sum(int expert) const { return sum_of(own_.sums + place_of<V>(expert)); }
    XSHARE_DEVICE_METHOD uint32_t utility_at(int place) const {
        return sum_of((proposing_ ? own_.proposed : own_.sums) + place);
    }

  private:
    XSHARE_DEVICE_METHOD uint32_t sum_of(uint32_t* number) const {
        uint32_t sum = 0;
        for_each_block(number, [&](uint32_t there) { sum += there; });
        return sum;
    }
    // Eight blocks are read at once.
    template <typename Visit>
    XSHARE_DEVICE_METHOD void for_each_block(uint32_t* word, Visit visit) const {
        if constexpr (Team::kIsBlock) {
            visit(*word);
        } else {
            for (int first = 0; first < Team::size(); first += kPortableTeamSize) {
                XSHARE_UNROLL
                for (int i = 0; i < kPortableTeamSize; ++i)
                    if (first + i < Team::size()) visit(*Team::of_peer(word, first + i));
            }
        }
    }

    Gathered<V>& own_;
    const bool proposing_;
};

// Rows and then requests, where there is a warp for each row: a request's rows are scored side by side, and
// stay in their warps for stage 5.
template <typename Team, int V>
XSHARE_DEVICE int gather_requests_at_once(const RouteArgs& args, int this_warp, int team_warps,
                                          StepShared<V>& shared, Row<V>& row) {
    if (this_warp < args.p.num_tokens) {
        gather_row(args, this_warp, row, shared.gathered);
        publish_row(args, row, shared.proposing.scored);
    }
    Team::sync();
    const auto add_row = [&](int index, uint32_t (&sums)[V]) {
        const int size = Team::size();
        add_lanes(Team::of_peer(shared.proposing.scored.utility[index / size], index % size), sums);
    };
    gather_requests(args, this_warp, team_warps, shared.proposing.rows, add_row, shared.gathered);
    return this_warp < args.p.num_tokens ? this_warp : -1;
}

// Returns the row that is left in `row`, or -1; its own choice may not have been written yet.
template <typename Team, int V>
XSHARE_DEVICE int gather_step(const RouteArgs& args, int this_warp, int team_warps, StepShared<V>& shared,
                              Row<V>& row) {
    int last = -1;
    if (args.p.request_budget == 0) {
        for (int index = this_warp; index < args.p.num_tokens; index += team_warps) {
            if (last >= 0) write_own(args, last, row);
            gather_row(args, index, row, shared.gathered);
            last = index;
        }
        return last;
    }
    enter_rows(args, shared.proposing.rows);
    if (args.p.num_tokens <= team_warps)
        return gather_requests_at_once<Team>(args, this_warp, team_warps, shared, row);
    device::sync_block();
    const auto add_row = [&](int index, uint32_t (&sums)[V]) {
        if (last >= 0) write_own(args, last, row);
        gather_row(args, index, row, shared.gathered);
        last = index;
        publish_row(args, row, shared.proposing.scored);
        device::sync_warp();
        add_lanes(shared.proposing.scored.utility[device::warp()], sums);
    };
    gather_requests(args, this_warp, team_warps, shared.proposing.rows, add_row, shared.gathered);
    if (last >= 0) write_own(args, last, row);  // before the barrier: another block may refine the row
    row.is_whole = false;
    return last;
}

template <int V>
XSHARE_DEVICE void refine_step(const RouteArgs& args, int this_warp, int team_warps, int scored,
                               StepShared<V>& shared, Row<V>& row) {
    const uint32_t active = shared.deciding.selection.active[device::lane()];
    const uint32_t in_use = experts_in_use(args, active, shared.deciding.selection.sets.before);
    const bool stands_aside = shared.deciding.selection.stands_aside;
    // Backwards: the row that was scored last comes first and still has its scores.
    const int last_round = (args.p.num_tokens - 1 - this_warp) / team_warps;
    for (int index = this_warp + last_round * team_warps; index >= 0; index -= team_warps) {
        if (index >= args.p.num_tokens) continue;
        if (index != scored) look_again(args, stands_aside, index, row);
        scored = -1;
        refine_row<V>(args, stands_aside, active, in_use, index, row, shared.gathered.sets.after);
    }
}

template <int V, typename Source>
XSHARE_DEVICE void tally_step(const RouteArgs& args, const Source& source, StepShared<V>& shared) {
    if (device::thread() < device::kWarpSize) {
        shared.deciding.tally.sets.before[device::thread()] =
            shared.deciding.selection.sets.before[device::thread()];
        shared.deciding.tally.active[device::thread()] = shared.deciding.selection.active[device::thread()];
    }
    for (int i = kWordsBeforeRefining + device::thread(); i < kSetWords; i += device::num_threads())
        words_of(shared.deciding.tally.sets)[i] = source.set_word(i);
    write_stats<V>(args, source, shared.deciding.selection.num_real_rows,
                   shared.deciding.selection.stands_aside, shared.deciding.selection.warmup_overflow,
                   shared.deciding.tally);
}

// By a team of kTeam blocks; 0 = as many as the launch says.
template <int V, int kTeam>
XSHARE_DEVICE void route_step(const RouteArgs& args) {
    using Team = device::Team<kTeam>;
    XSHARE_SHARED(StepShared<V>, shared);
    const int rank = Team::rank();
    const int this_warp = device::warp() * Team::size() + rank;
    const int team_warps = device::num_warps() * Team::size();
    clear(shared.gathered);
    if (args.p.request_budget > 0) clear(shared.proposing.rows);
    device::await_previous_kernel();
    device::allow_next_kernel();
    device::sync_block();

    Row<V> row;
    const int scored = gather_step<Team>(args, this_warp, team_warps, shared, row);
    Team::arrive();  // before the row is written: its fence would wait for that
    if (scored >= 0) write_own(args, scored, row);
    Team::wait();
    const TeamSource<V, Team> source(args, shared.gathered);
    merge_step(args, source, shared.deciding.selection);
    device::sync_block();
    if (args.t.stats == nullptr) Team::leave();
    select_experts(args, shared.deciding.selection);
    refine_step(args, this_warp, team_warps, scored, shared, row);
    if (rank == 0)
        write_selection<V>(
            args, shared.deciding.selection.stands_aside,
            args.is_shadow() ? shared.deciding.selection.sets.before : shared.deciding.selection.active);
    if (args.t.stats != nullptr) {
        Team::sync();
        if (rank == 0) tally_step<V>(args, source, shared);
        Team::leave();
    }
    Team::wait_for_leaving();
}

}  // namespace xshare

#endif  // XSHARE_CUDA_STEP_CUH
