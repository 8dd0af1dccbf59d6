// SPDX-License-Identifier: Apache-2.0
// Messages through TensorRT's logger, on standard error where there is none, and a fence around everything
// that TensorRT calls.
#ifndef XSHARE_TENSORRT_LOG_H
#define XSHARE_TENSORRT_LOG_H

#include <NvInferRuntime.h>

#include <exception>

namespace xshare::tensorrt {

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

void log_error(char const* format, ...) noexcept __attribute__((format(printf, 1, 2)));

// The value of `body`, or `failed` and a message where it throws: no exception may cross into TensorRT.
template <typename Value, typename Body>
Value guarded(char const* where, Value failed, Body&& body) noexcept {
    try {
        return body();
    } catch (std::exception const& error) {
        log_error("%s: %s", where, error.what());
    } catch (...) {
        log_error("%s: unknown exception", where);
    }
    return failed;
}

}  // namespace xshare::tensorrt

#endif  // XSHARE_TENSORRT_LOG_H
