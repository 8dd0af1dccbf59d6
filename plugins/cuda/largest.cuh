// SPDX-License-Identifier: Apache-2.0
// The largest of some sums, in one warp and without sorting them: the least of those that are taken is found
// bit by bit, at a cost that does not grow with how many are taken. Sums lie as in row.cuh: lane l has
// those of the experts from l * V on.
#ifndef XSHARE_CUDA_LARGEST_CUH
#define XSHARE_CUDA_LARGEST_CUH

#include "cuda/row.cuh"

namespace xshare {

// Of some sums: how many they are and what they add up to.
struct Extent {
    uint32_t count;
    uint64_t sum;
};

// No more than `room` are taken.
struct Room {
    static constexpr bool kNeedsSum = false;
    uint32_t room;

    XSHARE_DEVICE_METHOD bool is_met(const Extent& taken) const { return taken.count >= room; }
};

// Nor more than it takes until they are `least` and add up to `enough`.
struct RoomAndCoverage {
    static constexpr bool kNeedsSum = true;
    uint32_t room, least;
    uint64_t enough;

    XSHARE_DEVICE_METHOD bool is_met(const Extent& taken) const {
        return taken.count >= room || (taken.count >= least && taken.sum >= enough);
    }
};

XSHARE_DEVICE double as_double(uint64_t sum) { return static_cast<double>(static_cast<int64_t>(sum)); }

// The least integer that is not below `coverage * total`, for totals below 2^53.
XSHARE_DEVICE uint64_t share_of(double coverage, uint64_t total) {
    const double enough = coverage * as_double(total);
    const uint64_t whole = static_cast<uint64_t>(enough);
    return whole + (as_double(whole) < enough ? 1 : 0);
}

// Of a lane's sums in a step, which are at most 2^28 each, 32 bits hold up to 15.
template <bool kFits>
struct SumType {
    using Type = uint64_t;
};
template <>
struct SumType<true> {
    using Type = uint32_t;
};
template <int V, typename Sum>
using SumOfLane = typename SumType<sizeof(Sum) == 4 && (V < 16)>::Type;

// 1 or 0, for sums below half of what the type holds: less to execute than a comparison whose outcome is
// added.
template <typename Sum>
XSHARE_DEVICE uint32_t is_less(Sum a, Sum b) {
    return static_cast<uint32_t>((a - b) >> (8 * sizeof(Sum) - 1));
}

template <bool kNeedsSum, int V, typename Sum>
XSHARE_DEVICE Extent extent_above(const Sum (&sums)[V], Sum bound) {
    uint32_t count = 0;
    SumOfLane<V, Sum> sum = 0;
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) {
        count += is_less(bound, sums[i]);
        if (kNeedsSum) sum += sums[i] > bound ? sums[i] : 0;
    }
    return {device::warp_add(count), kNeedsSum ? device::warp_add_wide(sum) : 0};
}

template <int V, typename Sum>
XSHARE_DEVICE int bits_of_largest(const Sum (&sums)[V]) {
    Sum any = 0;
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) any |= sums[i];
    return device::warp_max(device::bit_length(any));
}

// A bound from which on the sums that are not 0 are those to take, but for some of those equal to it: by two
// bits at a time, of the largest from which on the sums meet the limit. A count takes 10 bits, so one
// reduction counts for three bounds. The rest of the bits is not needed once only one sum may be the last, or
// the room is just met.
template <int V, typename Sum, typename Limit>
XSHARE_DEVICE Sum find_bound(const Sum (&sums)[V], const Limit& limit) {
    constexpr uint32_t kCount = V * device::kWarpSize, kMask = (1 << 10) - 1;
    static_assert(kCount <= kMask, "a count takes 10 bits");
    Sum bound = 0;
    uint32_t count = kCount, count_above = 0;  // from the bound on, and from the next that is too large
    for (int b = (bits_of_largest(sums) - 1) & ~1; b >= 0; b -= 2) {
        const Sum unit = static_cast<Sum>(1) << b;
        uint32_t less[3] = {};
        SumOfLane<V, Sum> from[3] = {};
        XSHARE_UNROLL
        for (int i = 0; i < V; ++i) {
            XSHARE_UNROLL
            for (uint32_t d = 0; d < 3; ++d) {
                const Sum next = bound | (d + 1) * unit;
                less[d] += is_less(sums[i], next);
                if (Limit::kNeedsSum) from[d] += sums[i] >= next ? sums[i] : 0;
            }
        }
        const uint32_t packed = device::warp_add(less[0] | less[1] << 10 | less[2] << 20);
        uint32_t digit = 0;
        XSHARE_UNROLL
        for (uint32_t d = 0; d < 3; ++d) {
            const uint32_t here = kCount - (packed >> 10 * d & kMask);
            const bool met = limit.is_met({here, Limit::kNeedsSum ? device::warp_add_wide(from[d]) : 0});
            if (digit == d) (met ? count : count_above) = here;
            digit += digit == d && met;
        }
        bound |= digit * unit;
        if (Limit::kNeedsSum ? count - count_above <= 1 : count == limit.room) break;
    }
    return bound;
}

// Walks down the sums, the lower id first among equals, and takes those that are not 0 until the limit is
// met: this lane's bits of the set.
template <int V, typename Sum, typename Limit>
XSHARE_DEVICE uint32_t take_largest(const Sum (&sums)[V], const Limit& limit) {
    if (limit.is_met({0, 0})) return 0;
    const Sum bound = find_bound(sums, limit);
    const Extent larger = extent_above<Limit::kNeedsSum>(sums, bound);
    uint32_t equal_before = 0;
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i)
        equal_before += device::num_bits(device::ballot(sums[i] == bound) & device::lower_lanes());
    uint32_t taken = 0;
    XSHARE_UNROLL
    for (int i = 0; i < V; ++i) {
        const Extent before = {larger.count + equal_before, larger.sum + equal_before * uint64_t{bound}};
        const bool last = sums[i] == bound && bound != 0 && !limit.is_met(before);
        taken |= static_cast<uint32_t>(sums[i] > bound || last) << i;
        equal_before += sums[i] == bound;
    }
    return taken;
}

}  // namespace xshare

#endif  // XSHARE_CUDA_LARGEST_CUH
