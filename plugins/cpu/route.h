// SPDX-License-Identifier: Apache-2.0
#ifndef XSHARE_CPU_ROUTE_H
#define XSHARE_CPU_ROUTE_H

#include <stddef.h>

#include "core/limits.h"
#include "xshare/xshare.h"

namespace xshare {

size_t route_workspace_size(const xshare_route_params& params);

// All arguments have been checked; `workspace` has route_workspace_size bytes and kWorkspaceAlignment.
void route(const xshare_route_params& params, const xshare_route_tensors& tensors, unsigned char* workspace);

}  // namespace xshare

#endif  // XSHARE_CPU_ROUTE_H
