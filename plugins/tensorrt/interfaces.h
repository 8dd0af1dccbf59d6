// SPDX-License-Identifier: Apache-2.0
// The TensorRT objects that this library calls into (rather than is called through), as TensorRT 10 and 11
// lay them out.
//
// TensorRT 11 dropped the deprecated functions of IPluginRegistry and gave the loggers a common base: their
// virtual tables moved. The plugin and creator interfaces did not change, so one binary serves both, if it
// asks the TensorRT that it finds in the process which layout to use. Only the order of the functions matters
// here; those that are never called are declared without their arguments.
#ifndef XSHARE_TENSORRT_INTERFACES_H
#define XSHARE_TENSORRT_INTERFACES_H

#include <NvInferRuntime.h>

namespace xshare::tensorrt {

constexpr int kOldestMajor = 10;
constexpr int kNewestMajor = 11;

namespace v10 {

struct Logger {
    virtual void log(nvinfer1::ILogger::Severity severity, char const* message) noexcept = 0;

  protected:
    ~Logger() = default;
};

struct LoggerFinder {
    virtual void* findLogger() = 0;

  protected:
    ~LoggerFinder() = default;
};

struct Registry {
    virtual void registerCreatorV2() = 0;
    virtual void getPluginCreatorList() = 0;
    virtual void getPluginCreator() = 0;
    virtual void destroy() = 0;
    virtual void destroyAndFree() = 0;
    virtual void setErrorRecorder() = 0;
    virtual void getErrorRecorder() = 0;
    virtual void deregisterCreatorV2() = 0;
    virtual void isParentSearchEnabled() = 0;
    virtual void setParentSearchEnabled() = 0;
    virtual void loadLibrary() = 0;
    virtual void deregisterLibrary() = 0;
    virtual bool registerCreator(nvinfer1::IPluginCreatorInterface& creator,
                                 char const* plugin_namespace) noexcept = 0;
    virtual void getAllCreators() = 0;
    virtual nvinfer1::IPluginCreatorInterface* getCreator(char const* name, char const* version,
                                                          char const* plugin_namespace) noexcept = 0;
    virtual bool deregisterCreator(nvinfer1::IPluginCreatorInterface const& creator) noexcept = 0;

  protected:
    ~Registry() = default;
};

}  // namespace v10

namespace v11 {

struct Logger {
    virtual void getApiLanguage() = 0;
    virtual void getInterfaceInfo() = 0;
    virtual void destroy() = 0;
    virtual void destroyAndFree() = 0;
    virtual void log(nvinfer1::ILogger::Severity severity, char const* message) noexcept = 0;

  protected:
    ~Logger() = default;
};

struct LoggerFinder {
    virtual void getApiLanguage() = 0;
    virtual void getInterfaceInfo() = 0;
    virtual void destroy() = 0;
    virtual void destroyAndFree() = 0;
    virtual void* findLogger() = 0;

  protected:
    ~LoggerFinder() = default;
};

struct Registry {
    virtual void destroy() = 0;
    virtual void destroyAndFree() = 0;
    virtual void setErrorRecorder() = 0;
    virtual void getErrorRecorder() = 0;
    virtual void isParentSearchEnabled() = 0;
    virtual void setParentSearchEnabled() = 0;
    virtual void loadLibrary() = 0;
    virtual void deregisterLibrary() = 0;
    virtual bool registerCreator(nvinfer1::IPluginCreatorInterface& creator,
                                 char const* plugin_namespace) noexcept = 0;
    virtual void getAllCreators() = 0;
    virtual nvinfer1::IPluginCreatorInterface* getCreator(char const* name, char const* version,
                                                          char const* plugin_namespace) noexcept = 0;
    virtual bool deregisterCreator(nvinfer1::IPluginCreatorInterface const& creator) noexcept = 0;

  protected:
    ~Registry() = default;
};

}  // namespace v11

}  // namespace xshare::tensorrt

#endif  // XSHARE_TENSORRT_INTERFACES_H
