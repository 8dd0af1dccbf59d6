// SPDX-License-Identifier: Apache-2.0
// The two settings measured in turns, so that both see the same machine.
#ifndef XSHARE_BENCH_MEASURE_H
#define XSHARE_BENCH_MEASURE_H

#include <vector>

#include "layers.h"

struct Comparison {
    double us[2];                  // medians, per Setting
    double ratio;                  // XShare's median over the own routing's: below 1 is faster
    double ratio_low, ratio_high;  // quartiles of the iterations' own ratios
};

// From one time per iteration and setting; iteration i of both settings belong together.
Comparison compare(const std::vector<double> (&times)[2]);

struct Measured {
    int rows;
    double active_experts[2];  // per Setting
    double bytes[2];           // of those experts' weights
    Comparison route, layer;

    double gigabytes_per_second(Setting setting) const { return bytes[setting] / layer.us[setting] / 1e3; }
};

Measured measure(Layers& layers, const Logits& logits, int rows, int warmup, int iterations);

#endif  // XSHARE_BENCH_MEASURE_H
