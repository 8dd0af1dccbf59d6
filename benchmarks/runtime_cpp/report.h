// SPDX-License-Identifier: Apache-2.0
// The table and the JSON report of a run.
#ifndef XSHARE_BENCH_REPORT_H
#define XSHARE_BENCH_REPORT_H

#include <string>
#include <vector>

#include "measure.h"

struct ModelResult {
    const Model* model;
    std::string logits;  // where they came from
    std::string gpu;     // its name; empty on the host
    std::vector<Measured> by_rows;
};

void print_head(const Options& options, const ModelResult& result);
void print_row(const Measured& measured);

std::string json_report(const Options& options, const std::string& command,
                        const std::vector<ModelResult>& results);

#endif  // XSHARE_BENCH_REPORT_H
