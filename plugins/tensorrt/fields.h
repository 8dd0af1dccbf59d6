// SPDX-License-Identifier: Apache-2.0
// The plugin's fields: what a network says about the routing, checked, and the same written out for an
// engine.
#ifndef XSHARE_TENSORRT_FIELDS_H
#define XSHARE_TENSORRT_FIELDS_H

#include <NvInferRuntime.h>

#include "core/validate.h"
#include "xshare/xshare.h"

namespace xshare::tensorrt {

// What the plugin gives besides the active experts.
enum Output : int32_t {
    kRouting,       // expert ids and weights
    kMaskedLogits,  // for a layer that routes by them
    kStepBias       // for a layer that ranks by sigmoid plus this bias
};

struct Settings {
    xshare_route_params params;  // all but num_tokens and logits_dtype, which only the tensors know
    int32_t output;              // Output
    int32_t has_correction_bias;
    int32_t has_request_ids;
    int32_t has_exempt;
    int32_t has_expert_gpu;
    int32_t has_active_experts;
};

// Reads and checks the fields. On failure says why in `message`.
xshare_status parse_fields(nvinfer1::PluginFieldCollection const& fields, Settings& settings,
                           Message& message);

// The fields that a creator announces: names and types without values.
nvinfer1::PluginFieldCollection const& field_names();

// All fields with the values of one Settings. Refers to itself, so it does not move.
class SerializedFields {
  public:
    explicit SerializedFields(Settings const& settings);
    SerializedFields(SerializedFields const&) = delete;
    SerializedFields& operator=(SerializedFields const&) = delete;

    nvinfer1::PluginFieldCollection const& collection() const { return collection_; }

    static constexpr int kCount = 20;

  private:
    Settings const settings_;
    nvinfer1::PluginField fields_[kCount];
    nvinfer1::PluginFieldCollection collection_;
};

}  // namespace xshare::tensorrt

#endif  // XSHARE_TENSORRT_FIELDS_H
