// SPDX-License-Identifier: Apache-2.0
// The C functions of xshare_cuda.h: structs in, checks. Nothing throws past this file.
#include "core/validate.h"
#include "cuda/route.h"
#include "cuda/workspace.h"
#include "xshare/xshare_cuda.h"

namespace xshare {
namespace {

size_t workspace_size(const RouteArgs& args) {
    return args.p.num_tokens <= kBlockRows ? 0 : Workspace(args).size();
}

xshare_status run(const RouteArgs& args, cudaStream_t stream) {
    const cudaError_t error = route_on_device(args, stream);
    if (error == cudaSuccess) return XSHARE_OK;
    return refuse(last_error(), XSHARE_CUDA_ERROR, "%s: %s", cudaGetErrorName(error),
                  cudaGetErrorString(error));
}

}  // namespace
}  // namespace xshare

extern "C" {

xshare_status xshare_cuda_workspace_size(const xshare_route_params* params, size_t* size) {
    using namespace xshare;
    RouteArgs args = {};
    if (size == nullptr) return refuse(last_error(), XSHARE_INVALID_STRUCT, "workspace_size is NULL");
    xshare_status status = copy_struct(params, "xshare_route_params", args.p, last_error());
    if (status == XSHARE_OK) status = check_params(args.p, last_error());
    if (status == XSHARE_OK) *size = workspace_size(args);
    return status;
}

xshare_status xshare_route_cuda(const xshare_route_params* params, const xshare_route_tensors* tensors,
                                void* workspace, size_t size, void* stream) {
    using namespace xshare;
    RouteArgs args = {};
    xshare_status status = copy_struct(params, "xshare_route_params", args.p, last_error());
    if (status == XSHARE_OK) status = copy_struct(tensors, "xshare_route_tensors", args.t, last_error());
    if (status == XSHARE_OK) status = check_params(args.p, last_error());
    if (status == XSHARE_OK) status = check_pointers(args.p, args.t, last_error());
    if (status == XSHARE_OK) status = check_workspace(workspace_size(args), workspace, size, last_error());
    args.workspace = static_cast<unsigned char*>(workspace);
    return status == XSHARE_OK ? run(args, static_cast<cudaStream_t>(stream)) : status;
}

const char* xshare_cuda_architectures(void) { return XSHARE_ARCHITECTURES; }

}  // extern "C"
