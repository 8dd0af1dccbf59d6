// SPDX-License-Identifier: Apache-2.0
// The header is C, and a call from C works.
#include <math.h>
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

    // Row 0 may not take its best; coverage keeps the least that is enough, and two experts at least.
    const float banned[2][4] = {{-INFINITY, 2, 1, 0}, {0, 2, 1, 3}};
    float masked[2][4];
    tensors.router_logits = banned;
    tensors.masked_logits = masked;
    params.budget = 4;
    params.coverage = 0.1;
    params.mask_value = -1024;
    if (xshare_route_cpu(&params, &tensors, NULL, 0) != XSHARE_OK) return 1;
    const float expected_masked[2][4] = {{-1024, 2, -1024, 0}, {-1024, 2, -1024, 3}};
    if (memcmp(masked, expected_masked, sizeof masked) != 0) return 1;
    params.utility = 2;
    if (xshare_route_cpu(&params, &tensors, NULL, 0) != XSHARE_INVALID_PARAMETER) return 1;
    if (strcmp(xshare_last_error(), "utility must be in 0..1 (xshare_utility), not 2") != 0) return 1;
    params.utility = XSHARE_AFFINITY;
    params.mask_value = 0.5f;
    if (xshare_route_cpu(&params, &tensors, NULL, 0) != XSHARE_INVALID_PARAMETER) return 1;
    params.mask_value = 0;
    float step_bias[4];
    tensors.step_bias = step_bias;
    if (xshare_route_cpu(&params, &tensors, NULL, 0) != XSHARE_INVALID_TENSOR) return 1;
    if (strcmp(xshare_last_error(), "step_bias belongs to sigmoid_bias scoring alone") != 0) return 1;
    params.scoring = XSHARE_SIGMOID_BIAS;
    if (xshare_route_cpu(&params, &tensors, NULL, 0) != XSHARE_OK) return 1;
    const float expected_bias[4] = {-INFINITY, 0, -INFINITY, 0};
    if (memcmp(step_bias, expected_bias, sizeof step_bias) != 0) return 1;
    const uint8_t exempt[2] = {0, 1};
    tensors.exempt = exempt;
    if (xshare_route_cpu(&params, &tensors, NULL, 0) != XSHARE_OK) return 1;
    const float no_bias[4] = {0, 0, 0, 0};
    if (memcmp(step_bias, no_bias, sizeof step_bias) != 0) return 1;
    params.budget = 1;
    if (xshare_route_cpu(&params, &tensors, NULL, 0) != XSHARE_INVALID_PARAMETER) return 1;
    return strcmp(xshare_last_error(), "budget must be at least top_k=2, not 1") != 0;
}
