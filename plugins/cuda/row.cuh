// SPDX-License-Identifier: Apache-2.0
// How experts lie in a warp, a row's logits, and the choice of its best. Lane l holds the V neighbouring
// experts from l * V on, in registers: loads are wide, and the lowest lane with the largest key holds the
// lowest expert id that has it.
//
// A set has one word per lane: bit i of word l is the expert l * V + i. Sums lie so that a warp touches every
// bank once: the expert l * V + i is at i * 32 + l.
#ifndef XSHARE_CUDA_ROW_CUH
#define XSHARE_CUDA_ROW_CUH

#include "core/ordering.h"
#include "core/rules.h"
#include "core/scoring.h"
#include "cuda/args.h"
#include "cuda/device.cuh"

namespace xshare {

XSHARE_DEVICE float infinity() { return bits_float(0x7f800000); }

enum class RowKind { kPadding, kExempt, kShared };

// What a warp picked, best first: the lanes that hold an expert, and this lane's.
struct Picks {
    uint32_t lanes;
    int32_t id;
    int32_t key;

    XSHARE_DEVICE_METHOD int count() const { return device::num_bits(lanes); }
    XSHARE_DEVICE_METHOD bool is_here() const { return lanes >> device::lane() & 1; }
    XSHARE_DEVICE_METHOD int slot() const { return device::num_bits(lanes & device::lower_lanes()); }
};

template <int V>
struct Row {
    RowKind kind;
    int32_t keys[V];     // of R; kUnavailable where the row must not go, and of `own`
    float affinity[V];   // A; 0 beyond the last expert
    uint32_t available;  // where the row may go, if masked_logits are asked for: this lane's bits
    Picks own;           // the best of all experts, as far as they have been picked
    uint32_t utility;    // of this lane's pick in `own`: its squared weight
    float weight;        // of this lane's pick in `own`
    bool is_whole;       // `own` is the row's own choice as a whole
};

template <int V>
XSHARE_DEVICE int place_of(int expert) {
    return expert % V * device::kWarpSize + expert / V;
}

template <int V>
XSHARE_DEVICE int expert_at(int place) {
    return place % device::kWarpSize * V + place / device::kWarpSize;
}

template <int V>
XSHARE_DEVICE bool has(const uint32_t* set, int expert) {
    return set[expert / V] >> (expert % V) & 1;
}

template <int V>
XSHARE_DEVICE void add_expert(uint32_t* set, int expert) {
    device::atomic_or(&set[expert / V], 1u << (expert % V));
}

XSHARE_DEVICE int32_t max_of(int32_t a, int32_t b) { return a > b ? a : b; }
XSHARE_DEVICE int32_t min_of(int32_t a, int32_t b) { return a < b ? a : b; }

XSHARE_DEVICE float widen(uint32_t bits, int32_t dtype) {
    if (dtype == XSHARE_FLOAT32) return bits_float(static_cast<int32_t>(bits));
    return dtype == XSHARE_BFLOAT16 ? widen_bf16(static_cast<uint16_t>(bits))
                                    : widen_fp16(static_cast<uint16_t>(bits));
}

XSHARE_DEVICE size_t first_logit(const RouteArgs& args, int row) {
    return static_cast<size_t>(row) * static_cast<size_t>(args.p.num_experts);
}

template <int kWords>
struct alignas(4 * kWords) Chunk {
    uint32_t words[kWords];
};

// The words of V elements, in the widest loads that divide them.
template <int kWords>
XSHARE_DEVICE void load_words(const void* from, uint32_t (&words)[kWords]) {
    constexpr int kChunk = kWords % 4 == 0 ? 4 : kWords % 2 == 0 ? 2 : 1;
    XSHARE_UNROLL
    for (int c = 0; c < kWords / kChunk; ++c) {
        const auto chunk =
            device::load<Chunk<kChunk>>(static_cast<const unsigned char*>(from) + c * 4 * kChunk);
        XSHARE_UNROLL
        for (int w = 0; w < kChunk; ++w) words[c * kChunk + w] = chunk.words[w];
    }
}

// Whether every lane's part of every row is there as a whole and aligned for load_words.
template <int V>
XSHARE_DEVICE bool loads_are_wide(const RouteArgs& args) {
    const bool halves = args.p.logits_dtype != XSHARE_FLOAT32;
    return args.p.num_experts % V == 0 && reinterpret_cast<uintptr_t>(args.t.router_logits) % 16 == 0 &&
           !(halves && V == 1);
}

// The bits of this lane's logits, 0 beyond the last expert.
template <int V>
XSHARE_DEVICE void load_bits(const RouteArgs& args, int row, uint32_t (&bits)[V]) {
    const int first = device::lane() * V;
    const size_t at = first_logit(args, row) + static_cast<size_t>(first);
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) bits[i] = 0;
    if (first >= args.p.num_experts) return;
    const float* floats = static_cast<const float*>(args.t.router_logits) + at;
    const uint16_t* halves = static_cast<const uint16_t*>(args.t.router_logits) + at;
    if (!loads_are_wide<V>(args)) {
        XSHARE_UNROLL
        for (int i = 0; i < V; ++i)
            if (first + i < args.p.num_experts)
                bits[i] = args.p.logits_dtype == XSHARE_FLOAT32 ? static_cast<uint32_t>(float_bits(floats[i]))
                                                                : halves[i];
    } else if (args.p.logits_dtype == XSHARE_FLOAT32) {
        load_words<V>(floats, bits);
    } else {
        uint32_t words[(V + 1) / 2];
        load_words(halves, words);
        XSHARE_UNROLL
        for (int i = 0; i < V; ++i) bits[i] = i % 2 == 0 ? words[i / 2] & 0xffffu : words[i / 2] >> 16;
    }
}

// Stage 0: the row's logits, 0 beyond the last expert, and what kind of row it is, unless its bans (-inf)
// leave it too few experts.
template <int V>
XSHARE_DEVICE RowKind load_row(const RouteArgs& args, int index, float (&logits)[V], bool& has_bans) {
    uint32_t bits[V];
    load_bits(args, index, bits);
    const bool names_nobody = args.t.request_ids != nullptr && args.t.request_ids[index] < 0;
    const bool exempt = args.is_marked_exempt(index);
    bool readable = true, banned = false;
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) {
        logits[i] = widen(bits[i], args.p.logits_dtype);
        readable = readable && logits[i] < infinity();
        banned = banned || logits[i] == -infinity();
    }
    has_bans = device::ballot(banned) != 0;
    if (device::ballot(!readable) != 0 || names_nobody) return RowKind::kPadding;
    return exempt ? RowKind::kExempt : RowKind::kShared;
}

struct Best {
    int32_t key, id;
};

// The best of the keys, which is made unavailable; its key says if there was none.
template <int V>
XSHARE_DEVICE Best strike_out_best(int32_t (&keys)[V]) {
    int32_t best = keys[0];
    int place = 0;
    XSHARE_UNROLL
    for (int i = 1; i < V; ++i) {
        place = keys[i] > best ? i : place;
        best = max_of(best, keys[i]);
    }
    const int32_t top = device::warp_max(best);
    if (top == kUnavailable) return {top, 0};
    const uint32_t equal = device::ballot(best == top);
    const bool is_mine = best == top && (equal & device::lower_lanes()) == 0;
    const int taken = is_mine ? place : V;  // known here before the id is known everywhere
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) keys[i] = i == taken ? kUnavailable : keys[i];
    return {top, device::shuffle(device::lane() * V + place, device::first_bit(equal))};
}

// The `k` best of the keys, which are made unavailable, into the lanes from `first` on.
template <int V>
XSHARE_DEVICE void take_best(int32_t (&keys)[V], int k, int first, Picks& picks) {
    for (int to = first; to < first + k; ++to) {
        const Best best = strike_out_best(keys);
        if (best.key == kUnavailable) break;
        picks.lanes |= 1u << to;
        if (device::lane() != to) continue;
        picks.id = best.id;
        picks.key = best.key;
    }
}

template <int V>
XSHARE_DEVICE Picks take_best(int32_t (&keys)[V], int k) {
    Picks picks = {0, 0, kUnavailable};
    take_best(keys, k, 0, picks);
    return picks;
}

// This lane's bits.
template <int V>
XSHARE_DEVICE uint32_t available_experts(const int32_t (&keys)[V]) {
    uint32_t available = 0;
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) available |= static_cast<uint32_t>(keys[i] != kUnavailable) << i;
    return available;
}

}  // namespace xshare

#endif  // XSHARE_CUDA_ROW_CUH
