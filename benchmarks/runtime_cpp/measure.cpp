// SPDX-License-Identifier: Apache-2.0
#include "measure.h"

#include <algorithm>
#include <cmath>
#include <functional>

namespace {

// Linear between the two nearest values.
double quantile(std::vector<double> values, double share) {
    std::sort(values.begin(), values.end());
    const double place = share * static_cast<double>(values.size() - 1);
    const size_t below = static_cast<size_t>(place), above = std::min(below + 1, values.size() - 1);
    return values[below] + (place - std::floor(place)) * (values[above] - values[below]);
}

// Each iteration takes both settings, the first one in turns.
Comparison take_turns(int warmup, int iterations, const std::function<double(Setting, int)>& time) {
    std::vector<double> times[2];
    for (int i = -warmup; i < iterations; ++i) {
        const int index = i + warmup;
        const Setting first = index % 2 == 0 ? kOwn : kXShare;
        for (const Setting setting : {first, first == kOwn ? kXShare : kOwn}) {
            const double us = time(setting, index % kNumSteps);
            if (i >= 0) times[setting].push_back(us);
        }
    }
    return compare(times);
}

}  // namespace

Comparison compare(const std::vector<double> (&times)[2]) {
    std::vector<double> ratios;
    for (size_t i = 0; i < times[kOwn].size(); ++i) ratios.push_back(times[kXShare][i] / times[kOwn][i]);
    Comparison result = {};
    for (const Setting setting : kSettings) result.us[setting] = quantile(times[setting], 0.5);
    result.ratio = result.us[kXShare] / result.us[kOwn];
    result.ratio_low = quantile(ratios, 0.25);
    result.ratio_high = quantile(ratios, 0.75);
    return result;
}

Measured measure(Layers& layers, const Logits& logits, int rows, int warmup, int iterations) {
    layers.prepare(logits, rows);
    Measured result = {};
    result.rows = rows;
    for (const Setting setting : kSettings) {
        result.active_experts[setting] = layers.active_experts(setting);
        result.bytes[setting] = result.active_experts[setting] * layers.bytes_per_expert();
    }
    result.route = take_turns(warmup, iterations, [&](Setting s, int) { return layers.route_us(s); });
    result.layer = take_turns(warmup, iterations, [&](Setting setting, int step) {
        // The step before, so that the caches hold what this setting leaves in them, not what the other does.
        layers.layer_us(setting, (step + kNumSteps - 1) % kNumSteps);
        return layers.layer_us(setting, step);
    });
    return result;
}
