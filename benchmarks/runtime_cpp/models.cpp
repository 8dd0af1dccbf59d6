// SPDX-License-Identifier: Apache-2.0
#include "models.h"

#include "error.h"

// The numbers are those of xshare_trtllm/planning/shapes.py and of the shipped model's config.json.
const std::vector<Model>& models() {
    static const std::vector<Model> all = {
        {"xshare-moe-14m", 64, 8, XSHARE_SOFTMAX_RENORM, 1, 1, 1.0f, 256, 64, 2.0, 4},
        {"olmoe-1b-7b", 64, 8, XSHARE_SOFTMAX, 1, 1, 1.0f, 2048, 1024, 2.0, 1},
        {"qwen3-30b-a3b", 128, 8, XSHARE_SOFTMAX_RENORM, 1, 1, 1.0f, 2048, 768, 2.0, 1},
        {"gpt-oss-20b", 32, 4, XSHARE_TOPK_SOFTMAX, 1, 1, 1.0f, 2880, 2880, 4.25 / 8, 1},
        {"gpt-oss-120b", 128, 4, XSHARE_TOPK_SOFTMAX, 1, 1, 1.0f, 2880, 2880, 4.25 / 8, 1},
        {"qwen3-235b-a22b", 128, 8, XSHARE_SOFTMAX_RENORM, 1, 1, 1.0f, 4096, 1536, 2.0, 1},
        {"deepseek-r1", 256, 8, XSHARE_SIGMOID_BIAS, 8, 4, 2.5f, 7168, 2048, 1.0, 1},
    };
    return all;
}

const Model& find_model(const std::string& name) {
    std::string known;
    for (const Model& model : models()) {
        if (name == model.name) return model;
        known += std::string(known.empty() ? "" : ", ") + model.name;
    }
    throw UsageError("--model '" + name + "' is not known; known are " + known);
}

xshare_route_params route_params(const Model& model, const Sharing& sharing, Setting setting,
                                 int num_tokens) {
    xshare_route_params params = {};
    params.struct_size = sizeof params;
    params.num_tokens = num_tokens;
    params.num_experts = model.num_experts;
    params.top_k = model.top_k;
    params.scoring = model.scoring;
    params.num_groups = model.num_groups;
    params.top_k_groups = model.top_k_groups;
    params.routed_scaling_factor = model.routed_scaling_factor;
    params.logits_dtype = XSHARE_FLOAT32;
    params.budget = setting == kOwn || sharing.budget == 0 ? model.num_experts : sharing.budget;
    params.coverage = setting == kOwn ? 0.0 : sharing.coverage;
    params.warmup = sharing.warmup_experts;
    params.max_rows = -1;
    size_t workspace_size = 0;
    if (xshare_workspace_size(&params, &workspace_size) != XSHARE_OK)
        throw UsageError(std::string(model.name) + ": " + xshare_last_error());
    return params;
}
