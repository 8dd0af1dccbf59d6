// SPDX-License-Identifier: Apache-2.0
// The outputs of one row, written by its warp.
#ifndef XSHARE_CUDA_WRITE_CUH
#define XSHARE_CUDA_WRITE_CUH

#include "cuda/row.cuh"

namespace xshare {

XSHARE_DEVICE float logit_at(const RouteArgs& args, int row, int expert) {
    const size_t at = first_logit(args, row) + static_cast<size_t>(expert);
    if (args.p.logits_dtype == XSHARE_FLOAT32) return static_cast<const float*>(args.t.router_logits)[at];
    return widen(static_cast<const uint16_t*>(args.t.router_logits)[at], args.p.logits_dtype);
}

// This lane's weight before it is normalised.
XSHARE_DEVICE float weigh(const RouteArgs& args, int row, const Picks& picks) {
    const int32_t first_key = device::shuffle(picks.key, 0);
    if (device::lane() >= picks.count) return 0.0f;
    if (args.p.scoring == XSHARE_SIGMOID_BIAS) return sigmoid_fixed(logit_at(args, row, picks.id));
    if (args.p.scoring != XSHARE_TOPK_SOFTMAX) return key_score(picks.key);
    return exp_fixed(sub_rn(key_score(picks.key), key_score(first_key)));
}

XSHARE_DEVICE float normalise(const RouteArgs& args, const Picks& picks, float weight) {
    float sum = 0.0f;
    for (int j = 0; j < picks.count; ++j)
        sum = add_rn(sum, device::shuffle(weight, j));  // in the order of the slots
    if (args.p.scoring != XSHARE_SOFTMAX && weight != 0.0f) weight = div_rn(weight, sum);
    return mul_rn(weight, args.p.routed_scaling_factor);
}

// One real row that found at least one expert.
template <int V>
XSHARE_DEVICE void write_row(const RouteArgs& args, int row, const Picks& picks, uint32_t* after) {
    const int lane = device::lane();
    const size_t at =
        static_cast<size_t>(row) * static_cast<size_t>(args.p.top_k) + static_cast<size_t>(lane);
    if (args.t.stats != nullptr && lane < picks.count) add_expert<V>(after, picks.id);
    const int32_t last_id = device::shuffle(picks.id, picks.count - 1);
    if (args.t.expert_ids != nullptr && lane < args.p.top_k)
        args.t.expert_ids[at] = lane < picks.count ? picks.id : last_id;
    if (args.t.expert_weights == nullptr) return;
    const float weight = normalise(args, picks, weigh(args, row, picks));
    if (lane < args.p.top_k) args.t.expert_weights[at] = lane < picks.count ? weight : 0.0f;
}

// The lowest ids of S: a row that is not real activates nothing new.
template <int V>
XSHARE_DEVICE void write_padding_row(const RouteArgs& args, int row, uint32_t active) {
    const int lane = device::lane();
    const size_t at =
        static_cast<size_t>(row) * static_cast<size_t>(args.p.top_k) + static_cast<size_t>(lane);
    int32_t keys[V];
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) keys[i] = active >> i & 1 ? -(lane * V + i) : kUnavailable;
    const Picks lowest = take_best(keys, args.p.top_k);
    const int32_t last_id = device::shuffle(lowest.id, lowest.count > 0 ? lowest.count - 1 : 0);
    if (lane >= args.p.top_k) return;
    if (args.t.expert_ids != nullptr) args.t.expert_ids[at] = lane < lowest.count ? lowest.id : last_id;
    if (args.t.expert_weights != nullptr) args.t.expert_weights[at] = 0.0f;
}

XSHARE_DEVICE uint32_t minus_infinity(int32_t dtype) {
    return dtype == XSHARE_FLOAT32 ? 0xff800000u : dtype == XSHARE_BFLOAT16 ? 0xff80u : 0xfc00u;
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
        const uint32_t value = allowed >> i & 1 ? kept : minus_infinity(args.p.logits_dtype);
        const size_t to = at + static_cast<size_t>(expert);
        if (args.p.logits_dtype == XSHARE_FLOAT32)
            static_cast<float*>(args.t.masked_logits)[to] = bits_float(static_cast<int32_t>(value));
        else
            static_cast<uint16_t*>(args.t.masked_logits)[to] = static_cast<uint16_t>(value);
    }
}

}  // namespace xshare

#endif  // XSHARE_CUDA_WRITE_CUH
