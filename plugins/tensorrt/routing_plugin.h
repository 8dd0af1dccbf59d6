// SPDX-License-Identifier: Apache-2.0
// XShareRouting as a TensorRT V3 plugin: core, build and runtime capability in one class without changing
// state, so that any number of execution contexts and threads may use it and its clones at once.
#ifndef XSHARE_TENSORRT_ROUTING_PLUGIN_H
#define XSHARE_TENSORRT_ROUTING_PLUGIN_H

#include <NvInferRuntime.h>

#include "tensorrt/fields.h"

namespace xshare::tensorrt {

inline constexpr char kPluginName[] = "XShareRouting";
inline constexpr char kPluginVersion[] = "2";  // of its fields: another does not read them
inline constexpr char kPluginNamespace[] = "xshare";

// Which tensor is where. Optional inputs that are off take no place (-1).
struct InputPlaces {
    int router_logits = 0;
    int correction_bias = -1;
    int request_ids = -1;
    int exempt = -1;
    int expert_gpu = -1;
    int count = 1;
};

struct OutputPlaces {
    int expert_ids = -1;
    int expert_weights = -1;
    int masked_logits = -1;
    int step_bias = -1;
    int active_experts = -1;
    int count = 0;
};

class RoutingPlugin final : public nvinfer1::IPluginV3,
                            public nvinfer1::IPluginV3OneCore,
                            public nvinfer1::IPluginV3OneBuild,
                            public nvinfer1::IPluginV3OneRuntime {
  public:
    explicit RoutingPlugin(Settings const& settings);
    RoutingPlugin(RoutingPlugin const& other) : RoutingPlugin(other.settings_) {}
    RoutingPlugin& operator=(RoutingPlugin const&) = delete;

    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(
        nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    // IPluginV3OneCore
    char const* getPluginName() const noexcept override { return kPluginName; }
    char const* getPluginVersion() const noexcept override { return kPluginVersion; }
    char const* getPluginNamespace() const noexcept override { return kPluginNamespace; }

    // IPluginV3OneBuild
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t num_inputs,
                            nvinfer1::DynamicPluginTensorDesc const* out,
                            int32_t num_outputs) noexcept override;
    int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t num_outputs,
                               nvinfer1::DataType const* input_types,
                               int32_t num_inputs) const noexcept override;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t num_inputs,
                            nvinfer1::DimsExprs const* shape_inputs, int32_t num_shape_inputs,
                            nvinfer1::DimsExprs* outputs, int32_t num_outputs,
                            nvinfer1::IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* in_out,
                                   int32_t num_inputs, int32_t num_outputs) noexcept override;
    int32_t getNbOutputs() const noexcept override { return outputs_.count; }
    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t num_inputs,
                            nvinfer1::DynamicPluginTensorDesc const* outputs,
                            int32_t num_outputs) const noexcept override;

    // IPluginV3OneRuntime
    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t num_inputs,
                          nvinfer1::PluginTensorDesc const* out, int32_t num_outputs) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* input_desc,
                    nvinfer1::PluginTensorDesc const* output_desc, void const* const* inputs,
                    void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

  private:
    bool has_places(char const* where, int32_t num_inputs, int32_t num_outputs) const;
    bool fits(char const* where, nvinfer1::PluginTensorDesc const& logits,
              nvinfer1::Dims const& largest) const;
    xshare_route_params params_for(int64_t num_tokens, nvinfer1::DataType logits_type) const;

    Settings const settings_;
    InputPlaces const places_;
    OutputPlaces const outputs_;
    SerializedFields const serialized_;
};

}  // namespace xshare::tensorrt

#endif  // XSHARE_TENSORRT_ROUTING_PLUGIN_H
