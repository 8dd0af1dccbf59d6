// SPDX-License-Identifier: Apache-2.0
#include "plugin.h"

#include <dlfcn.h>

#include <cstring>
#include <vector>

#include "error.h"

namespace {

using namespace nvinfer1;

constexpr char kName[] = "XShareRouting";

// The library stays loaded: it may have registered itself in a TensorRT of this process.
IPluginCreatorV3One& creator_of(const std::string& library) {
    void* const handle = dlopen(library.c_str(), RTLD_NOW);
    if (handle == nullptr) throw Error("--dynamicPlugins " + library + ": " + dlerror());
    using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
    const auto get_creators = reinterpret_cast<GetCreators>(dlsym(handle, "getCreators"));
    int32_t count = 0;
    IPluginCreatorInterface* const* const creators = get_creators == nullptr ? nullptr : get_creators(count);
    for (int32_t i = 0; i < count; ++i) {
        if (std::strcmp(creators[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0) continue;
        auto& creator = *static_cast<IPluginCreatorV3One*>(creators[i]);
        if (std::strcmp(creator.getPluginName(), kName) == 0) return creator;
    }
    throw Error("--dynamicPlugins " + library + ": has no plugin " + kName);
}

const char* scoring_name(xshare_scoring scoring) {
    constexpr const char* kNames[] = {"softmax",      "softmax_renorm",    "topk_softmax",
                                      "sigmoid_bias", "softmax_bias",      "softmax_bias_renorm",
                                      "topk_sigmoid", "sqrt_softplus_bias"};
    return kNames[scoring];
}

IPluginV3* create(const std::string& library, const xshare_route_params& params) {
    const char* const scoring = scoring_name(static_cast<xshare_scoring>(params.scoring));
    const auto integer = [](const char* name, const int32_t& value) {
        return PluginField(name, &value, PluginFieldType::kINT32, 1);
    };
    const std::vector<PluginField> fields = {
        integer("num_experts", params.num_experts),
        integer("top_k", params.top_k),
        integer("num_groups", params.num_groups),
        integer("top_k_groups", params.top_k_groups),
        integer("budget", params.budget),
        PluginField("coverage", &params.coverage, PluginFieldType::kFLOAT64, 1),
        integer("warmup", params.warmup),
        PluginField("scoring", scoring, PluginFieldType::kCHAR, static_cast<int32_t>(std::strlen(scoring))),
        PluginField("routed_scaling_factor", &params.routed_scaling_factor, PluginFieldType::kFLOAT32, 1),
    };
    const PluginFieldCollection collection = {static_cast<int32_t>(fields.size()), fields.data()};
    return creator_of(library).createPlugin(kName, &collection, TensorRTPhase::kRUNTIME);
}

template <typename Capability>
Capability& capability(IPluginV3& plugin, PluginCapabilityType type) {
    auto* const found = static_cast<Capability*>(plugin.getCapabilityInterface(type));
    if (found == nullptr) throw Error(std::string(kName) + " lacks a capability");
    return *found;
}

PluginTensorDesc describe(DataType type, int rows, int columns) {
    PluginTensorDesc description = {};
    description.type = type;
    description.format = TensorFormat::kLINEAR;
    description.dims.nbDims = 2;
    description.dims.d[0] = rows;
    description.dims.d[1] = columns;
    return description;
}

DynamicPluginTensorDesc dynamic(const PluginTensorDesc& fixed) {
    return {fixed, fixed.dims, fixed.dims, fixed.dims};
}

}  // namespace

Plugin::Plugin(const std::string& library, const Model& model, const Sharing& sharing, Setting setting)
    : model_(model), created_(create(library, route_params(model, sharing, setting, 1))) {
    if (created_ == nullptr) throw Error(std::string(kName) + " refuses the fields of " + model.name);
    auto& runtime = capability<IPluginV3OneRuntime>(*created_, PluginCapabilityType::kRUNTIME);
    attached_.reset(runtime.attachToContext(nullptr));
    if (attached_ == nullptr) throw Error(std::string(kName) + " cannot be attached to a context");
    runtime_ = &capability<IPluginV3OneRuntime>(*attached_, PluginCapabilityType::kRUNTIME);
}

size_t Plugin::set_rows(int rows) {
    inputs_[0] = describe(DataType::kFLOAT, rows, model_.num_experts);
    outputs_[0] = describe(DataType::kINT32, rows, model_.top_k);
    outputs_[1] = describe(DataType::kFLOAT, rows, model_.top_k);
    const DynamicPluginTensorDesc inputs[] = {dynamic(inputs_[0])};
    const DynamicPluginTensorDesc outputs[] = {dynamic(outputs_[0]), dynamic(outputs_[1])};
    auto& build = capability<IPluginV3OneBuild>(*created_, PluginCapabilityType::kBUILD);
    if (build.configurePlugin(inputs, 1, outputs, 2) != 0 ||
        runtime_->onShapeChange(inputs_, 1, outputs_, 2) != 0)
        throw Error(std::string(kName) + " refuses " + std::to_string(rows) + " rows");
    return build.getWorkspaceSize(inputs, 1, outputs, 2);
}

void Plugin::enqueue(const float* router_logits, int32_t* expert_ids, float* expert_weights, void* workspace,
                     cudaStream_t stream) {
    const void* const inputs[] = {router_logits};
    void* const outputs[] = {expert_ids, expert_weights};
    if (runtime_->enqueue(inputs_, outputs_, inputs, outputs, workspace, stream) != 0)
        throw Error(std::string(kName) + " was not enqueued");
}
