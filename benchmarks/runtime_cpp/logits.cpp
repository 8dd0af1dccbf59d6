// SPDX-License-Identifier: Apache-2.0
#include "logits.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <random>

#include "error.h"

namespace {

// Of the shipped model's routers, means over its layers (router_fit.json in its folder): the variance of the
// experts' biases, of the rest of a logit, and how many components that rest has (its covariance's trace
// squared over its squared Frobenius norm, rounded).
constexpr double kBiasVariance = 0.088, kRowVariance = 0.88;
constexpr int kComponents = 9;

using Generator = std::mt19937_64;

std::vector<float> normals(Generator& generator, size_t count, double deviation) {
    std::normal_distribution<float> normal(0.0f, static_cast<float>(deviation));
    std::vector<float> values(count);
    for (float& value : values) value = normal(generator);
    return values;
}

// [experts, kComponents], each of length `length`.
std::vector<float> directions(Generator& generator, int experts, double length) {
    std::vector<float> values = normals(generator, static_cast<size_t>(experts) * kComponents, 1.0);
    for (int e = 0; e < experts; ++e) {
        float* const direction = &values[static_cast<size_t>(e) * kComponents];
        double squares = 0.0;
        for (int c = 0; c < kComponents; ++c) squares += direction[c] * direction[c];
        for (int c = 0; c < kComponents; ++c) direction[c] *= static_cast<float>(length / std::sqrt(squares));
    }
    return values;
}

// The row's top_k-th logit becomes 0: only sigmoid routers feel it, and give that expert an affinity of 1/2.
void centre(float* row, int experts, int top_k) {
    std::vector<float> sorted(row, row + experts);
    std::nth_element(sorted.begin(), sorted.begin() + top_k - 1, sorted.end(), std::greater<float>());
    for (int e = 0; e < experts; ++e) row[e] -= sorted[static_cast<size_t>(top_k) - 1];
}

// The number of values in a .npy file's header, and its four sizes.
size_t parse_header(const std::string& header, int (&shape)[4]) {
    const size_t at = header.find("'shape': (");
    const bool has_type = header.find("'descr': '<f4'") != std::string::npos &&
                          header.find("'fortran_order': False") != std::string::npos;
    char end = 0;
    if (!has_type || at == std::string::npos ||
        std::sscanf(header.c_str() + at, "'shape': (%d, %d, %d, %d%c", &shape[0], &shape[1], &shape[2],
                    &shape[3], &end) != 5 ||
        end != ')')
        return 0;
    size_t count = 1;
    for (const int size : shape) {
        if (size < 1 || size > 1 << 20 || count > (size_t{1} << 40) / static_cast<size_t>(size)) return 0;
        count *= static_cast<size_t>(size);
    }
    return count;
}

}  // namespace

Logits Logits::from_file(const std::string& path, const Model& model, int max_rows) {
    const std::string option = "--dataset " + path;
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    if (!file) throw UsageError(option + ": cannot be read");
    const size_t size = static_cast<size_t>(file.tellg());
    file.seekg(0);
    unsigned char start[10] = {};  // "\x93NUMPY", version 1.0, the header's length in 2 bytes
    file.read(reinterpret_cast<char*>(start), sizeof start);
    std::string header(start[8] + 256u * start[9], '\0');
    file.read(header.data(), static_cast<std::streamsize>(header.size()));
    int shape[4] = {};
    const size_t count =
        file && std::memcmp(start, "\x93NUMPY\x01", 7) == 0 ? parse_header(header, shape) : 0;
    if (count == 0 || size != sizeof start + header.size() + count * sizeof(float))
        throw UsageError(option + ": must be a .npy file of fp32 [layers, documents, positions, experts]");

    Logits logits;
    logits.layers_ = shape[0], logits.documents_ = shape[1];
    logits.positions_ = shape[2], logits.experts_ = shape[3];
    if (logits.experts_ != model.num_experts)
        throw UsageError(option + ": has " + std::to_string(logits.experts_) + " experts, but " + model.name +
                         " has " + std::to_string(model.num_experts));
    if (logits.documents_ < max_rows)
        throw UsageError(option + ": has " + std::to_string(logits.documents_) +
                         " documents, fewer than --concurrency " + std::to_string(max_rows));
    logits.values_.resize(count);
    file.read(reinterpret_cast<char*>(logits.values_.data()),
              static_cast<std::streamsize>(count * sizeof(float)));
    if (!file) throw UsageError(option + ": cannot be read");
    logits.source_ = path;
    return logits;
}

Logits Logits::synthetic(const Model& model, int max_rows) {
    Logits logits;
    logits.layers_ = model.num_layers, logits.documents_ = max_rows;
    logits.positions_ = kNumSteps, logits.experts_ = model.num_experts;
    logits.source_ = "synthetic, correlated";
    const size_t experts = static_cast<size_t>(model.num_experts);
    Generator generator(0);
    for (int layer = 0; layer < logits.layers_; ++layer) {
        const std::vector<float> bias = normals(generator, experts, std::sqrt(kBiasVariance));
        const std::vector<float> expert = directions(generator, model.num_experts, std::sqrt(kRowVariance));
        for (int row = 0; row < logits.documents_ * logits.positions_; ++row) {
            const std::vector<float> latent = normals(generator, kComponents, 1.0);
            const size_t start = logits.values_.size();
            for (size_t e = 0; e < experts; ++e) {
                float logit = bias[e];
                for (size_t c = 0; c < kComponents; ++c) logit += expert[e * kComponents + c] * latent[c];
                logits.values_.push_back(logit);
            }
            centre(&logits.values_[start], model.num_experts, model.top_k);
        }
    }
    return logits;
}

std::vector<float> Logits::step(int layer, int step, int rows) const {
    std::vector<float> result;
    const size_t experts = static_cast<size_t>(experts_);
    for (int row = 0; row < rows; ++row) {
        const int document = (step * rows + row) % documents_;
        const int place = (layer % layers_ * documents_ + document) * positions_ + step % positions_;
        const float* const start = &values_[static_cast<size_t>(place) * experts];
        result.insert(result.end(), start, start + experts);
    }
    return result;
}
