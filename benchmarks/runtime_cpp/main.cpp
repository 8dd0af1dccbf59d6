// SPDX-License-Identifier: Apache-2.0
#include <stdio.h>

#include <algorithm>

#include "error.h"
#include "json.h"
#include "measure.h"
#include "options.h"
#include "report.h"

namespace {

std::unique_ptr<Layers> make_layers(const Options& options, const Model& model) {
    if (!options.on_device) return make_host_layers(model, options.sharing);
#ifdef XSHARE_BENCH_TENSORRT
    return make_device_layers(model, options.sharing, options.plugin);
#else
    throw Error(
        "--backend tensorrt: not in this build, for which cmake found no nvcc or no TensorRT headers");
#endif
}

ModelResult run_model(const Options& options, const Model& model, const Logits& logits) {
    const std::unique_ptr<Layers> layers = make_layers(options, model);
    ModelResult result = {&model, logits.source(), layers->gpu(), {}};
    print_head(options, result);
    for (const int rows : options.concurrency) {
        result.by_rows.push_back(measure(*layers, logits, rows, options.warmup, options.iterations));
        print_row(result.by_rows.back());
    }
    return result;
}

void run(const Options& options, const std::string& command) {
    if (!options.json.empty()) check_writable(options.json);
    const int max_rows = *std::max_element(options.concurrency.begin(), options.concurrency.end());
    std::vector<Logits> logits;  // of all models first: a file that does not fit is refused at once
    for (const Model* model : options.models)
        logits.push_back(options.dataset.empty() ? Logits::synthetic(*model, max_rows)
                                                 : Logits::from_file(options.dataset, *model, max_rows));
    std::vector<ModelResult> results;
    for (size_t i = 0; i < logits.size(); ++i)
        results.push_back(run_model(options, *options.models[i], logits[i]));
    if (!options.json.empty()) write_file(options.json, json_report(options, command, results));
}

}  // namespace

int main(int argc, char** argv) {
    const std::vector<std::string> arguments(argv + 1, argv + argc);
    std::string command = "xshare_bench";
    for (const std::string& argument : arguments) command += " " + argument;
    try {
        const Options options = parse_options(arguments);
        if (options.help)
            fputs(kUsage, stdout);
        else
            run(options, command);
        return 0;
    } catch (const UsageError& error) {
        fprintf(stderr, "xshare_bench: %s\n", error.what());
        return 2;
    } catch (const std::exception& error) {
        fprintf(stderr, "xshare_bench: %s\n", error.what());
        return 1;
    }
}
