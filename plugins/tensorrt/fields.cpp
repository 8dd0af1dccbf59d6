// SPDX-License-Identifier: Apache-2.0
#include "tensorrt/fields.h"

#include <limits.h>
#include <stddef.h>
#include <string.h>

#include <iterator>

#include "core/rules.h"

namespace xshare::tensorrt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

enum class Kind { kInteger, kSwitch, kFloat, kDouble, kChoice };

struct Choices {
    char const* names[kNumScorings];  // by their codes, nullptr behind the last
    char const* all;
};

constexpr Choices kScorings = {{rule_of(0).name, rule_of(1).name, rule_of(2).name, rule_of(3).name,
                                rule_of(4).name, rule_of(5).name, rule_of(6).name, rule_of(7).name},
                               "softmax, softmax_renorm, topk_softmax, sigmoid_bias, softmax_bias, "
                               "softmax_bias_renorm, topk_sigmoid or sqrt_softplus_bias"};
constexpr Choices kUtilities = {{"squared_weight", "affinity"}, "squared_weight or affinity"};
constexpr Choices kOutputs = {{"routing", "masked_logits", "step_bias"},
                              "routing, masked_logits or step_bias"};

struct FieldSpec {
    char const* name;
    Kind kind;
    bool required;
    size_t offset;  // in Settings
    Choices const* choices = nullptr;
};

constexpr FieldSpec kFields[] = {
    {"num_experts", Kind::kInteger, true, offsetof(Settings, params.num_experts)},
    {"top_k", Kind::kInteger, true, offsetof(Settings, params.top_k)},
    {"scoring", Kind::kChoice, true, offsetof(Settings, params.scoring), &kScorings},
    {"budget", Kind::kInteger, false, offsetof(Settings, params.budget)},
    {"num_groups", Kind::kInteger, false, offsetof(Settings, params.num_groups)},
    {"top_k_groups", Kind::kInteger, false, offsetof(Settings, params.top_k_groups)},
    {"routed_scaling_factor", Kind::kFloat, false, offsetof(Settings, params.routed_scaling_factor)},
    {"warmup", Kind::kInteger, false, offsetof(Settings, params.warmup)},
    {"request_budget", Kind::kInteger, false, offsetof(Settings, params.request_budget)},
    {"gpu_budget", Kind::kInteger, false, offsetof(Settings, params.gpu_budget)},
    {"max_rows", Kind::kInteger, false, offsetof(Settings, params.max_rows)},
    {"coverage", Kind::kDouble, false, offsetof(Settings, params.coverage)},
    {"utility", Kind::kChoice, false, offsetof(Settings, params.utility), &kUtilities},
    {"output", Kind::kChoice, false, offsetof(Settings, output), &kOutputs},
    {"mask_value", Kind::kFloat, false, offsetof(Settings, params.mask_value)},
    {"has_correction_bias", Kind::kSwitch, false, offsetof(Settings, has_correction_bias)},
    {"has_request_ids", Kind::kSwitch, false, offsetof(Settings, has_request_ids)},
    {"has_exempt", Kind::kSwitch, false, offsetof(Settings, has_exempt)},
    {"has_expert_gpu", Kind::kSwitch, false, offsetof(Settings, has_expert_gpu)},
    {"has_active_experts", Kind::kSwitch, false, offsetof(Settings, has_active_experts)},
};
constexpr int kNumFields = static_cast<int>(std::size(kFields));
static_assert(kNumFields == SerializedFields::kCount);

PluginFieldType type_of(Kind kind) {
    switch (kind) {
        case Kind::kFloat:
            return PluginFieldType::kFLOAT32;
        case Kind::kDouble:
            return PluginFieldType::kFLOAT64;
        case Kind::kChoice:
            return PluginFieldType::kCHAR;
        default:
            return PluginFieldType::kINT32;
    }
}

template <typename Value>
Value load(void const* data) {  // the data of a field need not be aligned
    Value value;
    memcpy(&value, data, sizeof value);
    return value;
}

template <typename Value>
void store(Settings& settings, FieldSpec const& spec, Value value) {
    memcpy(reinterpret_cast<unsigned char*>(&settings) + spec.offset, &value, sizeof value);
}

Settings defaults() {
    Settings settings;
    memset(static_cast<void*>(&settings), 0, sizeof settings);
    settings.params.struct_size = sizeof settings.params;
    settings.params.num_groups = 1;
    settings.params.top_k_groups = 1;
    settings.params.routed_scaling_factor = 1.0f;
    settings.params.budget = INT_MAX;
    settings.params.warmup = 1;
    settings.params.max_rows = -1;
    return settings;
}

xshare_status read_integer(PluginField const& field, FieldSpec const& spec, Settings& settings,
                           Message& message) {
    int64_t value = 0;
    if (field.type == PluginFieldType::kINT32)
        value = load<int32_t>(field.data);
    else if (field.type == PluginFieldType::kINT64)
        value = load<int64_t>(field.data);
    else
        return refuse(message, XSHARE_INVALID_PARAMETER, "field %s must be an int32 or int64", spec.name);
    if (value < INT_MIN || value > INT_MAX)
        return refuse(message, XSHARE_INVALID_PARAMETER, "field %s does not fit an int32", spec.name);
    if (spec.kind == Kind::kSwitch && value != 0 && value != 1)
        return refuse(message, XSHARE_INVALID_PARAMETER, "field %s must be 0 or 1, not %d", spec.name,
                      static_cast<int>(value));
    store(settings, spec, static_cast<int32_t>(value));
    return XSHARE_OK;
}

xshare_status read_real(PluginField const& field, FieldSpec const& spec, Settings& settings,
                        Message& message) {
    double value = 0.0;
    if (field.type == PluginFieldType::kFLOAT32)
        value = static_cast<double>(load<float>(field.data));
    else if (field.type == PluginFieldType::kFLOAT64)
        value = load<double>(field.data);
    else
        return refuse(message, XSHARE_INVALID_PARAMETER, "field %s must be a float32 or float64", spec.name);
    if (spec.kind == Kind::kDouble)
        store(settings, spec, value);
    else
        store(settings, spec, static_cast<float>(value));
    return XSHARE_OK;
}

// Characters with or without zeros at their end: TensorRT's Python and its ONNX parser differ.
xshare_status read_choice(PluginField const& field, FieldSpec const& spec, Settings& settings,
                          Message& message) {
    if (field.type != PluginFieldType::kCHAR)
        return refuse(message, XSHARE_INVALID_PARAMETER, "field %s must be characters", spec.name);
    char const* const text = static_cast<char const*>(field.data);
    const size_t length = strnlen(text, static_cast<size_t>(field.length));
    int32_t code = 0;
    for (char const* name : spec.choices->names) {
        if (name != nullptr && strlen(name) == length && memcmp(name, text, length) == 0) {
            store(settings, spec, code);
            return XSHARE_OK;
        }
        ++code;
    }
    return refuse(message, XSHARE_INVALID_PARAMETER, "%s must be %s, not '%.*s'", spec.name,
                  spec.choices->all, static_cast<int>(length < 40 ? length : 40), text);
}

xshare_status read_field(PluginField const& field, FieldSpec const& spec, Settings& settings,
                         Message& message) {
    const bool is_text = spec.kind == Kind::kChoice;
    if (field.data == nullptr || field.length < 1)
        return refuse(message, XSHARE_INVALID_PARAMETER, "field %s has no value", spec.name);
    if (!is_text && field.length != 1)
        return refuse(message, XSHARE_INVALID_PARAMETER, "field %s must be one number, not %d", spec.name,
                      field.length);
    if (is_text) return read_choice(field, spec, settings, message);
    if (spec.kind == Kind::kFloat || spec.kind == Kind::kDouble)
        return read_real(field, spec, settings, message);
    return read_integer(field, spec, settings, message);
}

int find_field(char const* name) {
    for (int i = 0; i < kNumFields; ++i)
        if (strcmp(kFields[i].name, name) == 0) return i;
    return -1;
}

// A layer behind masked logits routes by the model's own rule, which must then give what routing inside S
// gives.
xshare_status check_output(Settings const& settings, Message& message) {
    constexpr xshare_status bad = XSHARE_INVALID_PARAMETER;
    if (settings.params.mask_value != 0.0f && settings.output == kRouting)
        return refuse(message, bad, "mask_value needs output masked_logits or step_bias");
    if (settings.output != kMaskedLogits) return XSHARE_OK;
    const ScoringRule rule = rule_of(settings.params.scoring);
    if (rule.affinity == Affinity::kSoftmax && !rule.renormalises)
        return refuse(message, bad,
                      "masked_logits would change the weights of %s scoring: its softmax is over all",
                      rule.name);
    if (settings.has_correction_bias)
        return refuse(message, bad,
                      "masked_logits cannot keep a correction bias from ranking what is masked%s",
                      settings.params.scoring == XSHARE_SIGMOID_BIAS ? ": output step_bias can" : "");
    return XSHARE_OK;
}

// The rules of the C ABI, asked with stand-ins for the tensors that the fields promise: the rules are written
// once.
xshare_status check_settings(Settings const& settings, Message& message) {
    alignas(8) static unsigned char present[8];
    xshare_route_params params = settings.params;
    params.num_tokens = 1;
    xshare_route_tensors tensors = {};
    tensors.struct_size = sizeof tensors;
    tensors.router_logits = present;
    if (settings.has_correction_bias) tensors.correction_bias = reinterpret_cast<float*>(present);
    if (settings.has_request_ids) tensors.request_ids = reinterpret_cast<int32_t*>(present);
    if (settings.has_exempt) tensors.exempt = present;
    if (settings.has_expert_gpu) tensors.expert_gpu = reinterpret_cast<int32_t*>(present);
    if (settings.output == kStepBias) tensors.step_bias = reinterpret_cast<float*>(present);
    xshare_status status = check_params(params, message);
    if (status == XSHARE_OK) status = check_pointers(params, tensors, message);
    return status == XSHARE_OK ? check_output(settings, message) : status;
}

struct FieldNames {
    PluginField fields[kNumFields];
    PluginFieldCollection collection;

    FieldNames() {
        for (int i = 0; i < kNumFields; ++i)
            fields[i] = PluginField(kFields[i].name, nullptr, type_of(kFields[i].kind), 1);
        collection = {kNumFields, fields};
    }
};

}  // namespace

xshare_status parse_fields(PluginFieldCollection const& given, Settings& settings, Message& message) {
    constexpr xshare_status bad = XSHARE_INVALID_PARAMETER;
    settings = defaults();
    bool seen[kNumFields] = {};
    if (given.nbFields < 0 || (given.nbFields > 0 && given.fields == nullptr))
        return refuse(message, bad, "the field collection is broken");
    for (int32_t i = 0; i < given.nbFields; ++i) {
        PluginField const& field = given.fields[i];
        if (field.name == nullptr) return refuse(message, bad, "field number %d has no name", i);
        const int place = find_field(field.name);
        if (place < 0) return refuse(message, bad, "there is no field '%.60s'", field.name);
        if (seen[place]) return refuse(message, bad, "field %s is given twice", field.name);
        seen[place] = true;
        const xshare_status status = read_field(field, kFields[place], settings, message);
        if (status != XSHARE_OK) return status;
    }
    for (int i = 0; i < kNumFields; ++i)
        if (kFields[i].required && !seen[i])
            return refuse(message, bad, "field %s is missing", kFields[i].name);
    if (!seen[find_field("budget")] && settings.params.coverage == 0.0 && settings.params.gpu_budget == 0)
        return refuse(message, bad, "one of coverage, budget and gpu_budget must be set");
    return check_settings(settings, message);
}

PluginFieldCollection const& field_names() {
    static FieldNames const names;
    return names.collection;
}

SerializedFields::SerializedFields(Settings const& settings) : settings_(settings) {
    auto const* const base = reinterpret_cast<unsigned char const*>(&settings_);
    for (int i = 0; i < kCount; ++i) {
        FieldSpec const& spec = kFields[i];
        fields_[i] = PluginField(spec.name, base + spec.offset, type_of(spec.kind), 1);
        if (spec.kind != Kind::kChoice) continue;
        int32_t code;
        memcpy(&code, base + spec.offset, sizeof code);
        char const* const name = spec.choices->names[code];
        fields_[i].data = name;
        fields_[i].length = static_cast<int32_t>(strlen(name));
    }
    collection_ = {kCount, fields_};
}

}  // namespace xshare::tensorrt
