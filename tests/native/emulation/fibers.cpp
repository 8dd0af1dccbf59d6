// SPDX-License-Identifier: Apache-2.0
// The scheduler's own data would look like races of the kernel: nothing in this file is instrumented by
// ThreadSanitizer.
#include "emulation/fibers.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <memory>
#include <vector>

#if defined(XSHARE_EMULATE_TSAN)
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);  // flags 1: the switch orders nothing
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

namespace {

constexpr int kWarpSize = 32;
constexpr size_t kStackSize = 128 << 10;

// Orders what was before release() before what is after acquire(), for ThreadSanitizer.
struct Order {
    char address;
#if defined(XSHARE_EMULATE_TSAN)
    void release() { __tsan_release(&address); }
    void acquire() { __tsan_acquire(&address); }
#else
    void release() {}
    void acquire() {}
#endif
};

struct Fiber {
    Place place;
    int team_ticket = 0;  // of the last arrive_team
    bool ended = true;
    std::unique_ptr<char[]> stack;
    void* stack_pointer = nullptr;
    void* sanitizer_fiber = nullptr;
#if !defined(__x86_64__)
    ucontext_t context;
#endif
};

// Waits until `size` fibers have come. Two sets of places, since a fiber can be one round ahead.
struct Barrier {
    int size = 0, arrived = 0, round = 0;
    Order order[2];
    std::vector<Fiber*> waiting;

    void expect(int num_fibers) {
        size = num_fibers;
        waiting.reserve(static_cast<size_t>(num_fibers));
    }
};

struct Warp {
    Barrier lanes;
    WarpOperation operation;
    bool is_sync;
    uint64_t values[2][kWarpSize];
};

struct Block {
    Barrier barrier;
    std::vector<Warp> warps;
    char* shared = nullptr;
    size_t shared_size = 0;
    Order allocation, end;
    int running = 0;
};

struct Machine {
    Fiber main;
    Fiber* current = nullptr;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Fiber*> ready;  // a ring: fibers must not allocate
    size_t first_ready = 0, num_ready = 0;
    std::vector<Block> blocks;
    std::vector<Barrier> teams;
    void (*body)(const void*) = nullptr;
    const void* argument = nullptr;
    int running = 0;
    uint64_t random = 1;
    Order begin, end;
};

Machine machine;

[[noreturn]] void fail(const char* what) {
    const Place& at = machine.current->place;
    fprintf(stderr, "emulated launch: %s (block %d, thread %d)\n", what, at.block, at.thread);
    abort();
}

uint64_t next_random() {
    machine.random ^= machine.random << 13;
    machine.random ^= machine.random >> 7;
    machine.random ^= machine.random << 17;
    return machine.random;
}

void shuffle_order(std::vector<Fiber*>& fibers) {
    for (size_t i = fibers.size(); i > 1; --i) std::swap(fibers[i - 1], fibers[next_random() % i]);
}

// ---- Switching --------------------------------------------------------------------------------------------

void run_fiber();

#if defined(__x86_64__)
extern "C" void emulation_switch(void** save, void* load);
asm(R"(
    .text
    .globl emulation_switch
    .hidden emulation_switch
    .type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emulation_switch, .-emulation_switch
)");

void prepare(Fiber& fiber) {
    uintptr_t top = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStackSize) & ~uintptr_t{15};
    void** frame = reinterpret_cast<void**>(top) - 8;  // six registers, the address to return to, and its own
    memset(frame, 0, 8 * sizeof *frame);
    frame[6] = reinterpret_cast<void*>(&run_fiber);
    fiber.stack_pointer = frame;
}

void jump(Fiber& from, Fiber& to) { emulation_switch(&from.stack_pointer, to.stack_pointer); }
#else
void prepare(Fiber& fiber) {
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, kStackSize};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
}

void jump(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
#endif

#if defined(__SANITIZE_ADDRESS__)
const void* main_stack = nullptr;
size_t main_stack_size = 0;
#endif

void switch_to(Fiber& to) {
    Fiber& from = *machine.current;
    if (&from == &to) return;
    machine.current = &to;
#if defined(XSHARE_EMULATE_TSAN)
    __tsan_switch_to_fiber(to.sanitizer_fiber, 1);
#endif
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    const bool to_main = &to == &machine.main;
    __sanitizer_start_switch_fiber(&fake_stack, to_main ? main_stack : to.stack.get(),
                                   to_main ? main_stack_size : kStackSize);
#endif
    jump(from, to);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void make_ready(Fiber* fiber) {
    machine.ready[(machine.first_ready + machine.num_ready++) % machine.ready.size()] = fiber;
}

// The next fiber that can run; the launcher if none can.
void yield() {
    if (machine.num_ready == 0) return switch_to(machine.main);
    Fiber* next = machine.ready[machine.first_ready];
    machine.first_ready = (machine.first_ready + 1) % machine.ready.size();
    --machine.num_ready;
    switch_to(*next);
}

Block& block_here() { return machine.blocks[static_cast<size_t>(machine.current->place.block)]; }

// The shared memory of a block is gone when its threads have ended, whatever its team still does.
void end_thread() {
    Block& block = block_here();
    block.end.release();
    if (--block.running > 0) return;
    block.end.acquire();
    if (block.shared != nullptr) memset(block.shared, 0xDB, block.shared_size);
}

// Fibers are kept for later launches: when one has ended, it waits to be run again.
void run_fiber() {
#if defined(__SANITIZE_ADDRESS__)
    const void* previous = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(nullptr, &previous, &size);
    if (main_stack == nullptr) {
        main_stack = previous;  // the first fiber is entered from the launcher
        main_stack_size = size;
    }
#endif
    while (true) {
        machine.begin.acquire();
        machine.body(machine.argument);
        end_thread();
        machine.end.release();
        machine.current->ended = true;
        --machine.running;
        yield();
    }
}

// ---- Barriers ---------------------------------------------------------------------------------------------

void open(Barrier& barrier) {
    barrier.arrived = 0;
    ++barrier.round;
    shuffle_order(barrier.waiting);
    for (Fiber* fiber : barrier.waiting) make_ready(fiber);
    barrier.waiting.clear();
}

void await(Barrier& barrier, int round) {
    if (barrier.round != round) return;
    barrier.waiting.push_back(machine.current);
    yield();
}

// Returns the round that ended.
int arrive(Barrier& barrier) {
    const int round = barrier.round;
    if (++barrier.arrived == barrier.size) open(barrier);
    return round;
}

void sync(Barrier& barrier) {
    Order& order = barrier.order[barrier.round % 2];
    order.release();
    await(barrier, arrive(barrier));
    order.acquire();
}

Warp& warp_here() {
    return block_here().warps[static_cast<size_t>(machine.current->place.thread / kWarpSize)];
}
Barrier& team_here() {
    const Place& at = machine.current->place;
    return machine.teams[static_cast<size_t>(at.block / at.team_size)];
}

void check_same(Warp& warp, bool is_sync, WarpOperation operation) {
    if (warp.lanes.arrived == 0) {
        warp.operation = operation;
        warp.is_sync = is_sync;
    } else if (warp.is_sync != is_sync || (!is_sync && warp.operation != operation)) {
        fail("the lanes of a warp are at different primitives");
    }
}

void combine(WarpOperation operation, uint64_t* values) {
    uint64_t result = values[0];
    if (operation == WarpOperation::kShuffle) return;
    for (int lane = 1; lane < kWarpSize; ++lane) {
        if (operation == WarpOperation::kBallot) result |= values[lane] << lane;
        if (operation == WarpOperation::kAdd) result += values[lane];
        if (operation == WarpOperation::kMax &&
            static_cast<int32_t>(values[lane]) > static_cast<int32_t>(result))
            result = values[lane];
    }
    values[0] = result;
}

}  // namespace

// ---- For the kernel ---------------------------------------------------------------------------------------

const Place& place() { return machine.current->place; }

const uint64_t* combine_lanes(WarpOperation operation, uint64_t value) {
    Warp& warp = warp_here();
    check_same(warp, false, operation);
    const int round = warp.lanes.round;
    uint64_t* values = warp.values[round % 2];
    values[machine.current->place.thread % kWarpSize] = value;
    if (warp.lanes.arrived + 1 == kWarpSize) combine(operation, values);
    await(warp.lanes, arrive(warp.lanes));
    return values;
}

void sync_warp() {
    Warp& warp = warp_here();
    check_same(warp, true, WarpOperation::kShuffle);
    sync(warp.lanes);
}

void sync_block() { sync(block_here().barrier); }

void arrive_team() {
    Barrier& team = team_here();
    team.order[team.round % 2].release();
    machine.current->team_ticket = arrive(team);
}

void wait_team() {
    Barrier& team = team_here();
    const int round = machine.current->team_ticket;
    await(team, round);
    team.order[round % 2].acquire();
}

void* shared_memory(size_t size) {
    Block& block = block_here();
    if (block.shared == nullptr) {
        block.shared = static_cast<char*>(aligned_alloc(64, (size + 63) / 64 * 64));
        block.shared_size = size;
        memset(block.shared, 0xA5, size);
        block.allocation.release();
    }
    block.allocation.acquire();
    if (block.shared_size != size) fail("a second shared object in one kernel");
    return block.shared;
}

void* of_peer(void* shared, int rank) {
    const Place& at = machine.current->place;
    const ptrdiff_t offset = static_cast<char*>(shared) - block_here().shared;
    Block& peer = machine.blocks[static_cast<size_t>(at.block / at.team_size * at.team_size + rank)];
    if (peer.shared == nullptr || peer.running == 0) fail("the shared memory of a block that is not running");
    return peer.shared + offset;
}

// ---- For the launcher -------------------------------------------------------------------------------------

namespace {

void set_up(const Shape& shape) {
    machine.blocks = std::vector<Block>(static_cast<size_t>(shape.num_blocks));
    machine.teams = std::vector<Barrier>(static_cast<size_t>(shape.num_blocks / shape.team_size));
    for (Barrier& team : machine.teams) team.expect(shape.team_size * shape.num_threads);
    for (Block& block : machine.blocks) {
        block.barrier.expect(shape.num_threads);
        block.running = shape.num_threads;
        block.warps = std::vector<Warp>(static_cast<size_t>(shape.num_threads / kWarpSize));
        for (Warp& warp : block.warps) warp.lanes.expect(kWarpSize);
    }
}

Fiber& fiber_at(size_t index) {
    while (machine.fibers.size() <= index) {
        auto fiber = std::make_unique<Fiber>();
        fiber->stack = std::make_unique<char[]>(kStackSize);
#if defined(XSHARE_EMULATE_TSAN)
        fiber->sanitizer_fiber = __tsan_create_fiber(0);
#endif
        prepare(*fiber);
        machine.fibers.push_back(std::move(fiber));
    }
    return *machine.fibers[index];
}

}  // namespace

void set_seed(uint64_t seed) { machine.random = seed * 2 + 1; }

void launch(const Shape& shape, void (*body)(const void*), const void* argument) {
    machine.current = &machine.main;
#if defined(XSHARE_EMULATE_TSAN)
    machine.main.sanitizer_fiber = __tsan_get_current_fiber();
#endif
    set_up(shape);
    machine.body = body;
    machine.argument = argument;
    machine.running = shape.num_blocks * shape.num_threads;
    std::vector<Fiber*> order;
    for (int i = 0; i < machine.running; ++i) {
        Fiber& fiber = fiber_at(static_cast<size_t>(i));
        fiber.place = {i % shape.num_threads, i / shape.num_threads, shape.num_threads, shape.num_blocks,
                       shape.team_size};
        order.push_back(&fiber);
    }
    shuffle_order(order);
    machine.ready.resize(order.size());
    machine.first_ready = machine.num_ready = 0;
    for (Fiber* fiber : order) make_ready(fiber);
    machine.begin.release();
    yield();
    if (machine.running != 0) {
        machine.current = order[0];
        fail("a barrier that not all threads reach; some have ended or wait elsewhere");
    }
    machine.end.acquire();
    for (Block& block : machine.blocks) free(block.shared);
}

}  // namespace emulation
