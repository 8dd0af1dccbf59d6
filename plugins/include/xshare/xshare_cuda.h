// SPDX-License-Identifier: Apache-2.0
// Routing on a CUDA device. libxshare_cuda.so holds these functions and those of xshare.h: link one library
// or the other.
//
// Results have the same bits as those of xshare_route_cpu, whatever the device and its number of blocks. The
// library needs compute capability 8.0 or newer.
#ifndef XSHARE_XSHARE_CUDA_H
#define XSHARE_XSHARE_CUDA_H

#include "xshare/xshare.h"

#ifdef __cplusplus
extern "C" {
#endif

// Checks `params` and says how much device memory a call with them needs (aligned to 64 bytes; 0 for few
// rows).
XSHARE_API xshare_status xshare_cuda_workspace_size(const xshare_route_params* params,
                                                    size_t* workspace_size);

// Enqueues the routing on `stream` (a cudaStream_t) of the current device and returns: no allocation, no
// synchronisation, nothing touched but the stream, so it may be captured into a graph (make one call before
// on this device, with any number of rows, since the first one for so many experts loads the kernels). The
// structs are read before it returns. Pointers in `tensors` are device pointers; the workspace belongs to the
// call until the stream has passed it and need not be cleared.
//
// What device tensors hold cannot be refused on the host. Instead: a correction bias that is not finite
// counts as 0, a request id below -1 is padding, an expert_gpu out of range is clamped to 0 .. num_experts-1.
//
// On compute capability 9.0 and newer, where the library has code for it, it is launched with programmatic
// stream serialization (it may start while the kernel before it in the stream is still running, but reads and
// writes global memory only after that one has ended) and, for more than a few rows, as a cluster of blocks.
// XSHARE_PROGRAMMATIC_LAUNCH=0 in the environment turns the former off, XSHARE_CLUSTER_SIZE=1 (or 2, 4, 8)
// limits the latter: to find what a device does not take.
XSHARE_API xshare_status xshare_route_cuda(const xshare_route_params* params,
                                           const xshare_route_tensors* tensors, void* workspace,
                                           size_t workspace_size, void* stream);

// What the library has kernels for: "80-real 90-real 90-virtual" is machine code for compute capability 8.0
// (and 8.x), the same for 9.0, and PTX from which a driver makes code for what is newer than 9.0.
XSHARE_API const char* xshare_cuda_architectures(void);

#ifdef __cplusplus
}
#endif

#endif  // XSHARE_XSHARE_CUDA_H
