// SPDX-License-Identifier: Apache-2.0
// The MoE layers of one model on one kind of machine: what measure.cpp drives. host_layers.cpp and
// device_layers.cpp are the two kinds.
#ifndef XSHARE_BENCH_LAYERS_H
#define XSHARE_BENCH_LAYERS_H

#include <memory>
#include <set>
#include <string>

#include "logits.h"
#include "models.h"
#include "options.h"

class Layers {
  public:
    virtual ~Layers() = default;

    // Takes the decode steps of `rows` rows each from `logits`. Comes before everything below.
    virtual void prepare(const Logits& logits, int rows) = 0;

    // Experts that a layer's rows use, mean over layers and steps.
    virtual double active_experts(Setting setting) = 0;

    // Microseconds of one layer's routing, mean over layers and steps.
    virtual double route_us(Setting setting) = 0;

    // Microseconds of one layer of one step: routing and experts, mean over layers.
    virtual double layer_us(Setting setting, int step) = 0;

    // Of one expert, as they are read here.
    virtual double bytes_per_expert() const = 0;

    // The GPU's name; empty on the host.
    virtual std::string gpu() const = 0;
};

// Throws Error where the weights do not fit into memory.
std::unique_ptr<Layers> make_host_layers(const Model& model, const Sharing& sharing);

// Throws Error without a usable plugin library or device, and for weights that do not fit.
std::unique_ptr<Layers> make_device_layers(const Model& model, const Sharing& sharing,
                                           const std::string& plugin);

// Distinct experts among slots whose weight is not 0.
inline double count_experts(const int32_t* ids, const float* weights, size_t slots) {
    std::set<int32_t> used;
    for (size_t s = 0; s < slots; ++s)
        if (weights[s] != 0.0f) used.insert(ids[s]);
    return static_cast<double>(used.size());
}

#endif  // XSHARE_BENCH_LAYERS_H
