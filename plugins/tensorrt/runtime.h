// SPDX-License-Identifier: Apache-2.0
// The TensorRT that is in the process. This library is not linked against one: it is found when it is needed.
#ifndef XSHARE_TENSORRT_RUNTIME_H
#define XSHARE_TENSORRT_RUNTIME_H

#include <NvInferRuntime.h>

namespace xshare::tensorrt {

class Runtime {
  public:
    // The library that holds `address`, if it is a TensorRT of a known major version.
    static Runtime owning(void const* address) noexcept;

    // The TensorRT that is loaded already; if there is none, the one whose headers this library was built
    // with, if the loader finds it (a preloaded library comes before the program has loaded its TensorRT).
    static Runtime in_process() noexcept;

    explicit operator bool() const noexcept { return major_ != 0; }

    bool register_creator(nvinfer1::IPluginCreatorInterface& creator,
                          char const* plugin_namespace) const noexcept;
    bool deregister_creator(nvinfer1::IPluginCreatorInterface const& creator) const noexcept;
    bool has_creator(char const* name, char const* version, char const* plugin_namespace) const noexcept;

    // Through `finder` where it is not null, else the logger that TensorRT's objects were made with. False:
    // there is none.
    bool log(nvinfer1::ILoggerFinder* finder, nvinfer1::ILogger::Severity severity,
             char const* message) const noexcept;

  private:
    static Runtime from_handle(void* handle) noexcept;
    void* registry() const noexcept;
    void* logger(nvinfer1::ILoggerFinder* finder) const;

    void* handle_ = nullptr;
    int major_ = 0;
};

}  // namespace xshare::tensorrt

#endif  // XSHARE_TENSORRT_RUNTIME_H
