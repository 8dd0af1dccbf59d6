// SPDX-License-Identifier: Apache-2.0
// The stages of the algorithm in their order, over all rows of a step. Two passes: the first scores every row
// and fills the sums and sets, the second restricts every row to S. Key rows are kept between them as far as
// kKeyBytes goes; rows beyond it are scored again, so that the workspace stays small whatever the number of
// rows.
#include "cpu/route.h"

#include <algorithm>

#include "core/masking.h"
#include "core/ordering.h"
#include "core/rules.h"
#include "core/scoring.h"
#include "cpu/expert_set.h"
#include "cpu/rows.h"
#include "cpu/select.h"

namespace xshare {

namespace {

constexpr size_t kKeyBytes = size_t{1} << 20;

enum class RowKind : uint8_t { kPadding, kExempt, kShared };

size_t align_up(size_t size) {
    return (size + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

struct Layout {
    size_t kinds_at, order_at, size;
    int kept_rows;  // rows whose keys are kept

    explicit Layout(const xshare_route_params& p) {
        const size_t rows = static_cast<size_t>(p.num_tokens);
        const size_t row_bytes = static_cast<size_t>(padded(p.num_experts)) * sizeof(int32_t);
        kept_rows = static_cast<int>(std::min(rows, kKeyBytes / row_bytes));
        kinds_at = align_up(static_cast<size_t>(kept_rows) * row_bytes);
        order_at = kinds_at + align_up(rows * sizeof(RowKind));
        size = order_at + (p.request_budget > 0 ? align_up(rows * sizeof(uint64_t)) : 0);
    }
};

// A row's output before it is written: ids by ranking score descending, and their keys.
struct Picks {
    int count = 0;
    int32_t ids[kMaxTopK];
    int32_t keys[kMaxTopK];
};

class Router {
  public:
    Router(const xshare_route_params& params, const xshare_route_tensors& tensors, unsigned char* workspace)
        : p_(params),
          t_(tensors),
          rule_(rule_of(params.scoring)),
          kernels_(row_kernels()),
          layout_(params),
          logit_size_(params.logits_dtype == XSHARE_FLOAT32 ? 4 : 2),
          num_padded_(padded(params.num_experts)),
          kept_keys_(reinterpret_cast<int32_t*>(workspace)),
          kinds_(reinterpret_cast<RowKind*>(workspace + layout_.kinds_at)),
          order_(reinterpret_cast<uint64_t*>(workspace + layout_.order_at)),
          is_shadow_(tensors.dial != nullptr && tensors.dial->mode == XSHARE_SHADOW) {}

    void run() {
        classify_rows();
        stand_aside_ = stands_aside();
        if (!stand_aside_ && p_.request_budget > 0)
            score_rows_by_request();
        else
            for (int row = 0; row < p_.num_tokens; ++row) score_row(row, sums_);
        choose_experts();
        if (!stand_aside_) refine_rows();
        write_stats();
        if (is_shadow_ && !stand_aside_) show_own_choice();
        write_padding_rows();
        write_active_experts();
        write_step_bias();
    }

  private:
    const unsigned char* logits_of(int row) const {
        const size_t offset = static_cast<size_t>(row) * static_cast<size_t>(p_.num_experts) * logit_size_;
        return static_cast<const unsigned char*>(t_.router_logits) + offset;
    }

    unsigned char* masked_of(int row) const {
        const size_t offset = static_cast<size_t>(row) * static_cast<size_t>(p_.num_experts) * logit_size_;
        return static_cast<unsigned char*>(t_.masked_logits) + offset;
    }

    float logit_at(int row, int expert) const {
        const unsigned char* logits = logits_of(row);
        if (p_.logits_dtype == XSHARE_FLOAT32) return reinterpret_cast<const float*>(logits)[expert];
        const uint16_t half = reinterpret_cast<const uint16_t*>(logits)[expert];
        return p_.logits_dtype == XSHARE_BFLOAT16 ? widen_bf16(half) : widen_fp16(half);
    }

    // Stage 0.
    void classify_rows() {
        for (int row = 0; row < p_.num_tokens; ++row) {
            const bool padding =
                (t_.request_ids != nullptr && t_.request_ids[row] == -1) || !has_own_choice(row);
            const bool exempt = t_.exempt != nullptr && t_.exempt[row] != 0;
            kinds_[row] = padding ? RowKind::kPadding : exempt ? RowKind::kExempt : RowKind::kShared;
            num_real_rows_ += !padding;
            num_exempt_rows_ += kinds_[row] == RowKind::kExempt;
        }
    }

    // Whether the row is free of NaN and +inf and leaves its own routing k experts.
    bool has_own_choice(int row) {
        const int finite = kernels_.count_finite(logits_of(row), p_.logits_dtype, p_.num_experts);
        if (finite < p_.top_k) return false;
        if (finite == p_.num_experts || p_.num_groups == 1) return true;
        kernels_.score(p_, logits_of(row), t_.correction_bias, scores_, spare_keys_);
        int available = 0;
        for (int e = 0; e < p_.num_experts; ++e) available += spare_keys_[e] != kUnavailable;
        return available >= p_.top_k;
    }

    bool stands_aside() const {
        const bool unlimited =
            p_.budget >= p_.num_experts && p_.gpu_budget == 0 && p_.request_budget == 0 && p_.coverage == 0.0;
        const bool bias_for_all = t_.step_bias != nullptr && num_exempt_rows_ > 0;
        return unlimited || bias_for_all || (p_.max_rows >= 0 && num_real_rows_ > p_.max_rows);
    }

    int32_t* keys_of(int row) {
        return row < layout_.kept_rows
                   ? kept_keys_ + static_cast<size_t>(row) * static_cast<size_t>(num_padded_)
                   : spare_keys_;
    }

    // Stages 1 and 2: one row's own top-k, and its part of the sums.
    void score_row(int row, int64_t* sums) {
        if (kinds_[row] == RowKind::kPadding) return;
        int32_t* keys = keys_of(row);
        kernels_.score(p_, logits_of(row), t_.correction_bias, scores_, keys);
        Picks own;
        own.count = kernels_.top_k(keys, num_padded_, p_.top_k, own.ids, own.keys);
        for (int j = 0; j < own.count; ++j) before_.add(own.ids[j]);
        if (stand_aside_ || kinds_[row] == RowKind::kExempt) {
            for (int j = 0; j < own.count; ++j) exempt_experts_.add(own.ids[j]);
            count_row(own);
            write_own_choice(row, own);
            return;
        }
        if (is_shadow_) write_own_choice(row, own);
        for (int j = 0; j < std::min(own.count, p_.warmup); ++j) warmup_experts_.add(own.ids[j]);
        if (p_.utility == XSHARE_AFFINITY)
            kernels_.accumulate(scores_.affinity, p_.num_experts, sums);
        else
            add_squared_weights(row, own, sums);
    }

    void write_own_choice(int row, const Picks& own) {
        write_row(row, own);
        if (t_.masked_logits != nullptr && masked_of(row) != logits_of(row))
            std::copy_n(logits_of(row), static_cast<size_t>(p_.num_experts) * logit_size_, masked_of(row));
    }

    void add_squared_weights(int row, const Picks& own, int64_t* sums) const {
        float weights[kMaxTopK];
        choice_weights(row, own, weights);
        for (int j = 0; j < own.count; ++j) sums[own.ids[j]] += fixed_point(mul_rn(weights[j], weights[j]));
    }

    // Stage 3: the rows of one request after each other.
    void score_rows_by_request() {
        for (int row = 0; row < p_.num_tokens; ++row)
            order_[row] = static_cast<uint64_t>(static_cast<uint32_t>(t_.request_ids[row])) << 32 |
                          static_cast<uint32_t>(row);
        std::sort(order_, order_ + p_.num_tokens);
        for (int first = 0, last = 0; first < p_.num_tokens; first = last) {
            int64_t request_sums[kMaxExperts] = {};
            for (; last < p_.num_tokens && order_[last] >> 32 == order_[first] >> 32; ++last)
                score_row(static_cast<int>(order_[last] & UINT32_MAX), request_sums);
            kernels_.add(request_sums, p_.num_experts, sums_);
            propose(request_sums, p_.num_experts, p_.request_budget, proposed_);
        }
    }

    // Stage 4.
    void choose_experts() {
        if (stand_aside_) {
            selection_.active = before_;
        } else {
            const int64_t* utility = p_.request_budget > 0 ? proposed_ : sums_;
            selection_ = select_experts(p_, utility, exempt_experts_, warmup_experts_, t_.expert_gpu);
        }
        num_active_ = selection_.active.list(active_ids_);
        for (int i = 0; i < num_active_; ++i) allowed_[active_ids_[i]] = 1;
    }

    // Stage 5. With a warm-up, S has an expert of every row.
    void refine_rows() {
        const bool need_picks =
            t_.expert_ids != nullptr || t_.expert_weights != nullptr || t_.stats != nullptr || p_.warmup == 0;
        for (int row = 0; row < p_.num_tokens; ++row) {
            if (kinds_[row] != RowKind::kShared) continue;
            int32_t* keys = keys_of(row);
            if (row >= layout_.kept_rows || weighs_by_scores())
                kernels_.score(p_, logits_of(row), t_.correction_bias, scores_, keys);
            if (need_picks) {
                const Picks picks = pick_active(keys);
                if (picks.count == 0) {
                    make_padding(row);
                    continue;
                }
                count_row(picks);
                if (!is_shadow_) write_row(row, picks);
            }
            if (t_.masked_logits != nullptr && !is_shadow_)
                kernels_.mask(logits_of(row), p_.logits_dtype, mask_bits(p_), allowed_, keys, p_.num_experts,
                              masked_of(row));
        }
    }

    // Whether weights are read from `scores_`, which are the row's scored last.
    bool weighs_by_scores() const {
        return rule_.affinity == Affinity::kSoftmax && rule_.has_bias && t_.expert_weights != nullptr;
    }

    // A row that finds nothing in S; what it will name counts.
    void make_padding(int row) {
        if (!is_shadow_) kinds_[row] = RowKind::kPadding;
        for (int j = 0; j < p_.top_k; ++j) after_.add(padding_id(j));
    }

    int32_t padding_id(int slot) const {
        return num_active_ > 0 ? active_ids_[std::min(slot, num_active_ - 1)] : 0;
    }

    Picks pick_active(const int32_t* keys) {
        alignas(64) int32_t active_keys[kMaxExperts];
        const int length = padded(num_active_);
        for (int i = 0; i < num_active_; ++i) active_keys[i] = keys[active_ids_[i]];
        std::fill(active_keys + num_active_, active_keys + length, kUnavailable);
        Picks picks;
        picks.count = kernels_.top_k(active_keys, length, p_.top_k, picks.ids, picks.keys);
        for (int j = 0; j < picks.count; ++j) picks.ids[j] = active_ids_[picks.ids[j]];
        return picks;
    }

    void count_row(const Picks& picks) {
        for (int j = 0; j < picks.count; ++j) after_.add(picks.ids[j]);
    }

    // The outputs of a shadow: the experts in use are those of the rows' own choices.
    void show_own_choice() {
        stand_aside_ = true;
        std::fill_n(allowed_, p_.num_experts, 0);
        num_active_ = before_.list(active_ids_);
        for (int i = 0; i < num_active_; ++i) allowed_[active_ids_[i]] = 1;
    }

    // One real row that found at least one expert.
    void write_row(int row, const Picks& picks) {
        const size_t first = static_cast<size_t>(row) * static_cast<size_t>(p_.top_k);
        for (int j = 0; t_.expert_ids != nullptr && j < p_.top_k; ++j)
            t_.expert_ids[first + j] = picks.ids[std::min(j, picks.count - 1)];
        if (t_.expert_weights != nullptr) write_weights(row, picks, t_.expert_weights + first);
    }

    void write_weights(int row, const Picks& picks, float* weights) const {
        choice_weights(row, picks, weights);
        for (int j = 0; j < p_.top_k; ++j)
            weights[j] = j < picks.count ? mul_rn(weights[j], p_.routed_scaling_factor) : 0.0f;
    }

    // The model's weights of the picks, before scaling; their sum is added up in the order of the slots.
    void choice_weights(int row, const Picks& picks, float* weights) const {
        float sum = 0.0f;
        for (int j = 0; j < picks.count; ++j) {
            weights[j] = unnormalised_weight(row, picks, j);
            sum = add_rn(sum, weights[j]);
        }
        for (int j = 0; j < picks.count && rule_.renormalises; ++j)
            weights[j] = weights[j] != 0.0f ? div_rn(weights[j], sum) : 0.0f;
    }

    float unnormalised_weight(int row, const Picks& picks, int j) const {
        if (rule_.weighs_by_ranking()) return key_score(picks.keys[j]);
        if (rule_.weighs_by_logits())
            return exp_fixed(sub_rn(key_score(picks.keys[j]), key_score(picks.keys[0])));
        if (rule_.affinity == Affinity::kSoftmax) return scores_.affinity[picks.ids[j]];
        const float z = logit_at(row, picks.ids[j]);
        return rule_.affinity == Affinity::kSigmoid ? sigmoid_fixed(z) : sqrt_softplus_fixed(z);
    }

    // Padding, and rows that find nothing in S: they activate nothing new.
    void write_padding_rows() {
        for (int row = 0; row < p_.num_tokens; ++row) {
            if (kinds_[row] != RowKind::kPadding) continue;
            const size_t first = static_cast<size_t>(row) * static_cast<size_t>(p_.top_k);
            for (int j = 0; t_.expert_ids != nullptr && j < p_.top_k; ++j)
                t_.expert_ids[first + j] = padding_id(j);
            if (t_.expert_weights != nullptr) std::fill_n(t_.expert_weights + first, p_.top_k, 0.0f);
            if (t_.masked_logits != nullptr) write_padding_logits(masked_of(row));
        }
    }

    void write_padding_logits(unsigned char* masked) {
        std::fill_n(masked, static_cast<size_t>(p_.num_experts) * logit_size_, static_cast<unsigned char>(0));
        if (num_active_ == 0) return;
        std::fill_n(spare_keys_, p_.num_experts, 0);
        kernels_.mask(masked, p_.logits_dtype, mask_bits(p_), allowed_, spare_keys_, p_.num_experts, masked);
    }

    void write_active_experts() const {
        for (int e = 0; t_.active_experts != nullptr && e < p_.num_experts; ++e)
            t_.active_experts[e] = static_cast<uint8_t>(allowed_[e]);
    }

    void write_step_bias() const {
        for (int e = 0; t_.step_bias != nullptr && e < p_.num_experts; ++e) {
            const float bias = t_.correction_bias == nullptr ? 0.0f : t_.correction_bias[e];
            t_.step_bias[e] = allowed_[e] != 0 || stand_aside_ ? bias : mask_value(p_);
        }
    }

    void write_stats() const {
        if (t_.stats == nullptr) return;
        int64_t kept = 0, total = 0;
        for (int e = 0; e < p_.num_experts; ++e) {
            total += sums_[e];
            kept += allowed_[e] != 0 ? sums_[e] : 0;
        }
        t_.stats[XSHARE_STAT_EXPERTS_BEFORE] = before_.size();
        t_.stats[XSHARE_STAT_EXPERTS_AFTER] = after_.size();
        t_.stats[XSHARE_STAT_KEPT_UTILITY] = kept;
        t_.stats[XSHARE_STAT_TOTAL_UTILITY] = total;
        t_.stats[XSHARE_STAT_WARMUP_OVERFLOW] = selection_.warmup_overflow;
        t_.stats[XSHARE_STAT_PEAK_GPU_BEFORE] = peak_experts_per_gpu(before_, t_.expert_gpu, p_.num_experts);
        t_.stats[XSHARE_STAT_PEAK_GPU_AFTER] = peak_experts_per_gpu(after_, t_.expert_gpu, p_.num_experts);
        t_.stats[XSHARE_STAT_ROWS] = num_real_rows_ | static_cast<int64_t>(stand_aside_) << 32;
    }

    const xshare_route_params& p_;
    const xshare_route_tensors& t_;
    const ScoringRule rule_;
    const RowKernels& kernels_;
    const Layout layout_;
    const size_t logit_size_;
    const int num_padded_;
    int32_t* const kept_keys_;
    RowKind* const kinds_;
    uint64_t* const order_;  // request id << 32 | row

    int num_real_rows_ = 0, num_exempt_rows_ = 0;
    bool stand_aside_ = false;
    const bool is_shadow_;
    ExpertSet before_, after_, exempt_experts_, warmup_experts_;
    Selection selection_;
    int num_active_ = 0;
    int32_t active_ids_[kMaxExperts];
    int32_t allowed_[kMaxExperts] = {};   // S as a mask
    int64_t sums_[kMaxExperts] = {};      // g
    int64_t proposed_[kMaxExperts] = {};  // u of the hierarchical form
    RowScores scores_;
    alignas(64) int32_t spare_keys_[kMaxExperts];
};

}  // namespace

size_t route_workspace_size(const xshare_route_params& params) { return Layout(params).size; }

void route(const xshare_route_params& params, const xshare_route_tensors& tensors, unsigned char* workspace) {
    Router(params, tensors, workspace).run();
}

}  // namespace xshare
