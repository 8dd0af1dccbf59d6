// SPDX-License-Identifier: Apache-2.0
// Every device primitive that the kernels use. A build without nvcc takes them from tests/native/emulation,
// which runs the threads of a launch on the host. Warps are always whole: blocks have a multiple of 32
// threads, and all lanes call a warp primitive together.
//
// A team is the blocks of one launch that see each other's shared memory: a cluster from sm_90 on, one block
// before it (Team, below).
#ifndef XSHARE_CUDA_DEVICE_CUH
#define XSHARE_CUDA_DEVICE_CUH

#include <stdint.h>

#if !defined(__CUDACC__)

#include "emulation/device.h"

#else

#define XSHARE_DEVICE static __device__ __forceinline__
#define XSHARE_DEVICE_METHOD __device__ __forceinline__
#define XSHARE_SHARED(Type, name) __shared__ Type name
#define XSHARE_UNROLL _Pragma("unroll")

namespace xshare {
namespace device {

constexpr unsigned kAllLanes = 0xffffffffu;

XSHARE_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
XSHARE_DEVICE int num_threads() { return static_cast<int>(blockDim.x); }
XSHARE_DEVICE int block() { return static_cast<int>(blockIdx.x); }
XSHARE_DEVICE int num_blocks() { return static_cast<int>(gridDim.x); }

XSHARE_DEVICE void sync_block() { __syncthreads(); }
XSHARE_DEVICE void sync_warp() { __syncwarp(); }

XSHARE_DEVICE uint32_t ballot(bool vote) { return __ballot_sync(kAllLanes, vote); }
XSHARE_DEVICE int32_t shuffle(int32_t value, int lane) { return __shfl_sync(kAllLanes, value, lane); }
XSHARE_DEVICE uint32_t shuffle(uint32_t value, int lane) { return __shfl_sync(kAllLanes, value, lane); }
XSHARE_DEVICE float shuffle(float value, int lane) { return __shfl_sync(kAllLanes, value, lane); }
XSHARE_DEVICE int32_t warp_max(int32_t value) { return __reduce_max_sync(kAllLanes, value); }
XSHARE_DEVICE uint32_t warp_add(uint32_t value) { return __reduce_add_sync(kAllLanes, value); }
XSHARE_DEVICE int first_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }
XSHARE_DEVICE int num_bits(uint32_t bits) { return __popc(bits); }
XSHARE_DEVICE int bit_length(uint32_t bits) { return 32 - __clz(static_cast<int>(bits)); }
XSHARE_DEVICE int bit_length(uint64_t bits) { return 64 - __clzll(static_cast<long long>(bits)); }

XSHARE_DEVICE uint32_t atomic_add(uint32_t* to, uint32_t value) { return atomicAdd(to, value); }
XSHARE_DEVICE void atomic_add(uint64_t* to, uint64_t value) {
    atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}
XSHARE_DEVICE void atomic_or(uint32_t* to, uint32_t value) { atomicOr(to, value); }
XSHARE_DEVICE void atomic_min(uint32_t* to, uint32_t value) { atomicMin(to, value); }
// What was there: `expected` if the exchange took place.
XSHARE_DEVICE uint32_t atomic_exchange_if(uint32_t* at, uint32_t expected, uint32_t value) {
    return atomicCAS(at, expected, value);
}

// A load as wide as `Chunk`.
template <typename Chunk>
XSHARE_DEVICE Chunk load(const void* from) {
    return *static_cast<const Chunk*>(from);
}

#if __CUDA_ARCH__ >= 900

XSHARE_DEVICE int cluster_size() { return static_cast<int>(__clusterSizeInBlocks()); }
XSHARE_DEVICE int cluster_rank() { return static_cast<int>(__clusterRelativeBlockRank()); }
template <typename Type>
XSHARE_DEVICE Type* of_peer(Type* shared, int rank) {
    return static_cast<Type*>(__cluster_map_shared_rank(shared, static_cast<unsigned>(rank)));
}
XSHARE_DEVICE void cluster_arrive() { __cluster_barrier_arrive(); }
XSHARE_DEVICE void cluster_leave() { __cluster_barrier_arrive_relaxed(); }
XSHARE_DEVICE void cluster_wait() { __cluster_barrier_wait(); }
XSHARE_DEVICE void await_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
XSHARE_DEVICE void allow_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

#else

XSHARE_DEVICE int cluster_size() { return 1; }
XSHARE_DEVICE int cluster_rank() { return 0; }
template <typename Type>
XSHARE_DEVICE Type* of_peer(Type* shared, int) {
    return shared;
}
XSHARE_DEVICE void cluster_arrive() {}
XSHARE_DEVICE void cluster_leave() {}
XSHARE_DEVICE void cluster_wait() {}
XSHARE_DEVICE void await_previous_kernel() {}
XSHARE_DEVICE void allow_next_kernel() {}

#endif

}  // namespace device
}  // namespace xshare

#endif  // __CUDACC__

namespace xshare {
namespace device {

constexpr int kWarpSize = 32;

XSHARE_DEVICE int lane() { return thread() % kWarpSize; }
XSHARE_DEVICE uint32_t lower_lanes() { return (1u << lane()) - 1; }
XSHARE_DEVICE int warp() { return thread() / kWarpSize; }
XSHARE_DEVICE int num_warps() { return num_threads() / kWarpSize; }

XSHARE_DEVICE uint64_t shuffle(uint64_t value, int lane) {
    const uint32_t high = shuffle(static_cast<uint32_t>(value >> 32), lane);
    return static_cast<uint64_t>(high) << 32 | shuffle(static_cast<uint32_t>(value), lane);
}

// The sum over `width` neighbouring lanes (a power of two), in each of them.
template <typename Number>
XSHARE_DEVICE Number add_neighbours(Number value, int width) {
    for (int step = 1; step < width; step *= 2) value += shuffle(value, lane() ^ step);
    return value;
}

// For values below 2^52: two 32-bit reductions instead of ten shuffles.
XSHARE_DEVICE uint64_t warp_add_wide(uint64_t value) {
    const uint64_t high = warp_add(static_cast<uint32_t>(value >> 26));
    return (high << 26) + warp_add(static_cast<uint32_t>(value) & 0x3ffffffu);
}

// Of kSize blocks, or of as many as the launch says where that is 0. A barrier is arrive, which publishes
// what the thread wrote, and wait. leave says no more than that the thread is done with its peers' memory,
// which spares it a fence; nobody may end before all have left.
template <int kSize>
struct Team {
    static constexpr bool kIsBlock = kSize == 1;

    XSHARE_DEVICE_METHOD static int size() { return kSize != 0 ? kSize : cluster_size(); }
    XSHARE_DEVICE_METHOD static int rank() { return kIsBlock ? 0 : cluster_rank(); }
    template <typename Type>
    XSHARE_DEVICE_METHOD static Type* of_peer(Type* shared, int rank) {
        return kIsBlock ? shared : device::of_peer(shared, rank);
    }
    XSHARE_DEVICE_METHOD static void arrive() {
        if (!kIsBlock) cluster_arrive();
    }
    XSHARE_DEVICE_METHOD static void wait() {
        if (kIsBlock)
            sync_block();
        else
            cluster_wait();
    }
    XSHARE_DEVICE_METHOD static void sync() {
        arrive();
        wait();
    }
    XSHARE_DEVICE_METHOD static void leave() {
        if (!kIsBlock) cluster_leave();
    }
    XSHARE_DEVICE_METHOD static void wait_for_leaving() {
        if (!kIsBlock) cluster_wait();
    }
};

}  // namespace device
}  // namespace xshare

#endif  // XSHARE_CUDA_DEVICE_CUH
