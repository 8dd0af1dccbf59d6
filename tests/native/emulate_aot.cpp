// SPDX-License-Identifier: Apache-2.0
// The entry of plugins/cuda/aot.cu on the host, launched as a driver would: from an array of addresses of its
// arguments. Built as a library by tests/graph/test_aot_plugin.py, once per configuration.
#include <tuple>
#include <utility>

#include "cuda/aot.cu"
#include "cuda/plan.h"

namespace {

using namespace xshare;

template <typename... Types>
struct Entry {
    using Arguments = std::tuple<Types...>;
    template <size_t... I>
    static void call(void (*entry)(Types...), void* const* arguments, std::index_sequence<I...>) {
        entry(*static_cast<Types*>(arguments[I])...);
    }
};

template <typename... Types>
Entry<Types...> entry_of(void (*)(Types...));

using Kernel = decltype(entry_of(XSHARE_AOT_NAME));
constexpr size_t kNumArguments = std::tuple_size_v<Kernel::Arguments>;
using Places = std::make_index_sequence<kNumArguments>;

void run_thread(const void* arguments) {
    Kernel::call(XSHARE_AOT_NAME, static_cast<void* const*>(arguments), Places());
}

template <size_t... I>
void copy_sizes(int* sizes, std::index_sequence<I...>) {
    ((sizes[I] = static_cast<int>(sizeof(std::tuple_element_t<I, Kernel::Arguments>))), ...);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// How many arguments there are, and how large each is.
EXPORT int argument_sizes(int* sizes) {
    copy_sizes(sizes, Places());
    return static_cast<int>(kNumArguments);
}

EXPORT void launch(void* const* arguments, int num_blocks, int num_threads, uint64_t seed) {
    emulation::set_seed(seed);
    emulation::launch({num_blocks, num_threads, XSHARE_AOT_BLOCKS}, run_thread, arguments);
}

// Blocks and threads with which the library would launch its step kernel for these rows.
EXPORT void plan(int num_tokens, int has_clusters, int* blocks, int* threads) {
    RouteArgs args = {};
    args.p.num_tokens = num_tokens;
    args.p.num_experts = XSHARE_AOT_NUM_EXPERTS;
    constexpr int kMostThreads = step_threads(XSHARE_AOT_EXPERTS_PER_LANE);
    static_assert(kMostThreads == XSHARE_AOT_THREADS);
    Machine machine = {};
    machine.max_team_size = has_clusters != 0 ? kPortableTeamSize : 1;
    machine.max_step_threads = kMostThreads;
    machine.block_rows = block_rows(XSHARE_AOT_EXPERTS_PER_LANE);
    machine.team_rows = kTeamRows;
    const xshare_launch step = plan_step(args, machine);
    *blocks = step.num_blocks;
    *threads = step.num_threads;
}

// What the kernel is built for, where Python has it written down once more.
EXPORT int step_rows() { return kStepRows; }
EXPORT int lanes() { return experts_per_lane(XSHARE_AOT_NUM_EXPERTS); }
