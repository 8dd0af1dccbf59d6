// SPDX-License-Identifier: Apache-2.0
// Which kernels a call is made of and how large they are. Host only.
#ifndef XSHARE_CUDA_PLAN_H
#define XSHARE_CUDA_PLAN_H

#include <algorithm>

#include "cuda/args.h"
#include "cuda/workspace.h"

namespace xshare {

enum class Kernel { kStep, kGatherRows, kPlaceRequests, kOrderRows, kPropose, kRefineRows, kTallyRows };

struct Launch {
    Kernel kernel;
    int num_blocks;
    int num_threads;
    int team_size;
};

// What the launches are fitted to.
struct Machine {
    int max_team_size;     // 1 = no clusters
    int max_step_threads;  // of the step kernel, by its registers
    int row_threads;       // of the other kernels
    int max_row_blocks;
    int block_rows;      // from which a step takes more than one block
    int team_rows;       // of a block, where a step takes more than one, as far as there are blocks
    int max_block_rows;  // that one block takes where there are no clusters
};

struct Plan {
    int num_launches = 0;
    Launch launches[6];

    void add(Kernel kernel, int num_blocks, int num_threads, int team_size = 1) {
        launches[num_launches++] = {kernel, std::max(num_blocks, 1), num_threads, team_size};
    }
};

inline int divide_up(int a, int b) { return (a + b - 1) / b; }

inline bool fits_step(const RouteArgs& args, const Machine& machine) {
    return args.p.num_tokens <= (machine.max_team_size > 1 ? kStepRows : machine.max_block_rows);
}

inline Launch plan_step(const RouteArgs& args, const Machine& machine) {
    int team = 1;
    if (args.p.num_tokens > machine.block_rows)
        while (team < machine.max_team_size && args.p.num_tokens > team * machine.team_rows) team *= 2;
    // A warp per row, and a thread per expert for what adds up the blocks.
    const int wanted = 32 * std::max(divide_up(args.p.num_tokens, team), divide_up(args.p.num_experts, 32));
    return {Kernel::kStep, team, std::min(std::max(wanted, 64), machine.max_step_threads), team};
}

inline Plan make_plan(const RouteArgs& args, const Machine& machine) {
    Plan plan;
    if (fits_step(args, machine)) {
        const Launch step = plan_step(args, machine);
        plan.add(step.kernel, step.num_blocks, step.num_threads, step.team_size);
        return plan;
    }
    const int threads = machine.row_threads;
    const auto blocks = [&](int items, int per_block) {
        return std::min(divide_up(items, per_block), machine.max_row_blocks);
    };
    const int row_blocks = blocks(args.p.num_tokens, threads / 32);
    plan.add(Kernel::kGatherRows, row_blocks, threads);
    if (args.p.request_budget > 0) {
        plan.add(Kernel::kPlaceRequests, blocks(static_cast<int>(Workspace(args).num_slots), threads),
                 threads);
        plan.add(Kernel::kOrderRows, blocks(args.p.num_tokens, threads), threads);
        plan.add(Kernel::kPropose, blocks(args.p.num_tokens, 1), threads);
    }
    plan.add(Kernel::kRefineRows, row_blocks, threads);
    if (args.t.stats != nullptr) plan.add(Kernel::kTallyRows, 1, threads);
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
