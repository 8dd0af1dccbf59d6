// SPDX-License-Identifier: Apache-2.0
// From a checked call to its launches on a stream.
#include "cuda/route.h"

#include "cuda/kernels.h"

namespace xshare {

template <>
const void* kernel_of<1>(Kernel);
template <>
const void* kernel_of<2>(Kernel);
template <>
const void* kernel_of<4>(Kernel);
template <>
const void* kernel_of<8>(Kernel);
template <>
const void* kernel_of<12>(Kernel);
template <>
const void* kernel_of<16>(Kernel);

namespace {

const void* find_kernel(Kernel kernel, int experts_per_lane) {
    switch (experts_per_lane) {
        case 1:
            return kernel_of<1>(kernel);
        case 2:
            return kernel_of<2>(kernel);
        case 4:
            return kernel_of<4>(kernel);
        case 8:
            return kernel_of<8>(kernel);
        case 12:
            return kernel_of<12>(kernel);
        default:
            return kernel_of<16>(kernel);
    }
}

struct Device {
    bool is_hopper;  // or newer: clusters and programmatic launches
    int num_multiprocessors;
};

cudaError_t find_device(Device& found) {
    int device = 0, major = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&found.num_multiprocessors, cudaDevAttrMultiProcessorCount, device);
    found.is_hopper = major >= 9;
    return error;
}

// The thresholds are estimates until they have been measured.
Machine fit_to(const Device& device, int experts_per_lane) {
    Machine machine = {};
    machine.has_clusters = device.is_hopper;
    machine.max_step_threads = step_threads(experts_per_lane);
    machine.row_threads = kRowThreads;
    machine.max_row_blocks = std::max(4 * device.num_multiprocessors, 264);  // a block's sums hold 4095 rows
    machine.cluster_rows = step_threads(experts_per_lane) / 32;
    machine.block_rows = kBlockRows;
    return machine;
}

cudaError_t launch(const Launch& launch, RouteArgs args, bool programmatic, cudaStream_t stream) {
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(launch.num_blocks));
    config.blockDim = dim3(static_cast<unsigned>(launch.num_threads));
    config.stream = stream;
    config.attrs = attributes;
    if (programmatic) {
        cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    if (launch.team_size > 1) {
        cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = static_cast<unsigned>(launch.team_size);
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    }
    void* arguments[] = {&args};
    return cudaLaunchKernelExC(&config, find_kernel(launch.kernel, experts_per_lane(args.p.num_experts)),
                               arguments);
}

}  // namespace

cudaError_t route_on_device(const RouteArgs& args, cudaStream_t stream) {
    Device device = {};
    cudaError_t error = find_device(device);
    if (error != cudaSuccess) return error;
    const Plan plan = make_plan(args, fit_to(device, experts_per_lane(args.p.num_experts)));
    const bool many_rows = plan.launches[0].kernel != Kernel::kStep;
    if (many_rows) error = cudaMemsetAsync(args.workspace, 0, Workspace(args).cleared_size(), stream);
    for (int i = 0; i < plan.num_launches && error == cudaSuccess; ++i) {
        const bool follows_memset = many_rows && i == 0;
        error = launch(plan.launches[i], args, device.is_hopper && !follows_memset, stream);
    }
    return error;
}

}  // namespace xshare
