// SPDX-License-Identifier: Apache-2.0
// Stages 3 and 4: which experts a request proposes, and which the batch activates.
#ifndef XSHARE_CPU_SELECT_H
#define XSHARE_CPU_SELECT_H

#include <stdint.h>

#include "cpu/expert_set.h"
#include "xshare/xshare.h"

namespace xshare {

// Stage 3: utility[e] += sums[e] for the request_budget best of one request's column sums.
void propose(const int64_t* sums, int num_experts, int request_budget, int64_t* utility);

struct Selection {
    ExpertSet active;  // S
    int warmup_overflow = 0;
};

// Stage 4. `expert_gpu` may be NULL where gpu_budget is off; where it is given, coverage sets gpu_budget.
Selection select_experts(const xshare_route_params& params, const int64_t* utility,
                         const ExpertSet& exempt_experts, const ExpertSet& warmup_experts,
                         const int32_t* expert_gpu);

// The most experts of `experts` on one GPU; all are on one where `expert_gpu` is NULL.
int peak_experts_per_gpu(const ExpertSet& experts, const int32_t* expert_gpu, int num_experts);

}  // namespace xshare

#endif  // XSHARE_CPU_SELECT_H
