// SPDX-License-Identifier: Apache-2.0
// Random bytes as parameters, shapes and tensors. Every call must end in a status; where it is XSHARE_OK, the
// outputs must make sense. Every buffer is a heap block of its exact size, so that a sanitizer sees the first
// byte beyond it.
//
//     fuzz_route [cases] [seed]
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"
#include "xshare/xshare.h"

namespace {

using namespace fuzz;

xshare_route_params sane_params() {
    xshare_route_params p = {};
    p.struct_size = sizeof p;
    p.num_tokens = between(0, 20);
    p.scoring = between(XSHARE_SOFTMAX, XSHARE_SQRT_SOFTPLUS_BIAS);
    p.num_groups =
        p.scoring == XSHARE_TOPK_SOFTMAX || p.scoring == XSHARE_TOPK_SIGMOID || one_in(2) ? 1 : between(1, 8);
    p.num_experts = p.num_groups * between(1, one_in(20) ? 512 / p.num_groups : 12);
    p.top_k_groups = between(1, p.num_groups);
    p.top_k = between(1, 5);
    p.routed_scaling_factor = one_in(3) ? 2.5f : 1.0f;
    p.logits_dtype = between(0, 2);
    p.budget = p.top_k + between(0, p.num_experts);
    p.warmup = between(0, p.top_k);
    p.request_budget = one_in(2) ? 0 : between(1, p.num_experts + 1);
    p.gpu_budget = one_in(2) ? 0 : between(1, p.num_experts);
    p.max_rows = one_in(4) ? between(0, 20) : -1;
    p.coverage = one_in(2) ? 0.0 : (bits() % 1000 + 1) / 1000.0;
    p.utility = one_in(20) || p.scoring != XSHARE_SQRT_SOFTPLUS_BIAS ? between(0, 1) : XSHARE_SQUARED_WEIGHT;
    p.mask_value = one_in(4) ? -1024.0f : 0.0f;
    return p;
}

xshare_route_params random_params() {
    xshare_route_params p = sane_params();
    if (one_in(8)) fill_random(&p, sizeof p);
    if (one_in(8)) p.struct_size = sizeof p;
    if (one_in(3)) {
        const int32_t value = extreme();  // into any of the 15 four-byte fields from num_tokens on
        memcpy(reinterpret_cast<unsigned char*>(&p) + 4 + 4 * (bits() % 15), &value, sizeof value);
    }
    if (one_in(30)) fill_random(&p.coverage, sizeof p.coverage);
    if (one_in(50)) p.struct_size = static_cast<uint32_t>(extreme());
    return p;
}

size_t logit_size(const xshare_route_params& p) { return p.logits_dtype == XSHARE_FLOAT32 ? 4 : 2; }

// Random bits are rarely valid ids: most of the time they are brought into range.
void tame(int32_t* values, size_t count, int32_t low, int32_t high) {
    if (one_in(8)) return;
    for (size_t i = 0; i < count; ++i) values[i] = between(low, high);
}

void tame_logits(void* logits, const xshare_route_params& p) {
    if (one_in(6)) return;
    const size_t count = static_cast<size_t>(p.num_tokens) * static_cast<size_t>(p.num_experts);
    const bool has_bans = one_in(3);
    for (size_t i = 0; i < count; ++i) {
        const bool is_banned = has_bans && one_in(8);
        if (p.logits_dtype == XSHARE_FLOAT32)
            static_cast<float*>(logits)[i] =
                is_banned ? -INFINITY : static_cast<float>(between(-4000, 4000)) / 256.0f;
        else if (is_banned)
            static_cast<uint16_t*>(logits)[i] = p.logits_dtype == XSHARE_BFLOAT16 ? 0xff80 : 0xfc00;
        else
            static_cast<uint16_t*>(logits)[i] &= 0xbbff;  // no infinite exponent in either half format
    }
}

[[noreturn]] void fail(const char* what, const xshare_route_params& p) {
    printf("%s: T=%d E=%d k=%d scoring=%d dtype=%d groups=%d/%d m=%d k0=%d m_r=%d m_g=%d c=%g\n", what,
           p.num_tokens, p.num_experts, p.top_k, p.scoring, p.logits_dtype, p.top_k_groups, p.num_groups,
           p.budget, p.warmup, p.request_budget, p.gpu_budget, p.coverage);
    exit(1);
}

void check_outputs(const xshare_route_params& p, const xshare_route_tensors& t) {
    const size_t slots = static_cast<size_t>(p.num_tokens) * static_cast<size_t>(p.top_k);
    for (size_t i = 0; t.expert_ids != nullptr && i < slots; ++i) {
        const int32_t id = t.expert_ids[i];
        if (id < 0 || id >= p.num_experts) fail("an expert id is out of range", p);
        const bool uses = t.expert_weights != nullptr && t.expert_weights[i] != 0.0f;
        if (uses && t.active_experts != nullptr && t.active_experts[id] != 1)
            fail("a row uses an expert outside S", p);
    }
    for (size_t i = 0; t.expert_weights != nullptr && i < slots; ++i)
        if (!isfinite(t.expert_weights[i]) && fabsf(p.routed_scaling_factor) < 1e30f)
            fail("a weight is not finite", p);
    if (t.stats == nullptr) return;
    if (t.stats[XSHARE_STAT_EXPERTS_AFTER] > p.num_experts) fail("more experts after than there are", p);
    if (t.stats[XSHARE_STAT_KEPT_UTILITY] > t.stats[XSHARE_STAT_TOTAL_UTILITY])
        fail("kept more utility than there is", p);
}

xshare_status call(const xshare_route_params& p, bool runnable) {
    const size_t rows = runnable ? static_cast<size_t>(p.num_tokens) : 1;
    const size_t experts = runnable ? static_cast<size_t>(p.num_experts) : 1;
    const size_t top_k = runnable ? static_cast<size_t>(p.top_k) : 1;
    const bool crooked = one_in(20);
    auto off = [&] { return crooked && one_in(4); };
    Block logits(rows * experts * logit_size(p), off()), bias(experts * 4, off()), requests(rows * 4, off()),
        exempt(rows, off());
    Block gpus(experts * 4, off()), ids(rows * top_k * 4, off()), weights(rows * top_k * 4, off());
    Block masked(rows * experts * logit_size(p), off()), active(experts, off()),
        step_bias(experts * 4, off()), stats(8 * XSHARE_NUM_STATS, off());
    if (runnable && !crooked) {
        tame(static_cast<int32_t*>(requests.get()), rows, -1, 4);
        tame(static_cast<int32_t*>(gpus.get()), experts, 0, static_cast<int32_t>(experts) - 1);
        tame_logits(logits.get(), p);
        for (size_t e = 0; e < experts && !one_in(8 * 64); ++e)
            static_cast<float*>(bias.get())[e] = static_cast<float>(between(-9, 9));
    }
    xshare_route_tensors t = {};
    t.struct_size = one_in(100) ? bits() : static_cast<uint32_t>(sizeof t);
    t.router_logits = !runnable || one_in(50) ? nullptr : logits.get();
    if (p.scoring >= XSHARE_SIGMOID_BIAS ? one_in(2) : one_in(40))
        t.correction_bias = static_cast<float*>(bias.get());
    if (p.request_budget > 0 ? !one_in(20) : one_in(2)) t.request_ids = static_cast<int32_t*>(requests.get());
    if (one_in(2)) t.exempt = static_cast<uint8_t*>(exempt.get());
    if (p.gpu_budget > 0 ? !one_in(20) : one_in(2)) t.expert_gpu = static_cast<int32_t*>(gpus.get());
    if (!one_in(4)) t.expert_ids = static_cast<int32_t*>(ids.get());
    if (!one_in(4)) t.expert_weights = static_cast<float*>(weights.get());
    if (!one_in(2)) t.masked_logits = one_in(4) && t.router_logits != nullptr ? logits.get() : masked.get();
    if (!one_in(4)) t.active_experts = static_cast<uint8_t*>(active.get());
    if (p.scoring == XSHARE_SIGMOID_BIAS ? one_in(3) : one_in(40))
        t.step_bias = static_cast<float*>(step_bias.get());
    if (!one_in(4)) t.stats = static_cast<int64_t*>(stats.get());

    size_t needed = 0;
    void* workspace = nullptr;
    if (!one_in(4) && xshare_workspace_size(&p, &needed) == XSHARE_OK && needed > 0) {
        workspace = aligned_alloc(64, needed);  // a multiple of 64
        if (one_in(30)) needed -= 1;
    }
    const xshare_status status = xshare_route_cpu(one_in(200) ? nullptr : &p, one_in(200) ? nullptr : &t,
                                                  workspace, workspace == nullptr ? 0 : needed);
    if (status == XSHARE_OK) check_outputs(p, t);
    free(workspace);
    return status;
}

}  // namespace

int main(int argc, char** argv) {
    const long cases = argc > 1 ? atol(argv[1]) : 20000;
    generator.seed(argc > 2 ? static_cast<uint64_t>(atol(argv[2])) : 1);
    long counts[16] = {};
    for (long i = 0; i < cases; ++i) {
        const xshare_route_params p = random_params();
        size_t size = 0;
        // Shapes that are valid but would need much memory are called without logits, which must be refused.
        const bool valid = xshare_workspace_size(&p, &size) == XSHARE_OK;
        const bool small = valid && static_cast<int64_t>(p.num_tokens) * p.num_experts <= 1 << 16;
        const xshare_status status = call(p, small);
        if (status == XSHARE_OK && !small && p.num_tokens != 0) fail("a call without logits was accepted", p);
        if (status != XSHARE_OK && xshare_last_error()[0] == '\0') fail("no message", p);
        ++counts[static_cast<int>(status) & 15];
    }
    for (int status = 0; status < 16; ++status)
        if (counts[status] > 0)
            printf("%8ld %s\n", counts[status], xshare_error_string(static_cast<xshare_status>(status)));
    return 0;
}
