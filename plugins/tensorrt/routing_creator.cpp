// SPDX-License-Identifier: Apache-2.0
#include "tensorrt/routing_creator.h"

#include "tensorrt/fields.h"
#include "tensorrt/log.h"
#include "tensorrt/routing_plugin.h"

namespace xshare::tensorrt {

nvinfer1::IPluginV3* RoutingCreator::createPlugin(char const* name,
                                                  nvinfer1::PluginFieldCollection const* fields,
                                                  nvinfer1::TensorRTPhase) noexcept {
    return guarded<nvinfer1::IPluginV3*>("createPlugin", nullptr, [&]() -> nvinfer1::IPluginV3* {
        char const* const layer = name == nullptr ? "" : name;
        Settings settings;
        Message message;
        if (fields == nullptr)
            refuse(message, XSHARE_INVALID_PARAMETER, "there are no fields");
        else if (parse_fields(*fields, settings, message) == XSHARE_OK)
            return new RoutingPlugin(settings);
        log_error("createPlugin('%.100s'): %s", layer, message.text);
        return nullptr;
    });
}

nvinfer1::PluginFieldCollection const* RoutingCreator::getFieldNames() noexcept { return &field_names(); }
char const* RoutingCreator::getPluginName() const noexcept { return kPluginName; }
char const* RoutingCreator::getPluginVersion() const noexcept { return kPluginVersion; }
char const* RoutingCreator::getPluginNamespace() const noexcept { return kPluginNamespace; }

}  // namespace xshare::tensorrt
