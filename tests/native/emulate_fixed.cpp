// SPDX-License-Identifier: Apache-2.0
// The kernels of plugins/cuda/fixed.cu for one setting on the host, launched as a driver would. Built as a
// library by tests/kernels/test_launch.py, once per setting.
#define XSHARE_FIXED_NAME xshare_unused
#define XSHARE_FIXED_KERNEL_ID 0

#include "cuda/fixed.cu"

namespace {

using namespace xshare;

constexpr int V = XSHARE_FIXED_EXPERTS_PER_LANE;

template <int kKernel>
void run_thread(const void* argument) {
    run_kernel<kKernel, V>(fix(*static_cast<const RouteArgs*>(argument)));
}

constexpr void (*kThreads[])(const void*) = {
    run_thread<XSHARE_KERNEL_BLOCK>,       run_thread<XSHARE_KERNEL_TEAM>,
    run_thread<XSHARE_KERNEL_GATHER_ROWS>, run_thread<XSHARE_KERNEL_PLACE_REQUESTS>,
    run_thread<XSHARE_KERNEL_ORDER_ROWS>,  run_thread<XSHARE_KERNEL_SUM_REQUESTS>,
    run_thread<XSHARE_KERNEL_PROPOSE>,     run_thread<XSHARE_KERNEL_REFINE_ROWS>,
    run_thread<XSHARE_KERNEL_TALLY_ROWS>};
static_assert(sizeof kThreads / sizeof kThreads[0] == XSHARE_NUM_KERNELS);

}  // namespace

extern "C" __attribute__((visibility("default"))) void launch(int kernel, void* const* arguments,
                                                              int num_blocks, int num_threads,
                                                              int cluster_size) {
    RouteArgs args;
    memcpy(&args, arguments[0], sizeof args);
    emulation::launch({num_blocks, num_threads, cluster_size}, kThreads[kernel], &args);
}
