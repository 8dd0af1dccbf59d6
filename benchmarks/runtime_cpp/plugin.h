// SPDX-License-Identifier: Apache-2.0
// The XShareRouting plugin of a library, called through TensorRT's own interface as an engine would call it.
// No TensorRT library is needed for that.
#ifndef XSHARE_BENCH_PLUGIN_H
#define XSHARE_BENCH_PLUGIN_H

#include <NvInferRuntime.h>

#include <memory>
#include <string>

#include "models.h"

class Plugin {
  public:
    // Loads the library, creates the plugin from its fields and attaches it to a context of its own. Throws
    // Error where one of them fails.
    Plugin(const std::string& library, const Model& model, const Sharing& sharing, Setting setting);

    // Says how many rows come, and gives the device memory that enqueue needs for them.
    size_t set_rows(int rows);

    // Device pointers: fp32 [rows, E] in, [rows, k] out.
    void enqueue(const float* router_logits, int32_t* expert_ids, float* expert_weights, void* workspace,
                 cudaStream_t stream);

  private:
    const Model& model_;
    std::unique_ptr<nvinfer1::IPluginV3> created_, attached_;
    nvinfer1::IPluginV3OneRuntime* runtime_ = nullptr;  // of attached_
    nvinfer1::PluginTensorDesc inputs_[1] = {}, outputs_[2] = {};
};

#endif  // XSHARE_BENCH_PLUGIN_H
