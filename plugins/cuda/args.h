// SPDX-License-Identifier: Apache-2.0
// What every kernel of one call is given, and the questions about it that more than one of them asks.
#ifndef XSHARE_CUDA_ARGS_H
#define XSHARE_CUDA_ARGS_H

#include "core/dial.h"
#include "core/limits.h"
#include "core/platform.h"
#include "xshare/xshare.h"

namespace xshare {

constexpr int kStepRows = 256;  // that one launch can take
// Blocks of a launch that share memory: what every device with clusters can do, and what H100 and H200 can.
constexpr int kPortableTeamSize = 8, kMaxTeamSize = 16;
// Rows of a block of a team, as far as there are blocks: two warps for each of the four schedulers, since
// more would compete for them.
constexpr int kTeamRows = 8;

constexpr int kRowThreads = 256;  // of the kernels for many rows

// The most threads of a step kernel, by the registers that a row takes.
constexpr int step_threads(int experts_per_lane) { return experts_per_lane <= 8 ? 512 : 384; }

// Rows that one block takes though there are clusters: as many as 900 instructions each keep the four
// schedulers of a multiprocessor busy with for about as long as one row's chain of them and a cluster's
// barrier take. A row of more experts has twice as many.
constexpr int block_rows(int experts_per_lane) { return experts_per_lane <= 4 ? 16 : 8; }

// Rows that one block takes in one launch where there are no clusters; needs no workspace. More rows than
// this keep one multiprocessor busy for longer than a memset and a second kernel take.
constexpr int kBlockRows = 32;

// Of a step kernel: for any call, or for what most decode steps are.
enum Variant { kGeneral, kPlainSoftmax, kPlainSigmoid, kNumVariants };

struct RouteArgs {
    xshare_route_params p;
    xshare_route_tensors t;
    unsigned char* workspace;

    // The dial is device memory: these are for kernels, behind the wait for the kernel before.
    XSHARE_METHOD int budget() const { return t.dial == nullptr ? p.budget : dialled_budget(p, *t.dial); }
    XSHARE_METHOD double coverage() const {
        return t.dial == nullptr ? p.coverage : dialled_coverage(*t.dial);
    }
    XSHARE_METHOD bool is_shadow() const { return t.dial != nullptr && t.dial->mode == XSHARE_SHADOW; }
    // XShare is off whatever the rows are: the model's own routing needs no second look at them.
    XSHARE_METHOD bool is_off() const {
        return (t.dial != nullptr && t.dial->mode == XSHARE_OFF) ||
               (budget() >= p.num_experts && p.gpu_budget == 0 && p.request_budget == 0 && coverage() == 0.0);
    }
    XSHARE_METHOD bool stands_aside(uint32_t num_real_rows) const {
        return is_off() || (p.max_rows >= 0 && num_real_rows > static_cast<uint32_t>(p.max_rows));
    }
    // For which of the step kernels that are built ahead this is.
    XSHARE_METHOD Variant variant() const {
        const bool is_plain = p.utility == XSHARE_SQUARED_WEIGHT && p.request_budget == 0 &&
                              p.gpu_budget == 0 && p.max_rows < 0 && t.expert_gpu == nullptr &&
                              t.masked_logits == nullptr && t.stats == nullptr && t.step_bias == nullptr &&
                              t.dial == nullptr;
        if (!is_plain) return kGeneral;
        if (p.scoring == XSHARE_SIGMOID_BIAS) return kPlainSigmoid;
        return p.scoring < XSHARE_SIGMOID_BIAS && p.num_groups == 1 ? kPlainSoftmax : kGeneral;
    }
    // The same, where the variant is known when it is compiled.
    XSHARE_METHOD RouteArgs known_to_be(Variant variant) const {
        RouteArgs args = *this;
        if (variant == kGeneral) return args;
        args.p.utility = XSHARE_SQUARED_WEIGHT;
        args.p.request_budget = args.p.gpu_budget = 0;
        args.p.max_rows = -1;
        args.t.expert_gpu = nullptr;
        args.t.masked_logits = nullptr;
        args.t.stats = nullptr;
        args.t.step_bias = nullptr;
        args.t.dial = nullptr;
        if (variant == kPlainSigmoid) {
            args.p.scoring = XSHARE_SIGMOID_BIAS;
        } else {
            args.p.scoring = p.scoring == XSHARE_TOPK_SOFTMAX     ? XSHARE_TOPK_SOFTMAX
                             : p.scoring == XSHARE_SOFTMAX_RENORM ? XSHARE_SOFTMAX_RENORM
                                                                  : XSHARE_SOFTMAX;
            args.p.num_groups = args.p.top_k_groups = 1;
            args.t.correction_bias = nullptr;
        }
        return args;
    }
    // Whether every row's own top-k must be known, and not its warm-up alone.
    XSHARE_METHOD bool needs_own_choice() const {
        return p.utility == XSHARE_SQUARED_WEIGHT || t.stats != nullptr || t.dial != nullptr ||
               p.warmup == p.top_k || is_off() || (t.step_bias != nullptr && t.exempt != nullptr) ||
               (p.max_rows >= 0 && p.num_tokens > p.max_rows);
    }
    // Whether it matters which experts of S a row takes. With a warm-up, S has one for every row.
    XSHARE_METHOD bool needs_picks() const {
        return t.expert_ids != nullptr || t.expert_weights != nullptr || t.stats != nullptr || p.warmup == 0;
    }
    // Coverage sets the budget of each GPU.
    XSHARE_METHOD bool caps_gpus() const {
        return p.gpu_budget == 0 && t.expert_gpu != nullptr && coverage() > 0.0;
    }
    XSHARE_METHOD bool limits_gpus() const { return p.gpu_budget > 0 || caps_gpus(); }
    XSHARE_METHOD bool is_marked_exempt(int row) const { return t.exempt != nullptr && t.exempt[row] != 0; }
    XSHARE_METHOD int gpu_of(int expert) const {
        const int gpu = t.expert_gpu == nullptr ? 0 : t.expert_gpu[expert];
        return gpu < 0 ? 0 : gpu < p.num_experts ? gpu : p.num_experts - 1;
    }
};

// Hosts that launch kernels themselves put the three after each other (xshare_plan.h).
static_assert(sizeof(RouteArgs) ==
              sizeof(xshare_route_params) + sizeof(xshare_route_tensors) + sizeof(unsigned char*));

}  // namespace xshare

#endif  // XSHARE_CUDA_ARGS_H
