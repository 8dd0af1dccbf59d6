// SPDX-License-Identifier: Apache-2.0
// A stand-in for libnvinfer.so with a registry of one entry, to see a plugin library register itself when no
// TensorRT of that version is at hand. Its classes come from TensorRT's own headers (tests: 10.14.1).
#include <NvInferRuntime.h>
#include <stdio.h>

#if NV_TENSORRT_MAJOR < 11
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // a registry has them all
#endif

using namespace nvinfer1;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

class Registry final : public IPluginRegistry {
  public:
#if NV_TENSORRT_MAJOR < 11
    bool registerCreator(IPluginCreator&, AsciiChar const*) noexcept override { return false; }
    IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept override { return nullptr; }
    IPluginCreator* getPluginCreator(AsciiChar const*, AsciiChar const*, AsciiChar const*) noexcept override {
        return nullptr;
    }
    bool deregisterCreator(IPluginCreator const&) noexcept override { return false; }
#endif
    void setErrorRecorder(IErrorRecorder*) noexcept override {}
    IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
    bool isParentSearchEnabled() const override { return false; }
    void setParentSearchEnabled(bool) override {}
    PluginLibraryHandle loadLibrary(AsciiChar const*) noexcept override { return nullptr; }
    void deregisterLibrary(PluginLibraryHandle) noexcept override {}
    bool registerCreator(IPluginCreatorInterface& creator,
                         AsciiChar const* plugin_namespace) noexcept override {
        if (only_ != nullptr) return false;
        only_ = &creator;
        fprintf(stdout, "registered %s in %s\n", static_cast<IPluginCreatorV3One&>(creator).getPluginName(),
                plugin_namespace);
        fflush(stdout);
        return true;
    }
    IPluginCreatorInterface* const* getAllCreators(int32_t* count) const noexcept override {
        *count = only_ == nullptr ? 0 : 1;
        return &only_;
    }
    IPluginCreatorInterface* getCreator(AsciiChar const*, AsciiChar const*,
                                        AsciiChar const*) noexcept override {
        return only_;
    }
    bool deregisterCreator(IPluginCreatorInterface const& creator) noexcept override {
        if (only_ != &creator) return false;
        only_ = nullptr;
        fprintf(stdout, "deregistered\n");
        fflush(stdout);
        return true;
    }
    IPluginResource* acquirePluginResource(AsciiChar const*, IPluginResource*) noexcept override {
        return nullptr;
    }
    int32_t releasePluginResource(AsciiChar const*) noexcept override { return 0; }
    virtual IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t* count) noexcept {  // not in 10.0
        return getAllCreators(count);
    }

  private:
    IPluginCreatorInterface* only_ = nullptr;
};

class Logger final : public ILogger {
  public:
    void log(Severity, AsciiChar const* message) noexcept override {
        fprintf(stdout, "logged %s\n", message);
        fflush(stdout);
    }
};

}  // namespace

EXPORT IPluginRegistry* getPluginRegistry() noexcept {
    static Registry& registry = *new Registry;
    return &registry;
}

EXPORT ILogger* getLogger() noexcept {
    static Logger& logger = *new Logger;
    return &logger;
}

EXPORT int32_t getInferLibVersion() noexcept { return NV_TENSORRT_VERSION; }
