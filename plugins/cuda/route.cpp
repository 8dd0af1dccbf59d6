// SPDX-License-Identifier: Apache-2.0
// From a checked call to its launches on a stream.
#include "cuda/route.h"

#include <atomic>

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
    int ordinal;
    bool is_hopper;  // or newer: clusters and programmatic launches
    int num_multiprocessors;
};

cudaError_t find_device(Device& found) {
    int major = 0;
    cudaError_t error = cudaGetDevice(&found.ordinal);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, found.ordinal);
    if (error == cudaSuccess)
        error =
            cudaDeviceGetAttribute(&found.num_multiprocessors, cudaDevAttrMultiProcessorCount, found.ordinal);
    found.is_hopper = major >= 9;
    return error;
}

cudaLaunchAttribute cluster_of(int team_size) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(team_size);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    return attribute;
}

// A cluster of more than kPortableTeamSize blocks must be allowed for the kernel.
cudaError_t allow_largest_team(const void* kernel) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

// Whether the device has room for the step kernel's largest team, asked once. Some have not: it must lie in
// one group of multiprocessors.
bool takes_largest_team(const Device& device, int experts_per_lane) {
    enum : char { kUnknown, kNo, kYes };
    constexpr int kNumDevices = 64;
    static std::atomic<char> known[kNumDevices][kMaxExperts / 32 + 1];
    if (device.ordinal >= kNumDevices) return false;
    std::atomic<char>& answer = known[device.ordinal][experts_per_lane];
    if (answer == kUnknown) {
        const void* kernel = find_kernel(Kernel::kStep, experts_per_lane);
        cudaLaunchAttribute cluster = cluster_of(kMaxTeamSize);
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(kMaxTeamSize);
        config.blockDim = dim3(static_cast<unsigned>(step_threads(experts_per_lane)));
        config.attrs = &cluster;
        config.numAttrs = 1;
        int num_clusters = 0;
        cudaError_t error = allow_largest_team(kernel);
        if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&num_clusters, kernel, &config);
        if (error != cudaSuccess) cudaGetLastError();  // or the next call would report it
        answer = error == cudaSuccess && num_clusters > 0 ? kYes : kNo;
    }
    return answer == kYes;
}

int max_team_size(const Device& device, int num_tokens, int experts_per_lane) {
    if (!device.is_hopper) return 1;
    const bool is_large = num_tokens > kPortableTeamSize * kTeamRows;
    return is_large && takes_largest_team(device, experts_per_lane) ? kMaxTeamSize : kPortableTeamSize;
}

// The thresholds are estimates until they have been measured.
Machine fit_to(const Device& device, int num_tokens, int experts_per_lane) {
    Machine machine = {};
    machine.max_team_size = max_team_size(device, num_tokens, experts_per_lane);
    machine.max_step_threads = step_threads(experts_per_lane);
    machine.row_threads = kRowThreads;
    machine.max_row_blocks = std::max(4 * device.num_multiprocessors, 264);  // a block's sums hold 4095 rows
    machine.block_rows = step_threads(experts_per_lane) / 32;
    machine.team_rows = kTeamRows;
    machine.max_block_rows = kBlockRows;
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
    if (launch.team_size > 1) attributes[config.numAttrs++] = cluster_of(launch.team_size);
    const void* kernel = find_kernel(launch.kernel, experts_per_lane(args.p.num_experts));
    if (launch.team_size > kPortableTeamSize) {
        const cudaError_t error = allow_largest_team(kernel);
        if (error != cudaSuccess) return error;
    }
    void* arguments[] = {&args};
    return cudaLaunchKernelExC(&config, kernel, arguments);
}

}  // namespace

cudaError_t route_on_device(const RouteArgs& args, cudaStream_t stream) {
    Device device = {};
    cudaError_t error = find_device(device);
    if (error != cudaSuccess) return error;
    const Plan plan =
        make_plan(args, fit_to(device, args.p.num_tokens, experts_per_lane(args.p.num_experts)));
    const bool many_rows = plan.launches[0].kernel != Kernel::kStep;
    if (many_rows) error = cudaMemsetAsync(args.workspace, 0, Workspace(args).cleared_size(), stream);
    for (int i = 0; i < plan.num_launches && error == cudaSuccess; ++i) {
        const bool follows_memset = many_rows && i == 0;
        error = launch(plan.launches[i], args, device.is_hopper && !follows_memset, stream);
    }
    return error;
}

}  // namespace xshare
