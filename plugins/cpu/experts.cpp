// SPDX-License-Identifier: Apache-2.0
// Sorts the slots by expert, then takes the experts in turn, up to kMaxExpertRows of an expert's rows at a
// time.
#include <string.h>

#include "core/validate.h"
#include "cpu/expert_rows.h"
#include "xshare/xshare_experts.h"

namespace xshare {

namespace baseline {
extern const RunExpert expert_kernel;
}
#if defined(XSHARE_HAVE_AVX2)
namespace avx2 {
extern const RunExpert expert_kernel;
}
#endif

RunExpert run_expert() {
#if defined(XSHARE_HAVE_AVX2)
    static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (has_avx2) return avx2::expert_kernel;
#endif
    return baseline::expert_kernel;
}

namespace {

constexpr int kMaxWidth = 1 << 16;

struct ExpertsLayout {
    size_t order_at, size;

    explicit ExpertsLayout(const xshare_experts_params& p) {
        const size_t scratch =
            static_cast<size_t>(kMaxExpertRows) * 3 * static_cast<size_t>(p.intermediate_size);
        order_at = scratch * sizeof(float);
        size = order_at + static_cast<size_t>(p.num_tokens) * static_cast<size_t>(p.top_k) * sizeof(int32_t);
    }
};

xshare_status check_experts_params(const xshare_experts_params& p, Message& message) {
    const struct {
        const char* name;
        int value, low, high;
    } ranges[] = {{"num_tokens", p.num_tokens, 0, kMaxTokens},
                  {"num_experts", p.num_experts, 1, kMaxExperts},
                  {"top_k", p.top_k, 1, kMaxTopK},
                  {"hidden_size", p.hidden_size, 1, kMaxWidth},
                  {"intermediate_size", p.intermediate_size, 1, kMaxWidth}};
    for (const auto& r : ranges)
        if (r.value < r.low || r.value > r.high)
            return refuse(message, XSHARE_INVALID_PARAMETER, "%s must be in %d..%d, not %d", r.name, r.low,
                          r.high, r.value);
    return XSHARE_OK;
}

xshare_status check_experts_tensors(const xshare_experts_params& p, const xshare_experts_tensors& t,
                                    Message& message) {
    const struct {
        const void* pointer;
        const char* name;
    } tensors[] = {{t.hidden_states, "hidden_states"},
                   {t.expert_ids, "expert_ids"},
                   {t.expert_weights, "expert_weights"},
                   {t.gate_up, "gate_up"},
                   {t.down, "down"},
                   {t.output, "output"}};
    if (p.num_tokens == 0) return XSHARE_OK;
    for (const auto& each : tensors) {
        if (each.pointer == nullptr)
            return refuse(message, XSHARE_INVALID_TENSOR, "%s is missing", each.name);
        const xshare_status status = check_pointer(each.pointer, 4, each.name, message);
        if (status != XSHARE_OK) return status;
    }
    const int64_t slots = static_cast<int64_t>(p.num_tokens) * p.top_k;
    for (int64_t s = 0; s < slots; ++s)
        if (t.expert_ids[s] < 0 || t.expert_ids[s] >= p.num_experts)
            return refuse(message, XSHARE_INVALID_TENSOR,
                          "expert_ids[%d, %d]=%d must be in 0..num_experts-1=%d",
                          static_cast<int>(s / p.top_k), static_cast<int>(s % p.top_k), t.expert_ids[s],
                          p.num_experts - 1);
    return XSHARE_OK;
}

// Slots with a weight, sorted by expert and stable: `order`, and where each expert's slots end in `ends`.
void sort_slots(const xshare_experts_params& p, const xshare_experts_tensors& t, int32_t* order,
                int32_t* ends) {
    const int32_t slots = p.num_tokens * p.top_k;
    memset(ends, 0, static_cast<size_t>(p.num_experts) * sizeof(int32_t));
    for (int32_t s = 0; s < slots; ++s) ends[t.expert_ids[s]] += t.expert_weights[s] != 0.0f;
    int32_t start = 0;
    for (int e = 0; e < p.num_experts; ++e) {
        const int32_t count = ends[e];
        ends[e] = start;
        start += count;
    }
    for (int32_t s = 0; s < slots; ++s)
        if (t.expert_weights[s] != 0.0f) order[ends[t.expert_ids[s]]++] = s;
}

void run_experts(const xshare_experts_params& p, const xshare_experts_tensors& t, unsigned char* workspace) {
    const ExpertsLayout layout(p);
    float* scratch = reinterpret_cast<float*>(workspace);
    int32_t* order = reinterpret_cast<int32_t*>(workspace + layout.order_at);
    int32_t ends[kMaxExperts];
    sort_slots(p, t, order, ends);
    const size_t width = static_cast<size_t>(p.hidden_size);
    const size_t expert_size = width * static_cast<size_t>(p.intermediate_size);
    memset(t.output, 0, static_cast<size_t>(p.num_tokens) * width * sizeof(float));
    const RunExpert run = run_expert();
    for (int e = 0, next = 0; e < p.num_experts; ++e) {
        while (next < ends[e]) {
            ExpertRows rows{};
            for (; rows.count < kMaxExpertRows && next < ends[e]; ++rows.count, ++next) {
                const size_t at = static_cast<size_t>(order[next] / p.top_k) * width;
                rows.input[rows.count] = t.hidden_states + at;
                rows.output[rows.count] = t.output + at;
                rows.weight[rows.count] = t.expert_weights[order[next]];
            }
            const size_t expert = static_cast<size_t>(e) * expert_size;
            run(rows, t.gate_up + 2 * expert, t.down + expert, p.hidden_size, p.intermediate_size, scratch);
        }
    }
}

}  // namespace
}  // namespace xshare

extern "C" {

xshare_status xshare_experts_workspace_size(const xshare_experts_params* params, size_t* workspace_size) {
    using namespace xshare;
    xshare_experts_params p;
    if (workspace_size == nullptr)
        return refuse(last_error(), XSHARE_INVALID_STRUCT, "workspace_size is NULL");
    xshare_status status = copy_struct(params, "xshare_experts_params", p, last_error());
    if (status == XSHARE_OK) status = check_experts_params(p, last_error());
    if (status == XSHARE_OK) *workspace_size = ExpertsLayout(p).size;
    return status;
}

xshare_status xshare_experts_cpu(const xshare_experts_params* params, const xshare_experts_tensors* tensors,
                                 void* workspace, size_t workspace_size) {
    using namespace xshare;
    xshare_experts_params p;
    xshare_experts_tensors t;
    xshare_status status = copy_struct(params, "xshare_experts_params", p, last_error());
    if (status == XSHARE_OK) status = copy_struct(tensors, "xshare_experts_tensors", t, last_error());
    if (status == XSHARE_OK) status = check_experts_params(p, last_error());
    if (status == XSHARE_OK) status = check_experts_tensors(p, t, last_error());
    if (status == XSHARE_OK)
        status = check_workspace(ExpertsLayout(p).size, workspace, workspace_size, last_error());
    if (status == XSHARE_OK) run_experts(p, t, static_cast<unsigned char*>(workspace));
    return status;
}

}  // extern "C"
