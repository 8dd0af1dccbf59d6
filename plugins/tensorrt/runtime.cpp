// SPDX-License-Identifier: Apache-2.0
#include "tensorrt/runtime.h"

#include <dlfcn.h>
#include <stdio.h>

#include "tensorrt/interfaces.h"

namespace xshare::tensorrt {
namespace {

template <typename Function>
Function find(void* handle, char const* name) noexcept {
    return reinterpret_cast<Function>(dlsym(handle, name));
}

// The full library first: a process that holds a lean one as well builds and runs with the full one.
constexpr char const* kLibraries[] = {"libnvinfer.so", "libnvinfer_lean.so", "libnvinfer_dispatch.so"};

void* open_loaded() noexcept {
    if (find<void*>(RTLD_DEFAULT, "getPluginRegistry") != nullptr) return dlopen(nullptr, RTLD_LAZY);
    for (char const* library : kLibraries) {
        for (int major = kNewestMajor; major >= kOldestMajor; --major) {
            char name[64];
            snprintf(name, sizeof name, "%s.%d", library, major);
            if (void* handle = dlopen(name, RTLD_LAZY | RTLD_NOLOAD)) return handle;
        }
    }
    return nullptr;
}

}  // namespace

// Handles are kept open: TensorRT must not go away under a registered creator.
Runtime Runtime::from_handle(void* handle) noexcept {
    Runtime runtime;
    if (handle == nullptr) return runtime;
    const auto version = find<int32_t (*)()>(handle, "getInferLibVersion");
    if (version == nullptr || find<void*>(handle, "getPluginRegistry") == nullptr) return runtime;
    const int32_t number = version();  // 101401: 10.14.1, earlier 8601: 8.6.1
    const int major = number >= 100000 ? number / 10000 : number / 1000;
    if (major < kOldestMajor || major > kNewestMajor) return runtime;
    runtime.handle_ = handle;
    runtime.major_ = major;
    return runtime;
}

Runtime Runtime::owning(void const* address) noexcept {
    Dl_info where;
    if (address == nullptr || dladdr(address, &where) == 0 || where.dli_fname == nullptr) return Runtime();
    return from_handle(dlopen(where.dli_fname, RTLD_LAZY | RTLD_NOLOAD));
}

Runtime Runtime::in_process() noexcept {
    if (void* loaded = open_loaded()) return from_handle(loaded);
    char name[64];
    snprintf(name, sizeof name, "%s.%d", kLibraries[0], NV_TENSORRT_MAJOR);
    return from_handle(dlopen(name, RTLD_LAZY));
}

void* Runtime::registry() const noexcept {
    if (handle_ == nullptr) return nullptr;
    return find<void* (*)()>(handle_, "getPluginRegistry")();
}

bool Runtime::register_creator(nvinfer1::IPluginCreatorInterface& creator,
                               char const* plugin_namespace) const noexcept {
    void* const plugins = registry();
    if (plugins == nullptr) return false;
    if (major_ == 10) return static_cast<v10::Registry*>(plugins)->registerCreator(creator, plugin_namespace);
    return static_cast<v11::Registry*>(plugins)->registerCreator(creator, plugin_namespace);
}

bool Runtime::deregister_creator(nvinfer1::IPluginCreatorInterface const& creator) const noexcept {
    void* const plugins = registry();
    if (plugins == nullptr) return false;
    if (major_ == 10) return static_cast<v10::Registry*>(plugins)->deregisterCreator(creator);
    return static_cast<v11::Registry*>(plugins)->deregisterCreator(creator);
}

bool Runtime::has_creator(char const* name, char const* version,
                          char const* plugin_namespace) const noexcept {
    void* const plugins = registry();
    if (plugins == nullptr) return false;
    if (major_ == 10)
        return static_cast<v10::Registry*>(plugins)->getCreator(name, version, plugin_namespace) != nullptr;
    return static_cast<v11::Registry*>(plugins)->getCreator(name, version, plugin_namespace) != nullptr;
}

void* Runtime::logger(nvinfer1::ILoggerFinder* finder) const {
    if (finder != nullptr) {
        void* const object = finder;
        void* const found = major_ == 10 ? static_cast<v10::LoggerFinder*>(object)->findLogger()
                                         : static_cast<v11::LoggerFinder*>(object)->findLogger();
        if (found != nullptr) return found;
    }
    const auto global = find<void* (*)()>(handle_, "getLogger");
    return global == nullptr ? nullptr : global();
}

bool Runtime::log(nvinfer1::ILoggerFinder* finder, nvinfer1::ILogger::Severity severity,
                  char const* message) const noexcept {
    if (handle_ == nullptr) return false;
    try {
        void* const found = logger(finder);
        if (found == nullptr) return false;
        if (major_ == 10)
            static_cast<v10::Logger*>(found)->log(severity, message);
        else
            static_cast<v11::Logger*>(found)->log(severity, message);
        return true;
    } catch (...) {  // findLogger is not noexcept
        return false;
    }
}

}  // namespace xshare::tensorrt
