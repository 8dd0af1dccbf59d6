// SPDX-License-Identifier: Apache-2.0
// The row loops of every instruction set give the same bits.
#include <stdio.h>
#include <string.h>

#include <random>
#include <vector>

#include "core/masking.h"
#include "core/ordering.h"
#include "core/rules.h"
#include "cpu/rows.h"

namespace xshare {
namespace baseline {
extern const RowKernels kernels;
}
namespace avx2 {
extern const RowKernels kernels;
}
}  // namespace xshare

using namespace xshare;

namespace {

std::mt19937 generator(0);

int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

struct Result {
    RowScores scores = {};
    int32_t keys[kMaxExperts] = {};
    int64_t sums[kMaxExperts] = {};
    int32_t places[kMaxTopK] = {}, best_keys[kMaxTopK] = {};
    uint32_t masked[kMaxExperts] = {};
    int found = 0, finite = 0;
};

void run(const RowKernels& kernels, const xshare_route_params& p, const void* logits, const float* bias,
         Result& r) {
    r.finite = kernels.count_finite(logits, p.logits_dtype, p.num_experts);
    if (r.finite <= 0) return;
    kernels.score(p, logits, bias, r.scores, r.keys);
    if (rule_of(p.scoring).is_bounded()) kernels.accumulate(r.scores.affinity, p.num_experts, r.sums);
    kernels.add(r.sums, p.num_experts, r.sums);
    r.found = kernels.top_k(r.keys, padded(p.num_experts), p.top_k, r.places, r.best_keys);
    kernels.mask(logits, p.logits_dtype, mask_bits(p), r.keys, r.keys, p.num_experts, r.masked);
}

bool same(const xshare_route_params& p, const Result& a, const Result& b) {
    const size_t n = static_cast<size_t>(p.num_experts);
    return a.finite == b.finite && a.found == b.found && memcmp(a.keys, b.keys, sizeof a.keys) == 0 &&
           memcmp(a.scores.affinity, b.scores.affinity, n * 4) == 0 &&
           memcmp(a.scores.logits, b.scores.logits, n * 4) == 0 &&
           memcmp(a.sums, b.sums, sizeof a.sums) == 0 && memcmp(a.places, b.places, sizeof a.places) == 0 &&
           memcmp(a.best_keys, b.best_keys, sizeof a.best_keys) == 0 &&
           memcmp(a.masked, b.masked, sizeof a.masked) == 0;
}

}  // namespace

int main() {
    if (!__builtin_cpu_supports("avx2")) {
        puts("skipped: this CPU has no AVX2");
        return 0;
    }
    for (int i = 0; i < 20000; ++i) {
        xshare_route_params p = {};
        p.scoring = pick(0, kNumScorings - 1);
        p.logits_dtype = pick(0, 2);
        p.num_groups = rule_of(p.scoring).group_best_of == 0 ? 1 : pick(1, 4);
        p.top_k_groups = pick(1, p.num_groups);
        p.num_experts = p.num_groups * pick(4, kMaxExperts / p.num_groups);
        p.top_k = pick(1, 4);
        std::vector<uint32_t> logits(static_cast<size_t>(p.num_experts));
        const float scale = std::vector<float>{0.1f, 1.0f, 30.0f, 1e30f}[static_cast<size_t>(pick(0, 3))];
        for (uint32_t& bits : logits) {
            const float value = scale * std::normal_distribution<float>()(generator);
            memcpy(&bits, &value, 4);
            // Halves: mostly finite patterns, so that rows are scored.
            if (p.logits_dtype != XSHARE_FLOAT32)
                bits = static_cast<uint32_t>(generator()) & (pick(0, 999) ? 0xbbffbbffu : ~0u);
            if (pick(0, 2 * p.num_experts) == 0)
                bits = p.logits_dtype == XSHARE_FLOAT32    ? 0xff800000u
                       : p.logits_dtype == XSHARE_BFLOAT16 ? 0xff80ff80u
                                                           : 0xfc00fc00u;
        }
        p.mask_value = pick(0, 1) ? -32768.0f : 0.0f;
        std::vector<float> bias(static_cast<size_t>(p.num_experts));
        for (float& b : bias) b = std::normal_distribution<float>()(generator);
        const float* maybe_bias = pick(0, 1) ? bias.data() : nullptr;
        Result baseline_result, avx2_result;
        run(baseline::kernels, p, logits.data(), maybe_bias, baseline_result);
        run(avx2::kernels, p, logits.data(), maybe_bias, avx2_result);
        if (same(p, baseline_result, avx2_result)) continue;
        printf("case %d differs: scoring %d dtype %d experts %d\n", i, p.scoring, p.logits_dtype,
               p.num_experts);
        return 1;
    }
    puts("baseline and avx2 agree on 20000 rows");
    return 0;
}
