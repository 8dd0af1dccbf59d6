// SPDX-License-Identifier: Apache-2.0
// The command line. Options are named as in NVIDIA's own tools where those have one: README.md says which.
#ifndef XSHARE_BENCH_OPTIONS_H
#define XSHARE_BENCH_OPTIONS_H

#include <string>
#include <vector>

#include "models.h"

struct Options {
    bool help = false;
    bool on_device = false;  // --backend tensorrt
    std::vector<const Model*> models;
    std::vector<int> concurrency = {1, 2, 4, 8, 16, 32, 64};  // rows of a decode step
    int iterations = 41;
    int warmup = 2;
    Sharing sharing = {0.97, 0, 1};
    std::string dataset;  // a .npy of router logits; empty = synthetic
    std::string plugin = XSHARE_ROOT "/xshare_trtllm/lib/libnvinfer_plugin_xshare.so";
    std::string json;    // empty = no report
    std::string commit;  // empty = ask git
};

extern const char kUsage[];

// Throws UsageError.
Options parse_options(const std::vector<std::string>& arguments);

#endif  // XSHARE_BENCH_OPTIONS_H
