// SPDX-License-Identifier: Apache-2.0
// The header is C, and a call from C works.
#include <stdio.h>
#include <string.h>

#include "xshare/xshare.h"

int main(void) {
    const float logits[2][4] = {{3, 2, 1, 0}, {0, 2, 1, 3}};
    int32_t ids[2][2];
    float weights[2][2];
    xshare_route_params params = {0};
    xshare_route_tensors tensors = {0};
    params.struct_size = sizeof params;
    params.num_tokens = 2;
    params.num_experts = 4;
    params.top_k = 2;
    params.scoring = XSHARE_TOPK_SOFTMAX;
    params.num_groups = params.top_k_groups = 1;
    params.routed_scaling_factor = 1;
    params.budget = 2;
    params.warmup = 1;
    params.max_rows = -1;
    tensors.struct_size = sizeof tensors;
    tensors.router_logits = logits;
    tensors.expert_ids = ids[0];
    tensors.expert_weights = weights[0];
    const xshare_status status = xshare_route_cpu(&params, &tensors, NULL, 0);
    printf("%s: %s %s\n", xshare_version(), xshare_error_string(status), xshare_last_error());
    const int32_t expected[2][2] = {{0, 3}, {3, 0}};
    if (status != XSHARE_OK || memcmp(ids, expected, sizeof ids) != 0) return 1;
    params.budget = 1;
    if (xshare_route_cpu(&params, &tensors, NULL, 0) != XSHARE_INVALID_PARAMETER) return 1;
    return strcmp(xshare_last_error(), "budget must be at least top_k=2, not 1") != 0;
}
