// SPDX-License-Identifier: Apache-2.0
// What each scoring is made of: everything that depends on it reads this table.
#ifndef XSHARE_CORE_RULES_H
#define XSHARE_CORE_RULES_H

#include "core/platform.h"
#include "xshare/xshare.h"

namespace xshare {

enum class Affinity : int32_t { kSoftmax, kSigmoid, kSqrtSoftplus };
enum class RankedBy : int32_t { kAffinity, kLogits };

struct ScoringRule {
    const char* name;
    Affinity affinity;
    RankedBy ranked_by;
    bool has_bias;      // added to what it ranks by
    int group_best_of;  // a group's score is the sum of so many of its best; 0 = no groups
    bool renormalises;  // divides the weights of a choice by their sum

    // The weight of a pick is: its ranking score; a softmax over the picks; or its affinity, by itself.
    XSHARE_METHOD constexpr bool weighs_by_ranking() const {
        return ranked_by == RankedBy::kAffinity && !has_bias;
    }
    XSHARE_METHOD constexpr bool weighs_by_logits() const {
        return ranked_by == RankedBy::kLogits && affinity == Affinity::kSoftmax;
    }
    XSHARE_METHOD constexpr bool is_bounded() const { return affinity != Affinity::kSqrtSoftplus; }
};

constexpr int kNumScorings = XSHARE_SQRT_SOFTPLUS_BIAS + 1;

XSHARE_FN constexpr ScoringRule rule_of(int32_t scoring) {
    switch (scoring) {
        case XSHARE_SOFTMAX:
            return {"softmax", Affinity::kSoftmax, RankedBy::kAffinity, false, 1, false};
        case XSHARE_SOFTMAX_RENORM:
            return {"softmax_renorm", Affinity::kSoftmax, RankedBy::kAffinity, false, 1, true};
        case XSHARE_TOPK_SOFTMAX:
            return {"topk_softmax", Affinity::kSoftmax, RankedBy::kLogits, false, 0, true};
        case XSHARE_SIGMOID_BIAS:
            return {"sigmoid_bias", Affinity::kSigmoid, RankedBy::kAffinity, true, 2, true};
        case XSHARE_SOFTMAX_BIAS:
            return {"softmax_bias", Affinity::kSoftmax, RankedBy::kAffinity, true, 2, false};
        case XSHARE_SOFTMAX_BIAS_RENORM:
            return {"softmax_bias_renorm", Affinity::kSoftmax, RankedBy::kAffinity, true, 2, true};
        case XSHARE_TOPK_SIGMOID:
            return {"topk_sigmoid", Affinity::kSigmoid, RankedBy::kLogits, true, 0, false};
        default:
            return {"sqrt_softplus_bias", Affinity::kSqrtSoftplus, RankedBy::kAffinity, true, 2, true};
    }
}

}  // namespace xshare

#endif  // XSHARE_CORE_RULES_H
