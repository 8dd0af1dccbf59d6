// SPDX-License-Identifier: Apache-2.0
// The MoE layers that can be measured, by name, and how XShare is set for them.
#ifndef XSHARE_BENCH_MODELS_H
#define XSHARE_BENCH_MODELS_H

#include <string>
#include <vector>

#include "xshare/xshare.h"

struct Model {
    const char* name;
    int num_experts, top_k;
    xshare_scoring scoring;
    int num_groups, top_k_groups;
    float routed_scaling_factor;
    int hidden_size, intermediate_size;
    double bytes_per_weight;  // as the model is served on a GPU; on the host every weight is fp32
    int num_layers;           // measured in turn, with weights of their own, where one layer fits a cache

    double weights_per_expert() const { return 3.0 * hidden_size * intermediate_size; }  // gate, up and down
};

const std::vector<Model>& models();

// Throws UsageError, which lists the known names.
const Model& find_model(const std::string& name);

// The two that are compared: the model's own routing, and XShare.
enum Setting { kOwn = 0, kXShare = 1 };
constexpr Setting kSettings[] = {kOwn, kXShare};

struct Sharing {
    double coverage;  // 0 = off
    int budget;       // 0 = no limit
    int warmup_experts;
};

// What the library's route takes for `num_tokens` rows of fp32 logits. kOwn is a budget of all experts.
// Throws UsageError where the library refuses it.
xshare_route_params route_params(const Model& model, const Sharing& sharing, Setting setting, int num_tokens);

#endif  // XSHARE_BENCH_MODELS_H
