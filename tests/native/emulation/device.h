// SPDX-License-Identifier: Apache-2.0
// The primitives of plugins/cuda/device.cuh on the host. Included by it where the compiler is not nvcc.
#ifndef XSHARE_TESTS_EMULATION_DEVICE_H
#define XSHARE_TESTS_EMULATION_DEVICE_H

#include <stdint.h>
#include <string.h>

#include "emulation/fibers.h"

#define XSHARE_DEVICE [[maybe_unused]] static inline
#define XSHARE_DEVICE_METHOD inline
#define XSHARE_SHARED(Type, name) Type& name = *static_cast<Type*>(emulation::shared_memory(sizeof(Type)))
#define XSHARE_UNROLL

namespace xshare {
namespace device {

XSHARE_DEVICE int thread() { return emulation::place().thread; }
XSHARE_DEVICE int num_threads() { return emulation::place().num_threads; }
XSHARE_DEVICE int block() { return emulation::place().block; }
XSHARE_DEVICE int num_blocks() { return emulation::place().num_blocks; }

XSHARE_DEVICE void sync_block() { emulation::sync_block(); }
XSHARE_DEVICE void sync_warp() { emulation::sync_warp(); }

XSHARE_DEVICE uint64_t combine(emulation::WarpOperation operation, uint64_t value) {
    return emulation::combine_lanes(operation, value)[0];
}
XSHARE_DEVICE uint64_t lane_of(uint64_t value, int lane) {
    return emulation::combine_lanes(emulation::WarpOperation::kShuffle, value)[lane & 31];
}
XSHARE_DEVICE uint32_t ballot(bool vote) {
    return static_cast<uint32_t>(combine(emulation::WarpOperation::kBallot, vote));
}
XSHARE_DEVICE int32_t shuffle(int32_t value, int lane) {
    return static_cast<int32_t>(lane_of(static_cast<uint32_t>(value), lane));
}
XSHARE_DEVICE uint32_t shuffle(uint32_t value, int lane) {
    return static_cast<uint32_t>(lane_of(value, lane));
}
XSHARE_DEVICE float shuffle(float value, int lane) {
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits = shuffle(bits, lane);
    memcpy(&value, &bits, sizeof bits);
    return value;
}
XSHARE_DEVICE int32_t warp_max(int32_t value) {
    return static_cast<int32_t>(combine(emulation::WarpOperation::kMax, static_cast<uint32_t>(value)));
}
XSHARE_DEVICE uint32_t warp_add(uint32_t value) {
    return static_cast<uint32_t>(combine(emulation::WarpOperation::kAdd, value));
}
XSHARE_DEVICE int first_bit(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)) - 1; }
XSHARE_DEVICE int num_bits(uint32_t bits) { return __builtin_popcount(bits); }
XSHARE_DEVICE int bit_length(uint32_t bits) { return bits == 0 ? 0 : 32 - __builtin_clz(bits); }
XSHARE_DEVICE int bit_length(uint64_t bits) { return bits == 0 ? 0 : 64 - __builtin_clzll(bits); }

XSHARE_DEVICE uint32_t atomic_add(uint32_t* to, uint32_t value) {
    return __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}
XSHARE_DEVICE void atomic_add(uint64_t* to, uint64_t value) {
    __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}
XSHARE_DEVICE void atomic_or(uint32_t* to, uint32_t value) { __atomic_fetch_or(to, value, __ATOMIC_RELAXED); }
XSHARE_DEVICE void atomic_min(uint32_t* to, uint32_t value) {
    uint32_t there = __atomic_load_n(to, __ATOMIC_RELAXED);
    while (value < there &&
           !__atomic_compare_exchange_n(to, &there, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}
XSHARE_DEVICE uint32_t atomic_exchange_if(uint32_t* at, uint32_t expected, uint32_t value) {
    __atomic_compare_exchange_n(at, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}

// A wide load must be aligned, as on the device.
template <typename Chunk>
XSHARE_DEVICE Chunk load(const void* from) {
    if (reinterpret_cast<uintptr_t>(from) % alignof(Chunk) != 0) __builtin_trap();
    Chunk chunk;
    memcpy(&chunk, from, sizeof chunk);
    return chunk;
}

XSHARE_DEVICE int cluster_size() { return emulation::place().team_size; }
XSHARE_DEVICE int cluster_rank() { return emulation::place().block % emulation::place().team_size; }
template <typename Type>
XSHARE_DEVICE Type* of_peer(Type* shared, int rank) {
    return static_cast<Type*>(emulation::of_peer(shared, rank));
}
XSHARE_DEVICE void cluster_arrive() { emulation::arrive_team(); }
XSHARE_DEVICE void cluster_leave() { emulation::arrive_team(); }
XSHARE_DEVICE void cluster_wait() { emulation::wait_team(); }
XSHARE_DEVICE void await_previous_kernel() {}
XSHARE_DEVICE void allow_next_kernel() {}

}  // namespace device
}  // namespace xshare

#endif  // XSHARE_TESTS_EMULATION_DEVICE_H
