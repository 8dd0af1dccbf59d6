// SPDX-License-Identifier: Apache-2.0
// The two ways into TensorRT's plugin registry: IPluginRegistry::loadLibrary calls getCreators, and a library
// that is only dlopened or preloaded registers itself when it is loaded.
#include <dlfcn.h>
#include <stdint.h>

#include <new>

#include "tensorrt/log.h"
#include "tensorrt/routing_creator.h"
#include "tensorrt/routing_plugin.h"
#include "tensorrt/runtime.h"
#include "xshare/xshare.h"

#define XSHARE_EXPORT extern "C" __attribute__((visibility("default")))

namespace xshare::tensorrt {
namespace {

// Never destroyed: at the end of the process the registry may outlive this library's objects, and look at
// them.
RoutingCreator& creator() {
    alignas(RoutingCreator) static unsigned char storage[sizeof(RoutingCreator)];
    static RoutingCreator* const instance = new (storage) RoutingCreator;
    return *instance;
}

Runtime self_registered_with;

// A registered creator's code must stay: from now on dlclose does nothing.
void stay_loaded() noexcept {
    Dl_info self;
    if (dladdr(reinterpret_cast<void*>(&stay_loaded), &self) != 0)
        dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD | RTLD_NODELETE);
}

__attribute__((constructor)) void register_self() noexcept {
    const Runtime runtime = Runtime::in_process();
    if (!runtime || runtime.has_creator(kPluginName, kPluginVersion, kPluginNamespace)) return;
    if (!runtime.register_creator(creator(), kPluginNamespace)) return;
    self_registered_with = runtime;
    stay_loaded();
}

// loadLibrary refuses a library whose creators are registered already, so it gets this one unregistered.
void hand_over_to_loader() noexcept {
    if (!self_registered_with) return;
    self_registered_with.deregister_creator(creator());
    self_registered_with = Runtime();
}

}  // namespace
}  // namespace xshare::tensorrt

XSHARE_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& num_creators) {
    xshare::tensorrt::hand_over_to_loader();
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&xshare::tensorrt::creator()};
    num_creators = 1;
    return creators;
}

// What the library was built from and for: its version, the TensorRT headers and the architectures.
XSHARE_EXPORT const char* xshare_plugin_build() {
#define XSHARE_TEXT_OF(number) #number
#define XSHARE_DOTTED(a, b, c) XSHARE_TEXT_OF(a) "." XSHARE_TEXT_OF(b) "." XSHARE_TEXT_OF(c)
#define XSHARE_OWN XSHARE_DOTTED(XSHARE_VERSION_MAJOR, XSHARE_VERSION_MINOR, XSHARE_VERSION_PATCH)
#define XSHARE_HEADERS XSHARE_DOTTED(NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, NV_TENSORRT_PATCH)
    return XSHARE_OWN ", TensorRT " XSHARE_HEADERS " headers, code for " XSHARE_ARCHITECTURES;
}

XSHARE_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    xshare::tensorrt::set_logger_finder(finder);
}
