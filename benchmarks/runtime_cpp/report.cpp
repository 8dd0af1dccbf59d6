// SPDX-License-Identifier: Apache-2.0
#include "report.h"

#include <stdio.h>

#include "json.h"
#include "machine.h"

namespace {

std::string layer_means(const Options& options) {
    return options.on_device ? "route + one read of each active expert's weights (no products)"
                             : "route + experts, one thread";
}

std::string sharing_text(const Sharing& sharing) {
    char coverage[32] = "off", budget[32] = "none", text[96];
    if (sharing.coverage > 0.0) snprintf(coverage, sizeof coverage, "%g", sharing.coverage);
    if (sharing.budget > 0) snprintf(budget, sizeof budget, "%d", sharing.budget);
    snprintf(text, sizeof text, "coverage %s, budget %s, warm-up %d", coverage, budget,
             sharing.warmup_experts);
    return text;
}

std::string ratio_text(const Comparison& c) {
    char text[48];
    snprintf(text, sizeof text, "%.2f (%.2f-%.2f)", c.ratio, c.ratio_low, c.ratio_high);
    return text;
}

Json comparison(const Comparison& c) {
    return Json::object({{"own_us", c.us[kOwn]},
                         {"xshare_us", c.us[kXShare]},
                         {"ratio", c.ratio},
                         {"ratio_quartiles", Json::array({c.ratio_low, c.ratio_high})}});
}

Json measured_json(const Measured& m) {
    return Json::object({{"rows", m.rows},
                         {"active_experts_own", m.active_experts[kOwn]},
                         {"active_experts_xshare", m.active_experts[kXShare]},
                         {"expert_bytes_own", m.bytes[kOwn]},
                         {"expert_bytes_xshare", m.bytes[kXShare]},
                         {"gigabytes_per_second_own", m.gigabytes_per_second(kOwn)},
                         {"gigabytes_per_second_xshare", m.gigabytes_per_second(kXShare)},
                         {"route", comparison(m.route)},
                         {"layer", comparison(m.layer)}});
}

Json result_json(const ModelResult& result) {
    const Model& model = *result.model;
    std::vector<Json> rows;
    for (const Measured& measured : result.by_rows) rows.push_back(measured_json(measured));
    return Json::object({{"model", model.name},
                         {"num_experts", model.num_experts},
                         {"top_k", model.top_k},
                         {"hidden_size", model.hidden_size},
                         {"intermediate_size", model.intermediate_size},
                         {"num_layers", model.num_layers},
                         {"logits", result.logits},
                         {"by_rows", Json::array(rows)}});
}

}  // namespace

void print_head(const Options& options, const ModelResult& result) {
    const Model& m = *result.model;
    printf("\n%s: %d experts, top %d, hidden %d, intermediate %d, %d layer%s; %s\n", m.name, m.num_experts,
           m.top_k, m.hidden_size, m.intermediate_size, m.num_layers, m.num_layers == 1 ? "" : "s",
           sharing_text(options.sharing).c_str());
    printf("logits: %s; layer: %s\n", result.logits.c_str(), layer_means(options).c_str());
    printf("%5s | %13s | %33s | %37s | %15s | %13s\n", "", "experts", "route, us", "layer, us",
           "weights, MiB", "GB/s");
    printf("%5s | %6s %6s | %8s %8s %15s | %10s %10s %15s | %7s %7s | %6s %6s\n", "rows", "own", "XShare",
           "own", "XShare", "ratio", "own", "XShare", "ratio", "own", "XShare", "own", "XShare");
    fflush(stdout);
}

void print_row(const Measured& m) {
    constexpr double kMiB = 1 << 20;
    printf("%5d | %6.1f %6.1f | %8.1f %8.1f %15s | %10.1f %10.1f %15s | %7.1f %7.1f | %6.1f %6.1f\n", m.rows,
           m.active_experts[kOwn], m.active_experts[kXShare], m.route.us[kOwn], m.route.us[kXShare],
           ratio_text(m.route).c_str(), m.layer.us[kOwn], m.layer.us[kXShare], ratio_text(m.layer).c_str(),
           m.bytes[kOwn] / kMiB, m.bytes[kXShare] / kMiB, m.gigabytes_per_second(kOwn),
           m.gigabytes_per_second(kXShare));
    fflush(stdout);
}

std::string json_report(const Options& options, const std::string& command,
                        const std::vector<ModelResult>& results) {
    const std::string commit = options.commit.empty() ? git_commit() : options.commit;
    const std::string gpu = results.front().gpu;
    std::vector<Json> models;
    for (const ModelResult& result : results) models.push_back(result_json(result));
    const Json machine = Json::object({{"processor", processor()},
                                       {"cores", cores()},
                                       {"gpu", gpu.empty() ? Json::null() : Json(gpu)},
                                       {"compiler", XSHARE_COMPILER},
                                       {"xshare", xshare_version()},
                                       {"commit", commit.empty() ? Json::null() : Json(commit)},
                                       {"time", utc_time()}});
    const Json report =
        Json::object({{"command", command},
                      {"machine", machine},
                      {"backend", options.on_device ? "tensorrt" : "cpu"},
                      {"layer", layer_means(options)},
                      {"iterations", options.iterations},
                      {"warmup", options.warmup},
                      {"coverage", options.sharing.coverage},
                      {"budget", options.sharing.budget > 0 ? Json(options.sharing.budget) : Json::null()},
                      {"warmup_experts", options.sharing.warmup_experts},
                      {"results", Json::array(models)}});
    return report.text() + "\n";
}
