// SPDX-License-Identifier: Apache-2.0
// Router logits of decode steps: of a recorded trace, or synthetic.
#ifndef XSHARE_BENCH_LOGITS_H
#define XSHARE_BENCH_LOGITS_H

#include <string>
#include <vector>

#include "models.h"

constexpr int kNumSteps = 16;  // different decode steps that the measurements go through

class Logits {
  public:
    // A .npy file, little-endian fp32 [layers, documents, positions, E]. Throws UsageError where it is no
    // such file, has another E than the model or fewer documents than rows.
    static Logits from_file(const std::string& path, const Model& model, int max_rows);

    // Correlated as the shipped model's routers are: experts have a bias, and their other logits are products
    // of the row's few latent components with the expert's direction. The same numbers in every run.
    static Logits synthetic(const Model& model, int max_rows);

    // [rows, E] of one step: as many documents in turn, each at the same position.
    std::vector<float> step(int layer, int step, int rows) const;

    const std::string& source() const { return source_; }

  private:
    int layers_ = 0, documents_ = 0, positions_ = 0, experts_ = 0;
    std::vector<float> values_;
    std::string source_;
};

#endif  // XSHARE_BENCH_LOGITS_H
