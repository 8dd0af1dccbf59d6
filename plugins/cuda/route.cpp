// SPDX-License-Identifier: Apache-2.0
// From a checked call to its launches on a stream.
#include "cuda/route.h"

#include <stdlib.h>

#include <atomic>

#include "cuda/kernels.h"
#include "cuda/plan.h"

namespace xshare {

template <>
const void* kernel_of<1>(xshare_kernel, Variant);
template <>
const void* kernel_of<2>(xshare_kernel, Variant);
template <>
const void* kernel_of<4>(xshare_kernel, Variant);
template <>
const void* kernel_of<8>(xshare_kernel, Variant);
template <>
const void* kernel_of<12>(xshare_kernel, Variant);
template <>
const void* kernel_of<16>(xshare_kernel, Variant);

namespace {

constexpr Variant kVariants[] = {kGeneral, kPlainSoftmax, kPlainSigmoid};

const void* find_kernel(xshare_kernel kernel, Variant variant, int experts_per_lane) {
    switch (experts_per_lane) {
        case 1:
            return kernel_of<1>(kernel, variant);
        case 2:
            return kernel_of<2>(kernel, variant);
        case 4:
            return kernel_of<4>(kernel, variant);
        case 8:
            return kernel_of<8>(kernel, variant);
        case 12:
            return kernel_of<12>(kernel, variant);
        default:
            return kernel_of<16>(kernel, variant);
    }
}

int number_from_environment(const char* name, int otherwise) {
    const char* text = getenv(name);
    return text == nullptr || text[0] == '\0' ? otherwise : atoi(text);
}

// What the kernels for one number of experts can do on one device.
struct Fit {
    xshare_gpu gpu;
    bool overlaps;  // programmatic launches
};

cudaLaunchAttribute cluster_of(int team_size) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(team_size);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    return attribute;
}

// The largest cluster that the device has room for: it must lie in one group of multiprocessors, of which
// some devices have few. One of more than kPortableTeamSize blocks must be allowed for the kernel.
int find_largest_team(int experts_per_lane) {
    int most = std::min(number_from_environment("XSHARE_CLUSTER_SIZE", kMaxTeamSize), kMaxTeamSize);
    for (const Variant variant : kVariants) {
        const void* kernel = find_kernel(XSHARE_KERNEL_TEAM, variant, experts_per_lane);
        if (cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess)
            most = std::min(most, kPortableTeamSize);
    }
    const void* kernel = find_kernel(XSHARE_KERNEL_TEAM, kGeneral, experts_per_lane);
    for (int size = kMaxTeamSize; size > 1; size /= 2) {
        if (size > most) continue;
        cudaLaunchAttribute cluster = cluster_of(size);
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(static_cast<unsigned>(size));
        config.blockDim = dim3(static_cast<unsigned>(step_threads(experts_per_lane)));
        config.attrs = &cluster;
        config.numAttrs = 1;
        int num_clusters = 0;
        if (cudaOccupancyMaxActiveClusters(&num_clusters, kernel, &config) == cudaSuccess && num_clusters > 0)
            return size;
    }
    return 1;
}

// Also loads the kernels, all of them, so that any later call may be captured.
cudaError_t fit(int ordinal, int experts_per_lane, Fit& found) {
    int major = 0;
    found.gpu.struct_size = sizeof found.gpu;
    cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal);
    if (error == cudaSuccess)
        error =
            cudaDeviceGetAttribute(&found.gpu.num_multiprocessors, cudaDevAttrMultiProcessorCount, ordinal);
    bool is_hopper = true;
    for (int kernel = 0; kernel < XSHARE_NUM_KERNELS && error == cudaSuccess; ++kernel) {
        for (const Variant variant : kVariants) {
            cudaFuncAttributes image = {};
            if (error == cudaSuccess)
                error = cudaFuncGetAttributes(
                    &image, find_kernel(static_cast<xshare_kernel>(kernel), variant, experts_per_lane));
            is_hopper = is_hopper && is_hopper_code(major, image.ptxVersion);
        }
    }
    if (error != cudaSuccess) return error;
    found.gpu.max_cluster_size = is_hopper ? find_largest_team(experts_per_lane) : 1;
    found.overlaps = is_hopper && number_from_environment("XSHARE_PROGRAMMATIC_LAUNCH", 1) != 0;
    cudaGetLastError();  // or the next call would report what a device has not
    return cudaSuccess;
}

// Asked once per device and number of experts.
cudaError_t find_fit(int experts_per_lane, Fit& found) {
    constexpr int kNumDevices = 64;
    enum : char { kUnknown, kWriting, kKnown };
    static std::atomic<char> states[kNumDevices][kMaxExperts / 32 + 1];
    static Fit fits[kNumDevices][kMaxExperts / 32 + 1];
    int ordinal = 0;
    const cudaError_t error = cudaGetDevice(&ordinal);
    if (error != cudaSuccess) return error;
    if (ordinal >= kNumDevices) return fit(ordinal, experts_per_lane, found);
    std::atomic<char>& state = states[ordinal][experts_per_lane];
    if (state.load(std::memory_order_acquire) == kKnown) {
        found = fits[ordinal][experts_per_lane];
        return cudaSuccess;
    }
    const cudaError_t asked = fit(ordinal, experts_per_lane, found);
    char unknown = kUnknown;
    if (asked != cudaSuccess || !state.compare_exchange_strong(unknown, kWriting)) return asked;
    fits[ordinal][experts_per_lane] = found;
    state.store(kKnown, std::memory_order_release);
    return cudaSuccess;
}

cudaError_t launch(const xshare_launch& launch, RouteArgs args, bool programmatic, cudaStream_t stream) {
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
    if (launch.cluster_size > 1) attributes[config.numAttrs++] = cluster_of(launch.cluster_size);
    const void* kernel = find_kernel(static_cast<xshare_kernel>(launch.kernel), args.variant(),
                                     experts_per_lane(args.p.num_experts));
    void* arguments[] = {&args};
    return cudaLaunchKernelExC(&config, kernel, arguments);
}

}  // namespace

cudaError_t route_on_device(const RouteArgs& args, cudaStream_t stream) {
    const int lanes = experts_per_lane(args.p.num_experts);
    Fit found = {};
    cudaError_t error = find_fit(lanes, found);
    if (error != cudaSuccess) return error;
    const xshare_launch_plan plan = make_plan(args, fit_to(found.gpu, args.p.num_tokens, lanes));
    if (plan.cleared_size > 0) error = cudaMemsetAsync(args.workspace, 0, plan.cleared_size, stream);
    for (int i = 0; i < plan.num_launches && error == cudaSuccess; ++i) {
        const bool follows_memset = plan.cleared_size > 0 && i == 0;
        error = launch(plan.launches[i], args, found.overlaps && !follows_memset, stream);
    }
    return error;
}

}  // namespace xshare
