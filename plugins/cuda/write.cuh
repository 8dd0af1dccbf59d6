// SPDX-License-Identifier: Apache-2.0
// The outputs of one row, written by its warp.
#ifndef XSHARE_CUDA_WRITE_CUH
#define XSHARE_CUDA_WRITE_CUH

#include "core/masking.h"
#include "cuda/row.cuh"

namespace xshare {

XSHARE_DEVICE float logit_at(const RouteArgs& args, int row, int expert) {
    const size_t at = first_logit(args, row) + static_cast<size_t>(expert);
    if (args.p.logits_dtype == XSHARE_FLOAT32) return static_cast<const float*>(args.t.router_logits)[at];
    return widen(static_cast<const uint16_t*>(args.t.router_logits)[at], args.p.logits_dtype);
}

// This lane's pick of a softmax over the row, whose scores are no longer there.
XSHARE_DEVICE float softmax_at(const RouteArgs& args, int row, const Picks& picks) {
    int32_t largest = kUnavailable;
    for (int e = device::lane(); e < args.p.num_experts; e += device::kWarpSize)
        largest = max_of(largest, score_key(logit_at(args, row, e)));
    const float peak = key_score(device::warp_max(largest));
    uint64_t sum = 0;
    for (int e = device::lane(); e < args.p.num_experts; e += device::kWarpSize)
        sum += softmax_term(exp_fixed(sub_rn(logit_at(args, row, e), peak))) - softmax_term(0.0f);
    const float scale = softmax_scale(device::warp_add_wide(sum), 0);
    return picks.is_here() ? mul_rn(exp_fixed(sub_rn(logit_at(args, row, picks.id), peak)), scale) : 0.0f;
}

// This lane's weight before it is normalised.
XSHARE_DEVICE float weigh_plainly(const RouteArgs& args, int row, const Picks& picks) {
    const ScoringRule rule = rule_of(args.p.scoring);
    if (rule.affinity == Affinity::kSoftmax && rule.has_bias) return softmax_at(args, row, picks);
    const int32_t first_key = device::shuffle(picks.key, device::first_bit(picks.lanes));
    if (!picks.is_here()) return 0.0f;
    if (rule.weighs_by_ranking()) return key_score(picks.key);
    if (rule.weighs_by_logits()) return exp_fixed(sub_rn(key_score(picks.key), key_score(first_key)));
    const float z = logit_at(args, row, picks.id);
    return rule.affinity == Affinity::kSigmoid ? sigmoid_fixed(z) : sqrt_softplus_fixed(z);
}

// The model's weight of this lane's pick, before scaling; `picks` is not empty.
XSHARE_DEVICE float weigh(const RouteArgs& args, int row, const Picks& picks) {
    const float weight = weigh_plainly(args, row, picks);
    if (!rule_of(args.p.scoring).renormalises) return weight;
    float sum = 0.0f;
    for (uint32_t rest = picks.lanes; rest != 0; rest &= rest - 1)  // in the order of the slots
        sum = add_rn(sum, device::shuffle(weight, device::first_bit(rest)));
    return weight != 0.0f ? div_rn(weight, sum) : 0.0f;
}

XSHARE_DEVICE void write_slot(const RouteArgs& args, int row, int slot, int32_t id, float weight) {
    const size_t at =
        static_cast<size_t>(row) * static_cast<size_t>(args.p.top_k) + static_cast<size_t>(slot);
    if (args.t.expert_ids != nullptr) args.t.expert_ids[at] = id;
    if (args.t.expert_weights != nullptr) args.t.expert_weights[at] = weight;
}

// One real row that found at least one expert.
XSHARE_DEVICE void write_row(const RouteArgs& args, int row, const Picks& picks, float weight) {
    if (picks.is_here())
        write_slot(args, row, picks.slot(), picks.id, mul_rn(weight, args.p.routed_scaling_factor));
    const int count = picks.count(), lane = device::lane();
    if (count == args.p.top_k) return;
    const int32_t last_id = device::shuffle(picks.id, device::bit_length(picks.lanes) - 1);
    if (lane >= count && lane < args.p.top_k) write_slot(args, row, lane, last_id, 0.0f);
}

// The lowest ids of S: a row that is not real activates nothing new. `after` is for one that was.
template <int V>
XSHARE_DEVICE void write_padding_row(const RouteArgs& args, int row, uint32_t active, bool is_written,
                                     uint32_t* after) {
    const int lane = device::lane();
    int32_t keys[V];
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) keys[i] = active >> i & 1 ? -(lane * V + i) : kUnavailable;
    const Picks lowest = take_best(keys, args.p.top_k);
    const int32_t last_id = device::shuffle(lowest.id, max_of(lowest.count() - 1, 0));
    if (lane >= args.p.top_k) return;
    const int32_t id = lowest.is_here() ? lowest.id : last_id;
    if (is_written) write_slot(args, row, lane, id, 0.0f);
    if (after != nullptr) add_expert<V>(after, id);
}

// This lane's part of a row of masked_logits: its logits (0 for padding) where its bit in `allowed` is set.
template <int V>
XSHARE_DEVICE void write_masked(const RouteArgs& args, int row, bool padding, uint32_t allowed) {
    uint32_t bits[V];
    load_bits(args, row, bits);
    const size_t at = first_logit(args, row);
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) {
        const int expert = device::lane() * V + i;
        if (expert >= args.p.num_experts) break;
        const uint32_t kept = padding ? 0 : bits[i];
        const uint32_t value = allowed >> i & 1 ? kept : mask_bits(args.p);
        const size_t to = at + static_cast<size_t>(expert);
        if (args.p.logits_dtype == XSHARE_FLOAT32)
            static_cast<float*>(args.t.masked_logits)[to] = bits_float(static_cast<int32_t>(value));
        else
            static_cast<uint16_t*>(args.t.masked_logits)[to] = static_cast<uint16_t>(value);
    }
}

}  // namespace xshare

#endif  // XSHARE_CUDA_WRITE_CUH
