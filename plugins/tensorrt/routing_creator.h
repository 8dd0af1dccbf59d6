// SPDX-License-Identifier: Apache-2.0
#ifndef XSHARE_TENSORRT_ROUTING_CREATOR_H
#define XSHARE_TENSORRT_ROUTING_CREATOR_H

#include <NvInferRuntime.h>

namespace xshare::tensorrt {

// Makes XShareRouting plugins from fields, when a network is built and when an engine is read alike.
class RoutingCreator final : public nvinfer1::IPluginCreatorV3One {
  public:
    nvinfer1::IPluginV3* createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
                                      nvinfer1::TensorRTPhase phase) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override;
    char const* getPluginName() const noexcept override;
    char const* getPluginVersion() const noexcept override;
    char const* getPluginNamespace() const noexcept override;
};

}  // namespace xshare::tensorrt

#endif  // XSHARE_TENSORRT_ROUTING_CREATOR_H
