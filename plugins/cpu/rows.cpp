// SPDX-License-Identifier: Apache-2.0
// Built once per instruction set with XSHARE_ISA naming it. Everything here is static or in that namespace,
// and nothing of the standard library is used, so that no function built for a newer CPU can be linked into
// the other copy. Loops are plain for the compiler to vectorise: integer reductions, selects instead of
// branches.
#include "cpu/rows.h"

#include "core/ordering.h"
#include "core/rules.h"
#include "core/scoring.h"

namespace xshare {
namespace XSHARE_ISA {

// Four int32 at a time where a loop over one block would be unrolled into scalars. GCC's and Clang's vector
// extension: the same code is SSE, AVX or NEON.
typedef int32_t Lanes __attribute__((vector_size(16)));
constexpr int kLanes = 4;

XSHARE_FN Lanes load_lanes(const int32_t* values) {
    Lanes lanes;
    memcpy(&lanes, values, sizeof lanes);
    return lanes;
}

XSHARE_FN Lanes max_lanes(Lanes a, Lanes b) { return a > b ? a : b; }
XSHARE_FN Lanes min_lanes(Lanes a, Lanes b) { return a < b ? a : b; }
XSHARE_FN int32_t max_of_two(int32_t a, int32_t b) { return a > b ? a : b; }
XSHARE_FN int32_t min_of_two(int32_t a, int32_t b) { return a < b ? a : b; }

static int32_t max_of(const int32_t* values, int n) {
    int32_t best = kUnavailable;
    for (int i = 0; i < n; ++i) best = max_of_two(best, values[i]);
    return best;
}

struct Best {
    int32_t key;
    int32_t place;
};

// The largest key of `kCount` vectors and the first place that holds it.
template <int kCount>
XSHARE_FN Best best_of(const Lanes (&keys)[kCount]) {
    Lanes best = keys[0];
    Lanes places = {0, 1, 2, 3};
    Lanes these = places;
    for (int i = 1; i < kCount; ++i) {
        these += kLanes;
        const Lanes better = keys[i] > best;  // strictly: within a lane the lower place stays
        best = better ? keys[i] : best;
        places = better ? these : places;
    }
    int64_t first = INT64_MIN;
    for (int lane = 0; lane < kLanes; ++lane) {
        const uint64_t high = static_cast<uint64_t>(static_cast<uint32_t>(best[lane])) << 32;
        const int64_t pair = static_cast<int64_t>(high | static_cast<uint32_t>(INT32_MAX - places[lane]));
        first = pair > first ? pair : first;
    }
    return {static_cast<int32_t>(first >> 32), INT32_MAX - static_cast<int32_t>(first & INT32_MAX)};
}

template <int kCount>
XSHARE_FN int32_t max_of(const Lanes (&keys)[kCount]) {
    Lanes best = keys[0];
    for (int i = 1; i < kCount; ++i) best = max_lanes(best, keys[i]);
    return max_of_two(max_of_two(best[0], best[1]), max_of_two(best[2], best[3]));
}

// keys[place] = key, without a round trip through memory.
template <int kCount>
XSHARE_FN void put(Lanes (&keys)[kCount], int32_t place, int32_t key) {
    Lanes these = {0, 1, 2, 3};
    for (int i = 0; i < kCount; ++i, these += kLanes) keys[i] = these == place ? Lanes{} + key : keys[i];
}

static int count_finite(const void* logits, int32_t dtype, int n) {
    int finite = 0, banned = 0;
    if (dtype == XSHARE_FLOAT32) {
        const uint32_t* bits = static_cast<const uint32_t*>(logits);
        for (int i = 0; i < n; ++i) {
            finite += (bits[i] & 0x7f800000u) != 0x7f800000u;
            banned += bits[i] == 0xff800000u;
        }
        return finite + banned == n ? finite : -1;
    }
    const uint16_t infinity = dtype == XSHARE_BFLOAT16 ? 0x7f80 : 0x7c00;
    const uint16_t minus_infinity = static_cast<uint16_t>(infinity | 0x8000);
    const uint16_t* bits = static_cast<const uint16_t*>(logits);
    for (int i = 0; i < n; ++i) {
        finite += (bits[i] & infinity) != infinity;
        banned += bits[i] == minus_infinity;
    }
    return finite + banned == n ? finite : -1;
}

static void widen(const void* logits, int32_t dtype, int n, float* out) {
    const float* as_float = static_cast<const float*>(logits);
    const uint16_t* as_half = static_cast<const uint16_t*>(logits);
    if (dtype == XSHARE_FLOAT32)
        for (int i = 0; i < n; ++i) out[i] = as_float[i];
    else if (dtype == XSHARE_BFLOAT16)
        for (int i = 0; i < n; ++i) out[i] = widen_bf16(as_half[i]);
    else
        for (int i = 0; i < n; ++i) out[i] = widen_fp16(as_half[i]);
}

// The affinities of a softmax; `keys` holds the keys of the logits.
static void softmax(const float* logits, const int32_t* keys, int n, float* affinity) {
    const float largest = key_score(max_of(keys, n));
    uint64_t sum = 0;
    for (int i = 0; i < n; ++i) {
        const float e = exp_fixed(sub_rn(logits[i], largest));
        affinity[i] = e;
        sum += softmax_term(e);
    }
    const float scale = softmax_scale(sum, n);
    for (int i = 0; i < n; ++i) affinity[i] = mul_rn(affinity[i], scale);
}

// Best plus second best of a group; unavailable where it has no two.
static int32_t best_two_key(const int32_t* keys, int n) {
    Lanes firsts = Lanes{} + kUnavailable, seconds = firsts;
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Lanes next = load_lanes(keys + i);
        seconds = max_lanes(seconds, min_lanes(firsts, next));
        firsts = max_lanes(firsts, next);
    }
    int32_t first = kUnavailable, second = kUnavailable;
    auto take = [&](int32_t key) {
        second = max_of_two(second, min_of_two(first, key));
        first = max_of_two(first, key);
    };
    for (int lane = 0; lane < kLanes; ++lane) {
        take(firsts[lane]);
        take(seconds[lane]);
    }
    for (; i < n; ++i) take(keys[i]);
    if (second == kUnavailable) return kUnavailable;
    return score_key(add_rn(key_score(first), key_score(second)));
}

// Repeated maximum over the best of each block, which stay in registers; the block that lost its best is
// looked at again.
template <int kMaxBlocks>
XSHARE_FN int top_k_of_blocks(int32_t* keys, int num_blocks, int k, int32_t* places, int32_t* best_keys) {
    alignas(16) int32_t block_best[kMaxBlocks];
    Lanes in_block[kBlock / kLanes], tops[kMaxBlocks / kLanes];
    for (int b = 0; b < kMaxBlocks; ++b) block_best[b] = kUnavailable;
    for (int b = 0; b < num_blocks; ++b) {
        memcpy(in_block, keys + b * kBlock, sizeof in_block);
        block_best[b] = max_of(in_block);
    }
    memcpy(tops, block_best, sizeof tops);
    int found = 0;
    for (; found < k; ++found) {
        const Best block = best_of(tops);
        if (block.key == kUnavailable) break;
        memcpy(in_block, keys + block.place * kBlock, sizeof in_block);
        const int32_t place = best_of(in_block).place;
        put(in_block, place, kUnavailable);
        put(tops, block.place, max_of(in_block));
        places[found] = block.place * kBlock + place;
        best_keys[found] = block.key;
        keys[places[found]] = kUnavailable;
    }
    for (int j = 0; j < found; ++j) keys[places[j]] = best_keys[j];
    return found;
}

static int top_k(int32_t* keys, int length, int k, int32_t* places, int32_t* best_keys) {
    const int num_blocks = length / kBlock;
    if (num_blocks <= 8) return top_k_of_blocks<8>(keys, num_blocks, k, places, best_keys);
    if (num_blocks <= 16) return top_k_of_blocks<16>(keys, num_blocks, k, places, best_keys);
    return top_k_of_blocks<32>(keys, num_blocks, k, places, best_keys);
}

// Makes the experts outside the row's best groups unavailable.
static void limit_groups(const xshare_route_params& params, int32_t* keys) {
    const int groups = params.num_groups;
    const int size = params.num_experts / groups, best_of = rule_of(params.scoring).group_best_of;
    int32_t group_keys[kMaxExperts], chosen[kMaxExperts], unused[kMaxExperts];
    for (int g = 0; g < groups; ++g)
        group_keys[g] = best_of == 2 ? best_two_key(keys + g * size, size) : max_of(keys + g * size, size);
    for (int g = groups; g < padded(groups); ++g) group_keys[g] = kUnavailable;
    const int found = top_k(group_keys, padded(groups), params.top_k_groups, chosen, unused);
    bool allowed[kMaxExperts] = {};
    for (int j = 0; j < found; ++j) allowed[chosen[j]] = true;
    for (int g = 0; g < groups; ++g)
        for (int i = 0; !allowed[g] && i < size; ++i) keys[g * size + i] = kUnavailable;
}

// `keys` holds the keys of the logits for a softmax.
static void score_affinity(Affinity kind, const float* logits, const int32_t* keys, int n, float* affinity) {
    if (kind == Affinity::kSoftmax)
        softmax(logits, keys, n, affinity);
    else if (kind == Affinity::kSigmoid)
        for (int i = 0; i < n; ++i) affinity[i] = sigmoid_fixed(logits[i]);
    else
        for (int i = 0; i < n; ++i) affinity[i] = sqrt_softplus_fixed(logits[i]);
}

// `keys` holds the keys of the logits for a ranking by them.
static void rank(const ScoringRule& rule, const float* logits, const float* affinity, const float* bias,
                 int n, int32_t* keys) {
    if (rule.ranked_by == RankedBy::kLogits && bias == nullptr) return;
    if (rule.ranked_by == RankedBy::kLogits) {
        for (int i = 0; i < n; ++i) keys[i] = score_key(add_bias_to_logit(logits[i], bias[i]));
    } else if (bias != nullptr) {
        for (int i = 0; i < n; ++i) keys[i] = score_key(add_rn(affinity[i], bias[i]));
    } else {
        for (int i = 0; i < n; ++i) keys[i] = float_bits(affinity[i]);
    }
}

static void score(const xshare_route_params& params, const void* logits, const float* bias, RowScores& scores,
                  int32_t* keys) {
    const int n = params.num_experts;
    float* z = scores.logits;
    float* affinity = scores.affinity;
    widen(logits, params.logits_dtype, n, z);
    const ScoringRule rule = rule_of(params.scoring);
    if (rule.affinity == Affinity::kSoftmax || rule.ranked_by == RankedBy::kLogits)
        for (int i = 0; i < n; ++i) keys[i] = score_key(z[i]);
    score_affinity(rule.affinity, z, keys, n, affinity);
    rank(rule, z, affinity, bias, n, keys);
    const float lowest = -3.402823466e+38f;
    for (int i = 0; i < n; ++i) keys[i] = z[i] < lowest ? kUnavailable : keys[i];
    for (int i = n; i < padded(n); ++i) keys[i] = kUnavailable;
    if (params.num_groups > 1) limit_groups(params, keys);
}

static void accumulate(const float* affinity, int n, int64_t* sums) {
    for (int i = 0; i < n; ++i) sums[i] += fixed_point(affinity[i]);
}

static void add(const int64_t* part, int n, int64_t* total) {
    for (int i = 0; i < n; ++i) total[i] += part[i];
}

static void mask(const void* logits, int32_t dtype, uint32_t mask_bits, const int32_t* allowed,
                 const int32_t* keys, int n, void* masked) {
    if (dtype == XSHARE_FLOAT32) {
        const uint32_t* in = static_cast<const uint32_t*>(logits);
        uint32_t* out = static_cast<uint32_t*>(masked);
        for (int i = 0; i < n; ++i)
            out[i] = (allowed[i] != 0) & (keys[i] != kUnavailable) ? in[i] : mask_bits;
        return;
    }
    const uint16_t no = static_cast<uint16_t>(mask_bits);
    const uint16_t* in = static_cast<const uint16_t*>(logits);
    uint16_t* out = static_cast<uint16_t*>(masked);
    for (int i = 0; i < n; ++i) out[i] = (allowed[i] != 0) & (keys[i] != kUnavailable) ? in[i] : no;
}

#define XSHARE_STRING(x) #x
#define XSHARE_NAME(x) XSHARE_STRING(x)
extern const RowKernels kernels;
const RowKernels kernels = {XSHARE_NAME(XSHARE_ISA), count_finite, score, accumulate, top_k, add, mask};

}  // namespace XSHARE_ISA
}  // namespace xshare
