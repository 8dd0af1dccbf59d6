// SPDX-License-Identifier: Apache-2.0
// The C function of xshare_plan.h. Nothing throws past this file.
#include "core/validate.h"
#include "cuda/plan.h"

extern "C" xshare_status xshare_plan_launches(const xshare_route_params* params,
                                              const xshare_route_tensors* tensors, const xshare_gpu* gpu,
                                              xshare_launch_plan* plan) {
    using namespace xshare;
    RouteArgs args = {};
    xshare_gpu machine = {};
    xshare_launch_plan copy = {};
    xshare_status status = copy_struct(params, "xshare_route_params", args.p, last_error());
    if (status == XSHARE_OK) status = copy_struct(tensors, "xshare_route_tensors", args.t, last_error());
    if (status == XSHARE_OK) status = copy_struct(gpu, "xshare_gpu", machine, last_error());
    if (status == XSHARE_OK)
        status = copy_struct<xshare_launch_plan>(plan, "xshare_launch_plan", copy, last_error());
    if (status == XSHARE_OK) status = check_params(args.p, last_error());
    if (status == XSHARE_OK) status = check_pointers(args.p, args.t, last_error());
    if (status != XSHARE_OK) return status;
    *plan = make_plan(args, fit_to(machine, args.p.num_tokens, experts_per_lane(args.p.num_experts)));
    return XSHARE_OK;
}
