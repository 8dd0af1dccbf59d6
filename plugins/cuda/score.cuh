// SPDX-License-Identifier: Apache-2.0
// Stage 1 of a row: affinities and the keys of its ranking scores.
#ifndef XSHARE_CUDA_SCORE_CUH
#define XSHARE_CUDA_SCORE_CUH

#include "cuda/groups.cuh"

namespace xshare {

constexpr float kNoLogit = -100.0f;  // of affinity 0: exp_fixed is 0 there

XSHARE_DEVICE float finite_or_zero(float bias) {
    return (float_bits(bias) & 0x7f800000) == 0x7f800000 ? 0.0f : bias;
}

XSHARE_DEVICE float bias_of(const RouteArgs& args, int expert) {
    return args.t.correction_bias == nullptr ? 0.0f : finite_or_zero(args.t.correction_bias[expert]);
}

// keys = R, affinity = A of a softmax.
template <int V>
XSHARE_DEVICE void score_softmax(const ScoringRule& rule, const float (&bias)[V], const float (&logits)[V],
                                 int num_here, Row<V>& row) {
    int32_t largest = kUnavailable;
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) {
        row.keys[i] = i < num_here ? score_key(logits[i]) : kUnavailable;
        largest = max_of(largest, row.keys[i]);
    }
    const float peak = key_score(device::warp_max(largest));
    uint64_t sum = 0;  // of rint(e * 2^40), below 2^50
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) {
        const float e = exp_fixed(i < num_here ? sub_rn(logits[i], peak) : kNoLogit);
        row.affinity[i] = e;
        sum += softmax_term(e) - softmax_term(0.0f);
    }
    const float scale = softmax_scale(device::warp_add_wide(sum), 0);
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) {
        row.affinity[i] = mul_rn(row.affinity[i], scale);
        if (rule.ranked_by == RankedBy::kAffinity && i < num_here)
            row.keys[i] = rule.has_bias ? score_key(add_rn(row.affinity[i], finite_or_zero(bias[i])))
                                        : float_bits(row.affinity[i]);
    }
}

// The same of an affinity that is each logit's own.
template <int V>
XSHARE_DEVICE void score_each(const ScoringRule& rule, const float (&bias)[V], const float (&logits)[V],
                              int num_here, Row<V>& row) {
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) {
        const float z = i < num_here ? logits[i] : kNoLogit, b = finite_or_zero(bias[i]);
        row.affinity[i] = rule.affinity == Affinity::kSigmoid ? sigmoid_fixed(z) : sqrt_softplus_fixed(z);
        const float score =
            rule.ranked_by == RankedBy::kLogits ? add_bias_to_logit(z, b) : add_rn(row.affinity[i], b);
        row.keys[i] = i < num_here ? score_key(score) : kUnavailable;
    }
}

template <int V>
XSHARE_DEVICE void strike_out_banned(const float (&logits)[V], int32_t (&keys)[V]) {
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) keys[i] = logits[i] == -infinity() ? kUnavailable : keys[i];
}

// Asked for before the logits have arrived, so that there is one wait for both.
template <int V>
XSHARE_DEVICE void load_bias(const RouteArgs& args, int num_here, float (&bias)[V]) {
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i)
        bias[i] = args.t.correction_bias != nullptr && i < num_here
                      ? args.t.correction_bias[device::lane() * V + i]
                      : 0.0f;
}

// Stage 1. A padding row gets no scores; nor does another of which the kind alone is asked for, as a rule.
template <int V>
XSHARE_DEVICE void score_row(const RouteArgs& args, int index, bool kind_alone, Row<V>& row) {
    const int num_here = max_of(0, min_of(V, args.p.num_experts - device::lane() * V));
    float logits[V], bias[V];
    bool has_bans;
    load_bias(args, num_here, bias);
    row.kind = load_row(args, index, logits, has_bans);
    row.own = {0, 0, kUnavailable};
    row.available = row.utility = 0;
    row.is_whole = false;
    if (row.kind == RowKind::kPadding || (kind_alone && !has_bans)) return;
    const ScoringRule rule = rule_of(args.p.scoring);
    if (rule.affinity == Affinity::kSoftmax)
        score_softmax(rule, bias, logits, num_here, row);
    else
        score_each(rule, bias, logits, num_here, row);
    if (has_bans) strike_out_banned(logits, row.keys);
    if (args.p.num_groups > 1) limit_groups(args, row.keys);
    if (!has_bans && args.t.masked_logits == nullptr) return;
    row.available = available_experts(row.keys);
    const uint32_t num_available = device::warp_add(static_cast<uint32_t>(device::num_bits(row.available)));
    if (num_available < static_cast<uint32_t>(args.p.top_k)) row.kind = RowKind::kPadding;
}

}  // namespace xshare

#endif  // XSHARE_CUDA_SCORE_CUH
