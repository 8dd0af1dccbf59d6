// SPDX-License-Identifier: Apache-2.0
// Runs the threads of a CUDA launch as fibers in one host thread: all blocks of the launch at once, in an
// order that a seed shuffles. ThreadSanitizer is told that every fiber is a thread of its own and that only
// barriers order them, so it reports any race of the kernel whatever the order was. A warp primitive that not
// all lanes of the warp reach, or a barrier that not all threads of the block reach, stops the process with a
// message.
#ifndef XSHARE_TESTS_EMULATION_FIBERS_H
#define XSHARE_TESTS_EMULATION_FIBERS_H

#include <stddef.h>
#include <stdint.h>

namespace emulation {

struct Shape {
    int num_blocks;
    int num_threads;  // per block, a multiple of 32
    int team_size;    // blocks per cluster; divides num_blocks
};

// The place of the running fiber.
struct Place {
    int thread, block, num_threads, num_blocks, team_size;
};
const Place& place();

enum class WarpOperation { kBallot, kMax, kAdd, kShuffle };

// The value of every lane for kShuffle; for the others the first element is the result.
const uint64_t* combine_lanes(WarpOperation operation, uint64_t value);

void sync_warp();
void sync_block();
void arrive_team();
void wait_team();

// The block's shared memory: a heap block of this size, filled with a pattern.
void* shared_memory(size_t size);
// The same place in the shared memory of another block of the team.
void* of_peer(void* shared, int rank);

// Runs body(argument) once per thread of the launch and returns when all have ended.
void launch(const Shape& shape, void (*body)(const void*), const void* argument);

void set_seed(uint64_t seed);

}  // namespace emulation

#endif  // XSHARE_TESTS_EMULATION_FIBERS_H
