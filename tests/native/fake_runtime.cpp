// SPDX-License-Identifier: Apache-2.0
// plugins/cuda/route.cpp on a CUDA runtime that only says what it was asked, for a device and an image that
// the command line describes:
//
//     fake_runtime MAJOR PTX_VERSION MAX_CLUSTER ROWS...       a line per launch
//
// The functions have the signatures of CUDA 13.0's cuda_runtime_api.h, which is included.
#include <stdio.h>
#include <stdlib.h>

#include "cuda/kernels.h"
#include "cuda/route.h"

namespace {

int device_major, ptx_version, max_cluster, num_attributes_asked;
char kernels[xshare::kNumVariants][XSHARE_NUM_KERNELS];

const char* const kNames[] = {"block",        "team",    "gather_rows", "place_requests", "order_rows",
                              "sum_requests", "propose", "refine_rows", "tally_rows"};

const char* const kVariants[] = {"", "_softmax", "_sigmoid"};

}  // namespace

namespace xshare {

#define FAKE_KERNELS(V)                                                             \
    template <>                                                                     \
    const void* kernel_of<V>(xshare_kernel kernel, Variant variant) {               \
        return &kernels[kernel <= XSHARE_KERNEL_TEAM ? variant : kGeneral][kernel]; \
    }
FAKE_KERNELS(1)
FAKE_KERNELS(2)
FAKE_KERNELS(4)
FAKE_KERNELS(8)
FAKE_KERNELS(12)
FAKE_KERNELS(16)

}  // namespace xshare

extern "C" {

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? device_major : 132;
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    ++num_attributes_asked;
    attributes->ptxVersion = ptx_version;
    attributes->binaryVersion = 10 * device_major;
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
    return max_cluster > 8 ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* number, const void*, const cudaLaunchConfig_t* config) {
    *number = static_cast<int>(config->gridDim.x) <= max_cluster;
    return *number > 0 ? cudaSuccess : cudaErrorInvalidClusterSize;
}

cudaError_t cudaMemsetAsync(void*, int, size_t size, cudaStream_t) {
    printf("memset %d\n", size > 0);
    return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
    int cluster = 1, programmatic = 0;
    for (unsigned i = 0; i < config->numAttrs; ++i) {
        if (config->attrs[i].id == cudaLaunchAttributeClusterDimension)
            cluster = static_cast<int>(config->attrs[i].val.clusterDim.x);
        if (config->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization)
            programmatic = config->attrs[i].val.programmaticStreamSerializationAllowed;
    }
    const int place = static_cast<int>(static_cast<const char*>(kernel) - kernels[0]);
    printf("%s%s blocks=%u threads=%u cluster=%d programmatic=%d asked=%d\n",
           kNames[place % XSHARE_NUM_KERNELS], kVariants[place / XSHARE_NUM_KERNELS], config->gridDim.x,
           config->blockDim.x, cluster, programmatic, num_attributes_asked);
    return arguments[0] != nullptr ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaGetLastError(void) { return cudaSuccess; }

}  // extern "C"

int main(int argc, char** argv) {
    device_major = atoi(argv[1]);
    ptx_version = atoi(argv[2]);
    max_cluster = atoi(argv[3]);
    alignas(64) static unsigned char workspace[1 << 20];
    for (int i = 4; i < argc; ++i) {
        xshare::RouteArgs args = {};
        args.p.num_tokens = atoi(argv[i]);
        args.p.num_experts = 128;
        args.p.top_k = 4;
        args.p.num_groups = args.p.top_k_groups = 1;
        args.p.budget = 24;
        args.p.max_rows = -1;
        args.workspace = workspace;
        if (xshare::route_on_device(args, nullptr) != cudaSuccess) return 1;
    }
    return 0;
}
