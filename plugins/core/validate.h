// SPDX-License-Identifier: Apache-2.0
// What a caller may ask for, and what it is told otherwise. Host only.
#ifndef XSHARE_CORE_VALIDATE_H
#define XSHARE_CORE_VALIDATE_H

#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>

#include "core/limits.h"
#include "core/masking.h"
#include "core/platform.h"
#include "core/rules.h"
#include "core/scoring.h"
#include "xshare/xshare.h"

namespace xshare {

struct Message {
    char text[256] = "";
};

// What xshare_last_error() tells this thread.
inline Message& last_error() {
    thread_local Message message;
    return message;
}

__attribute__((format(printf, 3, 4))) inline xshare_status refuse(Message& message, xshare_status status,
                                                                  const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message.text, sizeof message.text, format, arguments);
    va_end(arguments);
    return status;
}

// Copies a caller's struct, whatever its address is aligned to.
template <typename Struct>
xshare_status copy_struct(const Struct* source, const char* name, Struct& copy, Message& message) {
    if (source == nullptr) return refuse(message, XSHARE_INVALID_STRUCT, "%s is NULL", name);
    uint32_t size;
    memcpy(&size, static_cast<const void*>(source), sizeof size);
    if (size != sizeof(Struct))
        return refuse(message, XSHARE_INVALID_STRUCT,
                      "%s.struct_size is %u, but this library (%d.%d.%d) has %zu", name, size,
                      XSHARE_VERSION_MAJOR, XSHARE_VERSION_MINOR, XSHARE_VERSION_PATCH, sizeof(Struct));
    memcpy(&copy, static_cast<const void*>(source), sizeof(Struct));
    return XSHARE_OK;
}

inline xshare_status check_workspace(size_t needed, const void* workspace, size_t size, Message& message) {
    constexpr xshare_status bad = XSHARE_INVALID_WORKSPACE;
    if (size < needed)
        return refuse(message, bad, "the workspace has %zu bytes, but %zu are needed", size, needed);
    if (needed > 0 &&
        (workspace == nullptr || reinterpret_cast<uintptr_t>(workspace) % kWorkspaceAlignment != 0))
        return refuse(message, bad, "the workspace is NULL or not aligned to %d bytes", kWorkspaceAlignment);
    return XSHARE_OK;
}

inline bool is_finite(float x) { return (float_bits(x) & 0x7f800000) != 0x7f800000; }

inline xshare_status check_shape(const xshare_route_params& p, Message& message) {
    constexpr xshare_status bad = XSHARE_INVALID_PARAMETER;
    if (p.num_tokens < 0 || p.num_tokens > kMaxTokens)
        return refuse(message, bad, "num_tokens must be in 0..%d, not %d", kMaxTokens, p.num_tokens);
    if (p.num_experts < 1 || p.num_experts > kMaxExperts)
        return refuse(message, bad, "num_experts must be in 1..%d, not %d", kMaxExperts, p.num_experts);
    if (p.top_k < 1 || p.top_k > kMaxTopK)
        return refuse(message, bad, "top_k must be in 1..%d, not %d", kMaxTopK, p.top_k);
    if (p.top_k > p.num_experts)
        return refuse(message, bad, "top_k=%d is more than num_experts=%d", p.top_k, p.num_experts);
    if (p.scoring < XSHARE_SOFTMAX || p.scoring >= kNumScorings)
        return refuse(message, bad, "scoring must be in 0..%d (xshare_scoring), not %d", kNumScorings - 1,
                      p.scoring);
    if (p.logits_dtype < XSHARE_FLOAT32 || p.logits_dtype > XSHARE_FLOAT16)
        return refuse(message, bad, "logits_dtype must be in 0..2 (xshare_dtype), not %d", p.logits_dtype);
    if (!is_finite(p.routed_scaling_factor))
        return refuse(message, bad, "routed_scaling_factor must be finite");
    return XSHARE_OK;
}

inline xshare_status check_groups(const xshare_route_params& p, Message& message) {
    constexpr xshare_status bad = XSHARE_INVALID_PARAMETER;
    if (p.num_groups < 1 || p.num_groups > p.num_experts || p.num_experts % p.num_groups != 0)
        return refuse(message, bad, "num_groups=%d must divide num_experts=%d", p.num_groups, p.num_experts);
    if (p.top_k_groups < 1 || p.top_k_groups > p.num_groups)
        return refuse(message, bad, "top_k_groups must be in 1..num_groups=%d, not %d", p.num_groups,
                      p.top_k_groups);
    if (p.num_groups == 1) return XSHARE_OK;
    const int group_size = p.num_experts / p.num_groups;
    const ScoringRule rule = rule_of(p.scoring);
    if (rule.group_best_of == 0)
        return refuse(message, bad, "%s has no expert groups, but num_groups=%d", rule.name, p.num_groups);
    if (group_size < rule.group_best_of)
        return refuse(message, bad,
                      "%s scores a group by its best %d experts, but num_groups=%d leaves it %d", rule.name,
                      rule.group_best_of, p.num_groups, group_size);
    if (p.top_k > p.top_k_groups * group_size)
        return refuse(message, bad, "top_k=%d is more than the %d experts of top_k_groups=%d groups", p.top_k,
                      p.top_k_groups * group_size, p.top_k_groups);
    if (p.warmup == 0)
        return refuse(message, bad,
                      "warmup must be at least 1 with num_groups=%d: a row could find no expert",
                      p.num_groups);
    return XSHARE_OK;
}

inline xshare_status check_budgets(const xshare_route_params& p, Message& message) {
    constexpr xshare_status bad = XSHARE_INVALID_PARAMETER;
    if (p.budget < p.top_k)
        return refuse(message, bad, "budget must be at least top_k=%d, not %d", p.top_k, p.budget);
    if (p.warmup < 0 || p.warmup > p.top_k)
        return refuse(message, bad, "warmup must be in 0..top_k=%d, not %d", p.top_k, p.warmup);
    if (p.request_budget < 0)
        return refuse(message, bad, "request_budget must be positive (0 = off), not %d", p.request_budget);
    if (p.gpu_budget < 0)
        return refuse(message, bad, "gpu_budget must be positive (0 = off), not %d", p.gpu_budget);
    if (p.utility < XSHARE_SQUARED_WEIGHT || p.utility > XSHARE_AFFINITY)
        return refuse(message, bad, "utility must be in 0..1 (xshare_utility), not %d", p.utility);
    if (p.utility == XSHARE_AFFINITY && !rule_of(p.scoring).is_bounded())
        return refuse(message, bad, "utility cannot be affinity with %s, whose scores have no bound",
                      rule_of(p.scoring).name);
    if (!(p.coverage >= 0.0 && p.coverage <= 1.0))
        return refuse(message, bad, "coverage must be in 0..1 (0 = off), not %g", p.coverage);
    return XSHARE_OK;
}

inline xshare_status check_mask_value(const xshare_route_params& p, Message& message) {
    const uint32_t bits = mask_bits(p);
    const uint16_t half = static_cast<uint16_t>(bits);
    const float held = p.logits_dtype == XSHARE_FLOAT32    ? bits_float(static_cast<int32_t>(bits))
                       : p.logits_dtype == XSHARE_BFLOAT16 ? widen_bf16(half)
                                                           : widen_fp16(half);
    if (p.mask_value <= 0.0f && held == mask_value(p)) return XSHARE_OK;
    return refuse(message, XSHARE_INVALID_PARAMETER,
                  "mask_value must be negative and exact in logits_dtype (0 = -inf), not %g",
                  static_cast<double>(p.mask_value));
}

inline xshare_status check_params(const xshare_route_params& p, Message& message) {
    xshare_status status = check_shape(p, message);
    if (status == XSHARE_OK) status = check_groups(p, message);
    if (status == XSHARE_OK) status = check_budgets(p, message);
    if (status == XSHARE_OK) status = check_mask_value(p, message);
    return status;
}

inline xshare_status check_pointer(const void* pointer, size_t alignment, const char* name,
                                   Message& message) {
    if (reinterpret_cast<uintptr_t>(pointer) % alignment == 0) return XSHARE_OK;
    return refuse(message, XSHARE_INVALID_TENSOR, "%s is not aligned to %zu bytes", name, alignment);
}

// Which pointers are there and aligned; `p` has been checked. Reads no tensor, so it suits device memory as
// well.
inline xshare_status check_pointers(const xshare_route_params& p, const xshare_route_tensors& t,
                                    Message& message) {
    constexpr xshare_status bad = XSHARE_INVALID_TENSOR;
    if (t.router_logits == nullptr && p.num_tokens > 0)
        return refuse(message, bad, "router_logits is missing");
    if (t.correction_bias != nullptr && !rule_of(p.scoring).has_bias)
        return refuse(message, bad, "correction_bias: %s scoring has none", rule_of(p.scoring).name);
    if (t.request_ids == nullptr && p.request_budget > 0 && p.num_tokens > 0)
        return refuse(message, bad, "request_budget=%d needs request_ids", p.request_budget);
    if (t.expert_gpu == nullptr && p.gpu_budget > 0)
        return refuse(message, bad, "gpu_budget=%d needs expert_gpu", p.gpu_budget);
    if (t.step_bias != nullptr && p.scoring != XSHARE_SIGMOID_BIAS)
        return refuse(message, bad, "step_bias belongs to sigmoid_bias scoring alone");
    if (t.step_bias != nullptr && p.num_groups > 1)
        return refuse(message, bad, "step_bias cannot express num_groups=%d: a group's score would change",
                      p.num_groups);
    if (t.step_bias != nullptr && p.warmup == 0)
        return refuse(message, bad, "step_bias needs a warmup of at least 1: a row could find no expert");
    const size_t logit_size = p.logits_dtype == XSHARE_FLOAT32 ? 4 : 2;
    const struct {
        const void* pointer;
        size_t alignment;
        const char* name;
    } pointers[] = {{t.router_logits, logit_size, "router_logits"},
                    {t.masked_logits, logit_size, "masked_logits"},
                    {t.correction_bias, 4, "correction_bias"},
                    {t.request_ids, 4, "request_ids"},
                    {t.expert_gpu, 4, "expert_gpu"},
                    {t.expert_ids, 4, "expert_ids"},
                    {t.expert_weights, 4, "expert_weights"},
                    {t.step_bias, 4, "step_bias"},
                    {t.stats, 8, "stats"},
                    {t.dial, 8, "dial"}};
    for (const auto& each : pointers) {
        const xshare_status status = check_pointer(each.pointer, each.alignment, each.name, message);
        if (status != XSHARE_OK) return status;
    }
    return XSHARE_OK;
}

// What the small host tensors hold.
inline xshare_status check_contents(const xshare_route_params& p, const xshare_route_tensors& t,
                                    Message& message) {
    constexpr xshare_status bad = XSHARE_INVALID_TENSOR;
    for (int e = 0; t.correction_bias != nullptr && e < p.num_experts; ++e)
        if (!is_finite(t.correction_bias[e]))
            return refuse(message, bad, "correction_bias[%d] is not finite", e);
    for (int e = 0; t.expert_gpu != nullptr && e < p.num_experts; ++e)
        if (t.expert_gpu[e] < 0 || t.expert_gpu[e] >= p.num_experts)
            return refuse(message, bad, "expert_gpu[%d]=%d must be in 0..num_experts-1=%d", e,
                          t.expert_gpu[e], p.num_experts - 1);
    for (int row = 0; t.request_ids != nullptr && row < p.num_tokens; ++row)
        if (t.request_ids[row] < -1)
            return refuse(message, bad, "request_ids[%d]=%d must be -1 (padding) or not negative", row,
                          t.request_ids[row]);
    return XSHARE_OK;
}

}  // namespace xshare

#endif  // XSHARE_CORE_VALIDATE_H
