// SPDX-License-Identifier: Apache-2.0
// One expert applied to a few rows, built once per instruction set (expert_rows.cpp).
#ifndef XSHARE_CPU_EXPERT_ROWS_H
#define XSHARE_CPU_EXPERT_ROWS_H

namespace xshare {

constexpr int kMaxExpertRows = 4;  // rows that share one pass over the weights

struct ExpertRows {
    int count;  // 1 .. kMaxExpertRows
    const float* input[kMaxExpertRows];
    float weight[kMaxExpertRows];
    float* output[kMaxExpertRows];  // added to
};

// gate_up [2F, H], down [H, F], scratch [kMaxExpertRows * 3F].
using RunExpert = void (*)(const ExpertRows& rows, const float* gate_up, const float* down, int hidden_size,
                           int intermediate_size, float* scratch);

RunExpert run_expert();  // for this processor

}  // namespace xshare

#endif  // XSHARE_CPU_EXPERT_ROWS_H
