// SPDX-License-Identifier: Apache-2.0
// C functions over TensorRT's C++ plugin interface, for tests through ctypes: TensorRT's own Python calls
// clone, get_fields_to_serialize and enqueue of Python plugins only.
#include <NvInferRuntime.h>
#include <dlfcn.h>
#include <string.h>

#include <memory>
#include <string>
#include <vector>

#include "tensorrt/interfaces.h"

using namespace nvinfer1;
namespace abi = xshare::tensorrt;

#define PROBE extern "C" __attribute__((visibility("default")))

namespace {

class RecordingLogger final : public ILogger {
  public:
    void log(Severity severity, AsciiChar const* message) noexcept override {
        text += std::to_string(static_cast<int>(severity)) + ": " + message + "\n";
    }
    std::string text;
};

RecordingLogger logger;

class Finder final : public ILoggerFinder {
  public:
    ILogger* findLogger() override { return &logger; }
};

Finder finder;

class Constant final : public IDimensionExpr, apiv::VDimensionExpr {
  public:
    explicit Constant(int64_t value) : value_(value) { mImpl = this; }
    bool isConstant() const override { return true; }
    int64_t getConstantValue() const override { return value_; }
    bool isSizeTensor() const override { return false; }

  private:
    int64_t value_;
};

class Builder final : public IExprBuilder, apiv::VExprBuilder {
  public:
    Builder() { mImpl = this; }
    IDimensionExpr const* constant(int64_t value) override {
        return made_.emplace_back(new Constant(value)).get();
    }
    IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const& first,
                                    IDimensionExpr const&) override {
        return &first;
    }
    IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const& best,
                                            IDimensionExpr const&) override {
        return &best;
    }

  private:
    std::vector<std::unique_ptr<Constant>> made_;
};

template <typename Capability>
Capability& capability(void* plugin, PluginCapabilityType type) {
    return *static_cast<Capability*>(static_cast<IPluginV3*>(plugin)->getCapabilityInterface(type));
}

IPluginV3OneBuild& build_of(void* plugin) {
    return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
}

IPluginV3OneRuntime& runtime_of(void* plugin) {
    return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

PluginTensorDesc describe(int type, int format, int64_t rows, int64_t columns) {
    PluginTensorDesc desc{};
    desc.type = static_cast<DataType>(type);
    desc.format = static_cast<TensorFormat>(format);
    desc.dims.nbDims = columns < 0 ? 1 : 2;
    desc.dims.d[0] = rows;
    if (columns >= 0) desc.dims.d[1] = columns;
    return desc;
}

DynamicPluginTensorDesc describe_dynamic(PluginTensorDesc const& largest) {
    DynamicPluginTensorDesc desc{};
    desc.desc = largest;
    desc.desc.dims.d[0] = -1;
    desc.min = desc.opt = desc.max = largest.dims;
    desc.min.d[0] = 1;
    return desc;
}

}  // namespace

// What a logger finder needs around it to be recognised: the version of the TensorRT that it belongs to.
PROBE int32_t getInferLibVersion() noexcept { return NV_TENSORRT_VERSION; }
PROBE IPluginRegistry* getPluginRegistry() noexcept { return nullptr; }

struct ProbeField {
    char const* name;
    void const* data;
    int32_t type;
    int32_t length;
};

PROBE char const* probe_messages() {
    static std::string taken;
    taken.swap(logger.text);
    logger.text.clear();
    return taken.c_str();
}

PROBE int probe_set_logger(char const* plugin_library) {
    void* const handle = dlopen(plugin_library, RTLD_LAZY | RTLD_NOLOAD);
    if (handle == nullptr) return 0;
    reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(handle, "setLoggerFinder"))(&finder);
    return 1;
}

// The creator in the registry of the TensorRT library at `tensorrt_library`.
PROBE void* probe_registered_creator(char const* tensorrt_library) {
    void* const handle = dlopen(tensorrt_library, RTLD_LAZY | RTLD_NOLOAD);
    if (handle == nullptr) return nullptr;
    void* const registry = reinterpret_cast<void* (*)()>(dlsym(handle, "getPluginRegistry"))();
    const int32_t version = reinterpret_cast<int32_t (*)()>(dlsym(handle, "getInferLibVersion"))();
    if (version / 10000 == 10)
        return static_cast<abi::v10::Registry*>(registry)->getCreator("XShareRouting", "2", "xshare");
    return static_cast<abi::v11::Registry*>(registry)->getCreator("XShareRouting", "2", "xshare");
}

// The creator that a library offers, without any registry.
PROBE void* probe_offered_creator(char const* plugin_library) {
    void* const handle = dlopen(plugin_library, RTLD_LAZY);
    if (handle == nullptr) return nullptr;
    int32_t count = 0;
    auto const get =
        reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(handle, "getCreators"));
    auto const creators = get(count);
    return count == 1 ? creators[0] : nullptr;
}

PROBE void* probe_create(void* creator, ProbeField const* given, int32_t count, int32_t phase) {
    std::vector<PluginField> fields;
    for (int32_t i = 0; i < count; ++i)
        fields.emplace_back(given[i].name, given[i].data, static_cast<PluginFieldType>(given[i].type),
                            given[i].length);
    PluginFieldCollection const collection{count, fields.data()};
    auto& v3 = *static_cast<IPluginCreatorV3One*>(static_cast<IPluginCreatorInterface*>(creator));
    return v3.createPlugin("layer", count < 0 ? nullptr : &collection, static_cast<TensorRTPhase>(phase));
}

PROBE void* probe_clone(void* plugin) { return static_cast<IPluginV3*>(plugin)->clone(); }
PROBE void* probe_attach(void* plugin) { return runtime_of(plugin).attachToContext(nullptr); }
PROBE void probe_destroy(void* plugin) { delete static_cast<IPluginV3*>(plugin); }

PROBE int32_t probe_serialize(void* plugin, ProbeField* fields, int32_t room) {
    PluginFieldCollection const& all = *runtime_of(plugin).getFieldsToSerialize();
    for (int32_t i = 0; i < all.nbFields && i < room; ++i) {
        PluginField const& field = all.fields[i];
        fields[i] = {field.name, field.data, static_cast<int32_t>(field.type), field.length};
    }
    return all.nbFields;
}

PROBE int probe_has_capabilities(void* plugin) {
    auto* const object = static_cast<IPluginV3*>(plugin);
    auto& core = capability<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE);
    return strcmp(core.getInterfaceInfo().kind, "PLUGIN_V3ONE_CORE") == 0 &&
           strcmp(build_of(plugin).getInterfaceInfo().kind, "PLUGIN_V3ONE_BUILD") == 0 &&
           strcmp(runtime_of(plugin).getInterfaceInfo().kind, "PLUGIN_V3ONE_RUNTIME") == 0 &&
           strcmp(core.getPluginName(), "XShareRouting") == 0 &&
           strcmp(core.getPluginNamespace(), "xshare") == 0 &&
           object->getCapabilityInterface(static_cast<PluginCapabilityType>(9)) == nullptr;
}

PROBE int probe_supports(void* plugin, int32_t position, int32_t const* types, int32_t const* formats,
                         int32_t inputs, int32_t outputs) {
    std::vector<DynamicPluginTensorDesc> tensors;
    for (int32_t i = 0; i < inputs + outputs; ++i)
        tensors.push_back(describe_dynamic(describe(types[i], formats[i], 8, -1)));
    return build_of(plugin).supportsFormatCombination(position, tensors.data(), inputs, outputs);
}

// Types and shapes of the outputs for logits of 7 rows: type, number of dimensions and sizes, 4 numbers each.
PROBE int32_t probe_outputs(void* plugin, int32_t inputs, int32_t num_experts, int64_t* found) {
    IPluginV3OneBuild& build = build_of(plugin);
    const int32_t outputs = build.getNbOutputs();
    std::vector<DataType> in_types(inputs, DataType::kFLOAT), types(outputs);
    std::vector<DimsExprs> in(inputs), out(outputs);
    Builder builder;
    in[0].nbDims = 2;
    in[0].d[0] = builder.IExprBuilder::constant(7);
    in[0].d[1] = builder.IExprBuilder::constant(num_experts);
    if (build.getOutputDataTypes(types.data(), outputs, in_types.data(), inputs) != 0) return -1;
    if (build.getOutputShapes(in.data(), inputs, nullptr, 0, out.data(), outputs, builder) != 0) return -1;
    for (int32_t i = 0; i < outputs; ++i) {
        found[4 * i] = static_cast<int64_t>(types[i]);
        found[4 * i + 1] = out[i].nbDims;
        for (int32_t d = 0; d < out[i].nbDims; ++d)
            found[4 * i + 2 + d] = out[i].d[d]->IDimensionExpr::getConstantValue();
    }
    return outputs;
}

// 0 where configurePlugin and onShapeChange both accept logits of this type and size.
PROBE int probe_configure(void* plugin, int32_t inputs, int32_t type, int64_t rows, int64_t columns) {
    const int32_t outputs = build_of(plugin).getNbOutputs();
    std::vector<PluginTensorDesc> in(inputs, describe(type, 0, rows, columns)),
        out(outputs, describe(0, 0, rows, 1));
    std::vector<DynamicPluginTensorDesc> dynamic_in, dynamic_out;
    for (auto const& each : in) dynamic_in.push_back(describe_dynamic(each));
    for (auto const& each : out) dynamic_out.push_back(describe_dynamic(each));
    const int built =
        build_of(plugin).configurePlugin(dynamic_in.data(), inputs, dynamic_out.data(), outputs);
    return built != 0 ? built : runtime_of(plugin).onShapeChange(in.data(), inputs, out.data(), outputs);
}

PROBE uint64_t probe_workspace(void* plugin, int32_t type, int64_t rows, int64_t columns) {
    DynamicPluginTensorDesc const logits = describe_dynamic(describe(type, 0, rows, columns));
    return build_of(plugin).getWorkspaceSize(&logits, 1, nullptr, 0);
}

PROBE int probe_enqueue(void* plugin, int32_t type, int64_t rows, int64_t columns, void const* const* inputs,
                        void* const* outputs, void* workspace, void* stream) {
    PluginTensorDesc const logits = describe(type, 0, rows, columns);
    return runtime_of(plugin).enqueue(&logits, nullptr, inputs, outputs, workspace,
                                      static_cast<cudaStream_t>(stream));
}
