// SPDX-License-Identifier: Apache-2.0
// Random shapes, ids and parameters for the experts. Every call must end in a status; where it is XSHARE_OK,
// every output must have been written. Every buffer is a heap block of its exact size.
//
//     fuzz_experts [cases] [seed]
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "fuzz.h"
#include "xshare/xshare_experts.h"

namespace {

using namespace fuzz;

xshare_experts_params random_params() {
    xshare_experts_params p = {};
    p.struct_size = sizeof p;
    p.num_tokens = between(0, 12);
    p.num_experts = between(1, 9);
    p.top_k = between(1, 4);
    p.hidden_size = between(1, 40);
    p.intermediate_size = between(1, 40);
    if (one_in(6)) {
        const int32_t value = extreme();
        memcpy(reinterpret_cast<unsigned char*>(&p) + 4 * (bits() % 6), &value, sizeof value);
    }
    return p;
}

xshare_status run_case() {
    const xshare_experts_params p = random_params();
    size_t workspace_size = 0;
    const xshare_status accepted = xshare_experts_workspace_size(&p, &workspace_size);
    if (accepted != XSHARE_OK) {
        xshare_experts_tensors nothing = {};
        nothing.struct_size = sizeof nothing;
        return xshare_experts_cpu(&p, &nothing, nullptr, 0) == accepted ? accepted : XSHARE_INTERNAL_ERROR;
    }
    if (p.num_tokens > 12 || p.hidden_size > 40 || p.intermediate_size > 40)
        return accepted;  // legal, but large
    const size_t tokens = static_cast<size_t>(p.num_tokens), experts = static_cast<size_t>(p.num_experts);
    const size_t slots = tokens * static_cast<size_t>(p.top_k), width = static_cast<size_t>(p.hidden_size);
    const size_t matrix = experts * width * static_cast<size_t>(p.intermediate_size);
    std::vector<float> hidden(tokens * width, 0.5f), weights(slots, 0.25f), gate_up(2 * matrix, 0.125f),
        down(matrix, 1.0f);
    std::vector<int32_t> ids(slots);
    for (int32_t& id : ids) id = between(0, p.num_experts - 1);
    const bool bad_id = slots > 0 && one_in(8);
    if (bad_id) ids[bits() % slots] = one_in(2) ? -1 : extreme() | (1 << 30);
    const size_t too_small = workspace_size > 0 && one_in(10) ? bits() % workspace_size + 1 : 0;
    const Block output(tokens * width * sizeof(float), one_in(20));
    void* workspace = aligned_alloc(64, (workspace_size + 63) / 64 * 64);
    xshare_experts_tensors t = {sizeof t,
                                hidden.data(),
                                ids.data(),
                                weights.data(),
                                gate_up.data(),
                                down.data(),
                                static_cast<float*>(output.get())};
    if (one_in(20)) t.gate_up = nullptr;
    if (one_in(40)) t.struct_size = bits();
    memset(output.get(), 0xff, tokens * width * sizeof(float));
    const xshare_status status = xshare_experts_cpu(&p, &t, workspace, workspace_size - too_small);
    free(workspace);
    if (status != XSHARE_OK) return status;
    if (bad_id || too_small > 0) return XSHARE_INTERNAL_ERROR;  // must have been refused
    const float* written = static_cast<const float*>(output.get());
    for (size_t i = 0; i < tokens * width; ++i)
        if (!(written[i] > 0.0f)) return XSHARE_INTERNAL_ERROR;  // all inputs are positive; 0xff.. is a NaN
    return status;
}

}  // namespace

int main(int argc, char** argv) {
    const int cases = argc > 1 ? atoi(argv[1]) : 20000;
    generator.seed(argc > 2 ? strtoull(argv[2], nullptr, 10) : 1);
    int counts[XSHARE_CUDA_ERROR + 1] = {};
    for (int i = 0; i < cases; ++i) ++counts[run_case()];
    for (int status = 0; status <= XSHARE_CUDA_ERROR; ++status)
        if (counts[status] > 0)
            printf("%d %s\n", counts[status], xshare_error_string(static_cast<xshare_status>(status)));
    return counts[XSHARE_INTERNAL_ERROR] > 0;
}
