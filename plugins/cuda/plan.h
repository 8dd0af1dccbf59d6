// SPDX-License-Identifier: Apache-2.0
// Which kernels a call is made of and how large they are. Host only.
#ifndef XSHARE_CUDA_PLAN_H
#define XSHARE_CUDA_PLAN_H

#include <algorithm>

#include "cuda/args.h"
#include "cuda/workspace.h"
#include "xshare/xshare_plan.h"

namespace xshare {

// What one call is fitted to.
struct Machine {
    int max_team_size;     // 1 = no clusters
    int max_step_threads;  // of the step kernels, by their registers
    int row_threads;       // of the other kernels
    int max_row_blocks;
    int block_rows;      // from which a step takes more than one block
    int team_rows;       // of a block, where a step takes more than one, as far as there are blocks
    int max_block_rows;  // that one block takes where there are no clusters
};

inline int divide_up(int a, int b) { return (a + b - 1) / b; }

// Clusters and programmatic launches need both: a device of 9.0 or newer, and code that was compiled for it.
// PTX for 8.0 that a driver makes code of for 9.0 waits for nothing.
inline bool is_hopper_code(int device_major, int ptx_version) {
    return device_major >= 9 && ptx_version >= 90;
}

// The thresholds are estimates until they have been measured.
inline Machine fit_to(const xshare_gpu& gpu, int num_tokens, int experts_per_lane) {
    Machine machine = {};
    const bool is_large = num_tokens > kPortableTeamSize * kTeamRows;
    machine.max_team_size = std::min(gpu.max_cluster_size, is_large ? kMaxTeamSize : kPortableTeamSize);
    machine.max_step_threads = step_threads(experts_per_lane);
    machine.row_threads = kRowThreads;
    machine.max_row_blocks = std::max(4 * gpu.num_multiprocessors, 264);  // a block's sums hold 4095 rows
    machine.block_rows = block_rows(experts_per_lane);
    machine.team_rows = kTeamRows;
    machine.max_block_rows = kBlockRows;
    return machine;
}

inline bool fits_step(const RouteArgs& args, const Machine& machine) {
    return args.p.num_tokens <= (machine.max_team_size > 1 ? kStepRows : machine.max_block_rows);
}

inline xshare_launch plan_step(const RouteArgs& args, const Machine& machine) {
    int team = 1;
    if (args.p.num_tokens > machine.block_rows)
        while (2 * team <= machine.max_team_size && args.p.num_tokens > team * machine.team_rows) team *= 2;
    // A warp per row, and a thread per expert for what adds up the blocks.
    const int wanted = 32 * std::max(divide_up(args.p.num_tokens, team), divide_up(args.p.num_experts, 32));
    const int threads = std::min(std::max(wanted, 64), machine.max_step_threads);
    return {team == 1 ? XSHARE_KERNEL_BLOCK : XSHARE_KERNEL_TEAM, team, threads, team};
}

inline xshare_launch_plan make_plan(const RouteArgs& args, const Machine& machine) {
    xshare_launch_plan plan = {};
    plan.struct_size = sizeof plan;
    if (fits_step(args, machine)) {
        plan.launches[plan.num_launches++] = plan_step(args, machine);
        return plan;
    }
    const Workspace workspace(args);
    plan.workspace_size = workspace.size();
    plan.cleared_size = workspace.cleared_size();
    const int threads = machine.row_threads;
    const auto add = [&](xshare_kernel kernel, int items, int per_block) {
        const int blocks = std::min(divide_up(items, per_block), machine.max_row_blocks);
        plan.launches[plan.num_launches++] = {kernel, std::max(blocks, 1), threads, 1};
    };
    add(XSHARE_KERNEL_GATHER_ROWS, args.p.num_tokens, threads / 32);
    if (args.p.request_budget > 0) {
        add(XSHARE_KERNEL_PLACE_REQUESTS, static_cast<int>(workspace.num_slots), threads);
        add(XSHARE_KERNEL_ORDER_ROWS, args.p.num_tokens, threads);
        if (args.p.num_tokens > kChunkRows) add(XSHARE_KERNEL_SUM_REQUESTS, args.p.num_tokens, kChunkRows);
        add(XSHARE_KERNEL_PROPOSE, args.p.num_tokens, 1);
    }
    add(XSHARE_KERNEL_REFINE_ROWS, args.p.num_tokens, threads / 32);
    if (args.t.stats != nullptr) add(XSHARE_KERNEL_TALLY_ROWS, 1, 1);
    return plan;
}

// Experts per lane, for which kernels are built: the least that holds them all.
constexpr int kExpertsPerLane[] = {1, 2, 4, 8, 12, 16};

inline int experts_per_lane(int num_experts) {
    for (const int v : kExpertsPerLane)
        if (num_experts <= 32 * v) return v;
    return 16;
}

}  // namespace xshare

#endif  // XSHARE_CUDA_PLAN_H
