// SPDX-License-Identifier: Apache-2.0
// The C functions: structs in, checks, the thread's own workspace and message. Nothing throws past this file.
#include <stdlib.h>

#include "core/dial.h"
#include "core/validate.h"
#include "cpu/float_mode.h"
#include "cpu/route.h"

namespace xshare {
namespace {

// Grow-only, freed when its thread ends.
class ThreadBuffer {
  public:
    ~ThreadBuffer() { free(data_); }

    unsigned char* reserve(size_t size) {
        if (size <= size_) return data_;
        void* grown = nullptr;
        if (posix_memalign(&grown, kWorkspaceAlignment, size) != 0) return nullptr;
        free(data_);
        data_ = static_cast<unsigned char*>(grown);
        size_ = size;
        return data_;
    }

  private:
    unsigned char* data_ = nullptr;
    size_t size_ = 0;
};

thread_local ThreadBuffer thread_buffer;

xshare_status find_workspace(size_t needed, void* workspace, size_t workspace_size, unsigned char*& found) {
    if (workspace == nullptr && workspace_size == 0) {
        found = thread_buffer.reserve(needed);
        if (found != nullptr || needed == 0) return XSHARE_OK;
        return refuse(last_error(), XSHARE_OUT_OF_MEMORY, "no memory for a workspace of %zu bytes", needed);
    }
    found = static_cast<unsigned char*>(workspace);
    return check_workspace(needed, workspace, workspace_size, last_error());
}

// The parameters as the dial has them.
void turn(xshare_route_params& p, const xshare_dial* dial) {
    if (dial == nullptr) return;
    p.budget = dialled_budget(p, *dial);
    p.coverage = dialled_coverage(*dial);
    if (dial->mode != XSHARE_OFF) return;
    p.budget = p.num_experts;
    p.coverage = 0.0;
    p.request_budget = p.gpu_budget = 0;
}

__attribute__((noinline)) xshare_status run(const xshare_route_params* params,
                                            const xshare_route_tensors* tensors, void* workspace,
                                            size_t workspace_size) {
    xshare_route_params p;
    xshare_route_tensors t;
    unsigned char* buffer = nullptr;
    xshare_status status = copy_struct(params, "xshare_route_params", p, last_error());
    if (status == XSHARE_OK) status = copy_struct(tensors, "xshare_route_tensors", t, last_error());
    if (status == XSHARE_OK) status = check_params(p, last_error());
    if (status == XSHARE_OK) status = check_pointers(p, t, last_error());
    if (status == XSHARE_OK) turn(p, t.dial);
    if (status == XSHARE_OK) status = check_contents(p, t, last_error());
    if (status == XSHARE_OK)
        status = find_workspace(route_workspace_size(p), workspace, workspace_size, buffer);
    if (status == XSHARE_OK) route(p, t, buffer);
    return status;
}

}  // namespace
}  // namespace xshare

extern "C" {

xshare_status xshare_workspace_size(const xshare_route_params* params, size_t* workspace_size) {
    using namespace xshare;
    xshare_route_params p;
    if (workspace_size == nullptr)
        return refuse(last_error(), XSHARE_INVALID_STRUCT, "workspace_size is NULL");
    xshare_status status = copy_struct(params, "xshare_route_params", p, last_error());
    if (status == XSHARE_OK) status = check_params(p, last_error());
    if (status == XSHARE_OK) *workspace_size = route_workspace_size(p);
    return status;
}

xshare_status xshare_route_cpu(const xshare_route_params* params, const xshare_route_tensors* tensors,
                               void* workspace, size_t workspace_size) {
    const xshare::DefaultFloatMode mode;
    return xshare::run(params, tensors, workspace, workspace_size);
}

const char* xshare_error_string(xshare_status status) {
    switch (status) {
        case XSHARE_OK:
            return "no error";
        case XSHARE_INVALID_STRUCT:
            return "a struct is missing or from another version";
        case XSHARE_INVALID_PARAMETER:
            return "a parameter is out of range";
        case XSHARE_INVALID_TENSOR:
            return "a tensor is missing, misaligned or holds values out of range";
        case XSHARE_INVALID_WORKSPACE:
            return "the workspace is too small or misaligned";
        case XSHARE_OUT_OF_MEMORY:
            return "out of memory";
        case XSHARE_INTERNAL_ERROR:
            return "internal error";
        case XSHARE_CUDA_ERROR:
            return "a CUDA call failed";
    }
    return "unknown status";
}

const char* xshare_last_error(void) { return xshare::last_error().text; }

#define XSHARE_STRING(x) #x
#define XSHARE_DOTTED(major, minor, patch) \
    XSHARE_STRING(major) "." XSHARE_STRING(minor) "." XSHARE_STRING(patch)
const char* xshare_version(void) {
    return XSHARE_DOTTED(XSHARE_VERSION_MAJOR, XSHARE_VERSION_MINOR, XSHARE_VERSION_PATCH);
}

}  // extern "C"
