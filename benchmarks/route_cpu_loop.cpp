// SPDX-License-Identifier: Apache-2.0
// What Python cannot do for route_cpu.py: call the C ABI in a tight loop, and count the heap where this is
// LD_PRELOADed.
#include <malloc.h>
#include <stdint.h>
#include <time.h>

#include "xshare/xshare.h"

namespace {

using Route = xshare_status (*)(const xshare_route_params*, const xshare_route_tensors*, void*, size_t);
thread_local int64_t heap_bytes = 0;

double now() {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

}  // namespace

extern "C" {

// CPU seconds for `rounds` calls with each of the `count` batches, or -1 where one fails.
double time_route(Route route, const xshare_route_params* params, const xshare_route_tensors* batches,
                  int count, int rounds) {
    const double start = now();
    for (int round = 0; round < rounds; ++round)
        for (int i = 0; i < count; ++i)
            if (route(params, &batches[i], nullptr, 0) != XSHARE_OK) return -1.0;
    return now() - start;
}

int64_t heap_bytes_of_this_thread() { return heap_bytes; }

void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

void* malloc(size_t size) {
    heap_bytes += static_cast<int64_t>(size);
    return __libc_malloc(size);
}

void* calloc(size_t count, size_t size) {
    heap_bytes += static_cast<int64_t>(count * size);
    return __libc_calloc(count, size);
}

void* realloc(void* old, size_t size) {
    heap_bytes += static_cast<int64_t>(size);
    return __libc_realloc(old, size);
}

int posix_memalign(void** out, size_t alignment, size_t size) {
    heap_bytes += static_cast<int64_t>(size);
    *out = __libc_memalign(alignment, size);
    return *out == nullptr ? 12 : 0;  // ENOMEM
}

}  // extern "C"
