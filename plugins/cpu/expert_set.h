// SPDX-License-Identifier: Apache-2.0
// A set of experts that can be walked in the order of their ids.
#ifndef XSHARE_CPU_EXPERT_SET_H
#define XSHARE_CPU_EXPERT_SET_H

#include <stdint.h>

#include "core/limits.h"

namespace xshare {

class ExpertSet {
  public:
    void add(int expert) { words_[expert / 64] |= uint64_t{1} << (expert % 64); }
    bool has(int expert) const { return (words_[expert / 64] >> (expert % 64)) & 1; }

    void add(const ExpertSet& other) {
        for (int w = 0; w < kWords; ++w) words_[w] |= other.words_[w];
    }

    int size() const {
        int size = 0;
        for (int w = 0; w < kWords; ++w) size += __builtin_popcountll(words_[w]);
        return size;
    }

    // Writes the ids in ascending order; returns how many.
    int list(int32_t* ids) const {
        int size = 0;
        for (int w = 0; w < kWords; ++w)
            for (uint64_t rest = words_[w]; rest != 0; rest &= rest - 1)
                ids[size++] = w * 64 + __builtin_ctzll(rest);
        return size;
    }

  private:
    static constexpr int kWords = kMaxExperts / 64;
    uint64_t words_[kWords] = {};
};

}  // namespace xshare

#endif  // XSHARE_CPU_EXPERT_SET_H
