// SPDX-License-Identifier: Apache-2.0
#include "tensorrt/routing_plugin.h"

#include "tensorrt/log.h"
#include "xshare/xshare_cuda.h"

namespace xshare::tensorrt {
namespace {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

InputPlaces places_of(Settings const& settings) {
    InputPlaces places;
    if (settings.has_correction_bias) places.correction_bias = places.count++;
    if (settings.has_request_ids) places.request_ids = places.count++;
    if (settings.has_exempt) places.exempt = places.count++;
    if (settings.has_expert_gpu) places.expert_gpu = places.count++;
    return places;
}

OutputPlaces outputs_of(Settings const& settings) {
    OutputPlaces places;
    if (settings.output == kRouting) {
        places.expert_ids = places.count++;
        places.expert_weights = places.count++;
    }
    if (settings.output == kMaskedLogits) places.masked_logits = places.count++;
    if (settings.output == kStepBias) places.step_bias = places.count++;
    if (settings.has_active_experts) places.active_experts = places.count++;
    return places;
}

bool is_logits_type(DataType type) {
    return type == DataType::kFLOAT || type == DataType::kBF16 || type == DataType::kHALF;
}

xshare_dtype dtype_of(DataType type) {
    if (type == DataType::kBF16) return XSHARE_BFLOAT16;
    return type == DataType::kHALF ? XSHARE_FLOAT16 : XSHARE_FLOAT32;
}

DataType input_type(InputPlaces const& places, int32_t position) {
    if (position == places.exempt) return DataType::kBOOL;
    return position == places.correction_bias ? DataType::kFLOAT : DataType::kINT32;
}

DataType output_type(OutputPlaces const& places, int32_t position, DataType logits_type) {
    if (position == places.expert_ids) return DataType::kINT32;
    if (position == places.masked_logits) return logits_type;
    return position == places.active_experts ? DataType::kBOOL : DataType::kFLOAT;
}

template <typename Element>
Element const* input_at(void const* const* inputs, int place) {
    return place < 0 ? nullptr : static_cast<Element const*>(inputs[place]);
}

template <typename Element>
Element* output_at(void* const* outputs, int place) {
    return place < 0 ? nullptr : static_cast<Element*>(outputs[place]);
}

}  // namespace

RoutingPlugin::RoutingPlugin(Settings const& settings)
    : settings_(settings),
      places_(places_of(settings)),
      outputs_(outputs_of(settings)),
      serialized_(settings) {}

// ---- IPluginV3 ----

nvinfer1::IPluginCapability* RoutingPlugin::getCapabilityInterface(
    nvinfer1::PluginCapabilityType type) noexcept {
    switch (type) {
        case nvinfer1::PluginCapabilityType::kCORE:
            return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD:
            return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME:
            return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    log_error("getCapabilityInterface: there is no capability %d", static_cast<int>(type));
    return nullptr;
}

nvinfer1::IPluginV3* RoutingPlugin::clone() noexcept {
    return guarded<nvinfer1::IPluginV3*>("clone", nullptr, [&] { return new RoutingPlugin(*this); });
}

// ---- Build ----

bool RoutingPlugin::has_places(char const* where, int32_t num_inputs, int32_t num_outputs) const {
    if (num_inputs == places_.count && num_outputs == getNbOutputs()) return true;
    log_error("%s: its fields promise %d inputs and %d outputs, not %d and %d", where, places_.count,
              getNbOutputs(), num_inputs, num_outputs);
    return false;
}

// Whether these logits, with up to largest.d[0] rows, are what the fields and the kernel take.
bool RoutingPlugin::fits(char const* where, PluginTensorDesc const& logits,
                         nvinfer1::Dims const& largest) const {
    if (logits.dims.nbDims != 2 || logits.dims.d[1] != settings_.params.num_experts) {
        log_error(
            "%s: the router logits must be [rows, num_experts=%d], but have %d dimensions, the last %lld",
            where, settings_.params.num_experts, logits.dims.nbDims,
            logits.dims.nbDims > 0 ? static_cast<long long>(logits.dims.d[logits.dims.nbDims - 1]) : 0LL);
        return false;
    }
    if (!is_logits_type(logits.type)) {
        log_error("%s: the router logits must be float32, bfloat16 or float16", where);
        return false;
    }
    size_t size = 0;
    const xshare_route_params params = params_for(largest.d[0], logits.type);
    if (xshare_cuda_workspace_size(&params, &size) == XSHARE_OK) return true;
    log_error("%s: %s", where, xshare_last_error());
    return false;
}

xshare_route_params RoutingPlugin::params_for(int64_t num_tokens, DataType logits_type) const {
    xshare_route_params params = settings_.params;
    params.num_tokens = static_cast<int32_t>(num_tokens < INT32_MAX ? num_tokens : INT32_MAX);
    params.logits_dtype = dtype_of(logits_type);
    return params;
}

int32_t RoutingPlugin::configurePlugin(DynamicPluginTensorDesc const* in, int32_t num_inputs,
                                       DynamicPluginTensorDesc const*, int32_t num_outputs) noexcept {
    if (!has_places("configurePlugin", num_inputs, num_outputs)) return -1;
    DynamicPluginTensorDesc const& logits = in[places_.router_logits];
    return fits("configurePlugin", logits.desc, logits.max) ? 0 : -1;
}

int32_t RoutingPlugin::getOutputDataTypes(DataType* output_types, int32_t num_outputs,
                                          DataType const* input_types, int32_t num_inputs) const noexcept {
    if (!has_places("getOutputDataTypes", num_inputs, num_outputs)) return -1;
    for (int32_t i = 0; i < num_outputs; ++i)
        output_types[i] = output_type(outputs_, i, input_types[places_.router_logits]);
    return 0;
}

int32_t RoutingPlugin::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t num_inputs,
                                       nvinfer1::DimsExprs const*, int32_t, nvinfer1::DimsExprs* outputs,
                                       int32_t num_outputs, nvinfer1::IExprBuilder& builder) noexcept {
    return guarded("getOutputShapes", -1, [&] {
        if (!has_places("getOutputShapes", num_inputs, num_outputs)) return -1;
        nvinfer1::DimsExprs const& logits = inputs[places_.router_logits];
        if (logits.nbDims != 2) {
            log_error("the router logits must be [rows, num_experts], but have %d dimensions", logits.nbDims);
            return -1;
        }
        for (int place = 0; place < num_outputs; ++place) {
            const bool is_for_all_rows = place == outputs_.step_bias || place == outputs_.active_experts;
            const bool is_per_expert = is_for_all_rows || place == outputs_.masked_logits;
            outputs[place].nbDims = is_for_all_rows ? 1 : 2;
            outputs[place].d[0] = logits.d[0];
            outputs[place].d[outputs[place].nbDims - 1] =
                builder.constant(is_per_expert ? settings_.params.num_experts : settings_.params.top_k);
        }
        return 0;
    });
}

bool RoutingPlugin::supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* in_out,
                                              int32_t num_inputs, int32_t num_outputs) noexcept {
    if (!has_places("supportsFormatCombination", num_inputs, num_outputs)) return false;
    PluginTensorDesc const& tensor = in_out[position].desc;
    if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
    if (position == places_.router_logits) return is_logits_type(tensor.type);
    if (position < num_inputs) return tensor.type == input_type(places_, position);
    return tensor.type ==
           output_type(outputs_, position - num_inputs, in_out[places_.router_logits].desc.type);
}

size_t RoutingPlugin::getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t,
                                       DynamicPluginTensorDesc const*, int32_t) const noexcept {
    DynamicPluginTensorDesc const& logits = inputs[places_.router_logits];
    const xshare_route_params params = params_for(logits.max.d[0], logits.desc.type);
    size_t size = 0;
    if (xshare_cuda_workspace_size(&params, &size) != XSHARE_OK)
        log_error("getWorkspaceSize: %s", xshare_last_error());
    return size;
}

// ---- Runtime ----

int32_t RoutingPlugin::onShapeChange(PluginTensorDesc const* in, int32_t num_inputs, PluginTensorDesc const*,
                                     int32_t num_outputs) noexcept {
    if (!has_places("onShapeChange", num_inputs, num_outputs)) return -1;
    PluginTensorDesc const& logits = in[places_.router_logits];
    return fits("onShapeChange", logits, logits.dims) ? 0 : -1;
}

int32_t RoutingPlugin::enqueue(PluginTensorDesc const* input_desc, PluginTensorDesc const*,
                               void const* const* inputs, void* const* outputs, void* workspace,
                               cudaStream_t stream) noexcept {
    PluginTensorDesc const& logits = input_desc[places_.router_logits];
    const xshare_route_params params = params_for(logits.dims.d[0], logits.type);
    xshare_route_tensors tensors = {};
    tensors.struct_size = sizeof tensors;
    tensors.router_logits = inputs[places_.router_logits];
    tensors.correction_bias = input_at<float>(inputs, places_.correction_bias);
    tensors.request_ids = input_at<int32_t>(inputs, places_.request_ids);
    tensors.exempt = input_at<uint8_t>(inputs, places_.exempt);
    tensors.expert_gpu = input_at<int32_t>(inputs, places_.expert_gpu);
    tensors.expert_ids = output_at<int32_t>(outputs, outputs_.expert_ids);
    tensors.expert_weights = output_at<float>(outputs, outputs_.expert_weights);
    tensors.masked_logits = output_at<void>(outputs, outputs_.masked_logits);
    tensors.step_bias = output_at<float>(outputs, outputs_.step_bias);
    tensors.active_experts = output_at<uint8_t>(outputs, outputs_.active_experts);

    size_t size = 0;
    xshare_status status = xshare_cuda_workspace_size(&params, &size);
    if (status == XSHARE_OK) status = xshare_route_cuda(&params, &tensors, workspace, size, stream);
    if (status == XSHARE_OK) return 0;
    log_error("enqueue: %s", xshare_last_error());
    return -1;
}

// A context may be destroyed at any time: it gets a plugin of its own.
nvinfer1::IPluginV3* RoutingPlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
    return clone();
}

nvinfer1::PluginFieldCollection const* RoutingPlugin::getFieldsToSerialize() noexcept {
    return &serialized_.collection();
}

}  // namespace xshare::tensorrt
