// SPDX-License-Identifier: Apache-2.0
#include "tensorrt/log.h"

#include <stdarg.h>
#include <stdio.h>

#include <atomic>

#include "tensorrt/runtime.h"

namespace xshare::tensorrt {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept { logger_finder = finder; }

void log_error(char const* format, ...) noexcept {
    char text[512];
    const int prefix = snprintf(text, sizeof text, "XShareRouting: ");
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text + prefix, sizeof text - static_cast<size_t>(prefix), format, arguments);
    va_end(arguments);

    nvinfer1::ILoggerFinder* const finder = logger_finder;
    // A finder's virtual table lies in the TensorRT that it came from: with two in the process, that is the
    // one that asks.
    Runtime runtime =
        finder == nullptr ? Runtime() : Runtime::owning(*reinterpret_cast<void* const*>(finder));
    if (runtime && runtime.log(finder, nvinfer1::ILogger::Severity::kERROR, text)) return;
    if (!runtime) runtime = Runtime::in_process();
    if (runtime.log(nullptr, nvinfer1::ILogger::Severity::kERROR, text)) return;
    fprintf(stderr, "%s\n", text);
}

}  // namespace xshare::tensorrt
