// SPDX-License-Identifier: Apache-2.0
// Built once per instruction set with XSHARE_ISA naming it (see rows.cpp). A decode step has a few rows per
// expert, so this is bound by reading the weights: every weight is loaded once and used for all rows while it
// is in a register.
#include "cpu/expert_rows.h"

#include "core/scoring.h"

namespace xshare {
namespace XSHARE_ISA {

// GCC's and Clang's vector extension: the same code is SSE, AVX or NEON.
typedef float Lanes __attribute__((vector_size(32), aligned(4)));
constexpr int kLanes = 8;

// out[i] = sum of the lanes of sums[i], by adding halves of pairs.
XSHARE_FN void add_lanes(const Lanes (&sums)[kLanes], float (&out)[kLanes]) {
    Lanes pairs[4], quads[2];
    for (int i = 0; i < 4; ++i) {
        const Lanes a = sums[2 * i], b = sums[2 * i + 1];
        pairs[i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13) +
                   __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 2; ++i) {
        const Lanes a = pairs[2 * i], b = pairs[2 * i + 1];
        quads[i] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
                   __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    }
    const Lanes total = __builtin_shufflevector(quads[0], quads[1], 0, 1, 2, 3, 8, 9, 10, 11) +
                        __builtin_shufflevector(quads[0], quads[1], 4, 5, 6, 7, 12, 13, 14, 15);
    memcpy(out, &total, sizeof out);
}

// Calls take(j, row, dot of matrix row j and input row) for every row of matrix [columns, n]. A tile is as
// many columns as give eight sums, which hide the latency of one another.
template <int kRows, typename Take>
XSHARE_FN void dot_rows(const float* const* inputs, const float* matrix, int columns, int n, Take take) {
    constexpr int kColumns = kLanes / kRows;
    const long stride = n;
    int j = 0;
    for (; j + kColumns <= columns; j += kColumns) {
        const float* tile = matrix + j * stride;
        Lanes sums[kLanes] = {};
        int i = 0;
        for (; i + kLanes <= n; i += kLanes)
            for (int c = 0; c < kColumns; ++c) {
                const Lanes weight = *reinterpret_cast<const Lanes*>(tile + c * stride + i);
                for (int row = 0; row < kRows; ++row)
                    sums[c * kRows + row] += weight * *reinterpret_cast<const Lanes*>(inputs[row] + i);
            }
        float dots[kLanes];
        add_lanes(sums, dots);
        for (; i < n; ++i)
            for (int c = 0; c < kColumns; ++c)
                for (int row = 0; row < kRows; ++row)
                    dots[c * kRows + row] += tile[c * stride + i] * inputs[row][i];
        for (int c = 0; c < kColumns; ++c)
            for (int row = 0; row < kRows; ++row) take(j + c, row, dots[c * kRows + row]);
    }
    for (; j < columns; ++j)
        for (int row = 0; row < kRows; ++row) {
            float dot = 0.0f;
            for (int i = 0; i < n; ++i) dot += matrix[j * stride + i] * inputs[row][i];
            take(j, row, dot);
        }
}

template <int kRows>
static void run(const ExpertRows& rows, const float* gate_up, const float* down, int hidden_size,
                int intermediate_size, float* scratch) {
    const int gated = 2 * intermediate_size;
    float* projected = scratch;                  // [kRows, 2F]
    float* activated = scratch + kRows * gated;  // [kRows, F]
    dot_rows<kRows>(rows.input, gate_up, gated, hidden_size,
                    [&](int j, int row, float dot) { projected[row * gated + j] = dot; });
    const float* inputs[kRows];
    for (int row = 0; row < kRows; ++row) {
        const float* gate = projected + row * gated;
        float* out = activated + row * intermediate_size;
        for (int f = 0; f < intermediate_size; ++f)
            out[f] = gate[f] * sigmoid_fixed(gate[f]) * gate[intermediate_size + f] * rows.weight[row];
        inputs[row] = out;
    }
    dot_rows<kRows>(inputs, down, hidden_size, intermediate_size,
                    [&](int j, int row, float dot) { rows.output[row][j] += dot; });
}

static void run_expert(const ExpertRows& rows, const float* gate_up, const float* down, int hidden_size,
                       int intermediate_size, float* scratch) {
    constexpr RunExpert by_count[] = {run<1>, run<2>, run<3>, run<4>};
    by_count[rows.count - 1](rows, gate_up, down, hidden_size, intermediate_size, scratch);
}

extern const RunExpert expert_kernel;
const RunExpert expert_kernel = run_expert;

}  // namespace XSHARE_ISA
}  // namespace xshare
