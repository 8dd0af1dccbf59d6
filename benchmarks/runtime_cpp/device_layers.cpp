// SPDX-License-Identifier: Apache-2.0
// On a GPU: the plugin in captured CUDA graphs. One graph per setting routes all steps; one per setting and
// step routes its layers and reads their active experts' weights. Times are between events around a replay.
#include <cuda_runtime.h>

#include <functional>

#include "error.h"
#include "layers.h"
#include "plugin.h"
#include "read_experts.h"

namespace {

void check(cudaError_t status, const char* doing) {
    if (status != cudaSuccess) throw Error(std::string(doing) + ": " + cudaGetErrorString(status));
}

struct DeviceFree {
    void operator()(void* block) const { cudaFree(block); }
};
template <typename T>
using Block = std::unique_ptr<T[], DeviceFree>;

template <typename T>
Block<T> allocate(size_t count) {
    void* block = nullptr;
    check(cudaMalloc(&block, count * sizeof(T) + 16), "allocating device memory");
    return Block<T>(static_cast<T*>(block));
}

struct GraphDestroy {
    void operator()(cudaGraphExec_t graph) const { cudaGraphExecDestroy(graph); }
};
using Graph = std::unique_ptr<CUgraphExec_st, GraphDestroy>;

class Stream {
  public:
    Stream() {
        check(cudaStreamCreate(&stream_), "making a stream");
        check(cudaEventCreate(&start_), "making an event");
        check(cudaEventCreate(&end_), "making an event");
    }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    ~Stream() {
        cudaEventDestroy(start_);
        cudaEventDestroy(end_);
        cudaStreamDestroy(stream_);
    }

    cudaStream_t get() const { return stream_; }

    void wait() const { check(cudaStreamSynchronize(stream_), "running on the device"); }

    Graph capture(const std::function<void()>& work) const {
        cudaGraph_t graph = nullptr;
        check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capturing a graph");
        work();
        check(cudaStreamEndCapture(stream_, &graph), "capturing a graph");
        cudaGraphExec_t executable = nullptr;
        const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
        cudaGraphDestroy(graph);
        check(status, "instantiating a graph");
        return Graph(executable);
    }

    double replay_us(const Graph& graph) const {
        check(cudaEventRecord(start_, stream_), "recording an event");
        check(cudaGraphLaunch(graph.get(), stream_), "launching a graph");
        check(cudaEventRecord(end_, stream_), "recording an event");
        check(cudaEventSynchronize(end_), "running a graph");
        float milliseconds = 0.0f;
        check(cudaEventElapsedTime(&milliseconds, start_, end_), "reading an event");
        return 1e3 * static_cast<double>(milliseconds);
    }

  private:
    cudaStream_t stream_ = nullptr;
    cudaEvent_t start_ = nullptr, end_ = nullptr;
};

class DeviceLayers final : public Layers {
  public:
    DeviceLayers(const Model& model, const Sharing& sharing, const std::string& library)
        : model_(model), plugins_{{library, model, sharing, kOwn}, {library, model, sharing, kXShare}} {
        int devices = 0;
        const cudaError_t status = cudaGetDeviceCount(&devices);
        if (status != cudaSuccess || devices == 0)
            throw Error(std::string("--backend tensorrt needs a GPU: ") +
                        (status == cudaSuccess ? "there is none" : cudaGetErrorString(status)));
        stream_ = std::make_unique<Stream>();
        const size_t bytes = expert_bytes() * static_cast<size_t>(model.num_experts);
        for (int layer = 0; layer < model.num_layers; ++layer) {
            weights_.push_back(allocate<unsigned char>(bytes));
            check(cudaMemset(weights_.back().get(), 0, bytes), "clearing the weights");
        }
        sink_ = allocate<int32_t>(1);
    }

    void prepare(const Logits& logits, int rows) override {
        slots_ = static_cast<size_t>(rows) * static_cast<size_t>(model_.top_k);
        row_logits_ = static_cast<size_t>(rows) * static_cast<size_t>(model_.num_experts);
        const size_t calls = static_cast<size_t>(kNumSteps * model_.num_layers);
        logits_ = allocate<float>(calls * row_logits_);
        for (int step = 0; step < kNumSteps; ++step)
            for (int layer = 0; layer < model_.num_layers; ++layer)
                check(cudaMemcpy(logits_.get() + call(step, layer) * row_logits_,
                                 logits.step(layer, step, rows).data(), row_logits_ * sizeof(float),
                                 cudaMemcpyHostToDevice),
                      "copying logits");
        for (const Setting setting : kSettings) {
            Calls& mine = calls_[setting];
            mine.ids = allocate<int32_t>(calls * slots_);
            mine.scales = allocate<float>(calls * slots_);
            mine.workspace = allocate<unsigned char>(plugins_[setting].set_rows(rows));
            run_layers(setting, 0);  // the first call loads the kernels: never within a capture
            stream_->wait();
            mine.route = stream_->capture([&] { route_steps(setting); });
            mine.layers.clear();
            for (int step = 0; step < kNumSteps; ++step)
                mine.layers.push_back(stream_->capture([&] { run_layers(setting, step); }));
        }
    }

    double active_experts(Setting setting) override {
        const size_t calls = static_cast<size_t>(kNumSteps * model_.num_layers);
        std::vector<int32_t> ids(calls * slots_);
        std::vector<float> scales(calls * slots_);
        stream_->replay_us(calls_[setting].route);
        check(cudaMemcpy(ids.data(), calls_[setting].ids.get(), ids.size() * sizeof(int32_t),
                         cudaMemcpyDeviceToHost),
              "copying ids");
        check(cudaMemcpy(scales.data(), calls_[setting].scales.get(), scales.size() * sizeof(float),
                         cudaMemcpyDeviceToHost),
              "copying weights");
        double sum = 0.0;
        for (size_t c = 0; c < calls; ++c)
            sum += count_experts(&ids[c * slots_], &scales[c * slots_], slots_);
        return sum / static_cast<double>(calls);
    }

    double route_us(Setting setting) override {
        return stream_->replay_us(calls_[setting].route) / (kNumSteps * model_.num_layers);
    }

    double layer_us(Setting setting, int step) override {
        return stream_->replay_us(calls_[setting].layers[static_cast<size_t>(step)]) / model_.num_layers;
    }

    double bytes_per_expert() const override { return static_cast<double>(expert_bytes()); }

    std::string gpu() const override {
        cudaDeviceProp properties;
        check(cudaGetDeviceProperties(&properties, 0), "asking for the device's name");
        return properties.name;
    }

  private:
    // The calls of one setting, [step, layer], and the graphs that hold them.
    struct Calls {
        Block<int32_t> ids;   // [step, layer, slots]
        Block<float> scales;  // [step, layer, slots]
        Block<unsigned char> workspace;
        Graph route;
        std::vector<Graph> layers;  // [step]
    };

    size_t call(int step, int layer) const { return static_cast<size_t>(step * model_.num_layers + layer); }

    size_t expert_bytes() const {
        return static_cast<size_t>(model_.bytes_per_weight * model_.weights_per_expert()) / 16 * 16;
    }

    void route(Setting setting, int step, int layer) {
        const size_t at = call(step, layer);
        Calls& mine = calls_[setting];
        plugins_[setting].enqueue(logits_.get() + at * row_logits_, mine.ids.get() + at * slots_,
                                  mine.scales.get() + at * slots_, mine.workspace.get(), stream_->get());
    }

    void route_steps(Setting setting) {
        for (int step = 0; step < kNumSteps; ++step)
            for (int layer = 0; layer < model_.num_layers; ++layer) route(setting, step, layer);
    }

    void run_layers(Setting setting, int step) {
        for (int layer = 0; layer < model_.num_layers; ++layer) {
            route(setting, step, layer);
            const size_t at = call(step, layer) * slots_;
            const Calls& mine = calls_[setting];
            check(read_experts(weights_[static_cast<size_t>(layer)].get(), model_.num_experts, expert_bytes(),
                               mine.ids.get() + at, mine.scales.get() + at, static_cast<int>(slots_),
                               sink_.get(), stream_->get()),
                  "reading weights");
        }
    }

    const Model& model_;
    Plugin plugins_[2];  // per Setting
    std::unique_ptr<Stream> stream_;
    std::vector<Block<unsigned char>> weights_;  // per layer
    Block<int32_t> sink_;
    Block<float> logits_;  // [step, layer, rows, E]
    size_t slots_ = 0, row_logits_ = 0;
    Calls calls_[2];  // per Setting
};

}  // namespace

std::unique_ptr<Layers> make_device_layers(const Model& model, const Sharing& sharing,
                                           const std::string& plugin) {
    return std::make_unique<DeviceLayers>(model, sharing, plugin);
}
