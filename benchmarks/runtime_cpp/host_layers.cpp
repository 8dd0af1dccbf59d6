// SPDX-License-Identifier: Apache-2.0
// On the host: libxshare.so through its C ABI, on the calling thread. Times are CPU times of the thread.
#include <time.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>

#include "error.h"
#include "layers.h"
#include "xshare/xshare_experts.h"

namespace {

struct Free {
    void operator()(void* block) const { std::free(block); }
};
template <typename T>
using Block = std::unique_ptr<T[], Free>;

template <typename T>
Block<T> allocate(size_t count) {
    const size_t bytes = std::max<size_t>(64, (count * sizeof(T) + 63) / 64 * 64);
    void* const block = std::aligned_alloc(64, bytes);
    if (block == nullptr) throw Error("there is no memory for " + std::to_string(bytes) + " bytes");
    return Block<T>(static_cast<T*>(block));
}

double now_us() {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return 1e6 * static_cast<double>(time.tv_sec) + 1e-3 * static_cast<double>(time.tv_nsec);
}

void check(xshare_status status) {
    if (status != XSHARE_OK) throw Error(xshare_last_error());
}

// Random numbers, the same ones every 4096: their values cost nothing, where they lie does.
Block<float> random_matrix(size_t count, float deviation) {
    constexpr size_t kPeriod = 4096;
    std::mt19937 generator(1);
    std::normal_distribution<float> normal(0.0f, deviation);
    float pattern[kPeriod];
    for (float& value : pattern) value = normal(generator);
    Block<float> matrix = allocate<float>(count);
    for (size_t i = 0; i < count; i += kPeriod)
        std::memcpy(&matrix[i], pattern, std::min(kPeriod, count - i) * sizeof(float));
    return matrix;
}

double available_bytes() {
    std::ifstream file("/proc/meminfo");
    for (std::string key, unit; file >> key;) {
        double kib = 0.0;
        if (key == "MemAvailable:" && file >> kib) return 1024.0 * kib;
        std::getline(file, unit);
    }
    return 1e18;  // not Linux: the allocation will say
}

class HostLayers final : public Layers {
  public:
    HostLayers(const Model& model, const Sharing& sharing) : model_(model), sharing_(sharing) {
        const double bytes = model.num_layers * model.num_experts * bytes_per_expert();
        if (bytes > available_bytes())
            throw Error(std::string(model.name) + ": its fp32 weights need " +
                        std::to_string(static_cast<int>(bytes / (1 << 20))) + " MiB, more than is free");
        const size_t matrix = static_cast<size_t>(model.num_experts) *
                              static_cast<size_t>(model.hidden_size) *
                              static_cast<size_t>(model.intermediate_size);
        for (int layer = 0; layer < model.num_layers; ++layer) {
            gate_up_.push_back(random_matrix(2 * matrix, 0.02f));
            down_.push_back(random_matrix(matrix, 0.02f));
        }
    }

    void prepare(const Logits& logits, int rows) override {
        logits_.clear();
        for (int step = 0; step < kNumSteps; ++step)
            for (int layer = 0; layer < model_.num_layers; ++layer)
                logits_.push_back(logits.step(layer, step, rows));
        for (const Setting setting : kSettings)
            route_params_[setting] = route_params(model_, sharing_, setting, rows);
        experts_params_ = {sizeof experts_params_, rows,
                           model_.num_experts,     model_.top_k,
                           model_.hidden_size,     model_.intermediate_size};
        const size_t width = static_cast<size_t>(rows) * static_cast<size_t>(model_.hidden_size);
        hidden_ = random_matrix(width, 1.0f);
        output_ = allocate<float>(width);
        slots_ = static_cast<size_t>(rows) * static_cast<size_t>(model_.top_k);
        ids_ = allocate<int32_t>(slots_);
        weights_ = allocate<float>(slots_);
        check(xshare_experts_workspace_size(&experts_params_, &workspace_size_));
        workspace_ = allocate<unsigned char>(workspace_size_);
    }

    double active_experts(Setting setting) override {
        double sum = 0.0;
        for (int step = 0; step < kNumSteps; ++step)
            for (int layer = 0; layer < model_.num_layers; ++layer) {
                route(setting, step, layer);
                sum += count_experts(ids_.get(), weights_.get(), slots_);
            }
        return sum / (kNumSteps * model_.num_layers);
    }

    double route_us(Setting setting) override {
        const double start = now_us();
        for (int step = 0; step < kNumSteps; ++step)
            for (int layer = 0; layer < model_.num_layers; ++layer) route(setting, step, layer);
        return (now_us() - start) / (kNumSteps * model_.num_layers);
    }

    double layer_us(Setting setting, int step) override {
        const double start = now_us();
        for (int layer = 0; layer < model_.num_layers; ++layer) {
            route(setting, step, layer);
            run_experts(layer);
        }
        return (now_us() - start) / model_.num_layers;
    }

    double bytes_per_expert() const override { return sizeof(float) * model_.weights_per_expert(); }

    std::string gpu() const override { return ""; }

  private:
    void route(Setting setting, int step, int layer) {
        xshare_route_tensors tensors = {};
        tensors.struct_size = sizeof tensors;
        tensors.router_logits = logits_[static_cast<size_t>(step * model_.num_layers + layer)].data();
        tensors.expert_ids = ids_.get();
        tensors.expert_weights = weights_.get();
        check(xshare_route_cpu(&route_params_[setting], &tensors, nullptr, 0));
    }

    void run_experts(int layer) {
        const size_t at = static_cast<size_t>(layer);
        const xshare_experts_tensors tensors = {sizeof tensors, hidden_.get(),      ids_.get(),
                                                weights_.get(), gate_up_[at].get(), down_[at].get(),
                                                output_.get()};
        check(xshare_experts_cpu(&experts_params_, &tensors, workspace_.get(), workspace_size_));
    }

    const Model& model_;
    const Sharing sharing_;
    std::vector<Block<float>> gate_up_, down_;  // per layer
    std::vector<std::vector<float>> logits_;    // [step, layer]
    xshare_route_params route_params_[2] = {};
    xshare_experts_params experts_params_ = {};
    size_t slots_ = 0, workspace_size_ = 0;
    Block<float> hidden_, output_, weights_;
    Block<int32_t> ids_;
    Block<unsigned char> workspace_;
};

}  // namespace

std::unique_ptr<Layers> make_host_layers(const Model& model, const Sharing& sharing) {
    return std::make_unique<HostLayers>(model, sharing);
}
