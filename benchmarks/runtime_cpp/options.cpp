// SPDX-License-Identifier: Apache-2.0
#include "options.h"

#include <charconv>
#include <cstdlib>
#include <functional>
#include <map>

#include "error.h"

const char kUsage[] =
    R"(xshare_bench: a model's own routing against XShare, one MoE layer's decode steps, paired in one run.

  --backend cpu|tensorrt      libxshare.so on one CPU thread, or the TensorRT plugin on a GPU [cpu]
  --model NAME[,NAME...]      layer shapes; an unknown name lists the known ones [xshare-moe-14m]
  --concurrency N[,N...]      rows of a decode step, 1 to 1024 [1,2,4,8,16,32,64]
  --iterations N              measurements of each setting, in turns [41]
  --warmup N                  unmeasured iterations before [2]
  --coverage SHARE            XShare: the share of the rows' utility that is enough; 0 = off [0.97]
  --budget N                  XShare: experts that may be active [no limit]
  --warmup_experts N          XShare: best experts that each row keeps [1]
  --dataset PATH.npy          router logits from write_trace.py [synthetic, correlated]
  --dynamicPlugins PATH       libnvinfer_plugin_xshare.so [the package's]
  --json PATH                 write the report there as well
  --commit TEXT               the commit for the report [asked of git]
)";

namespace {

std::vector<std::string> split(const std::string& text) {
    std::vector<std::string> parts(1);
    for (const char c : text)
        if (c == ',')
            parts.emplace_back();
        else
            parts.back() += c;
    return parts;
}

int number(const std::string& name, const std::string& text, int low, int high) {
    int value = 0;
    const char* const end = text.data() + text.size();
    const auto [stopped, error] = std::from_chars(text.data(), end, value);
    if (error != std::errc() || stopped != end || value < low || value > high)
        throw UsageError(name + " must be a whole number from " + std::to_string(low) + " to " +
                         std::to_string(high) + ", not '" + text + "'");
    return value;
}

double share(const std::string& name, const std::string& text) {
    char* stopped = nullptr;
    const double value = std::strtod(text.c_str(), &stopped);
    if (*stopped != '\0' || !(value >= 0.0 && value <= 1.0))
        throw UsageError(name + " must be a number from 0 to 1, not '" + text + "'");
    return value;
}

bool is_tensorrt(const std::string& text) {
    if (text != "cpu" && text != "tensorrt")
        throw UsageError("--backend must be cpu or tensorrt, not '" + text + "'");
    return text == "tensorrt";
}

std::vector<int> numbers(const std::string& name, const std::string& text, int low, int high) {
    std::vector<int> values;
    for (const std::string& part : split(text)) values.push_back(number(name, part, low, high));
    return values;
}

std::vector<const Model*> named_models(const std::string& text) {
    std::vector<const Model*> found;
    for (const std::string& name : split(text)) found.push_back(&find_model(name));
    return found;
}

}  // namespace

Options parse_options(const std::vector<std::string>& arguments) {
    Options o;
    using Set = std::function<void(const std::string&)>;
    const std::map<std::string, Set> known = {
        {"--backend", [&](auto& v) { o.on_device = is_tensorrt(v); }},
        {"--model", [&](auto& v) { o.models = named_models(v); }},
        {"--concurrency", [&](auto& v) { o.concurrency = numbers("--concurrency", v, 1, 1024); }},
        {"--iterations", [&](auto& v) { o.iterations = number("--iterations", v, 1, 1000000); }},
        {"--warmup", [&](auto& v) { o.warmup = number("--warmup", v, 0, 1000000); }},
        {"--coverage", [&](auto& v) { o.sharing.coverage = share("--coverage", v); }},
        {"--budget", [&](auto& v) { o.sharing.budget = number("--budget", v, 1, 1000000); }},
        {"--warmup_experts",
         [&](auto& v) { o.sharing.warmup_experts = number("--warmup_experts", v, 0, 1000000); }},
        {"--dataset", [&](auto& v) { o.dataset = v; }},
        {"--dynamicPlugins", [&](auto& v) { o.plugin = v; }},
        {"--json", [&](auto& v) { o.json = v; }},
        {"--commit", [&](auto& v) { o.commit = v; }},
    };
    for (size_t i = 0; i < arguments.size(); ++i) {
        const size_t equals = arguments[i].find('=');
        const std::string name = arguments[i].substr(0, equals);
        if (name == "--help") {
            o.help = true;
            return o;
        }
        const auto option = known.find(name);
        if (option == known.end()) throw UsageError("there is no option " + name + "; --help lists them");
        if (equals == std::string::npos && i + 1 == arguments.size())
            throw UsageError(name + " needs a value");
        const std::string value =
            equals == std::string::npos ? arguments[++i] : arguments[i].substr(equals + 1);
        if (value.empty()) throw UsageError(name + " needs a value");
        option->second(value);
    }
    if (o.models.empty()) o.models = {&find_model("xshare-moe-14m")};
    if (o.sharing.coverage == 0.0 && o.sharing.budget == 0)
        throw UsageError("--coverage 0 needs a --budget, or XShare has nothing to do");
    for (const Model* model : o.models)
        for (const int rows : o.concurrency) route_params(*model, o.sharing, kXShare, rows);
    return o;
}
